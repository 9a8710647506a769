"""Where an image's bytes come from: a registry behind its mirrors, or a directory that is an OCI image layout.

A source hands over bytes; it decides nothing about images. Refuses, as a registry source, hosts without the capability
that is asked for. Invariant: hosts are asked in the order of hosts.toml, the registry itself last; its error is the
one that is raised, with what its mirrors said behind it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from imagestore.config import StoreConfig
from imagestore.content import Ingest, errno_text
from imagestore.layout import REF_NAME
from imagestore.manifest import descriptor, digest_of
from imagestore.model import ContentInvalid, Descriptor, ImageError, ImageNotFound, RegistryUnavailable
from imagestore.reference import Reference
from imagestore.registry import Document, Report, Repository
from imagestore.strict_json import parse_object
from imagestore.threads import Threads
from imagestore.transport import Transient
from runtime.linux.files import AT_FDCWD, read_bounded

T = TypeVar("T")


class Source(Protocol):
    """What a pull needs. Errors are ImageError and its kinds."""

    async def top(self) -> Document:
        """The manifest or index that the image's name means there."""
        ...

    async def manifest(self, wanted: Descriptor) -> Document:
        """A manifest by digest, verified."""
        ...

    async def blob(self, wanted: Descriptor, ingest: Ingest, report: Report) -> None:
        """All of a blob into `ingest`, verified, not yet finished."""
        ...


class RegistrySource:
    """A reference's image from the first host that has it."""

    def __init__(self, reference: Reference, repositories: Sequence[Repository]) -> None:
        self._reference = reference
        self._repositories = list(repositories)
        self._silent: set[Repository] = set()

    async def top(self) -> Document:
        resolving = not self._reference.digest
        return await self._first(lambda host: host.manifest(self._reference.target), resolving=resolving)

    async def digest(self) -> str | None:
        """The digest of the tag without fetching its manifest, where the host tells it."""
        return await self._first(lambda host: host.digest(self._reference.target), resolving=True)

    async def manifest(self, wanted: Descriptor) -> Document:
        return await self._first(lambda host: host.manifest(wanted.digest))

    async def blob(self, wanted: Descriptor, ingest: Ingest, report: Report) -> None:
        await self._first(lambda host: host.blob(wanted, ingest, report))

    async def _first(self, ask: Callable[[Repository], Awaitable[T]], *, resolving: bool = False) -> T:
        able = [host for host in self._repositories if (host.host.resolve if resolving else host.host.pull)]
        if not able:
            kind = "resolve tags" if resolving else "be pulled from"
            raise ImageNotFound(f"no host of {self._reference.domain} in hosts.toml may {kind}")
        # A mirror that could not be reached for one thing is not waited for again for each of the others.
        hosts = [host for host in able if host not in self._silent] or able
        said: list[str] = []
        for host in hosts[:-1]:
            try:
                return await ask(host)
            except ImageError as error:
                if type(error) is ImageError:
                    raise  # not the host's fault: our disk, our configuration
                if isinstance(error, RegistryUnavailable):
                    self._silent.add(host)
                said.append(f"mirror {error}")
        try:
            return await ask(hosts[-1])
        except ImageError as error:
            if not said or type(error) is ImageError:
                raise
            kind_of = RegistryUnavailable if isinstance(error, Transient) else type(error)
            raise kind_of("; ".join([str(error), *said[:3]])) from None


class LayoutSource:
    """An image of an OCI layout directory: index.json's entry with the name `tag`, or its only one."""

    def __init__(self, directory: Path, tag: str, threads: Threads, config: StoreConfig) -> None:
        self._directory = directory
        self._tag = tag
        self._threads = threads
        self._config = config

    async def top(self) -> Document:
        return await self._threads.io(self._top)

    def _top(self) -> Document:
        path = self._directory / "index.json"
        document = parse_object(self._read(path, self._config.manifest_bytes), str(path), self._config.json_values)
        found = [
            descriptor(item, self._config.manifest_bytes)
            for item in document.objects("manifests", self._config.index_manifests)
        ]
        named = [item for item in found if item.annotations.get(REF_NAME) == self._tag] if self._tag else found
        if len(named) != 1:
            names = ", ".join(sorted(item.annotations.get(REF_NAME, "(no name)") for item in found)[:12])
            wanted = f"named {self._tag!r}" if self._tag else "without a name to choose it by"
            raise ImageNotFound(
                f"layout {self._directory}: {len(named)} images {wanted}; there is {names or 'nothing'}"
            )
        return self._manifest(named[0])

    async def manifest(self, wanted: Descriptor) -> Document:
        return await self._threads.io(self._manifest, wanted)

    def _manifest(self, wanted: Descriptor) -> Document:
        data = self._read(self._path(wanted), self._config.manifest_bytes)
        if digest_of(data) != wanted.digest or len(data) != wanted.size:
            raise ContentInvalid(f"layout {self._directory}: manifest {wanted.digest} has other content")
        return Document(data, wanted.media_type, wanted.digest)

    async def blob(self, wanted: Descriptor, ingest: Ingest, report: Report) -> None:
        await self._threads.io(self._copy, wanted, ingest)
        report(ingest.offset)

    def _copy(self, wanted: Descriptor, ingest: Ingest) -> None:
        ingest.restart()
        path = self._path(wanted)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise self._unreadable(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ContentInvalid(f"layout {self._directory}: blob {wanted.digest} is no regular file")
            while piece := os.read(fd, self._config.batch_bytes):
                ingest.write([piece])
        finally:
            os.close(fd)
        ingest.check()

    def _path(self, wanted: Descriptor) -> Path:
        return self._directory / "blobs" / "sha256" / wanted.digest.removeprefix("sha256:")

    def _read(self, path: Path, limit: int) -> bytes:
        try:
            return read_bounded(AT_FDCWD, str(path), limit)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, error: OSError) -> ImageError:
        kind = ImageNotFound if isinstance(error, FileNotFoundError) or error.errno == 2 else ImageError
        return kind(f"layout {self._directory}: read {path.name}: {errno_text(error)}")
