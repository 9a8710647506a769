"""Connection tracking over netlink: forget UDP flows to ports that changed hands.

Refuses everything else: TCP ends by itself, UDP flows live on as long as somebody sends. Invariant: an entry is deleted
by its own tuple and id as the kernel printed them, so a new flow in its place is not hit.
See linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

from cri.network.netlink import (
    NETLINK_NETFILTER,
    NLM_F_DUMP,
    Netlink,
    NetlinkError,
    Request,
    attribute,
    attributes,
    nested,
    u32,
)

_SUBSYS, _GET, _DELETE = 1, 1, 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE, _CTA_FILTER = 1, 12, 18, 25
_CTA_TUPLE_PROTO, _CTA_PROTO_NUM, _CTA_PROTO_DST_PORT = 2, 1, 3
_CTA_FILTER_ORIG_FLAGS, _BY_PROTO_NUM, _BY_DST_PORT = 1, 1 << 3, 1 << 5
# Each look walks the kernel's whole table, some 5 ms for its buckets alone: for more ports than these it is one look.
_FEW = 3


def _udp_entries(ports: frozenset[int], only: int = 0) -> Iterator[bytes]:
    """The bodies of messages that delete the UDP entries with these original destination ports. The kernel picks out
    those of `only` (Linux 5.8), or of all ports: a node tracks hundreds of thousands of flows."""
    udp = bytes([socket.IPPROTO_UDP])
    proto, by = [attribute(_CTA_PROTO_NUM, udp)], _BY_PROTO_NUM
    if only:
        proto, by = [*proto, attribute(_CTA_PROTO_DST_PORT, only.to_bytes(2, "big"))], by | _BY_DST_PORT
    wanted = nested(_CTA_TUPLE_ORIG, nested(_CTA_TUPLE_PROTO, *proto))
    chosen = nested(_CTA_FILTER, u32(_CTA_FILTER_ORIG_FLAGS, by))
    with Netlink(NETLINK_NETFILTER) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            head = struct.pack(">BBH", family, 0, 0)
            answers = netlink.dump(_SUBSYS << 8 | _GET, head + wanted + chosen, "list connections", flags=NLM_F_DUMP)
            for _, payload in answers:
                values = attributes(payload, 4)
                original = values.get(_CTA_TUPLE_ORIG, b"")
                protocol = attributes(attributes(original).get(_CTA_TUPLE_PROTO, b""))
                there = int.from_bytes(protocol.get(_CTA_PROTO_DST_PORT, b""), "big")
                if protocol.get(_CTA_PROTO_NUM) != udp or there not in ports:
                    continue
                same = [attribute(key, values[key]) for key in (_CTA_ID, _CTA_ZONE) if key in values]
                yield head + nested(_CTA_TUPLE_ORIG, original) + b"".join(same)


def forget_udp(ports: frozenset[int]) -> None:
    """Deletes tracked UDP flows to `ports`. A kernel without ctnetlink keeps them. Raises NetlinkError."""
    try:
        if len(ports) <= _FEW:
            bodies = [body for port in sorted(ports) for body in _udp_entries(frozenset({port}), port)]
        else:
            bodies = list(_udp_entries(ports))
    except NetlinkError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return
        raise
    gone = frozenset({errno.ENOENT})
    with Netlink(NETLINK_NETFILTER) as netlink:
        # One message a datagram: ctnetlink stops at the first error of a datagram, and ENOENT is to be expected.
        for body in bodies:
            netlink.run([Request(_SUBSYS << 8 | _DELETE, 0, body, "forget a UDP flow", gone)])
