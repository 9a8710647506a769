"""Addresses and routes of interfaces, as rtnetlink messages over netlink.py's sockets.

Refuses to know bridges or pods, as netlink.py does. Invariant: what is made here is never waited for by duplicate
address detection. See rtnetlink(7), linux/if_addr.h, linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct

from cri.network.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    IPAddress,
    IPInterface,
    IPNetwork,
    Netlink,
    NetlinkError,
    Request,
    attribute,
    attributes,
    link_name,
    u32,
)
from runtime.linux.dataclass import dataclass

# linux/rtnetlink.h
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 20, 21, 22, 24, 26
RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RTN_UNICAST = 254, 3, 0, 253, 1
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE = 1, 4, 5, 6, 15
# linux/if_addr.h
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD, IFA_F_PERMANENT = 0x02, 0x80

_ADDR = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg


@dataclass(frozen=True, slots=True)
class Route:
    """A line of the routing tables: `destination` None is the default route."""

    destination: IPNetwork | None
    gateway: IPAddress | None
    index: int
    table: int


def _family(address: IPAddress | IPNetwork | IPInterface) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _address_body(index: int, address: IPInterface) -> bytes:
    head = _ADDR.pack(_family(address), address.network.prefixlen, IFA_F_PERMANENT, RT_SCOPE_UNIVERSE, index)
    parts = [attribute(IFA_LOCAL, address.ip.packed), attribute(IFA_ADDRESS, address.ip.packed)]
    if address.version == 4 and address.network.prefixlen < 31:
        parts.append(attribute(IFA_BROADCAST, address.network.broadcast_address.packed))
    if address.version == 6:
        # Addresses come from an allocator: duplicate detection would only keep the pod silent for a second.
        parts.append(u32(IFA_FLAGS, IFA_F_PERMANENT | IFA_F_NODAD))
    return head + b"".join(parts)


def add_address(index: int, name: str, address: IPInterface) -> Request:
    flags = NLM_F_CREATE | NLM_F_EXCL
    body = _address_body(index, address)
    return Request(RTM_NEWADDR, flags, body, f"add address {address} to {name}", frozenset({errno.EEXIST}))


def delete_address(index: int, name: str, address: IPInterface) -> Request:
    body = _address_body(index, address)
    missing = frozenset({errno.EADDRNOTAVAIL})
    return Request(RTM_DELADDR, 0, body, f"remove address {address} from {name}", missing)


def list_addresses(netlink: Netlink, index: int = 0) -> list[IPInterface]:
    """The addresses of interface `index`, or of all, link-local ones of IPv6 left out."""
    found: list[IPInterface] = []
    head = _ADDR.pack(socket.AF_UNSPEC, 0, 0, 0, index)
    for _, payload in netlink.dump(RTM_GETADDR, head, "list addresses"):
        _, prefix, _, scope, owner = _ADDR.unpack_from(payload)
        values = attributes(payload, _ADDR.size)
        raw = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
        if index in (0, owner) and raw is not None and scope != RT_SCOPE_LINK:
            found.append(ipaddress.ip_interface((raw, prefix)))
    return found


def add_route(index: int, name: str, destination: IPNetwork, gateway: IPAddress | None) -> Request:
    scope = RT_SCOPE_UNIVERSE if gateway is not None or destination.version == 6 else RT_SCOPE_LINK
    head = _ROUTE.pack(
        _family(destination), destination.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST, 0
    )
    parts = [u32(RTA_OIF, index)]
    if destination.prefixlen:
        parts.append(attribute(RTA_DST, destination.network_address.packed))
    if gateway is not None:
        parts.append(attribute(RTA_GATEWAY, gateway.packed))
    via = f" via {gateway}" if gateway is not None else ""
    flags = NLM_F_CREATE | NLM_F_EXCL
    what = f"add route {destination}{via} dev {name}"
    return Request(RTM_NEWROUTE, flags, head + b"".join(parts), what, frozenset({errno.EEXIST}))


def list_routes(netlink: Netlink) -> list[Route]:
    """All unicast routes of both families in every table; the kernel's own `local` and broadcast ones left out."""
    found: list[Route] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        head = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for _, payload in netlink.dump(RTM_GETROUTE, head, "list routes"):
            _, prefix, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(payload)
            if kind != RTN_UNICAST:
                continue
            values = attributes(payload, _ROUTE.size)
            raw, via = values.get(RTA_DST), values.get(RTA_GATEWAY)
            (index,) = struct.unpack("=I", values.get(RTA_OIF, bytes(4)))
            destination = ipaddress.ip_network((raw, prefix)) if raw is not None else None
            gateway = ipaddress.ip_address(via) if via is not None else None
            found.append(Route(destination, gateway, index, table))
    return found


def route_interface(netlink: Netlink, address: IPAddress) -> str | None:
    """The name of the interface that packets to `address` leave by, or None where there is no way."""
    head = _ROUTE.pack(_family(address), address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    body = head + attribute(RTA_DST, address.packed)
    try:
        for _, payload in netlink.dump(RTM_GETROUTE, body, f"look up the route to {address}", flags=0):
            (index,) = struct.unpack("=I", attributes(payload, _ROUTE.size).get(RTA_OIF, bytes(4)))
            return link_name(netlink, index)
    except NetlinkError as error:
        if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENODEV):
            raise
    return None
