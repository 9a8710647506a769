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

from snapshotter import tar_sparse
from snapshotter.model import Limits, UnpackError
from snapshotter.tar_feed import BLOCK, Feed
from snapshotter.tar_fields import check_sum, decimal, nanoseconds, octal, parse_pax, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ZEROS = bytes(BLOCK)
_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")

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
        self.regions: tar_sparse.Regions | None = None


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
                record = self._special(header, kind)
                if kind == b"x":
                    pax = parse_pax(record)
                elif kind == b"g":
                    if pax or long_name or long_link:
                        # POSIX: they belong to the entry after this; Go: they are lost. Nobody writes it.
                        raise UnpackError("tar: a global pax header between an extended header and its entry")
                    self._merge_globals(parse_pax(record))
                elif kind == b"L":
                    long_name = text(record)
                else:
                    long_link = text(record)
                continue
            entry = self._entry(header, fields, pax, long_name, long_link)
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
        self._count()
        fields = _HEADER.unpack(header)
        check_sum(header, octal(fields[6], "checksum"))
        size = octal(fields[4], "size")
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

    def _entry(
        self,
        header: bytes,
        fields: tuple[bytes, ...],
        pax: dict[bytes, bytes] | None,
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Entry:
        """The entry that `header` and the extended headers before it describe, checked."""
        self._count()
        check_sum(header, octal(fields[6], "checksum"))
        name, kind = self._name(header, fields), _KINDS.get(fields[7])
        if kind is None:
            raise UnpackError(f"tar entry {name!r}: type {fields[7]!r} is not supported")
        entry = Entry(
            name,
            kind,
            octal(fields[1], "mode") & 0o7777,
            octal(fields[2], "uid"),
            octal(fields[3], "gid"),
            octal(fields[4], "size"),
            octal(fields[5], "mtime") * 1_000_000_000,
            text(fields[8]),
        )
        if kind is CHAR or kind is BLOCK_DEVICE:
            entry.major, entry.minor = octal(fields[13], "devmajor"), octal(fields[14], "devminor")
        records = {**self._globals, **(pax or {})} if self._globals else pax
        if records:
            self._apply_pax(entry, records)
        # Who writes both means the same; where they differ, Go takes GNU's.
        if long_name is not None:
            entry.name = long_name
        if long_link is not None:
            entry.link = long_link
        if fields[7] == b"\0" and entry.name.endswith(b"/"):
            entry.kind = DIRECTORY  # the way before ustar
        # The size of an entry that cannot have data says nothing, as in Go's reader: no data follow.
        if entry.kind is not FILE:
            entry.size = entry.stored = 0
        else:
            entry.stored = entry.size
            if fields[7] == b"S":
                entry.size, numbers = tar_sparse.old_gnu(
                    entry.name, header, self._map_block, self.limits.sparse_regions
                )
                entry.regions = tar_sparse.regions(entry.name, numbers, entry.size, entry.stored)
            elif records and tar_sparse.is_pax(records):
                self._pax_sparse(entry, records)
        self._check(entry)
        return entry

    @staticmethod
    def _name(header: bytes, fields: tuple[bytes, ...]) -> bytes:
        """The name in the header itself."""
        own, magic, version = text(fields[0]), fields[9], fields[10]
        if magic == b"ustar\0":
            # star keeps atime and ctime in the last 24 bytes of the prefix and signs the header "tar\0".
            prefix = text(fields[15][:131] if header[508:] == b"tar\0" else fields[15])
            if prefix:
                return prefix + b"/" + own
        elif magic + version != b"ustar  \0" and magic[:5] == b"ustar":
            raise UnpackError(f"tar header of {own!r}: unknown magic {magic + version!r}")
        return own

    def _check(self, entry: Entry) -> None:
        """Ranges that no entry may leave."""
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

    def _map_block(self) -> bytes:
        """A block of a sparse map: it counts as an entry, so that no map is longer than an archive may be."""
        self._count()
        return self.feed.exactly(BLOCK)

    def _pax_sparse(self, entry: Entry, records: dict[bytes, bytes]) -> None:
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        if b"\0" in entry.name:
            raise UnpackError(f"tar entry {entry.name!r}: pax GNU.sparse.name holds a NUL")
        entry.size, numbers, taken = tar_sparse.pax(entry.name, records, self._map_block, self.limits.sparse_regions)
        entry.stored -= taken  # the map lies before the data, and counts as such
        if entry.stored < 0:
            raise UnpackError(f"tar entry {entry.name!r}: sparse map is longer than the data")
        entry.regions = tar_sparse.regions(entry.name, numbers, entry.size, entry.stored)

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
                else:
                    entry.link = value
            elif key == b"size":
                entry.size = decimal(value, key)
            elif key == b"uid":
                entry.uid = decimal(value, key)
            elif key == b"gid":
                entry.gid = decimal(value, key)
            elif key == b"mtime":
                entry.mtime = nanoseconds(value, key)
        if len(xattrs) > self.limits.xattrs:
            raise UnpackError(f"tar entry {entry.name!r}: more than {self.limits.xattrs} xattrs (limit xattrs)")
        entry.xattrs = xattrs or None
