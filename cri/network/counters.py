"""What the interfaces of pods have carried, asked for from outside of their network namespaces.

    netns file ──fd──▶ RTM_GETNSID (RTM_NEWNSID where it has none yet) ──▶ RTM_GETLINK with that id ──▶ counters

Refuses to enter a namespace: no thread of the daemon goes anywhere, and no process is started. An id belongs to the
namespace that we are in, and goes with the pod's. Invariant: a pod that has no network any more is left out, and is
nobody's error (threats O42). See linux/net_namespace.h, linux/if_link.h (IFLA_TARGET_NETNSID, since 4.20).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from cri.interfaces import InterfaceCounters
from cri.network.netlink import (
    IFLA_IFNAME,
    RTM_GETLINK,
    Netlink,
    Request,
    attribute,
    attributes,
    u32,
)

log = logging.getLogger(__name__)

# linux/rtnetlink.h, linux/net_namespace.h, linux/if_link.h
RTM_NEWNSID, RTM_GETNSID = 88, 90
NETNSA_NSID, NETNSA_FD = 1, 3
IFLA_STATS64, IFLA_TARGET_NETNSID = 23, 46
IFF_LOOPBACK = 0x8

_FAMILY = struct.pack("=B3x", socket.AF_UNSPEC)  # struct rtgenmsg, padded
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_NUMBER = struct.Struct("=i")
# struct rtnl_link_stats64: packets, bytes, errors, dropped, received and sent in turn.
_STATS = struct.Struct("=8Q")


def read(paths: Iterable[Path]) -> dict[Path, Sequence[InterfaceCounters]]:
    """The interfaces of each namespace but `lo`, in the order of their making; blocks for some 0.1 ms each."""
    found: dict[Path, Sequence[InterfaceCounters]] = {}
    with Netlink() as netlink:
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    found[path] = _links(netlink, _identity(netlink, fd, path), path)
                finally:
                    os.close(fd)
            except OSError as error:
                log.debug("counters of %s: %s", path, error)
    return found


def _identity(netlink: Netlink, fd: int, path: Path) -> int:
    identity = _known(netlink, fd, path)
    if identity >= 0:
        return identity
    any_number = attribute(NETNSA_NSID, _NUMBER.pack(-1))
    body = _FAMILY + u32(NETNSA_FD, fd) + any_number
    # Whoever was faster has given it one: that is as good.
    netlink.run([Request(RTM_NEWNSID, 0, body, f"give {path} an id", frozenset({errno.EEXIST}))])
    return _known(netlink, fd, path)


def _known(netlink: Netlink, fd: int, path: Path) -> int:
    body = _FAMILY + u32(NETNSA_FD, fd)
    for _, payload in netlink.dump(RTM_GETNSID, body, f"look up the id of {path}", flags=0):
        raw = attributes(payload, len(_FAMILY)).get(NETNSA_NSID)
        return int(_NUMBER.unpack(raw)[0]) if raw is not None else -1
    return -1


def _links(netlink: Netlink, identity: int, path: Path) -> list[InterfaceCounters]:
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(IFLA_TARGET_NETNSID, _NUMBER.pack(identity))
    found = []
    for _, payload in netlink.dump(RTM_GETLINK, body, f"list the interfaces of {path}"):
        _, _, _, flags, _ = _LINK.unpack_from(payload)
        values = attributes(payload, _LINK.size)
        raw = values.get(IFLA_STATS64, b"")
        if flags & IFF_LOOPBACK or len(raw) < _STATS.size:
            continue
        name = values.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace")
        found.append(InterfaceCounters(name, *_STATS.unpack_from(raw)))
    return found
