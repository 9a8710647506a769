"""What pulls, imports and repairs of one store have in common: their turn, leases and worker threads, the question to
the signature policy, the record at the end, and who watches.

    session ─> turn ─> worker threads ─> leases ─> the work ─> leases and threads are given back, whatever happened

For the store's event loop. Refuses to record what is not whole. Invariant: what a piece of work has leased stays until
it is recorded, or has failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from imagestore.catalog import Catalog
from imagestore.config import StoreConfig
from imagestore.leases import Leases
from imagestore.model import Credentials, Image, ImageError, KeyFile, Progress, ProgressFunction
from imagestore.platforms import Platform
from imagestore.policy import Requirements
from imagestore.pull import Held, Pulled, Puller
from imagestore.records import Records
from imagestore.reference import Reference
from imagestore.remotes import Remotes
from imagestore.scopes import in_registry
from imagestore.shared import Slots
from imagestore.source import RegistrySource
from imagestore.threads import Threads
from imagestore.transport import Transport
from imagestore.trust import Finder, Gate, Trust

T = TypeVar("T")


class Frame:
    """The frame of one store."""

    def __init__(
        self,
        records: Records,
        catalog: Catalog,
        leases: Leases,
        puller: Puller,
        remotes: Remotes,
        transport: Transport,
        trust: Trust,
        threads: Threads,
        config: StoreConfig,
    ) -> None:
        self.threads, self.transport, self.puller, self.trust, self.config = threads, transport, puller, trust, config
        self._records, self._catalog, self._leases, self._remotes = records, catalog, leases, remotes
        self._watchers: list[Callable[[str, Progress], None]] = []
        self._turns = Slots(config.concurrent_pulls)

    async def session(
        self, work: Callable[[Held], Awaitable[T]], keys: tuple[KeyFile, ...] = (), platform: Platform | None = None
    ) -> T:
        """The outcome of `work`, which has all of it."""
        async with self._turns.here():
            turns = asyncio.Semaphore(self.config.concurrent_downloads)
            held = Held(turns, platform or self.config.platform, keys)
            self.threads.enter()
            try:
                # Blocks while another process collects; entered for certain, so that `leave` is right.
                entering = self.threads.start_io(self._leases.enter)
                try:
                    await asyncio.wait({entering})
                    entering.result()
                    return await work(held)
                finally:
                    if entering.done() and not entering.cancelled() and entering.exception() is None:
                        self._leases.leave(held.blobs, held.layers)
                        self.puller.unpacking.reap()
                    else:
                        entering.add_done_callback(self._leave_late)
            finally:
                self.threads.leave()

    def _leave_late(self, entering: asyncio.Future[None]) -> None:
        if not entering.cancelled() and entering.exception() is None:
            self._leases.leave(set(), set())

    # ------------------------------------------------------------------------------------------------- registries

    async def source(self, wanted: Reference, credentials: Credentials | None) -> RegistrySource:
        """With the transport open. Raises ImageError and its kinds."""
        return RegistrySource(wanted, await self._remotes.repositories(wanted, credentials))

    def gate(self, source: RegistrySource, requirements: Requirements, namespace: str = "") -> Gate:
        """What asks the policy about an image of a registry."""
        finder = Finder(source.reference, source, self.transport, self.config)
        return Gate(self.trust, in_registry(source.reference), requirements, finder, namespace)

    # ---------------------------------------------------------------------------------------------------- the end

    async def record(self, called: Reference, pulled: Pulled, served: str, gate: Gate) -> Image:
        """The image, which is visible from now on. Raises ImageError."""
        return await self.threads.io(self._record, called, pulled, served, gate)

    def _record(self, called: Reference, pulled: Pulled, served: str, gate: Gate) -> Image:
        record = self._records.put(called, pulled.image_id, pulled.manifest, served, gate.origin(), pulled.index)
        image = self._catalog.image(record, again=True)
        if image is None:
            raise ImageError(f"image {pulled.image_id}: something outside removed parts of it; pull it again")
        return image

    # --------------------------------------------------------------------------------------------------- watchers

    @contextmanager
    def watched(self, listener: Callable[[str, Progress], None]) -> Iterator[None]:
        """While the block lasts, `listener` is told of every step of every pull and import, on their event loop."""
        self._watchers.append(listener)
        try:
            yield
        finally:
            self._watchers.remove(listener)

    def also(self, called: str, tell: ProgressFunction) -> ProgressFunction:
        """`tell`, and those who watch, who learn what is `called` so."""

        def both(step: Progress) -> None:
            tell(step)
            for listener in tuple(self._watchers):
                listener(called, step)

        return both
