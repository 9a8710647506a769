"""Layers: entries as data, written as a tar with fixed times, compressed, and measured on the way.

Invariant: the same entries give the same bytes. The writer is the standard library's: reading archives is what it gets
wrong (threats P1), and here nothing is read.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard
from isal import igzip

GZIP, ZSTD, NONE = "gzip", "zstd", "none"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_TYPES = {NONE: OCI_LAYER, GZIP: f"{OCI_LAYER}+gzip", ZSTD: f"{OCI_LAYER}+zstd"}
# image-spec layer.md: an empty file of this name hides the entry, respectively everything that is below.
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a layer. `kind` is a tarfile type; `mtime` 0 keeps layers reproducible."""

    path: str
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    data: bytes = b""
    target: str = ""
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


def directory(path: str, mode: int = 0o755, *, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path, tarfile.DIRTYPE, mode, uid=uid, gid=gid)


def file(path: str, data: bytes | str, mode: int = 0o644, *, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path, mode=mode, data=data.encode() if isinstance(data, str) else data, uid=uid, gid=gid)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, tarfile.SYMTYPE, 0o777, target=target)


def hardlink(path: str, target: str, mode: int = 0o644) -> Entry:
    """`mode` must be the target's: some unpackers apply what a link's header says to the file it shares."""
    return Entry(path, tarfile.LNKTYPE, mode, target=target)


def whiteout(path: str) -> Entry:
    head, _, name = path.rpartition("/")
    return Entry(f"{head}/{WHITEOUT}{name}" if head else WHITEOUT + name)


def opaque(path: str) -> Entry:
    return Entry(f"{path}/{OPAQUE}")


@dataclass(frozen=True, slots=True)
class Layer:
    """A finished layer: the file that holds it, its digest and size, and the digest of the tar inside."""

    path: Path
    media_type: str
    digest: str
    size: int
    diff_id: str


class _Writer(Protocol):
    def write(self, data: bytes, /) -> int: ...


class _Measure(io.RawIOBase):
    """Passes bytes on and keeps their digest and count."""

    def __init__(self, below: _Writer) -> None:
        self.hash = hashlib.sha256()
        self.size = 0
        self._below = below

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        block = bytes(data)  # type: ignore[call-overload]
        self.hash.update(block)
        self.size += len(block)
        self._below.write(block)
        return len(block)

    @property
    def digest(self) -> str:
        return f"sha256:{self.hash.hexdigest()}"


def write_layer(entries: Iterable[Entry], path: Path, compression: str = GZIP, *, docker: bool = False) -> Layer:
    """Writes `entries` in their order to `path`. `docker`: the media type of Docker's second schema (gzip only)."""
    with open(path, "wb") as raw:
        packed = _Measure(raw)
        packer = _compressor(packed, compression)
        tar = _Measure(packer or packed)
        _write_tar(entries, io.BufferedWriter(tar, 1 << 20))
        if packer:
            packer.close()
    media_type = DOCKER_LAYER if docker else OCI_TYPES[compression]
    return Layer(path, media_type, packed.digest, packed.size, tar.digest)


def _compressor(below: _Measure, compression: str) -> IO[bytes] | None:
    sink = cast(IO[bytes], below)
    if compression == GZIP:
        return cast(IO[bytes], igzip.IGzipFile(filename="", mode="wb", compresslevel=2, fileobj=sink, mtime=0))
    if compression == ZSTD:
        return cast(IO[bytes], zstandard.ZstdCompressor(level=3).stream_writer(sink, closefd=False))
    return None


def _write_tar(entries: Iterable[Entry], out: io.BufferedWriter) -> None:
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.path)
            info.type, info.mode, info.mtime = entry.kind, entry.mode, entry.mtime
            info.uid, info.gid, info.linkname, info.size = entry.uid, entry.gid, entry.target, len(entry.data)
            info.devmajor, info.devminor = entry.device
            if entry.xattrs:
                # The key the whole ecosystem writes extended attributes under, bytes held as latin-1 by tarfile.
                info.pax_headers = {
                    f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
                    for name, value in entry.xattrs.items()
                }
            tar.addfile(info, io.BytesIO(entry.data) if entry.data else None)
    out.flush()
