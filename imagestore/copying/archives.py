"""What kind of archive a file is and which images it holds; and the same archive without its compression.

Blocking. Refuses what is neither an OCI layout nor what `docker save` writes, by name. Invariant: a file that grows
beyond the limit while it is decompressed is given up.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from pathlib import Path
from typing import IO, Any

from imagestore.layout import REF_NAME
from imagestore.local import DirectoryFiles, Files, TarFiles
from imagestore.model import ContentInvalid, ImageError, ImageNotFound
from imagestore.strict_json import parse_array, parse_object
from runtime.linux.dataclass import dataclass

_PIECE = 1 << 20
_INDEX = 4 << 20
_VALUES = 200_000
_IMAGES = 2048
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class ArchiveImages:
    """`kind` is "oci", "oci-archive" or "docker-archive"; `names` are those to ask for, none for an unnamed image."""

    kind: str
    names: tuple[str, ...]


def images_in(path: Path, fd: int) -> ArchiveImages:
    """Of what is open as `fd` and called `path`. Raises ImageError and its kinds."""
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    files: Files = DirectoryFiles(path, fd) if is_directory else TarFiles(path, fd)
    docker = _read(files, "manifest.json")
    layout = _read(files, "index.json")
    what = f"archive {path}"
    if layout is not None:  # docker's own archives of today are both; the layout's digests are the registry's
        index = parse_object(layout, f"{what}: index.json", _VALUES)
        names = [item.string_map("annotations").get(REF_NAME, "") for item in index.objects("manifests", _IMAGES)]
        if docker is None or all("/" in name or ":" in name for name in names):
            return ArchiveImages("oci" if is_directory else "oci-archive", tuple(filter(None, names)))
    if docker is None or is_directory:
        raise ImageNotFound(f"{what}: neither index.json (an OCI layout) nor manifest.json (docker save) is in it")
    entries = parse_array(docker, f"{what}: manifest.json", _VALUES)
    return ArchiveImages("docker-archive", tuple(name for entry in entries for name in entry.strings("RepoTags")))


def _read(files: Files, name: str) -> bytes | None:
    pieces, size = [], 0
    try:
        for piece in files.open(name):
            size += len(piece)
            if size > _INDEX:
                raise ContentInvalid(f"{name}: more than {_INDEX} bytes")
            pieces.append(piece)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ImageError(f"read {name}: {error}") from error
    return b"".join(pieces)


def plain_copy(source: IO[bytes], target: IO[bytes], limit: int) -> bool:
    """Writes `source` to `target` without its compression; when it has none and can be read again, nothing is written
    and the answer is False. Raises ContentInvalid, OSError."""
    head = source.read(4)
    reader = _reader(head, _Again(head, source))
    if reader is None and source.seekable():
        return False
    reader = reader or _Again(head, source)
    size = 0
    try:
        while piece := reader.read(_PIECE):
            size += len(piece)
            if size > limit:
                raise ContentInvalid(f"the archive is larger than {limit} bytes")
            target.write(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ContentInvalid(f"the archive's compression is damaged ({type(error).__name__})") from None
    target.flush()
    return True


def _reader(head: bytes, whole: Any) -> Any:
    """None for what is not compressed."""
    if head.startswith(_GZIP):
        from isal import igzip

        return igzip.IGzipFile(fileobj=whole, mode="rb")
    if head == _ZSTD:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(whole, read_across_frames=True)
    return None


class _Again(io.RawIOBase):
    """A stream from which some bytes were read already."""

    def __init__(self, head: bytes, source: IO[bytes]) -> None:
        super().__init__()
        self._head, self._source = head, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._head[: len(buffer)] or self._source.read(len(buffer))
        self._head = self._head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)
