"""The bridge plugin, in-process: a veth pair from a Linux bridge into the pod, addresses, routes, masquerade.

Refuses what it does not do (`NOT_NATIVE`), by the option's name: the reference program then gets the call. Invariant:
names and MACs follow from the pod's id, so DEL finds what a killed ADD left; an interface whose MAC is not the pod's is
never touched.

The way back costs the kernel 40 ms for each veth (RCU grace periods in unregister_netdevice). DEL therefore takes the
host's end down, which is 0.03 ms and stops every packet, and leaves the removal to `retire`.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from cri.network import netlink as nl
from cri.network import routes as rt
from cri.network.conflist import ConfigError, Json, field
from cri.network.firewall import Firewall
from cri.network.netlink import IPInterface, IPNetwork, Netlink, NetlinkError
from cri.network.netns import inside, open_netns
from cri.network.records import is_alive
from cri.network.sysctl import write_net
from cri.network.values import Address, Allocation, Call, PluginError, PodRoute, Result, make_result
from runtime.linux.dataclass import dataclass
from runtime.linux.failpoint import failpoint

NOT_NATIVE: Final = ("vlan", "vlanTrunk", "macspoofchk", "disableContainerInterface", "uplinkInterface", "args")
PREFIX: Final = "oc"
_NAME_TRIES = 8
_DEFAULTS: Final[dict[int, IPNetwork]] = {
    4: ipaddress.ip_network("0.0.0.0/0"),
    6: ipaddress.ip_network("::/0"),
}


class Ipam(Protocol):
    """Where addresses come from."""

    def allocate(self, call: Call) -> Allocation: ...

    def release(self, call: Call, result: Result | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """The plugin's configuration."""

    bridge: str
    is_gateway: bool
    is_default_gateway: bool
    force_address: bool
    masquerade: bool
    mtu: int
    hairpin: bool
    promiscuous: bool
    dns: Json


def not_native(config: Json) -> str | None:
    """The first option of `config` that only the reference plugin does, or None."""
    for key in NOT_NATIVE:
        if config.get(key):
            return key
    if config.get("ipMasqBackend") not in (None, "", "nftables"):
        return "ipMasqBackend"
    ipam = config.get("ipam")
    routes = ipam.get("routes") if isinstance(ipam, dict) else None
    for route in routes if isinstance(routes, list) else ():  # CNI 1.1: mtu, advmss, priority, table, scope
        more = sorted(route.keys() - {"dst", "gw"}) if isinstance(route, dict) else []
        if more:
            return f"ipam.routes.{more[0]}"
    return None


def parse_settings(config: Json) -> Settings:
    """Raises ConfigError naming the field."""
    bridge = field(config, "bridge", str, "") or "cni0"
    if not is_interface_name(bridge):
        raise ConfigError(f"bridge: {bridge[:60]!r} is not an interface's name")
    mtu = field(config, "mtu", int, 0)
    if mtu and not 68 <= mtu <= 65535:
        raise ConfigError(f"mtu: {mtu} is not between 68 and 65535")
    default = field(config, "isDefaultGateway", bool, False)
    hairpin, promiscuous = (field(config, key, bool, False) for key in ("hairpinMode", "promiscMode"))
    if hairpin and promiscuous:
        raise ConfigError("hairpinMode and promiscMode exclude each other")
    return Settings(
        bridge=bridge,
        is_gateway=default or field(config, "isGateway", bool, False),
        is_default_gateway=default,
        force_address=field(config, "forceAddress", bool, False),
        masquerade=field(config, "ipMasq", bool, False),
        mtu=mtu,
        hairpin=hairpin,
        promiscuous=promiscuous,
        dns=field(config, "dns", dict, {}),
    )


def is_interface_name(text: str) -> bool:
    """As dev_valid_name() of the kernel has it, printable ASCII besides."""
    bad = any(char in "/:%" or not "!" <= char <= "~" for char in text)
    return 0 < len(text) < 16 and not bad and text not in (".", "..")


# ----------------------------------------------------------------------------------------------------- names and MACs


def mac(*parts: str) -> str:
    """A locally administered unicast address that follows from `parts`."""
    raw = hashlib.sha256("\0".join(("mac", *parts)).encode()).digest()
    return bytes([raw[0] & 0xFC | 0x02, *raw[1:6]]).hex(":")


def host_name(pod: str, interface: str, attempt: int) -> str:
    """The host's end of a pod's veth: 12 characters; `attempt` > 0 when another has that name."""
    return PREFIX + hashlib.sha256(f"veth\0{pod}\0{interface}\0{attempt}".encode()).hexdigest()[:10]


