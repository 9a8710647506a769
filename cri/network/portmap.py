"""The portmap plugin, in-process: host ports lead to the pod's, through maps of ocid's nftables table.

Refuses a host port that leads to another pod, and settings only iptables has. Invariant: an entry carries its pod's
id, so that DEL needs no result, and old UDP flows are forgotten when their port changes hands (threats O59).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from cri.interfaces import PortMapping
from cri.network import conntrack
from cri.network.conflist import Json, field
from cri.network.firewall import Firewall, Forward, PortTakenError
from cri.network.netlink import IPAddress, Netlink
from cri.network.routes import route_interface
from cri.network.sysctl import write_net
from cri.network.values import Call, PluginError, Result
from runtime.linux.dataclass import dataclass

# What the reference does with iptables alone: extra match arguments, and marks that other rules look for.
_NOT_NATIVE: Final = ("conditionsV4", "conditionsV6", "markMasqBit", "externalSetMarkChain", "masqAll")
_PROTOCOLS: Final = ("tcp", "udp", "sctp")
_ASKED: Final = "invalid_argument"


def not_native(config: Json) -> str | None:
    """The first option of `config` that only the reference plugin does, or None."""
    for key in _NOT_NATIVE:
        if config.get(key):
            return key
    if config.get("backend") not in (None, "", "nftables"):
        return "backend"
    return None


def parse_settings(config: Json) -> bool:
    """Whether connections from the host and back into the own subnet are to work (`snat`). Raises ConfigError."""
    return bool(field(config, "snat", bool, True))


def forwards(ports: Sequence[PortMapping], addresses: Sequence[IPAddress]) -> list[Forward]:
    """What to install: for each port and each family of the pod, unless its host address is of the other.
    Raises PluginError."""
    first: dict[int, IPAddress] = {}
    for address in addresses:
        first.setdefault(address.version, address)
    found: dict[tuple[object, ...], Forward] = {}
    for port in ports:
        if port.host_port == 0:  # a kubelet lists a container's other ports, too
            continue
        if not (0 < port.host_port < 65536 and 0 < port.container_port < 65536):
            raise PluginError(f"port {port.host_port} to {port.container_port}: not between 1 and 65535", code=_ASKED)
        protocol = port.protocol.lower()
        if protocol not in _PROTOCOLS:
            raise PluginError(
                f"protocol {port.protocol[:20]!r} of port {port.host_port}: tcp, udp or sctp", code=_ASKED
            )
        try:
            host = ipaddress.ip_address(port.host_ip) if port.host_ip else None
        except ValueError as error:
            raise PluginError(f"host address of port {port.host_port}: {error}", code=_ASKED) from None
        for version, address in first.items():
            if host is not None and host.version != version:
                continue
            everywhere = host is None or int(host) == 0  # 0.0.0.0 and :: are all addresses of that family
            one = Forward(protocol, port.host_port, None if everywhere else host, address, port.container_port)
            known = found.setdefault((protocol, one.host_port, one.host_ip, version), one)
            if known != one:
                ports_asked = f"ports {known.pod_port} and {one.pod_port} of the pod"
                raise PluginError(f"host {one.describe()} is asked for twice, for {ports_asked}", code=_ASKED)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Portmap:
    """The plugin, bound to a network."""

    firewall: Firewall
    snat: bool
    enabled: bool

    def add(self, call: Call, previous: Result | None) -> Result:
        """ADD. Raises PluginError."""
        if previous is None:
            raise PluginError("needs the result of a plugin before it", code="failed_precondition")
        wanted = forwards(call.pod.ports, [address.interface.ip for address in previous.addresses])
        if not self.enabled or not wanted:
            return previous
        try:
            self.firewall.add_forwards(call.pod.id, wanted)
            if self.snat:
                for address in previous.addresses:
                    self.firewall.ensure_subnet("hairpin", address.interface.network)
                _allow_localhost(wanted)
            _forget(wanted)
        except PortTakenError as error:
            raise PluginError(str(error), code="failed_precondition") from error
        except OSError as error:
            raise PluginError(str(error)) from error
        return previous

    def check(self, call: Call, result: Result) -> None:
        """CHECK: what is gone of the rules, which are ocid's own, is put back. Raises PluginError."""
        self.add(call, result)

    def delete(self, call: Call, result: Result | None) -> None:
        """DEL. A pod that never asked for ports costs one look. Raises PluginError."""
        if not call.pod.ports:
            return
        try:
            _forget(self.firewall.remove_forwards(call.pod.id))
        except OSError as error:
            raise PluginError(str(error)) from error


def _forget(changed: Sequence[Forward]) -> None:
    """Drops the kernel's memory of UDP flows to these ports: it would keep sending them where they went before."""
    ports = frozenset(forward.host_port for forward in changed if forward.protocol == "udp")
    if ports:
        conntrack.forget_udp(ports)


def _allow_localhost(wanted: Sequence[Forward]) -> None:
    """Lets packets from 127.0.0.1 leave by the interface that leads to the pod (net.ipv4.conf.*.route_localnet)."""
    addresses = [forward.pod_ip for forward in wanted if forward.pod_ip.version == 4]
    if not addresses:
        return
    with Netlink() as netlink:
        name = route_interface(netlink, addresses[0])
    if name is not None:
        write_net(f"ipv4/conf/{name}/route_localnet", "1", missing_ok=True)
