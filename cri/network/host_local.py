"""host-local IPAM, in-process: leases as files that the reference plugin reads and writes too.

Refuses ranges outside their subnet and ranges that overlap. Invariant: a lease is one file made with O_EXCL under an
flock on `lock`; it holds "CONTAINERID\\r\\nIFNAME", and who does not find both there does not remove it.

    DATADIR/NETWORK/lock                flock(2) around every change
    DATADIR/NETWORK/10.88.0.7           "3f…\\r\\neth0"; ours have the path of the pod's record as an attribute
    DATADIR/NETWORK/last_reserved_ip.0  the address given last in range set 0: the next search starts behind it
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cri.network.conflist import ConfigError, Json, field
from cri.network.netlink import IPAddress, IPNetwork
from cri.network.values import Address, Allocation, Call, PluginError, PodRoute, Result, parse_route
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded, write_all

_FILE_LIMIT: Final = 4096
_RESOLV_LIMIT: Final = 64 << 10
_LOCK_S: Final = 10.0
_LOCK_STEP_S: Final = 0.001  # holders need microseconds
_SETS_LIMIT: Final = 16
_RECORD: Final = "trusted.ocid.record"
_OWNER = re.compile(r"([^\r\n]+)(?:\r\n([^\r\n]*))?")


@dataclass(frozen=True, slots=True)
class Range:
    """`first` to `last` of `subnet`, both included; `gateway` is never given out."""

    subnet: IPNetwork
    first: IPAddress
    last: IPAddress
    gateway: IPAddress

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.subnet.version and int(self.first) <= int(address) <= int(self.last)


@dataclass(frozen=True, slots=True)
class Settings:
    """The `ipam` object: one address for each of `sets`."""

    sets: tuple[tuple[Range, ...], ...]
    routes: tuple[PodRoute, ...]
    directory: Path | None
    resolv_conf: Path | None


@dataclass(frozen=True, slots=True)
class Lease:
    """A file of the store."""

    address: IPAddress
    container: str
    interface: str


# ------------------------------------------------------------------------------------------------------- configuration


def _range(document: Json, path: str) -> Range:
    def address(key: str, default: IPAddress) -> IPAddress:
        text = field(document, key, str, "", f"{path}.")
        return ipaddress.ip_address(text) if text else default

    try:
        subnet = ipaddress.ip_network(field(document, "subnet", str, "", f"{path}."), strict=False)
        if subnet.max_prefixlen - subnet.prefixlen < 2:
            raise ValueError(f"{subnet} is too small for pods")
        gateway = address("gateway", subnet[1])
        # The last of an IPv4 subnet is its broadcast address.
        found = Range(subnet, address("rangeStart", subnet[1]), address("rangeEnd", _last(subnet)), gateway)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, value in (("rangeStart", found.first), ("rangeEnd", found.last)):
        if value not in subnet:
            raise ConfigError(f"{path}.{name}: {value} is not in {subnet}")
    if int(found.first) > int(found.last):
        raise ConfigError(f"{path}: rangeStart {found.first} is behind rangeEnd {found.last}")
    return found


def _last(subnet: IPNetwork) -> IPAddress:
    return subnet[-2] if subnet.version == 4 else subnet[-1]


def parse_settings(ipam: Json) -> Settings:
    """The `ipam` object of a plugin. Raises ConfigError."""
    documents: list[Any] = list(field(ipam, "ranges", list, [], "ipam."))
    if ipam.get("subnet"):  # the older spelling of one range
        documents.insert(0, [ipam])
    if not 0 < len(documents) <= _SETS_LIMIT:
        raise ConfigError(f"ipam.ranges: {len(documents)} of them, expected 1 to {_SETS_LIMIT}")
    sets = []
    for number, members in enumerate(documents):
        path = f"ipam.ranges[{number}]"
        if not isinstance(members, list) or not members or not all(isinstance(item, dict) for item in members):
            raise ConfigError(f"{path}: expected a list of objects")
        ranges = tuple(_range(item, f"{path}[{place}]") for place, item in enumerate(members))
        if len({item.subnet.version for item in ranges}) > 1:
            raise ConfigError(f"{path}: IPv4 and IPv6 in one set")
        sets.append(ranges)
    flat = [item for ranges in sets for item in ranges]
    for place, one in enumerate(flat):
        for other in flat[place + 1 :]:
            if one.first in other or other.first in one:
                raise ConfigError(f"ipam.ranges: {one.first}-{one.last} and {other.first}-{other.last} overlap")
    routes = field(ipam, "routes", list, [], "ipam.")
    directory, resolv_conf = (field(ipam, key, str, "", "ipam.") for key in ("dataDir", "resolvConf"))
    return Settings(
        tuple(sets),
        tuple(parse_route(item, f"ipam.routes[{number}]") for number, item in enumerate(routes)),
        Path(directory) if directory else None,
        Path(resolv_conf) if resolv_conf else None,
    )


# --------------------------------------------------------------------------------------------------------------- store


class Store:
    """The leases of one network in `directory`."""

    __slots__ = ("_directory",)

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Holds the lock that the reference plugin takes, too. Raises PluginError when another keeps it."""
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._directory / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            end = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        words = f"{path} is locked by another process for {seconds:.0f} s"
                        raise PluginError(words, code="deadline") from None
                    time.sleep(_LOCK_STEP_S)
            yield
        finally:
            os.close(fd)

    def reserve(self, ranges: tuple[Range, ...], number: int, call: Call) -> Address | None:
        """The next free address of a range set, under the lock; None when there is none."""
        content = f"{call.pod.id}\r\n{call.interface}".encode()
        taken: set[str] | None = None
        for candidate, owner in _candidates(ranges, self._last_reserved(number)):
            name = str(candidate)
            if taken is not None and name in taken:
                continue
            try:
                self._create(name, content, call.record)
            except FileExistsError:
                taken = taken or set(os.listdir(self._directory))
                continue
            self._write(f"last_reserved_ip.{number}", name.encode())
            return Address(ipaddress.ip_interface((candidate, owner.subnet.prefixlen)), owner.gateway)
        return None

    def _create(self, name: str, content: bytes, record: Path) -> None:
        path = self._directory / name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, content)
            with contextlib.suppress(OSError):  # a filesystem without extended attributes: a lease like the others
                os.setxattr(fd, _RECORD, os.fsencode(record))
        except BaseException:
            path.unlink()  # a full disk: an empty lease would never be released
            raise
        finally:
            os.close(fd)

    def _write(self, name: str, content: bytes) -> None:
        # Not O_TRUNC: ext4 writes a file out at close when it was truncated to nothing (mount option auto_da_alloc).
        fd = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write_all(fd, content)
            os.ftruncate(fd, len(content))
        finally:
            os.close(fd)

    def _last_reserved(self, number: int) -> IPAddress | None:
        raw = self._read(f"last_reserved_ip.{number}")
        try:
            return ipaddress.ip_address(raw.decode("ascii").strip()) if raw else None
        except ValueError:
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            return read_bounded(AT_FDCWD, f"{self._directory}/{name}", _FILE_LIMIT)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EFBIG, errno.EINVAL):
                return None
            raise

    def lease(self, address: IPAddress) -> Lease | None:
        """Who has `address`."""
        raw = self._read(str(address))
        match = _OWNER.match(raw.decode("utf-8", "replace").strip()) if raw else None
        return Lease(address, match[1], match[2] or "") if match else None

    def record(self, lease: Lease) -> Path | None:
        """The record that the lease was made for, where an ocid made it."""
        try:
            return Path(os.fsdecode(os.getxattr(self._directory / str(lease.address), _RECORD, follow_symlinks=False)))
        except OSError:
            return None

    def leases(self) -> list[Lease]:
        """All of them."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        found = []
        for name in filter(_is_address, names):
            lease = self.lease(ipaddress.ip_address(name))
            if lease is not None:
                found.append(lease)
        return found

    def sweep(self) -> None:
        """Under the lock: addresses that nobody has. Who takes one holds the lock until his name is in the file, so
        whoever left it empty was killed in between, or the machine was."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if not _is_address(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                if entry.stat(follow_symlinks=False).st_size == 0:
                    os.unlink(entry.path)

    def remove(self, lease: Lease) -> None:
        """Under the lock. Gone: no-op."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._directory / str(lease.address))

    def exists(self) -> bool:
        return self._directory.is_dir()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _candidates(ranges: tuple[Range, ...], last: IPAddress | None) -> Iterator[tuple[IPAddress, Range]]:
    """Every address of the set once, behind `last` first; gateways left out."""
    start = next((number for number, item in enumerate(ranges) if last is not None and last in item), None)
    if start is None or last is None:
        order = [(item, int(item.first), int(item.last)) for item in ranges]
    else:
        here = ranges[start]
        order = [(here, int(last) + 1, int(here.last))]
        order += [(item, int(item.first), int(item.last)) for item in (*ranges[start + 1 :], *ranges[:start])]
        order.append((here, int(here.first), int(last)))
    for item, first, end in order:
        kind = type(item.first)
        for value in range(first, end + 1):
            candidate = kind(value)
            if candidate != item.gateway:
                yield candidate, item


# --------------------------------------------------------------------------------------------------------------- plugin


@dataclass(frozen=True, slots=True)
class HostLocal:
    """The plugin, bound to a network: `allocate` and `release` are what ADD and DEL do."""

    network: str
    settings: Settings
    default_directory: Path

    @property
    def store(self) -> Store:
        return Store((self.settings.directory or self.default_directory) / self.network)

    def allocate(self, call: Call) -> Allocation:
        """One address of each range set, or none at all. Raises PluginError."""
        addresses: list[Address] = []
        store = self.store
        try:
            dns = _read_resolv(self.settings.resolv_conf)
            with store.locked(min(call.left(), _LOCK_S)):
                try:
                    for number, ranges in enumerate(self.settings.sets):
                        address = store.reserve(ranges, number, call)
                        if address is None:
                            spans = ", ".join(f"{item.first}-{item.last}" for item in ranges)
                            raise PluginError(f"no free address in {spans}", code="exhausted")
                        addresses.append(address)
                except BaseException:
                    for address in addresses:
                        store.remove(Lease(address.interface.ip, call.pod.id, call.interface))
                    raise
        except OSError as error:
            raise PluginError(f"reserve an address: {error}") from error
        return Allocation(tuple(addresses), self.settings.routes, dns)

    def release(self, call: Call, result: Result | None) -> None:
        """Every lease of this container and interface. Idempotent. Raises PluginError."""
        store = self.store
        if not store.exists():
            return
        try:
            with store.locked(min(call.left(), _LOCK_S)):
                known = [store.lease(address.interface.ip) for address in result.addresses] if result else []
                mine = [lease for lease in known if lease is not None and _is_of(lease, call)]
                if len(mine) < len(self.settings.sets):  # an ADD that got half-way, or a result that lies
                    mine = [lease for lease in store.leases() if _is_of(lease, call)]
                for lease in mine:
                    store.remove(lease)
        except OSError as error:
            raise PluginError(f"release the address: {error}") from error


def _is_of(lease: Lease, call: Call) -> bool:
    # Files of an old version hold the container alone.
    return lease.container == call.pod.id and lease.interface in (call.interface, "")


def _read_resolv(path: Path | None) -> Json:
    """The dns object that resolv.conf(5) at `path` stands for."""
    if path is None:
        return {}
    found: dict[str, Any] = {"nameservers": [], "search": [], "options": []}
    text = read_bounded(AT_FDCWD, str(path), _RESOLV_LIMIT).decode("utf-8", "replace")
    for words in (line.split() for line in text.splitlines()):
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver":
            found["nameservers"].append(words[1])
        elif words[0] == "domain":
            found["domain"] = words[1]
        elif words[0] in ("search", "options"):
            found[words[0]] += words[1:]
    return found
