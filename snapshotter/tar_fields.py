"""The fields of a tar header: numbers, times, the checksum, pax records.

It refuses what int() would take and tar does not mean: signs, underscores, other scripts' digits, thousands of them
(threats P6). Invariant: time is linear in the field's size (P5).
"""

from __future__ import annotations

from zlib import adler32

from snapshotter.model import UnpackError

# A pax number of more digits than this cannot be in range; int() would be quadratic in them.
MAX_DIGITS = 20


def octal(field: bytes, what: str) -> int:
    """A numeric header field: octal digits ended by NUL or blanks, or GNU base-256. Empty is 0."""
    digits = field[:-1]
    if digits.isdigit() and field[-1] in b"\0 ":  # as nearly every field is written
        try:
            return int(digits, 8)
        except ValueError:
            pass
    if field[0] & 0x80:
        number = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # The first bit is the marker, the second the sign.
        return number - (1 << bits) if field[0] & 0x40 else number - (1 << (bits - 1))
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    # isdigit() on bytes is ASCII only; int() alone would take b"0o7", b"+7" and b"1_0" (threats P6).
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            pass
    raise UnpackError(f"tar header: {what} is no octal number: {field!r}")


def decimal(value: bytes, what: bytes) -> int:
    if not value.isdigit() or len(value) > MAX_DIGITS:
        raise UnpackError(f"pax record {what.decode('latin-1')} is no number: {value[:40]!r}")
    return int(value)


def nanoseconds(value: bytes, what: bytes) -> int:
    """A pax time: seconds with an optional sign and fraction; digits below a nanosecond are dropped."""
    negative = value.startswith(b"-")
    seconds, dot, fraction = value[negative:].partition(b".")
    if (dot and fraction and not fraction.isdigit()) or len(fraction) > 64:
        raise UnpackError(f"pax record {what.decode('latin-1')} is no time: {value[:40]!r}")
    total = decimal(seconds, what) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -total if negative else total


def check_sum(header: bytes, stored: int) -> None:
    """The sum of the header's bytes, the checksum itself counted as blanks. adler32's low half is 1 + the sum of the
    bytes mod 65521, which a half header cannot reach: exact, and fifty times as fast as sum()."""
    field = header[148:156]
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2 - sum(field) + 256
    if total == stored:
        return
    # Some old tars summed signed chars; GNU and Go accept both.
    signed = total - 256 * sum(byte > 127 for byte in header) + 256 * sum(byte > 127 for byte in field)
    if signed != stored:
        raise UnpackError(f"tar header checksum is wrong: {stored:o}, computed {total:o}")


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, b"LENGTH KEY=VALUE\\n" each; the last of a key wins. GNU's sparse 0.0 map repeats
    its keys: those pairs come back joined as GNU.sparse.map, the form of 0.1. Raises UnpackError."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    at, end = 0, len(data)
    while at < end:
        blank = data.find(b" ", at, at + 12)
        digits = data[at:blank]
        if blank < 0 or not digits.isdigit():
            raise UnpackError(f"pax header: no record length at byte {at}")
        stop = at + int(digits)
        equals = data.find(b"=", blank + 1, stop)
        if stop > end or equals <= blank + 1 or data[stop - 1] != 10:
            raise UnpackError(f"pax header: malformed record at byte {at}")
        key, value = data[blank + 1 : equals], data[equals + 1 : stop - 1]
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (len(pairs) % 2 == 0) != (key == b"GNU.sparse.offset") or b"," in value:
                raise UnpackError("pax header: sparse map out of order")
            pairs.append(value)
        else:
            records[key] = value
        at = stop
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
