"""CHECK of the bridge plugin, in-process: is the pod still connected as ADD left it.

Refuses to repair what is the pod's: its processes may have changed it on purpose. What is ocid's own, the rules of its
table, is put back, since a flushed ruleset cuts off pods that nobody adds again. Invariant: a failure names the first
thing that is not as the result says.
See the CNI specification 1.1, section 3, "CHECK".
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cri.network import netlink as nl
from cri.network import routes as rt
from cri.network.bridge import Bridge, host_names, mac
from cri.network.host_local import HostLocal
from cri.network.netlink import Netlink
from cri.network.netns import inside, open_netns
from cri.network.values import Address, Call, PluginError, Result


def check(bridge: Bridge, call: Call, result: Result) -> None:
    """Raises PluginError."""
    addresses = result.pod_addresses()
    if call.netns is None or (netns := open_netns(call.netns)) is None:
        raise PluginError(f"{call.pod.netns} is no pinned network namespace")
    try:
        inside(netns, lambda: _pod_side(call, result, addresses))
        with Netlink() as netlink:
            _host_side(netlink, bridge.settings.bridge, call)
        if bridge.settings.masquerade:
            for address in addresses:
                bridge.firewall.ensure_subnet("masq", address.interface.network)
    except OSError as error:
        raise PluginError(str(error)) from error
    finally:
        os.close(netns)
    if isinstance(bridge.ipam, HostLocal):
        _leases(bridge.ipam, call, addresses)


def _mac(call: Call, result: Result) -> str:
    """The MAC that the result says; a later plugin of the chain may have given another than the bridge did."""
    for entry in result.raw.get("interfaces") or []:
        if entry.get("name") == call.interface and entry.get("sandbox") and entry.get("mac"):
            return str(entry["mac"]).lower()
    return mac(call.pod.id, call.interface, "pod")


def _pod_side(call: Call, result: Result, addresses: Sequence[Address]) -> None:
    with Netlink() as netlink:
        link = nl.get_link(netlink, call.interface)
        if link is None:
            raise PluginError(f"the pod has no interface {call.interface}")
        if link.mac != _mac(call, result):
            raise PluginError(f"{call.interface} of the pod has the MAC {link.mac}: it is not the one that was made")
        if not link.flags & nl.IFF_UP:
            raise PluginError(f"{call.interface} of the pod is down")
        there = rt.list_addresses(netlink, link.index)
        for address in addresses:
            if address.interface not in there:
                raise PluginError(f"{call.interface} of the pod has lost {address.interface}")


def _host_side(netlink: Netlink, bridge_name: str, call: Call) -> None:
    bridge = nl.get_link(netlink, bridge_name)
    if bridge is None:
        raise PluginError(f"bridge {bridge_name} is gone")
    if not bridge.flags & nl.IFF_UP:
        raise PluginError(f"bridge {bridge_name} is down")
    for name in host_names(call.pod.id, call.interface):
        link = nl.get_link(netlink, name)
        if link is not None and link.mac == mac(call.pod.id, call.interface, "host"):
            if link.master != bridge.index:
                raise PluginError(f"{name}, the host's end of the pod's veth, is no port of {bridge_name}")
            if not link.flags & nl.IFF_UP:
                raise PluginError(f"{name}, the host's end of the pod's veth, is down")
            return
    raise PluginError("the host's end of the pod's veth is gone")


def _leases(ipam: HostLocal, call: Call, addresses: Sequence[Address]) -> None:
    for address in addresses:
        lease = ipam.store.lease(address.interface.ip)
        if lease is None or lease.container != call.pod.id:
            owner = f"is leased to {lease.container[:12]}" if lease is not None else "has no lease"
            raise PluginError(f"{address.interface.ip} {owner}: it may be given to another pod")
