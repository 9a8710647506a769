"""What the files of this package hand to each other: a call, addresses, a plugin's result.

Refuses a result that is not what CNI defines, by field, before anything uses it. Invariant: `Result.raw` is always in
the version of the list it belongs to, so it can be given to the next plugin as prevResult as it is.
See the CNI specification 1.1, section 5.
"""

from __future__ import annotations

import ipaddress
import os
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cri.interfaces import PodNetwork
from cri.network.conflist import VERSIONS, ConfigError, Json, field
from cri.network.netlink import IPAddress, IPInterface, IPNetwork
from runtime.linux.dataclass import dataclass

_IPS_LIMIT, _ITEMS_LIMIT = 64, 1024


class PluginError(Exception):
    """A plugin's step failed: `str()` is the cause, without the plugin's name; `code` is NetworkError's."""

    def __init__(self, message: str, *, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code


class CancelledError(PluginError):
    """The caller went away in the middle."""


class Cancel:
    """One thread tells another, which may be in poll(2), to stop. Whoever makes it closes it."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def check(self) -> None:
        """Raises CancelledError once `set` was called."""
        if select.select([self._fd], [], [], 0)[0]:
            raise CancelledError("the caller gave up")

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Call:
    """One ADD or DEL of a pod's network. `netns` is None when the namespace is gone; `cancel` None: to the end.
    `record` is the pod's record: what is made carries its path, so that another ocid on the machine can tell it from
    leftovers."""

    pod: PodNetwork
    network: str
    version: str
    interface: str
    netns: Path | None
    deadline: float
    record: Path
    cancel: Cancel | None = None

    def left(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class Address:
    """An address for the pod, with its prefix, and the gateway in that subnet."""

    interface: IPInterface
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class PodRoute:
    """A route in the pod; without `gateway` the one of the address of its family is meant."""

    destination: IPNetwork
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What IPAM grants."""

    addresses: tuple[Address, ...]
    routes: tuple[PodRoute, ...]
    dns: Json


@dataclass(frozen=True, slots=True)
class Result:
    """A CNI result: `raw` is the JSON, the rest what is read out of it."""

    raw: Json
    addresses: tuple[Address, ...]
    routes: tuple[PodRoute, ...]

    def pod_addresses(self) -> tuple[Address, ...]:
        """Those whose interface is in a sandbox, or that name none."""
        interfaces, found = self.raw.get("interfaces") or [], []
        for entry, address in zip(self.raw.get("ips") or [], self.addresses, strict=True):
            index = entry.get("interface")
            known = isinstance(index, int) and 0 <= index < len(interfaces)
            if not known or interfaces[index].get("sandbox"):
                found.append(address)
        return tuple(found)

    def allocation(self) -> Allocation:
        return Allocation(self.addresses, self.routes, field(self.raw, "dns", dict, {}))


def parse_route(document: object, path: str) -> PodRoute:
    """{"dst": prefix, "gw": address}. Raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected an object")
    destination, gateway = field(document, "dst", str, "", f"{path}."), field(document, "gw", str, "", f"{path}.")
    try:
        return PodRoute(
            ipaddress.ip_network(destination, strict=False), ipaddress.ip_address(gateway) if gateway else None
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse_address(document: object, path: str) -> Address:
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected an object")
    address, gateway = field(document, "address", str, "", f"{path}."), field(document, "gateway", str, "", f"{path}.")
    try:
        if "/" not in address:
            raise ValueError(f"{address!r} has no prefix length")
        return Address(ipaddress.ip_interface(address), ipaddress.ip_address(gateway) if gateway else None)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _items(document: Json, key: str, limit: int) -> list[Any]:
    found: list[Any] = field(document, key, list, [])
    if len(found) > limit:
        raise ConfigError(f"{key}: {len(found)} of them, at most {limit}")
    return found


def parse_result(document: object, version: str) -> Result:
    """A plugin's answer, brought to `version`. Raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError("expected an object")
    said = field(document, "cniVersion", str, "")
    if said not in VERSIONS:
        raise ConfigError(f"cniVersion: {said!r} is none of {', '.join(VERSIONS)}")
    ips = _items(document, "ips", _IPS_LIMIT)
    addresses = tuple(_parse_address(item, f"ips[{number}]") for number, item in enumerate(ips))
    routes = tuple(parse_route(item, f"routes[{i}]") for i, item in enumerate(_items(document, "routes", _ITEMS_LIMIT)))
    _items(document, "interfaces", _ITEMS_LIMIT)
    field(document, "dns", dict, {})
    raw = {**document, "cniVersion": version}
    if ips:
        raw["ips"] = [
            with_family({key: value for key, value in item.items() if key != "version"}, address, version)
            for item, address in zip(ips, addresses, strict=True)
        ]
    return Result(raw, addresses, routes)


def with_family(entry: dict[str, Any], address: Address, version: str) -> dict[str, Any]:
    """An entry of `ips` as `version` has it: before 1.0.0 each said its family."""
    return entry if version >= "1.0.0" else {"version": str(address.interface.version), **entry}


def make_result(version: str, interfaces: Sequence[Json], granted: Allocation, index: int | None) -> Result:
    """The result of a native plugin; `index` is the place in `interfaces` of the one that has the addresses."""
    ips = []
    for address in granted.addresses:
        entry: dict[str, Any] = {"address": str(address.interface)}
        if index is not None:
            entry["interface"] = index
        if address.gateway is not None:
            entry["gateway"] = str(address.gateway)
        ips.append(with_family(entry, address, version))
    routes = []
    for route in granted.routes:
        shown = {"dst": str(route.destination)}
        if route.gateway is not None:
            shown["gw"] = str(route.gateway)
        routes.append(shown)
    raw: dict[str, Any] = {"cniVersion": version, "interfaces": list(interfaces), "ips": ips, "routes": routes}
    raw["dns"] = dict(granted.dns)
    return Result(raw, granted.addresses, granted.routes)


# A native or exec'd plugin, bound to its configuration. `delete` gets the chain's whole result, where there was one.
AddFunction = Callable[[Call, Result | None], Result]
DeleteFunction = Callable[[Call, Result | None], None]
CheckFunction = Callable[[Call, Result], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One plugin of a chain, ready to be called; `describe` is "plugin bridge (native)"."""

    describe: str
    add: AddFunction
    delete: DeleteFunction
    check: CheckFunction
    external: bool = False
