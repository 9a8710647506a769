"""Netlink by hand: the few rtnetlink messages on a pod's path, and the framing that nftables.py shares.

Why not a library on this path: docs/decisions/0002-raw-netlink-on-the-pod-path.md. Refuses to know bridges or pods:
messages in, answers or a `NetlinkError` out. Invariant: a socket belongs to one operation and to the network namespace
of the thread that made it, so no lock is shared between pods; every wait ends after TIMEOUT_S.
See netlink(7), rtnetlink(7), linux/if_link.h, linux/veth.h. Addresses and routes are in routes.py.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType

from runtime.linux.dataclass import dataclass

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

TIMEOUT_S = 30.0
_SMALL = 1 << 15  # fits into any socket's send buffer
SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_BUFFER = 1 << 17  # a dump's datagrams are at most 32 KiB (NLMSG_GOODSIZE), leave room

# linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND, NLM_F_DUMP = 0x100, 0x200, 0x400, 0x800, 0x300
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK = 270, 11, 10, 12
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLA_F_NESTED, _NLA_TYPE = 0x8000, 0x3FFF
# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
# linux/if_link.h, linux/veth.h, linux/if_bridge.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 10, 18, 20
IFLA_AF_SPEC, IFLA_NET_NS_FD = 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER, IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 1, 8, 1
IFLA_BRPORT_MODE, IFLA_BRPORT_ISOLATED = 4, 33
IFF_UP, IFF_PROMISC = 0x1, 0x100

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTR = struct.Struct("=HH")


class NetlinkError(OSError):
    """The kernel refused a message. `str()` is "verb object: ERRNO words (what the kernel said)"."""

    def __init__(self, code: int, what: str, said: str = "") -> None:
        super().__init__(code, os.strerror(code))
        self.what, self.said = what, said

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        said = f" (kernel: {self.said})" if self.said else ""
        return f"{self.what}: {name} {(self.strerror or '').lower()}{said}"


def attribute(kind: int, payload: bytes) -> bytes:
    """One struct nlattr, padded to four bytes."""
    length = 4 + len(payload)
    return _ATTR.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` by type; the last of equals counts. What is malformed ends the list."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            break
        found[kind & _NLA_TYPE] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """One message to send: `what` is how an error names it ("add address 10.88.0.2/16 to eth0")."""

    kind: int
    flags: int
    body: bytes
    what: str
    tolerated: frozenset[int] = frozenset()


class Netlink:
    """A netlink socket in the network namespace of the calling thread. Use it in a `with`."""

    __slots__ = ("_sequence", "_socket")

    def __init__(self, family: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._sequence = 0
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            if family == NETLINK_ROUTE:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()

    def run(self, requests: Sequence[Request]) -> None:
        """Sends all in one datagram; the kernel does them in order. Raises NetlinkError for the first that failed;
        rtnetlink goes on with the later ones all the same, as they are independent messages to it."""
        pieces, by_sequence = [], {}
        for request in requests:
            self._sequence += 1
            by_sequence[self._sequence] = request
            pieces.append(pack(request.kind, request.flags | NLM_F_REQUEST | NLM_F_ACK, self._sequence, request.body))
        self._socket.send(b"".join(pieces))
        failure: NetlinkError | None = None
        while by_sequence:
            for kind, flags, sequence, body in self.receive():
                request_or_none = by_sequence.pop(sequence, None)
                if request_or_none is None or kind != NLMSG_ERROR:
                    continue
                error = parse_error(flags, body, request_or_none.what)
                if error is not None and error.errno not in request_or_none.tolerated and failure is None:
                    failure = error
        if failure is not None:
            raise failure

    def send_raw(self, data: bytes) -> None:
        """One datagram, however long: the kernel takes none that is longer than the socket's buffer."""
        if len(data) > _SMALL:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * len(data))
        self._socket.send(data)

    def dump(self, kind: int, body: bytes, what: str, *, flags: int = NLM_F_DUMP) -> Iterator[tuple[int, bytes]]:
        """(type, payload) of every answer. Without NLM_F_DUMP in `flags` it is one answer. An interrupted dump is
        made again by the caller: it raises EINTR."""
        self._sequence += 1
        self._socket.send(pack(kind, NLM_F_REQUEST | flags, self._sequence, body))
        while True:
            for answer, answer_flags, sequence, payload in self.receive():
                if sequence != self._sequence:
                    continue
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    error = parse_error(answer_flags, payload, what) if len(payload) >= 4 else None
                    if error is not None:
                        raise error
                    return
                if answer_flags & NLM_F_DUMP_INTR:
                    raise NetlinkError(errno.EINTR, what)
                yield answer, payload
                if flags & NLM_F_DUMP != NLM_F_DUMP:
                    return

    def receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence, payload) of each message of the next datagram."""
        try:
            data = self._socket.recv(_BUFFER)
        except TimeoutError:
            raise NetlinkError(errno.ETIMEDOUT, f"wait {TIMEOUT_S:.0f} s for the kernel's answer") from None
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size or offset + length > len(data):
                return
            yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def pack(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """struct nlmsghdr and its payload, padded."""
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, flags, sequence, 0) + body + bytes(-length % 4)


def parse_error(flags: int, body: bytes, what: str) -> NetlinkError | None:
    """What struct nlmsgerr says: None for an acknowledgement. NETLINK_CAP_ACK keeps the request out of it."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0:
        return None
    said = b""
    if flags & NLM_F_ACK_TLVS and len(body) > 4 + _HEADER.size:
        said = attributes(body, 4 + _HEADER.size).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0")
    return NetlinkError(-code, what, said.decode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------------------- links


@dataclass(frozen=True, slots=True)
class Link:
    """What RTM_GETLINK says of an interface, as far as pods need it."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    master: int
    flags: int
    alias: str = ""


def _mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _link_body(index: int, flags: int, change: int, *parts: bytes) -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, index, flags, change) + b"".join(parts)


def _parse_link(payload: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(payload)
    found = attributes(payload, _LINK.size)
    info = attributes(found.get(IFLA_LINKINFO, b""))
    number = struct.Struct("=I").unpack
    return Link(
        index,
        found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace"),
        info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode("utf-8", "replace"),
        found.get(IFLA_ADDRESS, b"").hex(":"),
        number(found.get(IFLA_MTU, bytes(4)))[0],
        number(found.get(IFLA_MASTER, bytes(4)))[0],
        flags,
        found.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode("utf-8", "replace"),
    )


def get_link(netlink: Netlink, name: str) -> Link | None:
    """The interface `name`, or None."""
    body = _link_body(0, 0, 0, text(IFLA_IFNAME, name))
    try:
        for _, payload in netlink.dump(RTM_GETLINK, body, f"look up interface {name}", flags=0):
            return _parse_link(payload)
    except NetlinkError as error:
        if error.errno != errno.ENODEV:
            raise
    return None


def link_name(netlink: Netlink, index: int) -> str:
    """The name of interface `index`. Raises NetlinkError (ENODEV when there is none)."""
    answers = netlink.dump(RTM_GETLINK, _link_body(index, 0, 0), f"look up interface {index}", flags=0)
    return _parse_link(next(iter(answers))[1]).name


def list_links(netlink: Netlink) -> list[Link]:
    """All interfaces of the namespace."""
    return [_parse_link(payload) for _, payload in netlink.dump(RTM_GETLINK, _link_body(0, 0, 0), "list interfaces")]


def new_bridge(name: str, mac: str, mtu: int) -> Request:
    """An own `mac` keeps the bridge's address from changing with its ports."""
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"))
    parts = [text(IFLA_IFNAME, name), attribute(IFLA_ADDRESS, _mac_bytes(mac)), info]
    if mtu:
        parts.append(u32(IFLA_MTU, mtu))
    body = _link_body(0, 0, 0, *parts)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create bridge {name}", frozenset({errno.EEXIST}))


def new_veth(name: str, mac: str, master: int, mtu: int, peer: str, peer_mac: str, netns_fd: int) -> Request:
    """A veth pair in one message: this end up and a port of `master`, the other born in `netns_fd`, still down."""
    peer_parts = [text(IFLA_IFNAME, peer), attribute(IFLA_ADDRESS, _mac_bytes(peer_mac)), u32(IFLA_NET_NS_FD, netns_fd)]
    parts = [text(IFLA_IFNAME, name), attribute(IFLA_ADDRESS, _mac_bytes(mac))]
    if mtu:
        parts.append(u32(IFLA_MTU, mtu))
        peer_parts.append(u32(IFLA_MTU, mtu))
    if master:
        parts.append(u32(IFLA_MASTER, master))
    peer_info = attribute(VETH_INFO_PEER | NLA_F_NESTED, _link_body(0, 0, 0, *peer_parts))
    parts.append(nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "veth"), nested(IFLA_INFO_DATA, peer_info)))
    body = _link_body(0, IFF_UP, IFF_UP, *parts)
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create veth {name} with peer {peer}")


