"""Where a copy may go. Each is told of blobs in any order, of manifests after what they name, and ends with `finish`.

    RegistryTarget   a repository and its tag
    LayoutTarget     an OCI layout: blobs/, then index.json; beside images that are there already
    OciArchive       the same as one tar
    DirTarget        skopeo's `dir:`: manifest.json, blobs by their hex digits, and signatures

`docker-archive:` is in imagestore.copying.docker_archive. Invariant: until `finish` nothing that was there before has
changed, and after a failure what is left is garbage that no name leads to.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from imagestore.attaching import Attaching
from imagestore.config import StoreConfig
from imagestore.content import errno_text
from imagestore.copying.contents import encode
from imagestore.copying.tar_write import TarWriter
from imagestore.layout import REF_NAME, VERSION_FILE
from imagestore.manifest import OCI_INDEX, OCI_MANIFEST
from imagestore.model import Descriptor, ImageError
from imagestore.push import Pusher
from imagestore.reference import Reference
from imagestore.registry import Document, Repository
from imagestore.signatures import Signature, to_blob
from imagestore.strict_json import parse_object
from imagestore.threads import Threads
from runtime.linux.files import AT_FDCWD, read_bounded, sync_directory, write_durable
from runtime.linux.libc import KernelError

Report = Callable[[int], None]

_SIGNATURE = re.compile(r"([0-9a-f]{64}\.)?signature-[0-9]+", re.ASCII)


class Target(Protocol):
    """What a copy needs. `format_type` is the manifest's media type that it insists on, "" for any; `layers` the
    compression, None for any. Errors are ImageError and its kinds."""

    format_type: str
    layers: str | None

    async def has(self, blob: Descriptor) -> bool:
        """True when the blob is there, or can be without its bytes."""
        ...

    async def put(self, blob: Descriptor, path: Path, report: Report) -> None:
        """Takes the verified file `path`, which it may move away."""
        ...

    async def manifest(self, document: Document, top: bool) -> None:
        """Takes a manifest or an index; `top` is the one that the image is called by."""
        ...

    async def finish(self) -> None:
        """Makes all of it visible."""
        ...


class RegistryTarget:
    """A repository. `origin` is where blobs may be mounted from: another repository of the same registry."""

    format_type = ""
    layers: str | None = None

    def __init__(
        self, repository: Repository, threads: Threads, config: StoreConfig, reference: Reference, origin: str
    ) -> None:
        self._pusher = Pusher(repository, threads, config)
        self.attaching = Attaching(repository, self._pusher, config)
        self.reference, self._origin = reference, origin
        self.mounted = 0

    async def has(self, blob: Descriptor) -> bool:
        if await self._pusher.has(blob):
            return True
        if self._origin and await self._pusher.mount(blob, self._origin):
            self.mounted += 1
            return True
        return False

    async def put(self, blob: Descriptor, path: Path, report: Report) -> None:
        await self._pusher.upload(blob, path, report)

    async def manifest(self, document: Document, top: bool) -> None:
        if top and self.reference.digest and document.digest != self.reference.digest:
            raise ImageError(f"the image is {document.digest} here: it cannot be called {self.reference}")
        tag = self.reference.tag if top and not self.reference.digest else ""
        await self._pusher.manifest(document, tag or document.digest)

    async def finish(self) -> None:
        """A manifest that was put is visible: there is nothing left to do."""


class LayoutTarget:
    """An OCI layout directory, made when it is missing. Its readers look for OCI's media types only."""

    format_type = OCI_MANIFEST
    layers: str | None = None

    def __init__(self, directory: Path, name: str, threads: Threads, config: StoreConfig) -> None:
        self._directory, self._name = directory, name
        self._threads, self._config = threads, config
        self._blobs = directory / "blobs" / "sha256"
        self._top: Document | None = None

    async def has(self, blob: Descriptor) -> bool:
        return await self._threads.io(self._has, blob)

    def _has(self, blob: Descriptor) -> bool:
        try:
            return os.lstat(self._blobs / blob.digest[7:]).st_size == blob.size
        except (FileNotFoundError, NotADirectoryError):
            return False

    async def put(self, blob: Descriptor, path: Path, report: Report) -> None:
        await self._threads.io(move, path, self._blobs / blob.digest[7:])
        report(blob.size)

    async def manifest(self, document: Document, top: bool) -> None:
        await self._threads.io(_write, self._blobs / document.digest[7:], document.data)
        if top:
            self._top = document

    async def finish(self) -> None:
        await self._threads.io(self._publish)

    def _publish(self) -> None:
        assert self._top is not None
        entry: dict[str, Any] = {
            "mediaType": self._top.content_type,
            "digest": self._top.digest,
            "size": len(self._top.data),
        }
        if self._name:
            entry["annotations"] = {REF_NAME: self._name}
        with _alone(self._directory):
            others = [item for item in self._entries() if not self._replaces(item)]
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*others, entry]}
            _write(self._directory / "oci-layout", VERSION_FILE)
            _write(self._directory / "index.json", encode(index))

    def _entries(self) -> list[dict[str, Any]]:
        """What index.json has already, as it stands there."""
        import json

        try:
            data = read_bounded(AT_FDCWD, str(self._directory / "index.json"), self._config.manifest_bytes)
        except KernelError:
            return []
        parse_object(data, f"layout {self._directory}: index.json", self._config.json_values)
        entries = json.loads(data).get("manifests") or []
        return [item for item in entries if isinstance(item, dict)]

    def _replaces(self, item: dict[str, Any]) -> bool:
        name = (item.get("annotations") or {}).get(REF_NAME, "")
        assert self._top is not None
        return name == self._name and (bool(name) or item.get("digest") == self._top.digest)


