"""Images from files: an OCI layout directory, the same as a tar, and what `docker save` writes.

Nothing is extracted: a tar is walked once, header by header, and its members are read where they lie. Refuses
compressed archives, members beyond the limits, and tars it does not fully understand. Invariant: bytes from here go the
way of those from a registry: digest and size are checked before anything is visible.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from imagestore.config import StoreConfig
from imagestore.content import Ingest, errno_text
from imagestore.layout import REF_NAME
from imagestore.manifest import OCI_CONFIG, OCI_MANIFEST, descriptor, digest_of
from imagestore.model import ContentInvalid, Descriptor, ImageError, ImageNotFound, ReferenceInvalid
from imagestore.reference import DEFAULT_TAG, Reference, is_digest, parse
from imagestore.registry import Document, Report
from imagestore.strict_json import parse_array, parse_object
from imagestore.tarfiles import TarIndex
from imagestore.threads import Threads
from runtime.linux.dataclass import dataclass

_TAR = "application/vnd.oci.image.layer.v1.tar"
_PIECE = 1 << 20


class Files(Protocol):
    """Named regular files, whatever holds them."""

    def open(self, name: str) -> Iterator[bytes]:
        """The content in pieces. Raises OSError (ENOENT), ContentInvalid."""
        ...


class DirectoryFiles:
    """The files below a directory, which is open as `fd` where that is not -1, and `directory` then only its name."""

    def __init__(self, directory: Path, fd: int = -1) -> None:
        self._directory, self._fd = directory, fd

    def open(self, name: str) -> Iterator[bytes]:
        # NONBLOCK: somebody's layout may hold a FIFO where a blob should be.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if self._fd < 0:
            fd = os.open(self._directory / name, flags)
        else:
            fd = os.open(name, flags, dir_fd=self._fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ContentInvalid(f"{name} is no regular file")
            while piece := os.read(fd, _PIECE):
                yield piece
        finally:
            os.close(fd)


class TarFiles:
    """The regular members of a tar, which is open as `fd` where that is not -1, and `path` then only its name."""

    def __init__(self, path: Path, fd: int = -1) -> None:
        self._path, self._fd = path, fd
        self._index: TarIndex | None = None

    def open(self, name: str) -> Iterator[bytes]:
        if self._fd < 0:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        else:
            fd = os.dup(self._fd)  # whoever handed it over need not be able to open it again
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ContentInvalid(f"{self._path} is no regular file")
            if self._index is None:
                self._index = TarIndex(fd)
            member = self._index.find(name)
            if member is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            offset, end = member.offset, member.offset + member.size
            while offset < end:
                piece = os.pread(fd, min(_PIECE, end - offset), offset)
                if not piece:
                    raise ContentInvalid(f"{name}: the archive ends in the middle of it")
                offset += len(piece)
                yield piece
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Found:
    """The image that was asked for: its manifest, and what it is called where it comes from."""

    document: Document
    name: str


class LocalSource:
    """imagestore.source.Source over `files`; `what` begins every message: "layout DIR", "archive FILE"."""

    def __init__(self, files: Files, what: str, tag: str, threads: Threads, config: StoreConfig) -> None:
        self._files = files
        self._what = what
        self._tag = tag
        self._spellings: tuple[str, ...] = (tag,) if tag else ()
        self._threads = threads
        self._config = config
        self.name = ""
        """What the image is called in its archive; known after `top`."""

    async def top(self) -> Document:
        found = await self._threads.io(self._find)
        self.name = found.name
        return found.document

    async def manifest(self, wanted: Descriptor) -> Document:
        return await self._threads.io(self._manifest, wanted)

    async def blob(self, wanted: Descriptor, ingest: Ingest, report: Report) -> None:
        await self._threads.io(self._copy, wanted, ingest)
        report(ingest.offset)

    # ---------------------------------------------------------------------------------------- what layouts have

    def _find(self) -> Found:
        """The entry of index.json named `tag`, or the only one."""
        data = self._read("index.json", self._config.manifest_bytes)
        document = parse_object(data, f"{self._what}: index.json", self._config.json_values)
        found = [
            descriptor(item, self._config.manifest_bytes)
            for item in document.objects("manifests", self._config.index_manifests)
        ]
        names = [item.annotations.get(REF_NAME, "") for item in found]
        number = self._choose([(name,) for name in names])
        return Found(self._manifest(found[number]), names[number])

    def _choose(self, names: list[tuple[str, ...]]) -> int:
        """The number of the image that has the name asked for, or of the only image."""
        fitting = [
            number for number, own in enumerate(names) if not self._tag or not set(self._spellings).isdisjoint(own)
        ]
        if len(fitting) == 1:
            return fitting[0]
        wanted = f"named {self._tag!r}" if self._tag else "without a name to choose it by"
        listed = ", ".join(sorted(name or "(no name)" for own in names for name in own)[:12])
        raise ImageNotFound(f"{self._what}: {len(fitting)} images {wanted}; there is {listed or 'nothing'}")

    def _manifest(self, wanted: Descriptor) -> Document:
        data = self._read(self._path(wanted), self._config.manifest_bytes)
        if digest_of(data) != wanted.digest or len(data) != wanted.size:
            raise ContentInvalid(f"{self._what}: manifest {wanted.digest} has other content")
        return Document(data, wanted.media_type, wanted.digest)

    def _path(self, wanted: Descriptor) -> str:
        return f"blobs/sha256/{wanted.digest.removeprefix('sha256:')}"

    def _copy(self, wanted: Descriptor, ingest: Ingest) -> None:
        ingest.restart()
        self._each(self._path(wanted), lambda piece: ingest.write([piece]))
        ingest.check()

    # -------------------------------------------------------------------------------------------------- reading

    def _read(self, name: str, limit: int) -> bytes:
        pieces: list[bytes] = []
        size = 0

        def keep(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            if size > limit:
                raise ContentInvalid(f"{name}: more than {limit} bytes")
            pieces.append(piece)

        self._each(name, keep)
        return b"".join(pieces)

    def _each(self, name: str, use: Callable[[bytes], None]) -> None:
        """Hands every piece of a file to `use`; its own failures pass as they are, those of reading are worded."""
        pieces = self._files.open(name)
        while True:
            try:
                piece = next(pieces, b"")
            except ContentInvalid as error:
                raise ContentInvalid(f"{self._what}: {error}") from None
            except OSError as error:
                kind = ImageNotFound if error.errno == errno.ENOENT else ImageError
                raise kind(f"{self._what}: read {name}: {errno_text(error)}") from error
            if not piece:
                return
            use(piece)


class DockerArchive(LocalSource):
    """What `docker save` writes: manifest.json, configs, and layers as plain tars, for which a manifest is made."""

    def __init__(self, files: Files, what: str, tag: str, threads: Threads, config: StoreConfig) -> None:
        super().__init__(files, what, tag, threads, config)
        self._spellings = _spellings((tag,)) if tag else ()
        self._members: dict[str, str] = {}

    def _find(self) -> Found:
        data = self._read("manifest.json", self._config.manifest_bytes)
        entries = parse_array(data, f"{self._what}: manifest.json", self._config.json_values)
        names = [_spellings(entry.strings("RepoTags")) for entry in entries]
        number = self._choose(names)
        entry = entries[number]
        layers = entry.strings("Layers")
        if len(layers) > self._config.layers:
            raise ContentInvalid(f"{self._what}: {len(layers)} layers, the limit is {self._config.layers}")
        config = self._describe(OCI_CONFIG, entry.string("Config"), self._config.config_bytes)
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config,
            "layers": [self._describe(_TAR, name, self._config.blob_bytes) for name in layers],
        }
        made = json.dumps(document, separators=(",", ":")).encode()
        name = self._tag or (names[number][0] if names[number] else "")
        return Found(Document(made, OCI_MANIFEST, digest_of(made)), name)

    def _describe(self, media_type: str, name: str, limit: int) -> dict[str, object]:
        """A descriptor for a member, which is hashed for it. A layer that was compressed is told by its magic."""
        digest, size, head = hashlib.sha256(), 0, b""

        def add(piece: bytes) -> None:
            nonlocal size, head
            digest.update(piece)
            size += len(piece)
            head = head or piece[:4]
            if size > limit:
                raise ContentInvalid(f"{self._what}: {name}: more than {limit} bytes")

        self._each(name, add)
        if media_type == _TAR:
            media_type += "+gzip" if head[:2] == b"\x1f\x8b" else "+zstd" if head == b"\x28\xb5\x2f\xfd" else ""
        found = f"sha256:{digest.hexdigest()}"
        self._members[found] = name
        return {"mediaType": media_type, "digest": found, "size": size}

    def _path(self, wanted: Descriptor) -> str:
        if not is_digest(wanted.digest) or wanted.digest not in self._members:
            raise ContentInvalid(f"{self._what}: there is no {wanted.digest}")
        return self._members[wanted.digest]


def _spellings(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as they stand there, then in full: docker writes "busybox:1", others docker.io/library/busybox:1."""
    found = dict.fromkeys(names)
    for name in names:
        try:
            found[str(parse(name))] = None
        except ReferenceInvalid:
            continue
    return tuple(found)


def local_name(path: Path, tag: str) -> Reference:
    """What an image from a file is called: by its full reference in there, or as localhost/NAME:TAG."""
    if "/" in tag or ":" in tag:
        try:
            return parse(tag)
        except ReferenceInvalid:
            pass
    name = re.sub(r"[^a-z0-9]+", "-", path.absolute().name.lower().removesuffix(".tar")).strip("-") or "layout"
    try:
        return parse(f"localhost/{name}:{tag or DEFAULT_TAG}")
    except ReferenceInvalid:
        return parse(f"localhost/{name}:{DEFAULT_TAG}")
