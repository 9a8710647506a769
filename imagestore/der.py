"""DER, as far as CMS messages need it: a value is a tag, its content, and where that is constructed, values within.

Pure. Refuses indefinite lengths, tags of several bytes, lengths that are longer than they must be or than what is
there, and garbage after the value. Invariant: nothing is read twice, so reading takes no longer than the bytes are.
"""

from __future__ import annotations

from typing import NamedTuple

INTEGER, OCTETS, OID, SEQUENCE, SET = 0x02, 0x04, 0x06, 0x30, 0x31
_CONSTRUCTED = 0x20


class Value(NamedTuple):
    """`whole` is the value as it was encoded, tag and length included."""

    tag: int
    content: bytes
    whole: bytes

    def expect(self, tag: int) -> Value:
        """Itself. Raises ValueError when it is something else."""
        if self.tag != tag:
            raise ValueError(f"DER: tag {self.tag:#x}, expected {tag:#x}")
        return self

    def values(self, tag: int = SEQUENCE) -> list[Value]:
        """The values within. Raises ValueError, also where it has another tag than `tag`."""
        self.expect(tag)
        found, rest = [], self.content
        while rest:
            value, rest = _next(rest)
            found.append(value)
        return found


def parse(data: bytes) -> Value:
    """The one value that `data` is. Raises ValueError."""
    value, rest = _next(data)
    if rest:
        raise ValueError("DER: bytes after the end")
    return value


def context(number: int, *, constructed: bool = True) -> int:
    """The tag [number]."""
    return 0x80 | number | (_CONSTRUCTED if constructed else 0)


def octets(value: Value, tag: int = OCTETS) -> bytes:
    """The bytes of an OCTET STRING that may have come in pieces, as BER lets it."""
    if value.tag == tag | _CONSTRUCTED:
        return b"".join(piece.expect(OCTETS).content for piece in value.values(value.tag))
    return value.expect(tag).content


def oid(dotted: str) -> bytes:
    """The content of an OBJECT IDENTIFIER."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    out = bytearray()
    for number in (first * 40 + second, *rest):
        piece = [number & 0x7F]
        while number := number >> 7:
            piece.append(0x80 | number & 0x7F)
        out += bytes(reversed(piece))
    return bytes(out)


def _next(data: bytes) -> tuple[Value, bytes]:
    if len(data) < 2:
        raise ValueError("DER: truncated")
    tag, length, at = data[0], data[1], 2
    if tag & 0x1F == 0x1F:
        raise ValueError("DER: a tag of several bytes")
    if length & 0x80:
        count = length & 0x7F
        if not 1 <= count <= 4 or len(data) < 2 + count:
            raise ValueError("DER: a length that is indefinite, too long or truncated")
        at += count
        length = int.from_bytes(data[2:at], "big")
        if length < 0x80 or length >> 8 * (count - 1) == 0:
            raise ValueError("DER: a length that is longer than it must be")
    end = at + length
    if end > len(data):
        raise ValueError("DER: truncated")
    return Value(tag, data[at:end], data[:end]), data[end:]
