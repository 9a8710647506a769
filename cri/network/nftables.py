"""nf_tables over netlink: atomic batches, and the dozen expressions that ocid's one table is made of.

Refuses policy: which chains and maps there are is firewall.py's. Invariant: a batch takes effect as a whole or not at
all (the kernel's commit), and whatever lies outside the given table is never named.
See linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h, whose attribute numbers stand here as such;
data registers are 16 bytes, 32-bit ones their quarters: register 1 is NFT_REG32_00 to _03.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence

from cri.network.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    nested,
    pack,
    parse_error,
    text,
)
from runtime.linux.dataclass import dataclass

NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NFT_NAME_LIMIT = 128

_SUBSYS = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWSET = 0, 2, 3, 4, 5, 6, 8, 9
_NEWSETELEM, _GETSETELEM, _DELSETELEM = 12, 13, 14
_LIST_ELEM = 1  # NFTA_LIST_ELEM
_SET_MAP, _SET_CONCAT = 0x8, 0x80
_JUMP, _RETURN = -3, -5
_REG_VERDICT, REG_1 = 0, 1
_REG32 = 8  # NFT_REG32_00
# Types as nft(8) numbers them, so that it can print the maps: a concatenation is six bits a part.
TYPE_IPV4, TYPE_IPV6, TYPE_PROTO, TYPE_PORT = 7, 8, 12, 13
_SIZES = {TYPE_IPV4: 4, TYPE_IPV6: 16, TYPE_PROTO: 1, TYPE_PORT: 2}
_META_NFPROTO, _META_L4PROTO = 15, 16
_PAYLOAD_NETWORK, _PAYLOAD_TRANSPORT = 1, 2
_CT_STATUS, IPS_DST_NAT = 2, 1 << 5
_FIB_ADDRTYPE, _FIB_DADDR, _RTN_LOCAL = 3, 2, 2
_NAT_DNAT = 1


def _be32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


@dataclass(frozen=True, slots=True)
class Message:
    """One step of a batch; `what` names it in an error."""

    kind: int
    flags: int
    body: bytes
    what: str


def _message(kind: int, flags: int, what: str, *parts: bytes) -> Message:
    return Message(kind, flags, struct.pack(">BBH", NFPROTO_INET, 0, 0) + b"".join(parts), what)


def commit(messages: Sequence[Message]) -> None:
    """Applies all of them at once, or none. Raises NetlinkError for the first that the kernel refused."""
    edge = struct.pack(">BBH", socket.AF_UNSPEC, 0, _SUBSYS)
    pieces = [pack(_BATCH_BEGIN, NLM_F_REQUEST, 0, edge)]
    for number, message in enumerate(messages, 1):
        # Only the last is acknowledged: errors of the others come all the same, and before it.
        ack = NLM_F_ACK if number == len(messages) else 0
        pieces.append(pack(_SUBSYS << 8 | message.kind, NLM_F_REQUEST | message.flags | ack, number, message.body))
    pieces.append(pack(_BATCH_END, NLM_F_REQUEST, len(messages) + 1, edge))
    failure: NetlinkError | None = None
    with Netlink(NETLINK_NETFILTER) as netlink:
        netlink.send_raw(b"".join(pieces))
        done = False
        while not done:
            for kind, flags, sequence, body in netlink.receive():
                if kind != NLMSG_ERROR:
                    continue
                # Sequence 0 is the batch itself: EPERM, or a kernel without nf_tables.
                what = messages[sequence - 1].what if 0 < sequence <= len(messages) else "commit an nftables batch"
                failure = failure or parse_error(flags, body, what)
                done = done or sequence in (0, len(messages))
    if failure is not None:
        raise failure


# -------------------------------------------------------------------------------------------- tables, chains, rules


def new_table(table: str) -> Message:
    return _message(_NEWTABLE, NLM_F_CREATE, f"create nftables table {table}", text(1, table))


def delete_table(table: str) -> Message:
    return _message(_DELTABLE, 0, f"delete nftables table {table}", text(1, table))


def new_nat_chain(table: str, chain: str, hook: int, priority: int) -> Message:
    """A base chain of type nat; `hook` is NF_INET_*."""
    hooks = nested(4, _be32(1, hook), _be32(2, priority))
    what = f"create nftables chain {table} {chain}"
    return _message(_NEWCHAIN, NLM_F_CREATE, what, text(1, table), text(3, chain), hooks, text(7, "nat"))


def new_chain(table: str, chain: str, *, exclusive: bool = False) -> Message:
    """A chain to jump to. `exclusive`: EEXIST when it is there, so that its rules are never added twice."""
    what = f"create nftables chain {table} {chain}"
    flags = NLM_F_CREATE | (NLM_F_EXCL if exclusive else 0)
    return _message(_NEWCHAIN, flags, what, text(1, table), text(3, chain))


def delete_chain(table: str, chain: str) -> Message:
    """The chain must be empty and nobody's target: flush and replace those first, in the same batch."""
    return _message(_DELCHAIN, 0, f"delete nftables chain {table} {chain}", text(1, table), text(3, chain))