def host_names(pod: str, interface: str) -> list[str]:
    """All that it may have."""
    return [host_name(pod, interface, attempt) for attempt in range(_NAME_TRIES)]


def is_host_name(name: str) -> bool:
    return len(name) == len(PREFIX) + 10 and name.startswith(PREFIX) and not name[2:].strip("0123456789abcdef")


# --------------------------------------------------------------------------------------------------------- the plugin


@dataclass(frozen=True, slots=True)
class Bridge:
    """The plugin, bound to a network. `retire` removes an interface (index, name) soon, off the call's path."""

    settings: Settings
    ipam: Ipam | None
    firewall: Firewall
    retire: Callable[[int, str], None]

    def add(self, call: Call, previous: Result | None) -> Result:
        """ADD. What it leaves when it fails is undone by `delete`. Raises PluginError."""
        if call.netns is None or (netns := open_netns(call.netns)) is None:
            raise PluginError(f"{call.pod.netns} is no pinned network namespace")
        try:
            granted = self.ipam.allocate(call) if self.ipam is not None else Allocation((), (), {})
            failpoint("network.bridge.leased")
            granted = self._complete(granted)
            with Netlink() as netlink:
                bridge = self._ensure_bridge(netlink, granted)
                if call.cancel is not None:
                    call.cancel.check()
                host = self._connect(netlink, bridge, call, netns)
            failpoint("network.bridge.connected")
            pod_mac = mac(call.pod.id, call.interface, "pod")
            inside(netns, lambda: _configure(call.interface, granted))
            if self.settings.masquerade:
                for address in granted.addresses:
                    self.firewall.ensure_subnet("masq", address.interface.network)
            interfaces = [
                {"name": bridge.name, "mac": bridge.mac},
                {"name": host, "mac": mac(call.pod.id, call.interface, "host")},
                {"name": call.interface, "mac": pod_mac, "sandbox": str(call.netns)},
            ]
            return make_result(call.version, interfaces, granted, 2)
        except OSError as error:
            raise PluginError(str(error)) from error
        finally:
            os.close(netns)

    def delete(self, call: Call, result: Result | None) -> None:
        """DEL, whatever an ADD got to, and also without the namespace. Raises PluginError."""
        try:
            with Netlink() as netlink:
                for name in host_names(call.pod.id, call.interface):
                    link = nl.get_link(netlink, name)
                    if link is None:
                        break
                    if link.mac == mac(call.pod.id, call.interface, "host"):
                        netlink.run([nl.set_link_down(link.index, name)])
                        self.retire(link.index, name)
                        break
        except OSError as error:
            raise PluginError(str(error)) from error
        # The lease goes last: from then on the address may be another pod's.
        if self.ipam is not None:
            self.ipam.release(call, result)

    def _complete(self, granted: Allocation) -> Allocation:
        """Gateways where the bridge is one, the default routes that isDefaultGateway asks for, and dns."""
        addresses = granted.addresses
        if self.settings.is_gateway:
            addresses = tuple(
                address if address.gateway is not None else Address(address.interface, address.interface.network[1])
                for address in addresses
            )
        routes = list(granted.routes)
        if self.settings.is_default_gateway:
            for address in addresses:
                default = _DEFAULTS[address.interface.version]
                if all(route.destination != default for route in routes):
                    routes.append(PodRoute(default, address.gateway))
        return Allocation(addresses, tuple(routes), self.settings.dns or granted.dns)

    # --------------------------------------------------------------------------------------------- the host's side

    def _ensure_bridge(self, netlink: Netlink, granted: Allocation) -> nl.Link:
        """The bridge, up, with the gateways' addresses where it is the gateway, and forwarding on."""
        name = self.settings.bridge
        link = nl.get_link(netlink, name)
        if link is None:
            netlink.run([nl.new_bridge(name, mac("bridge", name), self.settings.mtu)])
            # A router advertisement by a pod must not reconfigure the host (CVE-2020-10749).
            write_net(f"ipv6/conf/{name}/accept_ra", "0", missing_ok=True)
            link = nl.get_link(netlink, name)
        if link is None or link.kind != "bridge":
            raise PluginError(f"interface {name} is there and is no bridge", code="failed_precondition")
        wanted = nl.IFF_UP | (nl.IFF_PROMISC if self.settings.promiscuous else 0)
        if link.flags & wanted != wanted:
            netlink.run([nl.set_link(link.index, name, up=True, promisc=self.settings.promiscuous)])
        if self.settings.is_gateway and granted.addresses:
            self._ensure_gateway(netlink, link, granted)
        return link

    def _ensure_gateway(self, netlink: Netlink, link: nl.Link, granted: Allocation) -> None:
        there = rt.list_addresses(netlink, link.index)
        for address in granted.addresses:
            if address.gateway is None:
                continue
            wanted = ipaddress.ip_interface((address.gateway, address.interface.network.prefixlen))
            if wanted not in there:
                self._make_room(netlink, link, wanted, there)
                netlink.run([rt.add_address(link.index, link.name, wanted)])
        if any(address.interface.version == 4 for address in granted.addresses):
            write_net("ipv4/ip_forward", "1")
        if any(address.interface.version == 6 for address in granted.addresses):
            write_net("ipv6/conf/all/forwarding", "1")

    def _make_room(self, netlink: Netlink, link: nl.Link, wanted: IPInterface, there: list[IPInterface]) -> None:
        """Another address of the family stands in the way: of IPv6 only one whose subnet overlaps."""
        for other in there:
            if other.version != wanted.version:
                continue
            if wanted.version == 6 and not _overlap(other.network, wanted.network):
                continue
            if not self.settings.force_address:
                words = f"bridge {link.name} has address {other}, not {wanted}; remove it or set forceAddress"
                raise PluginError(words, code="failed_precondition")
            netlink.run([rt.delete_address(link.index, link.name, other)])

    def _connect(self, netlink: Netlink, bridge: nl.Link, call: Call, netns: int) -> str:
        """The veth pair; its name on the host. An own leftover is replaced, another's name avoided."""
        host_mac, pod_mac = (mac(call.pod.id, call.interface, end) for end in ("host", "pod"))
        mtu = self.settings.mtu
        for name in host_names(call.pod.id, call.interface):
            request = nl.new_veth(name, host_mac, bridge.index, mtu, call.interface, pod_mac, netns)
            try:
                netlink.run([request])
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise
                link = nl.get_link(netlink, name)
                if link is None:
                    raise PluginError(f"{call.interface} is in {call.netns} already") from error
                if link.mac != host_mac:
                    continue
                netlink.run([nl.delete_link(link.index, name)])
                netlink.run([request])
            more = [nl.set_bridge_port(name, hairpin=True)] if self.settings.hairpin else []
            netlink.run([nl.set_alias(name, str(call.record)), *more])
            return name
        raise PluginError(f"all of {_NAME_TRIES} names for the host's interface are taken")

    # ------------------------------------------------------------------------------------------------- collection

    def sweep(self, keep: frozenset[tuple[str, str]]) -> None:
        """Removes the ports of this bridge that we named, but for those of the `keep` (pod, interface) pairs and of
        another ocid's pods. One without an alias was half made: its own daemon finds it by its record."""
        wanted = {host_name(pod, name, attempt) for pod, name in keep for attempt in range(_NAME_TRIES)}
        with Netlink() as netlink:
            bridge = nl.get_link(netlink, self.settings.bridge)
            if bridge is None:
                return
            for link in nl.list_links(netlink):
                ours = link.master == bridge.index and link.kind == "veth" and is_host_name(link.name)
                if ours and link.name not in wanted and link.alias and not is_alive(Path(link.alias)):
                    self.retire(link.index, link.name)


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.network_address in other or other.network_address in one


# ------------------------------------------------------------------------------------------------------ the pod's side


def _configure(name: str, granted: Allocation) -> None:
    """In the pod's namespace: addresses, up, routes. Nothing is heard there before the sysctls stand."""
    for knob in ("accept_ra", "accept_dad"):  # routes come from CNI, and addresses are unique by their lease
        write_net(f"ipv6/conf/{name}/{knob}", "0", missing_ok=True)
    with Netlink() as netlink:
        link = nl.get_link(netlink, name)
        if link is None:
            raise PluginError(f"interface {name} vanished from the pod")
        requests = [nl.set_link(1, "lo", up=True)]  # index 1 in every namespace; up already in those we made
        requests += [rt.add_address(link.index, name, address.interface) for address in granted.addresses]
        requests.append(nl.set_link(link.index, name, up=True))
        requests += [rt.add_route(link.index, name, *_resolve(route, granted)) for route in granted.routes]
        netlink.run(requests)


def _resolve(route: PodRoute, granted: Allocation) -> tuple[IPNetwork, nl.IPAddress | None]:
    if route.gateway is not None:
        return route.destination, route.gateway
    for address in granted.addresses:
        if address.interface.version == route.destination.version and address.gateway is not None:
            return route.destination, address.gateway
    return route.destination, None