class OciArchive(LayoutTarget):
    """An OCI layout as a tar, written beside and renamed at the end. `scratch` holds the layout until then."""

    def __init__(self, file: Path, name: str, scratch: Path, threads: Threads, config: StoreConfig) -> None:
        super().__init__(scratch, name, threads, config)
        self._file = file

    def _publish(self) -> None:
        super()._publish()
        with archive(self._file) as tar:
            for name in ("oci-layout", "index.json"):
                tar.add_file(name, self._directory / name)
            for blob in sorted(self._blobs.iterdir()):
                tar.add_file(f"blobs/sha256/{blob.name}", blob)


class DirTarget:
    """skopeo's directory transport, version 1.1. What signatures an image had that was there before are no longer."""

    format_type = ""
    layers: str | None = None

    def __init__(self, directory: Path, threads: Threads) -> None:
        self._directory, self._threads = directory, threads
        self._top: Document | None = None
        self._signatures: dict[str, bytes] = {}

    async def has(self, blob: Descriptor) -> bool:
        return False  # what lies there is another image's, perhaps: it is written anew

    async def put(self, blob: Descriptor, path: Path, report: Report) -> None:
        await self._threads.io(move, path, self._directory / blob.digest[7:])
        report(blob.size)

    async def manifest(self, document: Document, top: bool) -> None:
        if top:
            self._top = document
        else:
            name = f"{document.digest[7:]}.manifest.json"
            await self._threads.io(_write, self._directory / name, document.data)

    async def sign(self, document: Document, top: bool, signatures: Sequence[Signature]) -> None:
        prefix = "" if top else f"{document.digest[7:]}."
        for number, one in enumerate(signatures, 1):
            self._signatures[f"{prefix}signature-{number}"] = to_blob(one)

    async def finish(self) -> None:
        await self._threads.io(self._publish)

    def _publish(self) -> None:
        assert self._top is not None
        # In between the manifest of before has the signatures of another, which no policy takes for its own.
        try:
            for old in self._directory.iterdir():
                if _SIGNATURE.fullmatch(old.name):
                    old.unlink()
        except OSError as error:
            raise ImageError(f"remove old signatures in {self._directory}: {errno_text(error)}") from error
        for name, data in self._signatures.items():
            _write(self._directory / name, data)
        _write(self._directory / "version", b"Directory Transport Version: 1.1\n")
        _write(self._directory / "manifest.json", self._top.data)


# --------------------------------------------------------------------------------------------------------------- files


def move(path: Path, to: Path) -> None:
    """A staged file becomes `to`. Raises ImageError."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o644)
        os.rename(path, to)
        sync_directory(to.parent)
    except OSError as error:
        raise ImageError(f"write {to}: {errno_text(error)}") from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of copies into one layout at the same time, one after the other adds its entry. Raises ImageError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"open {directory}: {errno_text(error)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, data, 0o644)
    except OSError as error:
        raise ImageError(f"write {path}: {errno_text(error)}") from error


@contextmanager
def archive(file: Path) -> Iterator[TarWriter]:
    """A tar that is there as `file`, whole and durable, after a block that raised nothing. Raises ImageError."""
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with os.fdopen(fd, "wb") as out:
                tar = TarWriter(out)
                yield tar
                tar.close()
                out.flush()
                os.fsync(out.fileno())
            os.rename(hidden, file)
            sync_directory(file.absolute().parent)
        finally:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        raise ImageError(f"write {file}: {errno_text(error)}") from error
