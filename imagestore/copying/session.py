"""The frame of copies: transport, worker threads and staging exist as long as it does; places become sources, targets.

Refuses to guess: a place that cannot be written to, or that holds several images, is an error that lists what there is.
Invariant: whatever happens, the staging directory is gone at the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from imagestore.config import StoreConfig
from imagestore.content import Blobs, errno_text
from imagestore.copying.copy import Copy, CopyOptions
from imagestore.copying.docker_archive import DockerArchiveTarget
from imagestore.copying.local_sources import DirSource, StoredSource
from imagestore.copying.places import Place
from imagestore.copying.scratch import scratch
from imagestore.copying.signatures import Carrying, InRegistry, Signable, Signed
from imagestore.copying.targets import DirTarget, LayoutTarget, OciArchive, RegistryTarget, Target
from imagestore.local import DirectoryFiles, DockerArchive, LocalSource, TarFiles
from imagestore.model import Credentials, ImageError, ProgressFunction, ReferenceInvalid
from imagestore.pull import Admit
from imagestore.reference import Reference, parse
from imagestore.registry import Document, Repository
from imagestore.remotes import Remotes
from imagestore.scopes import in_file, in_registry
from imagestore.signing import Signer
from imagestore.source import RegistrySource, Source
from imagestore.threads import Threads
from imagestore.transport import Transport, preload
from imagestore.trust import Finder, Finds, Gate, Trust
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Access:
    """How the registry of one side is reached: with a login, or a file of logins; and whether it has to prove who it
    is."""

    credentials: Credentials | None = None
    authfile: Path | None = None
    verify: bool = True


_USUAL = Access()


class Session:
    """Made by `session`."""

    def __init__(self, config: StoreConfig, scratch: Path, threads: Threads, transport: Transport) -> None:
        self.config, self.scratch, self.threads = config, scratch, threads
        self._transport = transport

    def _remotes(self, access: Access) -> Remotes:
        config = self.config
        if access.authfile is not None:
            config = replace(config, keyring=replace(config.keyring, files=(access.authfile,)))
        return Remotes(self._transport, self.threads, config, verify=access.verify)

    async def policy(self, place: Place, source: Source) -> Admit:
        """What asks the signature policy about the image at `place`, of which `source` was made. Raises PolicyInvalid,
        and SignatureRefused where that is decided already."""
        trust = Trust(self.config)
        if isinstance(source, RegistrySource):
            subject = in_registry(source.reference)
            finder: Finds | None = Finder(source.reference, source, self._transport, self.config)
        else:
            subject, finder = in_file(place.kind, place.path), source if isinstance(source, DirSource) else None
        return Gate(trust, subject, await self.threads.io(trust.before, subject), finder).admit

    async def source(self, place: Place, access: Access = _USUAL) -> Source:
        """Raises ImageError and its kinds."""
        config, threads = self.config, self.threads
        match place.kind:
            case "docker":
                remotes = self._remotes(access)
                wanted = (await threads.io(remotes.candidates, place.name))[0]
                return RegistrySource(wanted, await remotes.repositories(wanted, access.credentials))
            case "oci":
                return LocalSource(DirectoryFiles(place.path), f"layout {place.path}", place.name, threads, config)
            case "oci-archive":
                return LocalSource(TarFiles(place.path), f"archive {place.path}", place.name, threads, config)
            case "docker-archive":
                return DockerArchive(TarFiles(place.path), f"archive {place.path}", place.name, threads, config)
            case "dir":
                return DirSource(DirectoryFiles(place.path), f"directory {place.path}", "", threads, config)
        raise ReferenceInvalid(f"{place}: nothing can be copied from there without the store")

    def stored(self, root: Path, manifest_digest: str) -> Source:
        """An image of the store in `root`, of which the caller knows that it is there."""
        return StoredSource(DirectoryFiles(root), f"store {root}", manifest_digest, self.threads, self.config)

    async def repository(self, place: Place, access: Access, actions: str) -> Repository:
        """As Remotes.repository."""
        return await self._remotes(access).repository(parse(place.name), access.credentials, actions)

    async def target(self, place: Place, source: Place, access: Access = _USUAL) -> Target:
        """Raises ImageError and its kinds."""
        config, threads = self.config, self.threads
        match place.kind:
            case "docker":
                wanted = parse(place.name)
                repository = await self.repository(place, access, "pull,push")
                return RegistryTarget(repository, threads, config, wanted, _origin(source, wanted))
            case "oci":
                return LayoutTarget(place.path, place.name, threads, config)
            case "oci-archive":
                return OciArchive(place.path, place.name, self._inner("layout"), threads, config)
            case "docker-archive":
                target = DockerArchiveTarget(place.path, self._inner("docker"), threads, config)
                target.called((_full(place.name),) if place.name else ())
                return target
            case "dir":
                return DirTarget(place.path, threads)
        raise ReferenceInvalid(f"{place}: nothing can be copied there")

    def carrying(
        self,
        source: Source,
        place: Place,
        target: Target,
        *,
        remove: bool = False,
        signer: Signer | None = None,
        name: str = "",
    ) -> Carrying:
        """The signatures of a copy from `source` to `target` at `place`, which is signed by `signer`, as `name` or as
        it is called there. Without those of the source with `remove`. Raises ImageError."""
        signed: Signed | None = source if isinstance(source, DirSource) else None
        if isinstance(source, RegistrySource):
            signed = Finder(source.reference, source, self._transport, self.config, unsaid=False)
        signable: Signable | None = target if isinstance(target, DirTarget) else None
        if isinstance(target, RegistryTarget):
            signable = InRegistry(target.reference, target.attaching, self.threads, self.config)
            name = name or str(target.reference)
        return Carrying(None if remove else signed, signable, str(place), signer, name)

    def _inner(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))

    async def copy(
        self,
        source: Source,
        target: Target,
        options: CopyOptions,
        tell: ProgressFunction = lambda _: None,
        admit: Admit | None = None,
        carrying: Carrying | None = None,
    ) -> Document:
        """Copies, and leaves `finish` to the caller, who may have more to copy to the same target."""
        staging = Blobs(self._inner("staging"))
        staging.create()
        return await Copy(source, target, staging, self.threads, self.config, options, tell, admit, carrying).run()


@asynccontextmanager
async def session(config: StoreConfig, beside: Path | None = None) -> AsyncIterator[Session]:
    """`beside` is where the staging directory is made: on the filesystem that the target is on, so that a blob can be
    renamed there; else where large temporary files go, since /tmp may be memory."""
    with ExitStack() as held:
        try:
            if beside is not None:
                beside.mkdir(parents=True, exist_ok=True)
            staging = held.enter_context(scratch(beside or Path(os.environ.get("TMPDIR") or "/var/tmp")))
        except OSError as error:
            raise ImageError(f"make a staging directory: {errno_text(error)}") from error
        threads = Threads(config.concurrent_downloads + 2, 1, 1)
        threads.enter()
        try:
            await threads.io(preload)
            transport = Transport(config)
            async with transport.open():
                yield Session(config, staging, threads, transport)
        finally:
            threads.leave()


def beside(target: Place) -> Path | None:
    """Where staged blobs can be renamed from."""
    if target.kind in ("oci", "dir"):
        return target.path
    return None if target.kind in ("docker", "ocid") else target.path.absolute().parent


def _origin(source: Place, wanted: Reference) -> str:
    """The repository that blobs may be mounted from."""
    if source.kind != "docker":
        return ""
    origin = parse(source.name)
    return origin.path if origin.domain == wanted.domain and origin.path != wanted.path else ""


def _full(name: str) -> str:
    return str(parse(name)) if name else ""
