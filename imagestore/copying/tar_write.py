"""A tar of regular files, the same bytes for the same content: ustar, with GNU's base 256 for sizes beyond 8 GiB.

Refuses names that ustar cannot hold. Invariant: no time, owner or mode of this machine is in it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from imagestore.model import ImageError

_BLOCK = 512
_PIECE = 1 << 20


class TarWriter:
    """Writes to `out`; ends with `close`, which leaves `out` open."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._names: set[str] = set()

    def add(self, name: str, data: bytes) -> None:
        """A small file."""
        if self._begin(name, len(data)):
            self._out.write(data)
            self._pad(len(data))

    def add_file(self, name: str, path: Path) -> None:
        """The file `path` under `name`; a second one of that name is the first."""
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if not self._begin(name, size):
                return
            left = size
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise ImageError(f"write archive: {path} became shorter")
                self._out.write(piece)
                left -= len(piece)
            self._pad(size)

    def close(self) -> None:
        self._out.write(b"\0" * (2 * _BLOCK))

    def _begin(self, name: str, size: int) -> bool:
        if name in self._names:
            return False
        self._names.add(name)
        encoded = name.encode()
        if len(encoded) > 100:
            raise ImageError(f"write archive: the name {name[:60]!r} is too long")
        header = bytearray(_BLOCK)
        header[0 : len(encoded)] = encoded
        header[100:108] = b"0000644\0"
        header[108:116] = header[116:124] = b"0000000\0"
        header[124:136] = _size(size)
        header[136:148] = b"00000000000\0"
        header[148:156] = b" " * 8
        header[156:157] = b"0"
        header[257:265] = b"ustar\00000"
        header[148:156] = b"%06o\0 " % sum(header)
        self._out.write(header)
        return True

    def _pad(self, size: int) -> None:
        self._out.write(b"\0" * (-size % _BLOCK))


def _size(size: int) -> bytes:
    if size < 8**11:
        return b"%011o\0" % size
    return b"\x80" + size.to_bytes(11, "big")
