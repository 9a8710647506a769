"""Tar archives, written: POSIX.1-2001 (pax), one entry after the other, to a file descriptor.

Knows names, kinds and numbers; refuses to look at a filesystem (`pack` does that). Invariant: what a header promises is
what follows it: a file that shrinks meanwhile is filled with zeros, one that grows is cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import field

from runtime.linux.dataclass import dataclass
from runtime.linux.files import write_all

_BLOCK = 512
_CHUNK = 1 << 20
_OCTAL_7, _OCTAL_11 = 8**7 - 1, 8**11 - 1
REGULAR, LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True, slots=True)
class Item:
    """An entry: `size` is of a regular file's content, `link` where a link leads to, `device` major and minor."""

    name: bytes
    kind: bytes = REGULAR
    size: int = 0
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)


class TarOut:
    """The archive at `fd`, which stays the caller's. `check` is called before each piece that is written, and may end
    it by raising."""

    def __init__(self, fd: int, check: Callable[[], object] = lambda: None) -> None:
        self._fd = fd
        self._check = check

    def add(self, item: Item) -> None:
        """An entry without content."""
        self._check()
        write_all(self._fd, headers(item))

    def add_bytes(self, item: Item, content: bytes) -> None:
        """A file of `content`, which is as long as the item says."""
        write_all(self._fd, headers(item) + content + bytes(-len(content) % _BLOCK))

    def add_file(self, item: Item, source: int) -> None:
        """A file with what is read from `source`."""
        write_all(self._fd, headers(item))
        left = item.size
        while left:
            self._check()
            piece = os.read(source, min(left, _CHUNK))
            if not piece:
                break
            write_all(self._fd, piece)
            left -= len(piece)
        while left:
            write_all(self._fd, bytes(min(left, _CHUNK)))
            left -= min(left, _CHUNK)
        write_all(self._fd, bytes(-item.size % _BLOCK))

    def end(self) -> None:
        """Two blocks of zeros."""
        self._check()
        write_all(self._fd, bytes(2 * _BLOCK))


def headers(item: Item) -> bytes:
    """What stands before an entry's content."""
    records = _records(item)
    if not records:
        return _header(item)
    content = b"".join(_record(key, value) for key, value in records.items())
    above = Item(b"PaxHeaders/" + item.name[-80:].lstrip(b"/"), b"x", len(content), 0o644)
    return _header(above) + content + bytes(-len(content) % _BLOCK) + _header(item)


def _records(item: Item) -> dict[bytes, bytes]:
    """What does not fit into the header of 1988."""
    records = {}
    if len(item.name) > 100 or not item.name.isascii():
        records[b"path"] = item.name
    if len(item.link) > 100 or not item.link.isascii():
        records[b"linkpath"] = item.link
    if item.size > _OCTAL_11:
        records[b"size"] = b"%d" % item.size
    for key, value in ((b"uid", item.uid), (b"gid", item.gid)):
        if value > _OCTAL_7:
            records[key] = b"%d" % value
    seconds, rest = divmod(item.mtime_ns, 10**9)
    if rest or not 0 <= seconds <= _OCTAL_11:
        records[b"mtime"] = b"%d.%09d" % (seconds, rest) if seconds >= 0 else b"0"
    records |= {b"SCHILY.xattr." + key: value for key, value in item.xattrs.items()}
    return records


def _record(key: bytes, value: bytes) -> bytes:
    """ "LENGTH KEY=VALUE\\n", where LENGTH counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, key, value)


def _header(item: Item) -> bytes:
    seconds = min(max(item.mtime_ns // 10**9, 0), _OCTAL_11)
    fields = [
        item.name[:100].ljust(100, b"\0"),
        b"%07o\0" % (item.mode & 0o7777),
        b"%07o\0" % min(item.uid, _OCTAL_7),
        b"%07o\0" % min(item.gid, _OCTAL_7),
        b"%011o\0" % min(item.size, _OCTAL_11),
        b"%011o\0" % seconds,
        b" " * 8,
        item.kind,
        item.link[:100].ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),
        b"%07o\0%07o\0" % item.device,
    ]
    raw = b"".join(fields).ljust(_BLOCK, b"\0")
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]