def list_chains(table: str, only: str = "") -> list[str]:
    """The names of the chains of `table`, or just of `only` where it exists. Takes no lock that a commit holds."""
    parts = [text(1, table), text(3, only)] if only else []
    request = _message(_GETCHAIN, 0, f"list the chains of nftables table {table}", *parts)
    found = []
    with Netlink(NETLINK_NETFILTER) as netlink:
        try:
            flags = 0 if only else NLM_F_DUMP
            for _, payload in netlink.dump(_SUBSYS << 8 | _GETCHAIN, request.body, request.what, flags=flags):
                values = attributes(payload, 4)
                if _string(values.get(1, b"")) == table:
                    found.append(_string(values.get(3, b"")))
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
    return found


def _string(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def flush_chain(table: str, chain: str) -> Message:
    """Removes all rules of a chain: with new ones behind it in one batch nobody sees it empty."""
    return _message(_DELRULE, 0, f"flush nftables chain {table} {chain}", text(1, table), text(2, chain))


def new_rule(table: str, chain: str, *expressions: bytes) -> Message:
    what = f"add a rule to nftables chain {table} {chain}"
    return _message(_NEWRULE, NLM_F_CREATE | 0x800, what, text(1, table), text(2, chain), nested(4, *expressions))


# ------------------------------------------------------------------------------------------------------ expressions


def _expression(name: str, *parts: bytes) -> bytes:
    return nested(_LIST_ELEM, text(1, name), nested(2, *parts))


def _data(kind: int, value: bytes) -> bytes:
    return nested(kind, attribute(1, value))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _be32(1, REG_1), _be32(2, 0), _data(3, value))


def _differs(value: bytes) -> bytes:
    return _expression("cmp", _be32(1, REG_1), _be32(2, 1), _data(3, value))


