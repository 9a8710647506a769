"""GNU's sparse files: where the stored bytes of a file with holes belong. Four ways to write the same map.

It refuses maps that are out of order, overlap, leave the file or do not add up to the data, and more regions than
`Limits.sparse_regions`; every block of a map counts as an entry (threats S37, CVE-2025-58183). Invariant: a map that is
returned can be applied blindly. See the GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

import struct

from snapshotter.model import UnpackError
from snapshotter.tar_feed import BLOCK
from snapshotter.tar_fields import MAX_DIGITS, decimal, octal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    More = Callable[[], bytes]

Regions = list[tuple[int, int]]
_PAIR = struct.Struct("12s12s")
_VERSIONS = ((None, None), (b"0", b"0"), (b"0", b"1"), (b"1", b"0"))


def regions(name: bytes, numbers: list[int], size: int, stored: int) -> Regions:
    """The checked map of a file of `size` bytes from `numbers`: offset, length, offset, …"""
    found, last, total = [], 0, 0
    if len(numbers) % 2:
        raise UnpackError(f"tar entry {name!r}: sparse map with an odd number of values")
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if offset < last or length < 0 or offset + length > size:
            raise UnpackError(f"tar entry {name!r}: sparse map is out of order or beyond the file's end")
        last = offset + length
        total += length
        if length:
            found.append((offset, length))
    if total != stored:
        raise UnpackError(f"tar entry {name!r}: sparse map covers {total} bytes, {stored} are stored")
    return found


def _bounded(name: bytes, count: int, limit: int) -> None:
    if count > limit:
        raise UnpackError(f"tar entry {name!r}: sparse map of more than {limit} regions (limit sparse_regions)")


def old_gnu(name: bytes, header: bytes, more: More, limit: int) -> tuple[int, list[int]]:
    """Type S: the true size, at 483, and the map: four regions in the header at 386, the rest in blocks of 21."""
    numbers: list[int] = []
    source, room, continued = header[386:482], 4, header[482]
    while True:
        for at in range(0, room * 24, 24):
            offset, length = _PAIR.unpack_from(source, at)
            if offset[0] == 0 or length[0] == 0:
                break
            numbers += (octal(offset, "sparse offset"), octal(length, "sparse length"))
        _bounded(name, len(numbers) // 2, limit)
        if not continued:
            return octal(header[483:495], "realsize"), numbers
        source, room = more(), 21
        continued = source[504]


def is_pax(records: Mapping[bytes, bytes]) -> bool:
    """Whether pax records describe a sparse file."""
    return b"GNU.sparse.map" in records or b"GNU.sparse.major" in records or b"GNU.sparse.minor" in records


def pax(name: bytes, records: Mapping[bytes, bytes], more: More, limit: int) -> tuple[int, list[int], int]:
    """Versions 0.0 and 0.1 (map in the records) and 1.0 (map in blocks before the data): the true size, the map and
    how many bytes of the stored data the map itself took."""
    version = (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor"))
    real = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
    if real is None or version not in _VERSIONS:
        raise UnpackError(f"tar entry {name!r}: unknown GNU sparse format {version}")
    size = decimal(real, b"GNU.sparse.realsize")
    if version == (b"1", b"0"):
        numbers, taken = _in_data(name, more, limit)
        return size, numbers, taken
    packed = records.get(b"GNU.sparse.map")
    words = packed.split(b",") if packed else []
    _bounded(name, len(words) // 2, limit)
    return size, [decimal(word, b"GNU.sparse.map") for word in words], 0


def _in_data(name: bytes, more: More, limit: int) -> tuple[list[int], int]:
    """Decimal lines, the count of regions first."""
    numbers: list[int] = []
    wanted, rest, taken = 1, b"", 0
    while len(numbers) < wanted:
        *lines, rest = (rest + more()).split(b"\n")
        taken += BLOCK
        for line in lines:
            if len(numbers) == wanted:
                break
            numbers.append(decimal(line, b"sparse map"))
            if len(numbers) == 1:
                _bounded(name, numbers[0], limit)
                wanted = 1 + 2 * numbers[0]
        # What follows the last number is padding; a number that does not end is none.
        if len(numbers) < wanted and len(rest) > MAX_DIGITS:
            raise UnpackError(f"tar entry {name!r}: malformed sparse map")
    return numbers[1:], taken
