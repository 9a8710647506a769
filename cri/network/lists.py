"""The networks of /etc/cni/net.d, read again whenever a file there changed, and the built-in one where there is none.

Refuses to stand in for a configuration that is there and broken: then no network is ready, and the reason names the
file. Invariant: the first valid file in lexical order is the default; one look at the directory costs a listing.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cri.network.conflist import SIZE_LIMIT, ConfigError, Conflist, parse_file, parse_list
from cri.network.netlink import IPNetwork, Netlink, get_link, list_links
from cri.network.routes import Route, list_addresses, list_routes
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded

log = logging.getLogger(__name__)

_SUFFIXES = (".conflist", ".conf", ".json")
_FILES_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a directory holds: networks in their order, and one sentence for each file that is none."""

    networks: tuple[Conflist, ...]
    problems: tuple[str, ...]


Signature = tuple[tuple[str, int, int, int], ...]


class Lists:
    """The networks of `directory`; `validate` raises ConfigError for a list whose plugins cannot be planned."""

    def __init__(self, directory: Path, validate: Callable[[Conflist], object]) -> None:
        self._directory = directory
        self._validate = validate
        self._lock = threading.Lock()
        self._signature: Signature | None = None
        self._loaded = Loaded((), ())

    def load(self) -> Loaded:
        """What is in the directory now."""
        try:
            signature = self._look()
        except OSError as error:
            return Loaded((), (f"read {self._directory}: {error}",))
        with self._lock:
            if signature != self._signature:
                self._loaded = self._read([entry[0] for entry in signature])
                self._signature = signature
                for problem in self._loaded.problems:
                    log.warning("network configuration: %s", problem)
            return self._loaded

    def _look(self) -> Signature:
        found = []
        try:
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.endswith(_SUFFIXES) and not entry.name.startswith("."):
                        try:
                            info = entry.stat()
                        except OSError:  # a dangling link: reading it will say so
                            found.append((entry.name, 0, 0, 0))
                            continue
                        found.append((entry.name, info.st_mtime_ns, info.st_size, info.st_ino))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        return tuple(sorted(found))

    def _read(self, names: Sequence[str]) -> Loaded:
        networks: dict[str, Conflist] = {}
        problems = [f"{self._directory} has {len(names)} files, {_FILES_LIMIT} are read"] * (len(names) > _FILES_LIMIT)
        for name in names[:_FILES_LIMIT]:
            path = self._directory / name
            try:
                found = parse_file(read_bounded(AT_FDCWD, str(path), SIZE_LIMIT), str(path))
                self._validate(found)
                if found.name in networks:
                    raise ConfigError(f"{path}: name: {found.name} is the network of {networks[found.name].source}")
            except (OSError, ConfigError) as error:
                problems.append(str(error))
                continue
            networks[found.name] = found
        return Loaded(tuple(networks.values()), tuple(problems))


# ------------------------------------------------------------------------------------------------ the built-in network


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """The network of a machine without configuration: a bridge with the first subnet that nothing else uses."""

    name: str
    bridge: str
    subnets: tuple[IPNetwork, ...]

    def choose(self) -> Conflist:
        """The bridge's own subnet where it has one already, else the first without a route. Raises ConfigError,
        OSError."""
        with Netlink() as netlink:
            bridge = get_link(netlink, self.bridge)
            routes = list_routes(netlink)
            if bridge is not None:
                there = list_addresses(netlink, bridge.index)
                for subnet in self.subnets:
                    if any(address.network == subnet for address in there):
                        return self._list(subnet, self._mtu(netlink, routes))
            for subnet in self.subnets:
                taken = [
                    route.destination
                    for route in routes
                    if route.destination is not None
                    and route.destination.version == subnet.version
                    and (route.destination.network_address in subnet or subnet.network_address in route.destination)
                ]
                if not taken:
                    return self._list(subnet, self._mtu(netlink, routes))
        raise ConfigError(
            f"every subnet of the built-in network has a route already ({', '.join(map(str, self.subnets))}); "
            "put a conflist into the configuration directory"
        )

    @staticmethod
    def _mtu(netlink: Netlink, routes: Sequence[Route]) -> int:
        """The smallest MTU of the interfaces that lead out, where that is below Ethernet's."""
        out = {route.index for route in routes if route.destination is None}
        found = [link.mtu for link in list_links(netlink) if link.index in out and link.mtu]
        return min(found) if found and min(found) < 1500 else 0

    def _list(self, subnet: IPNetwork, mtu: int) -> Conflist:
        default = "0.0.0.0/0" if subnet.version == 4 else "::/0"
        bridge = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,  # a pod reaches itself by its host port also where bridged packets see netfilter
            "mtu": mtu,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": str(subnet)}]], "routes": [{"dst": default}]},
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        document = {"cniVersion": "1.0.0", "name": self.name, "plugins": [bridge, portmap]}
        return parse_list(document, "the built-in network")


def parse_subnets(texts: Sequence[str]) -> tuple[IPNetwork, ...]:
    """Raises ConfigError."""
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigError(f"subnet of the built-in network: {error}") from None
