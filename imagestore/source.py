"""Where an image's bytes come from. Here: a registry behind its mirrors; imagestore.local has layouts and archives.

A source hands over bytes; it decides nothing about images. Refuses, as a registry source, hosts without the capability
that is asked for. Invariant: hosts are asked in the order of hosts.toml, the registry itself last; its error is the
one that is raised, with what its mirrors said behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from imagestore.content import Ingest
from imagestore.model import AccessDenied, Descriptor, ImageError, ImageNotFound, RegistryUnavailable
from imagestore.reference import Reference
from imagestore.registry import Document, Report, Repository
from imagestore.transport import Transient

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
        self.reference = reference
        self._repositories = list(repositories)
        self._silent: set[Repository] = set()

    async def top(self) -> Document:
        resolving = not self.reference.digest
        return await self._first(lambda host: host.manifest(self.reference.target), resolving=resolving)

    async def digest(self) -> str | None:
        """The digest of the tag without fetching its manifest, where the host tells it."""
        return await self._first(lambda host: host.digest(self.reference.target), resolving=True)

    async def manifest(self, wanted: Descriptor) -> Document:
        return await self._first(lambda host: host.manifest(wanted.digest))

    async def small(self, path: str, what: str, limit: int, accept: str = "*/*") -> bytes:
        """What one path of the repository answers, unverified."""
        return await self._first(lambda host: host.small(path, what, limit, accept))

    async def blob(self, wanted: Descriptor, ingest: Ingest, report: Report) -> None:
        await self._first(lambda host: host.blob(wanted, ingest, report))

    async def pages(self, path: str, what: str, accept: str) -> list[bytes]:
        """The same for what may come in pages."""
        return await self._first(lambda host: host.pages(path, what, accept))

    async def ask(self, ask: Callable[[Repository], Awaitable[T]]) -> T:
        """What the first host answers that does not fail."""
        return await self._first(ask)

    async def _first(self, ask: Callable[[Repository], Awaitable[T]], *, resolving: bool = False) -> T:
        able = [host for host in self._repositories if (host.host.resolve if resolving else host.host.pull)]
        if not able:
            kind = "resolve tags" if resolving else "be pulled from"
            raise ImageNotFound(f"no host of {self.reference.domain} in hosts.toml may {kind}")
        # A mirror that could not be reached for one thing is not waited for again for each of the others.
        left = [host for host in able if host not in self._silent] or able
        said: list[str] = []
        while True:
            host = left.pop(0)
            try:
                found = await ask(host)
            except ImageError as error:
                if type(error) is ImageError:
                    raise  # not the host's fault: our disk, our configuration
                if isinstance(error, (ImageNotFound, AccessDenied)):
                    left = self._settled(host, left)
                if not left:
                    if not said:
                        raise
                    kind_of = RegistryUnavailable if isinstance(error, Transient) else type(error)
                    raise kind_of("; ".join([str(error), *said[:3]])) from None
                if isinstance(error, RegistryUnavailable):
                    self._silent.add(host)
                said.append(f"mirror {error}")
            else:
                self._settled(host, left)
                return found

    def _settled(self, host: Repository, left: list[Repository]) -> list[Repository]:
        """What is left to ask once `host` has answered. A registry that need not prove who it is may be spoken to with
        TLS or without: once it is known how, it is not asked in the other way, which can only fail."""
        twins = {one for one in self._repositories if one.host.is_twin(host.host)}
        self._repositories = [one for one in self._repositories if one not in twins]
        return [one for one in left if one not in twins]
