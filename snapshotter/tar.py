"""A streaming tar walker: ustar, GNU long names, pax, base-256 numbers, sparse files. Yields entries, touches no file.

It refuses whatever it does not fully understand: a wrong checksum, a number with a stray character, a pax record that
does not add up, a sparse map that overlaps; and whatever goes beyond `Limits`. Invariant: every header is parsed once,
in time linear in its size, with memory bounded by `Limits`, and only UnpackError comes out of bad input (threats P5,
S37). Where formats leave room it reads what Go's archive/tar reads, so that no two tools see two trees in one layer.
Names stay bytes (P8). See POSIX.1-2017 pax, "ustar Interchange Format", and the GNU tar manual, "Standard" and
"Sparse Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from zlib import adler32

from snapshotter.model import Limits, UnpackError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")
_OLD_SPARSE = struct.Struct("12s12s")

FILE, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"S": FILE,
    b"1": LINK,
    b"2": SYMLINK,
    b"3": CHAR,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}
_MAX_ID = 2**32 - 2
_XATTR = b"SCHILY.xattr."
# A pax number of more digits than this cannot be in range; int() would be quadratic in them (threats P6).
_MAX_DIGITS = 20

Regions = list[tuple[int, int]]


class Entry:
    """One member. `size` is the file's length, `stored` the bytes of data in the tar, which differ when it is sparse:
    then `regions` says where the data goes. `mtime` is in ns."""

    __slots__ = (
        "name",
        "kind",
        "mode",
        "uid",
        "gid",
        "size",
        "stored",
        "mtime",
        "link",
        "major",
        "minor",
        "xattrs",
        "regions",
    )

    def __init__(
        self, name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes
    ) -> None:
        self.name = name
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size
        self.stored = size
        self.mtime = mtime
        self.link = link
        self.major = 0
        self.minor = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.regions: Regions | None = None


class Feed:
    """The raw tar as a stream of chunks; `position` counts what was taken. `more` returns b"" at the end."""

    __slots__ = ("_more", "_view", "_offset", "_length", "position")

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._view = memoryview(b"")
        self._offset = 0
        self._length = 0
        self.position = 0

    def _refill(self) -> bool:
        chunk = self._more()
        self._view, self._offset, self._length = memoryview(chunk), 0, len(chunk)
        return self._length > 0

    def block(self) -> bytes:
        """The next 512 bytes, or b"" at a clean end."""
        start = self._offset
        if self._length - start >= BLOCK:
            self._offset = start + BLOCK
            self.position += BLOCK
            return bytes(self._view[start : start + BLOCK])
        return self.exactly(BLOCK, or_end=True)

    def exactly(self, count: int, *, or_end: bool = False) -> bytes:
        """The next `count` bytes; with `or_end`, b"" when the stream ends right here. Raises UnpackError."""
        data = b"".join(self.pieces(count, short=True))
        if len(data) == count or (or_end and not data):
            return data
        raise UnpackError(f"tar ends in the middle of a record, at byte {self.position}")

    def pieces(self, count: int, *, short: bool = False) -> Iterator[memoryview]:
        """The next `count` bytes in as few views as the chunks allow. Raises UnpackError when the stream is shorter,
        unless `short`."""
        while count:
            if self._offset == self._length and not self._refill():
                if short:
                    return
                raise UnpackError(f"tar ends in the middle of a file's data, at byte {self.position}")
            start = self._offset
            end = min(start + count, self._length)
            self._offset = end
            self.position += end - start
            count -= end - start
            yield self._view[start:end]

    def skip_to(self, position: int) -> None:
        """Drops what lies before `position`."""
        if self._length - self._offset >= position - self.position:
            self._offset += position - self.position
            self.position = position
            return
        for _ in self.pieces(position - self.position):
            pass

    def drain(self) -> None:
        """Reads to the end: what follows the end marker belongs to the diff id too."""
        self.position += self._length - self._offset
        while self._refill():
            self.position += self._length
        self._offset = self._length


def _octal(field: bytes, what: str) -> int:
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


def _decimal(value: bytes, what: bytes) -> int:
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        raise UnpackError(f"pax record {what.decode('latin-1')} is no number: {value[:40]!r}")
    return int(value)


def _nanoseconds(value: bytes, what: bytes) -> int:
    """A pax time: seconds with an optional sign and fraction; digits below a nanosecond are dropped."""
    negative = value.startswith(b"-")
    seconds, dot, fraction = value[negative:].partition(b".")
    if (dot and fraction and not fraction.isdigit()) or len(fraction) > 64:
        raise UnpackError(f"pax record {what.decode('latin-1')} is no time: {value[:40]!r}")
    total = _decimal(seconds, what) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -total if negative else total


def _check_sum(header: bytes, stored: int) -> None:
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


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


class Walker:
    """Iterates over a tar's entries. Between two of them the consumer may take the current one's data with `data()`;
    what it leaves is skipped."""

    def __init__(self, feed: Feed, limits: Limits) -> None:
        self.feed = feed
        self.limits = limits
        self.count = 0
        self._left = 0
        self._globals: dict[bytes, bytes] = {}

    def data(self) -> Iterator[memoryview]:
        """The current entry's stored bytes, once."""
        count, self._left = self._left, 0
        return self.feed.pieces(count)

    def __iter__(self) -> Iterator[Entry]:
        feed = self.feed
        pax: dict[bytes, bytes] | None = None
        long_name = long_link = None
        while (header := feed.block()) and header != _ZEROS:
            fields = _HEADER.unpack(header)
            kind = fields[7]
            if kind in (b"x", b"g", b"L", b"K"):
                self._count()
                record = self._special(header, kind)
                if kind == b"x":
                    pax = parse_pax(record)
                elif kind == b"g":
                    self._merge_globals(parse_pax(record))
                elif kind == b"L":
                    long_name = _text(record)
                else:
                    long_link = _text(record)
                continue
            self._count()
            entry = self._entry(header, fields, long_name, long_link)
            self._overrides(entry, pax, kind, header)
            pax = long_name = long_link = None
            start = feed.position
            self._left = entry.stored
            yield entry
            # An entry's data are padded to whole blocks. `start` + is right whether or not the data were taken.
            feed.skip_to(start + (entry.stored + BLOCK - 1) // BLOCK * BLOCK)
        if pax or long_name or long_link:
            raise UnpackError("tar ends after an extended header")
        if header and (second := feed.block()) and second != _ZEROS:
            raise UnpackError(f"tar: one zero block in the middle, at byte {feed.position - 2 * BLOCK}")
        feed.drain()

    def _count(self) -> None:
        self.count += 1
        if self.count > self.limits.entries:
            raise UnpackError(f"tar has more than {self.limits.entries} entries (limit entries)")

    def _special(self, header: bytes, kind: bytes) -> bytes:
        """The content of an extended header."""
        fields = _HEADER.unpack(header)
        _check_sum(header, _octal(fields[6], "checksum"))
        size = _octal(fields[4], "size")
        limit, name = (
            (self.limits.pax_bytes, "pax_bytes") if kind in b"xg" else (self.limits.path_bytes + 1, "path_bytes")
        )
        # Extended long names end in a NUL, and GNU tar pads none of it: one byte over the limit is enough.
        if not 0 <= size <= limit:
            raise UnpackError(f"tar: extended header {kind.decode()} of {size} bytes, at most {limit} (limit {name})")
        content = self.feed.exactly(size)
        self.feed.exactly(-size % BLOCK)
        return content

    def _merge_globals(self, records: dict[bytes, bytes]) -> None:
        # Go's reader ignores global records, POSIX applies them. Where that would change which files there are,
        # nobody means it: two tools would see two trees.
        for key in records:
            if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
                raise UnpackError(f"tar: global pax header sets {key.decode()}")
        merged = {**self._globals, **records}
        if sum(len(key) + len(value) for key, value in merged.items()) > self.limits.pax_bytes:
            raise UnpackError(f"tar: global pax records of more than {self.limits.pax_bytes} bytes (limit pax_bytes)")
        self._globals = merged

    def _entry(self, header: bytes, fields: tuple[bytes, ...], name: bytes | None, link: bytes | None) -> Entry:
        """The entry as its own header and the GNU long names tell it."""
        _check_sum(header, _octal(fields[6], "checksum"))
        kind = _KINDS.get(fields[7])
        own = _text(fields[0])
        magic, version = fields[9], fields[10]
        if magic == b"ustar\0":
            # star keeps atime and ctime in the last 24 bytes of the prefix and signs the header "tar\0".
            prefix = _text(fields[15][:131] if header[508:] == b"tar\0" else fields[15])
            if prefix:
                own = prefix + b"/" + own
        elif magic + version != b"ustar  \0" and magic[:5] == b"ustar":
            raise UnpackError(f"tar header of {own!r}: unknown magic {magic + version!r}")
        if name is not None:
            own = name
        if kind is None:
            raise UnpackError(f"tar entry {own!r}: type {fields[7]!r} is not supported")
        if kind is FILE and fields[7] != b"S" and own.endswith(b"/"):
            kind = DIRECTORY  # the way before ustar
        entry = Entry(
            own,
            kind,
            _octal(fields[1], "mode") & 0o7777,
            _octal(fields[2], "uid"),
            _octal(fields[3], "gid"),
            _octal(fields[4], "size"),
            _octal(fields[5], "mtime") * 1_000_000_000,
            link if link is not None else _text(fields[8]),
        )
        if kind is CHAR or kind is BLOCK_DEVICE:
            entry.major, entry.minor = _octal(fields[13], "devmajor"), _octal(fields[14], "devminor")
        return entry

    def _overrides(self, entry: Entry, pax: dict[bytes, bytes] | None, kind: bytes, header: bytes) -> None:
        """Applies pax records and sparse maps, then checks ranges."""
        records = pax
        if self._globals:
            records = {**self._globals, **(pax or {})}
        if records:
            self._apply_pax(entry, records)
        # The size of an entry that cannot have data says nothing, as in Go's reader: no data follow.
        if entry.kind is not FILE:
            entry.size = entry.stored = 0
        else:
            entry.stored = entry.size
            if kind == b"S":
                self._old_sparse(entry, header)
            elif records:
                self._pax_sparse(entry, records)
        limits = self.limits
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise UnpackError(f"tar entry {entry.name!r}: owner {entry.uid}:{entry.gid} is out of range")
        if entry.stored < 0 or not 0 <= entry.size <= limits.file_bytes:
            raise UnpackError(
                f"tar entry {entry.name!r}: {entry.size} bytes, at most {limits.file_bytes} (limit file_bytes)"
            )
        if len(entry.name) > limits.path_bytes or len(entry.link) > limits.path_bytes:
            raise UnpackError(
                f"tar entry {entry.name[:60]!r}…: path longer than {limits.path_bytes} bytes (limit path_bytes)"
            )

    def _apply_pax(self, entry: Entry, records: dict[bytes, bytes]) -> None:
        xattrs: dict[bytes, bytes] = {}
        for key, value in records.items():
            if not value:
                continue  # an empty value takes a global record back (POSIX pax, "Extended Header")
            if key.startswith(_XATTR):
                if len(key) == len(_XATTR) or b"\0" in key:
                    raise UnpackError(f"tar entry {entry.name!r}: xattr with the name {key[len(_XATTR) :]!r}")
                xattrs[key[len(_XATTR) :]] = value
            elif key == b"path" or key == b"linkpath":
                if b"\0" in value:
                    raise UnpackError(f"tar entry {entry.name!r}: pax {key.decode()} holds a NUL")
                if key == b"path":
                    entry.name = value
                    if entry.kind is FILE and value.endswith(b"/") and b"GNU.sparse.name" not in records:
                        entry.kind = DIRECTORY
                else:
                    entry.link = value
            elif key == b"size":
                entry.size = _decimal(value, key)
            elif key == b"uid":
                entry.uid = _decimal(value, key)
            elif key == b"gid":
                entry.gid = _decimal(value, key)
            elif key == b"mtime":
                entry.mtime = _nanoseconds(value, key)
        if len(xattrs) > self.limits.xattrs:
            raise UnpackError(f"tar entry {entry.name!r}: more than {self.limits.xattrs} xattrs (limit xattrs)")
        entry.xattrs = xattrs or None

    # ------------------------------------------------------------------------------------------------- sparse files

    def _regions(self, entry: Entry, numbers: list[int]) -> Regions:
        """The checked map: regions in order, without overlap, within the file, adding up to the stored data."""
        regions, last, total = [], 0, 0
        for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
            if offset < last or length < 0 or offset + length > entry.size:
                raise UnpackError(f"tar entry {entry.name!r}: sparse map is out of order or beyond the file's end")
            last = offset + length
            total += length
            if length:
                regions.append((offset, length))
        if total != entry.stored:
            raise UnpackError(f"tar entry {entry.name!r}: sparse map covers {total} bytes, {entry.stored} are stored")
        return regions

    def _count_regions(self, entry: Entry, count: int) -> None:
        if count > self.limits.sparse_regions:
            raise UnpackError(
                f"tar entry {entry.name!r}: sparse map of more than {self.limits.sparse_regions} regions "
                "(limit sparse_regions)"
            )

    def _old_sparse(self, entry: Entry, header: bytes) -> None:
        """GNU type S: four regions in the header at 386, the true size at 483, more in blocks of 21."""
        entry.size = _octal(header[483:495], "realsize")
        numbers: list[int] = []
        source, room, more = header[386:482], 4, header[482]
        while True:
            for at in range(0, room * 24, 24):
                offset, length = _OLD_SPARSE.unpack_from(source, at)
                if offset[0] == 0 or length[0] == 0:
                    break
                numbers += (_octal(offset, "sparse offset"), _octal(length, "sparse length"))
            self._count_regions(entry, len(numbers) // 2)
            if not more:
                break
            block = self.feed.exactly(BLOCK)
            self._count()  # each block of a map counts: a map cannot be longer than the archive may be
            source, room, more = block, 21, block[504]
        entry.regions = self._regions(entry, numbers)

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes]) -> None:
        """GNU sparse 0.0, 0.1 (map in the pax header) and 1.0 (map before the data)."""
        version = (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor"))
        packed = records.get(b"GNU.sparse.map")
        if version == (None, None) and packed is None:
            return
        real = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
        if real is None or version not in ((None, None), (b"0", b"0"), (b"0", b"1"), (b"1", b"0")):
            raise UnpackError(f"tar entry {entry.name!r}: unknown GNU sparse format {version}")
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        if b"\0" in entry.name:
            raise UnpackError(f"tar entry {entry.name!r}: pax GNU.sparse.name holds a NUL")
        entry.size = _decimal(real, b"GNU.sparse.realsize")
        if version == (b"1", b"0"):
            numbers = self._map_in_data(entry)
        else:
            words = packed.split(b",") if packed else []
            self._count_regions(entry, len(words) // 2)
            if len(words) % 2:
                raise UnpackError(f"tar entry {entry.name!r}: sparse map with an odd number of values")
            numbers = [_decimal(word, b"GNU.sparse.map") for word in words]
        entry.regions = self._regions(entry, numbers)

    def _map_in_data(self, entry: Entry) -> list[int]:
        """Sparse 1.0: decimal lines, the count first, in whole blocks before the data; they count as stored data."""
        numbers: list[int] = []
        wanted, rest = 1, b""
        while len(numbers) < wanted:
            if entry.stored < BLOCK:
                raise UnpackError(f"tar entry {entry.name!r}: sparse map is longer than the data")
            *lines, rest = (rest + self.feed.exactly(BLOCK)).split(b"\n")
            entry.stored -= BLOCK
            for line in lines:
                if len(numbers) == wanted:
                    break
                numbers.append(_decimal(line, b"sparse map"))
                if len(numbers) == 1:
                    self._count_regions(entry, numbers[0])
                    wanted = 1 + 2 * numbers[0]
            # What follows the last number is padding; a number that does not end is none.
            if len(numbers) < wanted and len(rest) > _MAX_DIGITS:
                raise UnpackError(f"tar entry {entry.name!r}: malformed sparse map")
        return numbers[1:]
