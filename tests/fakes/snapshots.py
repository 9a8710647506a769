"""A snapshotter that mounts nothing and unpacks plainly, and makers of layer blobs, for the tests of everybody.

`MemorySnapshots` passes tests/contract/test_snapshots.py next to the real one. Its layers are real directories with
regular files, directories and links, so that users can be looked up in them; whiteouts are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from runtime.linux.mount import FsMount
from snapshotter.model import AlreadyExists, IdMap, LayerKey, NotFound, SnapshotInfo, UnpackError, Usage
from snapshotter.sealed import Sealed

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
PLAIN = "application/vnd.oci.image.layer.v1.tar"

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, data: bytes = b"", mode: int = 0o644, **fields: object) -> Member:
    """A regular file; `fields` are TarInfo's (uid, gid, mtime, pax_headers, …)."""
    return _member(name, tarfile.REGTYPE, mode, data, **fields)


def directory(name: str, mode: int = 0o755, **fields: object) -> Member:
    return _member(name, tarfile.DIRTYPE, mode, **fields)


def symlink(name: str, target: str, **fields: object) -> Member:
    return _member(name, tarfile.SYMTYPE, 0o777, linkname=target, **fields)


def hardlink(name: str, target: str, **fields: object) -> Member:
    return _member(name, tarfile.LNKTYPE, 0o644, linkname=target, **fields)


def device(
    name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE, mode: int = 0o600, **fields: object
) -> Member:
    return _member(name, kind, mode, devmajor=major, devminor=minor, **fields)


def fifo(name: str, mode: int = 0o600, **fields: object) -> Member:
    return _member(name, tarfile.FIFOTYPE, mode, **fields)


def whiteout(name: str) -> Member:
    head, slash, base = name.rpartition("/")
    return file(f"{head}{slash}.wh.{base}")


