"""Where the regular files of a tar lie: names, offsets, sizes. For image archives, which are containers of blobs.

Nothing is extracted and no name touches the filesystem. Reads ustar, GNU long names and pax paths and sizes; refuses
sparse members, headers whose checksum is wrong, and more than the limits below. Invariant: every member that is told
lies wholly within the file.
"""

from __future__ import annotations

import os
import posixpath

from imagestore.model import ContentInvalid
from runtime.linux.dataclass import dataclass

_BLOCK = 512
_MEMBERS = 50_000
_EXTENSION = 1 << 20
_LINKS = 8


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file's place in the archive; `link` instead of a place when it is another name of a member."""

    offset: int
    size: int
    link: str = ""


class TarIndex:
    """The members of the tar behind `fd`, by normalised name; of equal names the last, as tar extracts them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._members: dict[str, Member] = {}
        self._walk()

    def find(self, name: str) -> Member | None:
        """The member called `name`, through links within the archive."""
        for _ in range(_LINKS):
            member = self._members.get(_normal(name))
            if member is None or not member.link:
                return member
            name = member.link
        raise ContentInvalid(f"{name[:100]}: too many links within the archive")

    def _walk(self) -> None:
        position, long_name, pax = 0, "", dict[str, str]()
        for _ in range(_MEMBERS):
            header = os.pread(self._fd, _BLOCK, position)
            if len(header) < _BLOCK or not header.strip(b"\0"):
                return
            _check(header, position)
            kind = header[156:157]
            size = int(pax["size"]) if "size" in pax else _number(header[124:136])
            data = position + _BLOCK
            if size > self._end - data:
                raise ContentInvalid("the archive ends in the middle of a member")
            if kind in (b"L", b"K", b"x", b"g"):
                content = self._extension(data, size)
                if kind == b"L":
                    long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif kind == b"x":
                    pax = _pax(content)
            else:
                self._remember(header, kind, pax.get("path") or long_name, pax, Member(data, size))
                long_name, pax = "", {}
            carries = kind not in (b"1", b"2", b"3", b"4", b"5", b"6")
            position = data + (-(-size // _BLOCK) * _BLOCK if carries else 0)
        raise ContentInvalid(f"the archive has more than {_MEMBERS} members")

    def _remember(self, header: bytes, kind: bytes, name: str, pax: dict[str, str], member: Member) -> None:
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
            raise ContentInvalid("the archive has sparse members")
        name = _normal(name or _name(header))
        if kind in (b"0", b"\0", b"7"):
            self._members[name] = member
        elif kind in (b"1", b"2"):
            target = pax.get("linkpath") or _text(header[157:257])
            if kind == b"2":  # a symbolic link's target is relative to the place it stands at
                target = posixpath.join(posixpath.dirname(name), target)
            self._members[name] = Member(0, 0, _normal(target))

    def _extension(self, offset: int, size: int) -> bytes:
        if size > _EXTENSION:
            raise ContentInvalid(f"the archive has a header of {size} bytes")
        return os.pread(self._fd, size, offset)


def _check(header: bytes, position: int) -> None:
    if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" or header[:6] == b"\xfd7zXZ\0":
        raise ContentInvalid("the archive is compressed: decompress it first")
    expected = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if _number(header[148:156]) != expected:
        raise ContentInvalid(f"no tar header at byte {position}")


def _number(field: bytes) -> int:
    """An octal number, or GNU's base 256."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if value >= 1 << 62:
            raise ContentInvalid("the archive has a negative or huge size")
        return value
    digits = field.strip(b" \0")
    if not all(0x30 <= byte <= 0x37 for byte in digits):
        raise ContentInvalid("the archive has a number that is not octal")
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header."""
    found, position = dict[str, str](), 0
    while position < len(content):
        digits, space, _ = content[position : position + 12].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or len(record) != length:
            raise ContentInvalid("the archive has a malformed pax header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    size = found.get("size", "0")
    if not (size.isascii() and size.isdecimal() and len(size) <= 18):
        raise ContentInvalid("the archive has a malformed pax header")
    return found


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[263:265] == b"00" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _normal(name: str) -> str:
    return posixpath.normpath(f"/{name}").lstrip("/")