def set_link(index: int, name: str, *, up: bool = False, promisc: bool = False, mtu: int = 0) -> Request:
    flags = (IFF_UP if up else 0) | (IFF_PROMISC if promisc else 0)
    parts = [u32(IFLA_MTU, mtu)] if mtu else []
    return Request(RTM_SETLINK, 0, _link_body(index, flags, flags, *parts), f"set up interface {name}")


def set_link_down(index: int, name: str) -> Request:
    body = _link_body(index, 0, IFF_UP)
    return Request(RTM_SETLINK, 0, body, f"take down interface {name}", frozenset({errno.ENODEV}))


def set_bridge_port(name: str, *, hairpin: bool) -> Request:
    data = nested(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, bytes([hairpin])))
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_SLAVE_KIND, "bridge"), data)
    return Request(RTM_NEWLINK, 0, _link_body(0, 0, 0, text(IFLA_IFNAME, name), info), f"set hairpin mode of {name}")


def set_alias(name: str, alias: str) -> Request:
    """At most 255 bytes: a longer one is none."""
    short = alias if len(alias.encode()) < 256 else ""
    return Request(
        RTM_SETLINK,
        0,
        _link_body(0, 0, 0, text(IFLA_IFNAME, name), text(IFLA_IFALIAS, short)),
        f"set the alias of {name}",
    )


def delete_link(index: int, name: str) -> Request:
    body = _link_body(index, 0, 0)
    return Request(RTM_DELLINK, 0, body, f"delete interface {name}", frozenset({errno.ENODEV}))
