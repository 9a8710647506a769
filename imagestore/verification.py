"""What the signature policy says of an image in a registry, without pulling it: `ocid verify`.

Nothing is kept and nothing but manifests and signatures is fetched. Refuses nothing itself: the verdict says whether a
pull would be refused, and why. Invariant: the verdict is the one that a pull at the same moment would be given.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from imagestore.config import StoreConfig
from imagestore.model import Credentials, ImageNotFound
from imagestore.reference import Reference
from imagestore.remotes import Remotes
from imagestore.resolve import resolve
from imagestore.scopes import in_registry
from imagestore.source import RegistrySource
from imagestore.threads import Threads
from imagestore.transport import Transport, preload
from imagestore.trust import Finder, Trust, timestamp_authorities
from imagestore.verdict import Verdict, judge, needs_signatures
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Reach:
    """The way to registries for the length of a command."""

    config: StoreConfig
    transport: Transport
    threads: Threads
    remotes: Remotes


@asynccontextmanager
async def reaching(config: StoreConfig) -> AsyncIterator[Reach]:
    """Ends pools and threads at the end."""
    preload()
    threads = Threads(4, 1, 1)
    threads.enter()
    transport = Transport(config)
    try:
        async with transport.open():
            yield Reach(config, transport, threads, Remotes(transport, threads, config))
    finally:
        threads.leave()


@dataclass(frozen=True, slots=True)
class Found:
    """An image in a registry: what it is called, the digest of what that led to, and of the platform's manifest."""

    reference: Reference
    source: RegistrySource
    top: str
    manifest: str

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.manifest, self.top)))


async def find(reach: Reach, text: str, credentials: Credentials | None) -> Found:
    """The image that `text` means. Raises ImageError and its kinds."""
    failure: ImageNotFound | None = None
    for reference in await reach.threads.io(reach.remotes.candidates, text):
        source = RegistrySource(reference, await reach.remotes.repositories(reference, credentials))
        try:
            top = await source.top()
        except ImageNotFound as error:
            failure = failure or error
            continue
        document, _ = await resolve(source, top, reach.threads, reach.config)
        return Found(reference, source, top.digest, document.digest)
    raise failure or ImageNotFound(f"{text}: no such image")


async def verify(reach: Reach, text: str, credentials: Credentials | None) -> Verdict:
    """Raises ImageError and its kinds."""
    config = reach.config
    policy = await reach.threads.io(Trust(config).policy)
    found = await find(reach, text, credentials)
    subject = in_registry(found.reference)
    _, requirements = policy.requirements(subject)
    signatures = []
    if needs_signatures(requirements):
        finder = Finder(found.reference, found.source, reach.transport, config)
        signatures = await finder.find(found.digests, requirements)
    return judge(
        policy,
        subject,
        found.digests,
        signatures,
        time.time(),
        unnamed=config.accept_unnamed_bundles,
        timestamps=timestamp_authorities(config),
    )
