"""rtnetlink(7), as far as moving a network device takes: links, addresses, and requests with one answer.

Refuses policy. Invariant: a socket belongs to the network namespace in which it was made, wherever its process goes.
"""

from __future__ import annotations

import _socket
import os
import struct

from runtime.linux.libc import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h, linux/if_addr.h
RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 20, 22
_REQUEST, _ACK, _DUMP, _CREATE, _EXCL = 0x1, 0x4, 0x300, 0x400, 0x200
_ERROR, _DONE = 2, 3
IFLA_IFNAME, IFLA_NET_NS_FD = 3, 28
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
IFF_UP = 1


class Address:
    """One address of a device: `attributes` are IFA_* with their raw values."""

    __slots__ = ("attributes", "family", "flags", "prefix", "scope")

    def __init__(self, family: int, prefix: int, flags: int, scope: int, attributes: dict[int, bytes]) -> None:
        self.family = family
        self.prefix = prefix
        self.flags = flags
        self.scope = scope
        self.attributes = attributes


class Rtnetlink:
    """A socket in the network namespace of who makes it."""

    def __init__(self) -> None:
        kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def links(self) -> dict[str, int]:
        """Index by name of every device."""
        found = {}
        for body in self._ask(RTM_GETLINK, _DUMP, struct.pack("=BxHiII", 0, 0, 0, 0, 0), "get links"):
            index = struct.unpack_from("=i", body, 4)[0]
            name = _attributes(body, 16).get(IFLA_IFNAME, b"").rstrip(b"\0")
            found[os.fsdecode(name)] = index
        return found

    def addresses(self, index: int) -> list[Address]:
        """Those of one device, of any family."""
        found = []
        for body in self._ask(RTM_GETADDR, _DUMP, struct.pack("=BBBBi", 0, 0, 0, 0, 0), "get addresses"):
            family, prefix, flags, scope, of = struct.unpack_from("=BBBBi", body)
            if of == index:
                attributes = _attributes(body, 8)
                if IFA_FLAGS in attributes:
                    flags = struct.unpack("=I", attributes[IFA_FLAGS])[0]
                found.append(Address(family, prefix, flags, scope, attributes))
        return found

    def set_up(self, index: int, up: bool, subject: str) -> None:
        """IFF_UP on or off."""
        self._ask(RTM_NEWLINK, _ACK, struct.pack("=BxHiII", 0, 0, index, IFF_UP if up else 0, IFF_UP), subject)

    def move(self, index: int, name: str, netns_fd: int, subject: str) -> None:
        """Into another network namespace, under `name` there, in one step; the kernel numbers a name with %d."""
        body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
        body += _attribute(IFLA_IFNAME, os.fsencode(name) + b"\0")
        body += _attribute(IFLA_NET_NS_FD, struct.pack("=I", netns_fd))
        self._ask(RTM_NEWLINK, _ACK, body, subject)

    def add_address(self, index: int, address: Address, flags: int, subject: str) -> None:
        """An address like `address` on another device, with `flags` of its own."""
        body = struct.pack("=BBBBi", address.family, address.prefix, flags & 0xFF, address.scope, index)
        for kind in (IFA_LOCAL, IFA_ADDRESS, IFA_BROADCAST):
            if kind in address.attributes:
                body += _attribute(kind, address.attributes[kind])
        body += _attribute(IFA_FLAGS, struct.pack("=I", flags))
        self._ask(RTM_NEWADDR, _ACK | _CREATE | _EXCL, body, subject)

    def _ask(self, kind: int, flags: int, body: bytes, subject: str) -> list[bytes]:
        self._sequence += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        found: list[bytes] = []
        while True:
            for answer, sequence, data in _messages(self._socket.recv(1 << 16)):
                if sequence != self._sequence:
                    continue
                if answer == _ERROR:
                    code = -struct.unpack_from("=i", data)[0]
                    if code:
                        raise KernelError(code, "rtnetlink", subject)
                    return found
                if answer == _DONE:
                    return found
                found.append(data)


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(data) >= 16:
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        if not 16 <= length <= len(data):
            return
        yield kind, sequence, data[16:length]
        data = data[(length + 3) & ~3 :]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes, at: int) -> dict[int, bytes]:
    found = {}
    data = data[at:]
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
