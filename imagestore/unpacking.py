"""Layers on their way through the unpacker: one job for each, whoever waits for it, ended when nobody does.

    wanted ──> job in a worker thread ──> committed          every pull that waits gets the outcome
                 └─ nobody wants it any more ──> doomed ──> told to stop until it has

A layer is unpacked before its parent is there and then waits for it, inside the unpacker. Refuses to leave such a wait
behind when the parent will not come. Invariant: a job that another pull has leased the layer of is not doomed, and a
job that is doomed is not joined.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from imagestore.artifacts import unpack_type
from imagestore.content import errno_text
from imagestore.growth import Growth
from imagestore.leases import Leases
from imagestore.model import ContentInvalid, Early, ImageError, Layer, LayerKey, Unpacker
from imagestore.threads import Threads

# An unpacker that is told to stop a moment before it has begun does not hear it: it is told again.
_TELL_AGAIN_S = 0.05


class _Job:
    __slots__ = ("_doomed", "_growth", "future")

    def __init__(self, future: Future[None], growth: Growth | None) -> None:
        self.future = future
        self._growth = growth
        self._doomed = False

    @property
    def doomed(self) -> bool:
        return self._doomed or (self._growth is not None and self._growth.given_up)

    def ended(self) -> asyncio.Future[None]:
        """For the running loop. Its failure is `future`'s: asyncio must not complain that nobody asked for it here."""
        ended = asyncio.wrap_future(self.future)
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        return ended

    def doom(self) -> None:
        self._doomed = True


class Unpacking:
    """The jobs of one store. Event loop only; `patience_s` is how long a cancelled caller waits for its job's end."""

    def __init__(self, unpacker: Unpacker, leases: Leases, threads: Threads, patience_s: float) -> None:
        self._unpacker = unpacker
        self._leases = leases
        self._threads = threads
        self._patience_s = patience_s
        self._jobs: dict[str, _Job] = {}
        self.can_cancel = hasattr(unpacker, "cancel")
        """Whether the unpacker can be told to stop waiting for a parent. Its Protocol leaves that open."""
        self.can_begin_early = isinstance(unpacker, Early)

    async def unpack(self, layer: Layer, blob: Path | Growth, parent: str | None, key: LayerKey | None = None) -> None:
        """After: the layer is committed. Only where `can_begin_early` may `blob` be a Growth. Raises ContentInvalid,
        ImageError."""
        job = self._jobs.get(layer.chain_id)
        if job is not None and job.doomed:
            await self._end(layer.chain_id, job, None)
            job = self._jobs.get(layer.chain_id)
        if job is None:
            job = self._start(layer, blob, parent, key)
        try:
            await asyncio.wait({job.ended()})
        except asyncio.CancelledError:
            if self._leases.holders(layer.chain_id) <= 1:
                await self._end(layer.chain_id, job, self._patience_s)
            raise
        error = job.future.exception()
        if isinstance(error, OSError):
            raise ImageError(f"unpack layer {layer.blob.digest}: {errno_text(error)}") from error
        if isinstance(error, Exception):
            raise ContentInvalid(f"unpack layer {layer.blob.digest}: {error}") from error
        job.future.result()

    def reap(self) -> None:
        """After a pull gave its leases back: ends what others were to finish and now nobody wants."""
        for chain_id, job in tuple(self._jobs.items()):
            if self._leases.holders(chain_id) == 0:
                self._doom(chain_id, job)

    def _start(self, layer: Layer, blob: Path | Growth, parent: str | None, key: LayerKey | None) -> _Job:
        chain_id, unpacker = layer.chain_id, self._unpacker
        growth = blob if isinstance(blob, Growth) else None
        call: Callable[..., None] = unpacker.unpack_layer
        if growth is not None and isinstance(unpacker, Early):
            call = unpacker.unpack_arriving
        future = self._threads.start_unpack(call, blob, unpack_type(layer), layer.diff_id, chain_id, parent, key)
        job = self._jobs[chain_id] = _Job(future, growth)

        def forget(_: Future[None]) -> None:
            if self._jobs.get(chain_id) is job:
                del self._jobs[chain_id]

        job.future.add_done_callback(forget)
        return job

    def _doom(self, chain_id: str, job: _Job) -> None:
        job.doom()
        if not job.future.cancel() and self.can_cancel:
            self._unpacker.cancel(chain_id)  # type: ignore[attr-defined]

    async def _end(self, chain_id: str, job: _Job, patience_s: float | None) -> None:
        """Waits for a job that nobody wants, and sees to it that it does not wait for anything itself."""
        began = time.monotonic()
        ended = job.ended()
        while not job.future.done() and (patience_s is None or time.monotonic() - began < patience_s):
            self._doom(chain_id, job)
            await asyncio.wait({ended}, timeout=_TELL_AGAIN_S)
