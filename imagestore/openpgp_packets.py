"""An OpenPGP message as far as it must be known before a library may have it: no packet in it grows.

    [compressed data: bzip2, zip, zlib]  ──inflated up to a limit──>  one-pass signature, literal data, signature

A compressed packet may hold a thousand times its size, and libraries inflate it in memory (threats S31). Refuses
armour, encryption, compression within compression, and what inflates beyond the limit. Pure. Invariant: what comes out
has no packet that is larger than it looks.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Iterator

_COMPRESSED = 8
_ENCRYPTED = frozenset({1, 3, 9, 18, 20})
_PACKETS = 64


def unwrapped(message: bytes, limit: int) -> bytes:
    """The message without the compression around it. Raises ValueError, saying what is wrong."""
    packets = list(_packets(message))
    if len(packets) == 1 and packets[0][0] == _COMPRESSED:
        message = _inflated(packets[0][1], limit)
        packets = list(_packets(message))
    for tag, _ in packets:
        if tag == _COMPRESSED:
            raise ValueError("compression within the message")
        if tag in _ENCRYPTED:
            raise ValueError("it is encrypted")
    return message


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and body of each (RFC 9580 4.2)."""
    at = 0
    for _ in range(_PACKETS):
        if at == len(data):
            return
        header = data[at]
        if not header & 0x80:
            raise ValueError("no binary OpenPGP message")
        if header & 0x40:
            tag, (body, at) = header & 0x3F, _new_body(data, at + 1)
        else:
            tag, (body, at) = header >> 2 & 0x0F, _old_body(data, at + 1, header & 3)
        yield tag, body
    raise ValueError(f"more than {_PACKETS} packets")


def _old_body(data: bytes, at: int, kind: int) -> tuple[bytes, int]:
    if kind == 3:  # up to the end
        return data[at:], len(data)
    size = 1 << kind
    return _part(data, at + size, int.from_bytes(_part(data, at, size)[0], "big"))


def _new_body(data: bytes, at: int) -> tuple[bytes, int]:
    """Also a body in parts, each a power of two long, the last of which is not."""
    parts = []
    while True:
        first = _part(data, at, 1)[0][0]
        if first < 192:
            length, at, last = first, at + 1, True
        elif first < 224:
            length, at, last = ((first - 192) << 8) + _part(data, at + 1, 1)[0][0] + 192, at + 2, True
        elif first == 255:
            length, at, last = int.from_bytes(_part(data, at + 1, 4)[0], "big"), at + 5, True
        else:
            length, at, last = 1 << (first & 0x1F), at + 1, False
        part, at = _part(data, at, length)
        parts.append(part)
        if last:
            return b"".join(parts), at


def _part(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if at + length > len(data):
        raise ValueError("a packet ends beyond the message")
    return data[at : at + length], at + length


def _inflated(body: bytes, limit: int) -> bytes:
    kind, data = body[:1], body[1:]
    try:
        if kind == b"\0":
            made, more = data[: limit + 1], False
        elif kind in (b"\1", b"\2"):
            inflate = zlib.decompressobj(-15 if kind == b"\1" else 15)
            made = inflate.decompress(data, limit + 1)
            more = not inflate.eof
        elif kind == b"\3":
            unpack = bz2.BZ2Decompressor()
            made = unpack.decompress(data, limit + 1)
            more = not unpack.eof
        else:
            raise ValueError("compressed in an unknown way")
    except (zlib.error, OSError) as error:
        raise ValueError(f"its compression is damaged ({error})") from None
    if len(made) > limit:
        raise ValueError(f"it inflates to more than {limit} bytes")
    if more:
        raise ValueError("its compression is cut off")
    return made