def _payload(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression("payload", _be32(1, register), _be32(2, base), _be32(3, offset), _be32(4, length))


def family(version: int) -> bytes:
    """meta nfproto ipv4 | ipv6: addresses are read only behind this."""
    wanted = NFPROTO_IPV4 if version == 4 else NFPROTO_IPV6
    return _expression("meta", _be32(1, REG_1), _be32(2, _META_NFPROTO)) + _equals(bytes([wanted]))


def _address(version: int, source: bool, register: int) -> bytes:
    if version == 4:
        return _payload(_PAYLOAD_NETWORK, 12 if source else 16, 4, register)
    return _payload(_PAYLOAD_NETWORK, 8 if source else 24, 16, register)


def in_subnet(version: int, source: bool, network: bytes, mask: bytes) -> bytes:
    """ip saddr | daddr in a prefix."""
    masked = _expression(
        "bitwise", _be32(1, REG_1), _be32(2, REG_1), _be32(3, len(mask)), _data(4, mask), _data(5, bytes(len(mask)))
    )
    return _address(version, source, REG_1) + masked + _equals(network)


def not_to(version: int, address: bytes) -> bytes:
    """ip daddr != ADDRESS"""
    return _address(version, False, REG_1) + _differs(address)


def is_translated() -> bytes:
    """ct status dnat"""
    bit = struct.pack("=I", IPS_DST_NAT)
    load = _expression("ct", _be32(1, REG_1), _be32(2, _CT_STATUS))
    masked = _expression("bitwise", _be32(1, REG_1), _be32(2, REG_1), _be32(3, 4), _data(4, bit), _data(5, bytes(4)))
    return load + masked + _differs(bytes(4))


def is_local_destination() -> bytes:
    """fib daddr type local"""
    load = _expression("fib", _be32(1, REG_1), _be32(2, _FIB_ADDRTYPE), _be32(3, _FIB_DADDR))
    return load + _equals(struct.pack("=I", _RTN_LOCAL))


def jump(chain: str) -> bytes:
    verdict = nested(2, nested(2, _be32(1, _JUMP), text(2, chain)))
    return _expression("immediate", _be32(1, _REG_VERDICT), verdict)


def leave() -> bytes:
    """return"""
    return _expression("immediate", _be32(1, _REG_VERDICT), nested(2, nested(2, _be32(1, _RETURN))))


def masquerade() -> bytes:
    return _expression("masq")


def translate_by_port(version: int, map_name: str, *, with_address: bool) -> bytes:
    """dnat to [ip daddr .] meta l4proto . th dport map @map; no entry: the rule does not match."""
    register, pieces = _REG32, []
    if with_address:
        pieces.append(_address(version, False, register))
        register += 1 if version == 4 else 4
    pieces.append(_expression("meta", _be32(1, register), _be32(2, _META_L4PROTO)))
    pieces.append(_payload(_PAYLOAD_TRANSPORT, 2, 2, register + 1))
    pieces.append(_expression("lookup", text(1, map_name), _be32(2, _REG32), _be32(3, _REG32)))
    wanted = NFPROTO_IPV4 if version == 4 else NFPROTO_IPV6
    port = _REG32 + (1 if version == 4 else 4)
    pieces.append(_expression("nat", _be32(1, _NAT_DNAT), _be32(2, wanted), _be32(3, _REG32), _be32(5, port)))
    return b"".join(pieces)


# ------------------------------------------------------------------------------------------------------------- maps


def _padded(size: int) -> int:
    return (size + 3) & ~3


def concatenation(*parts: bytes) -> bytes:
    """A key or value of several fields: each starts at a 32-bit register."""
    return b"".join(part + bytes(-len(part) % 4) for part in parts) if len(parts) > 1 else parts[0]


def _shape(types: Sequence[int]) -> tuple[int, int]:
    """nft's number of a (concatenated) type, and its length in registers."""
    if len(types) == 1:
        return types[0], _SIZES[types[0]]
    number = 0
    for kind in types:
        number = number << 6 | kind
    return number, sum(_padded(_SIZES[kind]) for kind in types)


def new_map(table: str, name: str, key: Sequence[int], value: Sequence[int], identity: int) -> Message:
    """A map from `key` to `value`. `identity` is unique in its batch."""
    key_type, key_length = _shape(key)
    value_type, value_length = _shape(value)
    flags = _SET_MAP | (_SET_CONCAT if len(key) > 1 else 0)
    parts = [text(1, table), text(2, name), _be32(4, key_type), _be32(5, key_length), _be32(10, identity)]
    parts += [_be32(6, value_type), _be32(7, value_length)]
    if len(key) > 1:
        fields = [nested(_LIST_ELEM, _be32(1, _SIZES[kind])) for kind in key]
        parts.append(nested(9, nested(2, *fields)))
    parts.append(_be32(3, flags))
    return _message(_NEWSET, NLM_F_CREATE, f"create nftables map {table} {name}", *parts)


@dataclass(frozen=True, slots=True)
class Element:
    """An entry of a map; `owner` is kept as its comment."""

    key: bytes
    value: bytes = b""
    owner: str = ""


def _comment(owner: str) -> bytes:
    # libnftnl's user data: type 0 is a comment, one byte of length, NUL at the end. nft(8) prints it up to 128 bytes;
    # the kernel keeps 256 (NFT_USERDATA_MAXLEN).
    raw = owner.encode()
    if len(raw) > 250:
        raw = raw.partition(b" ")[0][:250]
    raw += b"\0"
    return bytes([0, len(raw)]) + raw


def _elements(table: str, name: str, elements: Sequence[Element], *, whole: bool) -> list[bytes]:
    packed = []
    for element in elements:
        parts = [_data(1, element.key)]
        if whole:
            parts.append(_data(2, element.value))
            parts.append(attribute(6, _comment(element.owner)))
        packed.append(nested(_LIST_ELEM, *parts))
    return [text(1, table), text(2, name), nested(3, *packed)]


def add_elements(table: str, name: str, elements: Sequence[Element]) -> Message:
    """EEXIST when a key is there already, whatever it leads to."""
    what = f"add to nftables map {table} {name}"
    return _message(_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, what, *_elements(table, name, elements, whole=True))


def delete_elements(table: str, name: str, elements: Sequence[Element]) -> Message:
    """ENOENT when a key is not there."""
    what = f"remove from nftables map {table} {name}"
    return _message(_DELSETELEM, 0, what, *_elements(table, name, elements, whole=False))


def list_elements(table: str, name: str, only: Element | None = None) -> Iterator[Element]:
    """The entries of a map, or the one with the key of `only`. A missing table, map or key: none."""
    parts = [text(1, table), text(2, name)]
    if only is not None:
        parts = _elements(table, name, [only], whole=False)
    request = _message(_GETSETELEM, 0, f"read nftables map {table} {name}", *parts)
    flags = NLM_F_DUMP if only is None else 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        try:
            for _, payload in netlink.dump(_SUBSYS << 8 | _GETSETELEM, request.body, request.what, flags=flags):
                yield from _parse_elements(payload)
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise


def _parse_elements(payload: bytes) -> Iterator[Element]:
    data = attributes(payload, 4).get(3, b"")
    offset = 0
    while offset + 4 <= len(data):
        length = struct.unpack_from("=H", data, offset)[0]
        if length < 4:
            return
        found = attributes(data[offset + 4 : offset + length])
        offset += (length + 3) & ~3
        comment = found.get(6, b"")
        yield Element(
            key=attributes(found.get(1, b"")).get(1, b""),
            value=attributes(found.get(2, b"")).get(1, b""),
            owner=_string(comment[2:]) if comment[:1] == b"\0" else "",
        )