def opaque(name: str) -> Member:
    return file(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def xattrs(**values: bytes) -> dict[str, str]:
    """pax_headers for xattrs; `__` in a key stands for a dot."""
    return {
        f"SCHILY.xattr.{key.replace('__', '.')}": value.decode("utf-8", "surrogateescape")
        for key, value in values.items()
    }


def _member(name: str, kind: bytes, mode: int, data: bytes = b"", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, len(data)
    info.mtime = 1_600_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tarball(members: Iterable[Member], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The raw tar of `members`, byte for byte as tarfile writes it, and what is plain a sixth of the time."""
    pieces = []
    for info, data in members:
        pieces.append(_plain(info, form) or info.tobuf(form, "utf-8", "surrogateescape"))
        if info.type == tarfile.REGTYPE:
            pieces.append(data)
            pieces.append(bytes(-len(data) % tarfile.BLOCKSIZE))
    size = sum(map(len, pieces)) + 2 * tarfile.BLOCKSIZE
    return b"".join((*pieces, bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE)))


def _plain(info: tarfile.TarInfo, form: int) -> bytes:
    """The header of a member for which one block of ustar does; nothing for another."""
    name = f"{info.name}/" if info.type == tarfile.DIRTYPE and not info.name.endswith("/") else info.name
    numbers = (info.mode, info.uid, info.gid, info.size, info.mtime)
    if (
        form != tarfile.PAX_FORMAT
        or info.type not in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
        or not (name.isascii() and info.linkname.isascii() and len(name) <= 100 and len(info.linkname) <= 100)
        or not all(type(number) is int and 0 <= number <= most for number, most in zip(numbers, _MOST, strict=True))
        or info.pax_headers or info.uname or info.gname
    ):  # fmt: skip
        return b""
    front = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.encode().ljust(100, b"\0"), *numbers)
    back = b"%b%bustar\x0000" % (info.type, info.linkname.encode().ljust(100, b"\0"))
    return b"%b%06o\0 %b%b" % (front, sum(front) + 8 * 32 + sum(back), back, bytes(247))


# What mode, uid, gid, size and mtime have room for: digits that are octal.
_MOST = (0o7777, 0o7777777, 0o7777777, 0o77777777777, 0o77777777777)


@dataclass(frozen=True)
class Blob:
    """A layer ready to unpack. `chain_id` is the image-spec's, over `parent`."""

    path: Path
    media_type: str
    diff_id: str
    chain_id: str
    parent: str | None = None

    def arguments(self) -> tuple[Path, str, str, str, str | None]:
        """What `unpack_layer` takes."""
        return self.path, self.media_type, self.diff_id, self.chain_id, self.parent


def blob(
    directory_: Path, members: Iterable[Member] | bytes, media_type: str = GZIP, parent: Blob | str | None = None
) -> Blob:
    """Writes a layer below `directory_`."""
    raw = members if isinstance(members, bytes) else tarball(members)
    diff_id = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    above = parent.chain_id if isinstance(parent, Blob) else parent
    chain = diff_id if above is None else "sha256:" + hashlib.sha256(f"{above} {diff_id}".encode()).hexdigest()
    packed = {GZIP: lambda: gzip.compress(raw, 1), ZSTD: lambda: zstandard.compress(raw), PLAIN: lambda: raw}
    path = directory_ / f"blob-{chain[7:23]}"
    path.write_bytes(packed[media_type]())
    return Blob(path, media_type, diff_id, chain, above)


def seal(raw: bytes, media_type: str = GZIP) -> tuple[bytes, LayerKey]:
    """An encrypted layer, and what opens it."""
    secret, nonce = os.urandom(32), os.urandom(16)
    data = Cipher(AES(secret), CTR(nonce)).encryptor().update(raw)
    return data, (secret, nonce, hmac.digest(secret, data, "sha256"))


def opened(data: bytes, key: LayerKey | None) -> bytes:
    """The plain text of a layer. Raises UnpackError."""
    if key is None:
        return data
    sealed = Sealed(io.BytesIO(data).read, key)
    plain = sealed.read(len(data))
    sealed.finish()
    return plain


class MemorySnapshots:
    """cri.interfaces.Snapshots and imagestore.model.Unpacker, without a kernel."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._changed = threading.Condition()
        self._layers: dict[str, tuple[str | None, Path]] = {}
        self._unpacking: set[str] = set()
        self._active: dict[str, SnapshotInfo] = {}

    def prepare(self, key: str, parent: str | None, ids: IdMap | None = None) -> FsMount:
        with self._changed:
            if key in self._active:
                raise AlreadyExists(f"snapshot {key} exists already")
            if parent is not None and parent not in self._layers:
                raise NotFound(f"layer {parent} does not exist")
            self._active[key] = SnapshotInfo(key, parent, time.time_ns())
            return self._mount(key)

    def mount(self, key: str) -> FsMount:
        with self._changed:
            if key not in self._active:
                raise NotFound(f"snapshot {key} does not exist")
            return self._mount(key)

    def remove(self, key: str) -> None:
        with self._changed:
            self._active.pop(key, None)

    def usage(self, key: str) -> Usage:
        with self._changed:
            if key not in self._active:
                raise NotFound(f"snapshot {key} does not exist")
        return Usage(4096, 1)

    def pack(self, key: str, fd: int, check: Callable[[], object] = lambda: None) -> None:
        if key not in self._active:
            raise NotFound(f"snapshot {key} does not exist")
        check()
        os.write(fd, tarball([]))

    def unpack(self, key: str, fd: int) -> None:
        with self._changed:
            if key not in self._active:
                raise NotFound(f"snapshot {key} does not exist")
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(os.dup(fd), "rb") as file:
            raw = file.read()
        try:
            self._extract(raw, self._root / f"upper-{key[:12]}-{time.monotonic_ns()}")
        except (tarfile.TarError, ValueError) as error:
            raise UnpackError(f"layer is no tar: {error}") from error

    def list(self) -> Sequence[SnapshotInfo]:
        with self._changed:
            return [*self._active.values()]

    def lower_directories(self, parent: str) -> Sequence[Path]:
        with self._changed:
            found, at = [], parent
            while at is not None:
                if at not in self._layers:
                    raise NotFound(f"layer {at} does not exist")
                above, path = self._layers[at]
                found.append(path)
                at = above
            return found

    def has_layer(self, chain_id: str) -> bool:
        with self._changed:
            return chain_id in self._layers

    def unpack_layer(
        self,
        blob: Path,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        with self._changed:
            self._changed.wait_for(lambda: chain_id not in self._unpacking)
            if chain_id in self._layers:
                return
            self._unpacking.add(chain_id)
        try:
            raw = opened(blob.read_bytes(), key)
            try:
                if media_type.endswith("gzip"):
                    raw = gzip.decompress(raw)
                elif media_type.endswith("zstd"):
                    raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
            except (OSError, EOFError, zstandard.ZstdError) as error:
                raise UnpackError(f"layer is not {media_type}: {error}") from error
            if f"sha256:{hashlib.sha256(raw).hexdigest()}" != diff_id:
                raise UnpackError(f"layer is not the diff id {diff_id}")
            path = self._root / f"layer{len(self._layers)}-{chain_id[7:19]}"
            self._extract(raw, path)
            with self._changed:
                self._changed.wait_for(lambda: parent is None or parent in self._layers)
                self._layers[chain_id] = (parent, path)
        finally:
            with self._changed:
                self._unpacking.discard(chain_id)
                self._changed.notify_all()

    def remove_layers_except(self, keep: frozenset[str]) -> int:
        with self._changed:
            kept: set[str] = set()
            for chain in (*keep, *(info.parent for info in self._active.values())):
                at = chain
                while at is not None and at in self._layers and at not in kept:
                    kept.add(at)
                    at = self._layers[at][0]
            gone = [chain for chain in self._layers if chain not in kept]
            for chain in gone:
                del self._layers[chain]
            return len(gone)

    def forget_layers(self, chain_ids: frozenset[str]) -> Sequence[str]:
        with self._changed:
            gone = set(chain_ids)
            while more := {chain for chain, (parent, _) in self._layers.items() if parent in gone} - gone:
                gone |= more
            self.remove_layers_except(frozenset(self._layers) - gone)
            return [chain for chain in chain_ids if chain in self._layers]

    def _mount(self, key: str) -> FsMount:
        parent = self._active[key].parent
        lowers: list[tuple[str, str | None]] = []
        while parent is not None:
            above, path = self._layers[parent]
            lowers.append(("lowerdir+", str(path)))
            parent = above
        upper = self._root / "active" / key
        return FsMount("overlay", "overlay", (*lowers, ("upperdir", f"{upper}/upper"), ("workdir", f"{upper}/work")))

    @staticmethod
    def _extract(raw: bytes, path: Path) -> None:
        path.mkdir()
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:
                target = path / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if member.isdir():
                    target.mkdir(exist_ok=True)
                elif member.issym():
                    target.symlink_to(member.linkname)
                elif member.isfile() and not target.name.startswith(".wh."):
                    content = archive.extractfile(member)
                    assert content is not None
                    target.write_bytes(content.read())
