"""One blob from one registry host into an `Ingest`: a stream while that is quick, else several ranges at once.

    GET, from the offset on ──broken off──> again, from the new offset on
         └─ slow, and much is left ─> GET bytes=a-b │ GET bytes=b-c │ … `ranges` at a time, appended in their order
                                          └─ 200: this server knows no ranges ─> one stream, however slow

One connection over a long or lossy line does not fill it, since each loss and each window halves it alone. Refuses
partial content that is not what was asked for, content encodings, and connections that move less than `stall_bytes` in
`stall_timeout_s` (threats O48, O49). Invariant: what is in the `Ingest` is a true prefix or will fail its digest; no
more than `_AHEAD` times `ranges` parts of `range_bytes` are in memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from imagestore.config import StoreConfig
from imagestore.content import Ingest
from imagestore.model import ContentInvalid, Descriptor
from imagestore.threads import Threads
from imagestore.transport import Answer, Transient, place, worded

if TYPE_CHECKING:
    from imagestore.registry import Repository

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)
# A connection that was cut after moving this much was worth continuing: it does not use up a retry.
_WORTHWHILE = 1 << 20
_ATTEMPTS = 200
_AHEAD = 2


class _Slow(Exception):
    """A stream that may be quicker as several."""


class _NoRanges(Exception):
    """The server answered a range with the whole."""


class Download:
    """One run."""

    def __init__(
        self,
        repository: Repository,
        blob: Descriptor,
        ingest: Ingest,
        report: Callable[[int], None],
        threads: Threads,
        config: StoreConfig,
    ) -> None:
        self._repository, self._blob, self._ingest, self._report = repository, blob, ingest, report
        self._threads, self._config = threads, config
        self._what = f"blob {blob.digest}"
        self._origin = repository.host.origin
        self._may_split = config.ranges > 1

    async def run(self) -> None:
        """Raises ImageNotFound, AccessDenied, RegistryUnavailable, ContentInvalid, ImageError."""
        ingest, repository = self._ingest, self._repository
        failures = attempts = 0
        ingest.resumed = ingest.offset > 0
        while True:
            before, attempts = ingest.offset, attempts + 1
            try:
                if ingest.offset < self._blob.size or self._blob.size == 0:
                    await self._some()
                await self._threads.io(ingest.check)
                return
            except ContentInvalid:
                resumed = ingest.resumed
                await self._threads.io(ingest.restart)
                if not resumed:
                    raise
                # The beginning came from another time or host: one clean try tells who was wrong.
            except (Transient, TimeoutError) as error:
                failures = 0 if ingest.offset - before >= _WORTHWHILE else failures + 1
                if failures > repository.retries or attempts >= _ATTEMPTS:
                    raise repository.final(error, self._what) from None
                await repository.pause(failures, error)

    async def _some(self) -> None:
        try:
            await self._stream()
        except _Slow:
            try:
                await self._ranges()
            except _NoRanges:
                self._may_split = False
                await self._stream()

    # ---------------------------------------------------------------------------------------------------- one stream

    async def _stream(self) -> None:
        ingest = self._ingest
        headers: Mapping[str, str] = {"Range": f"bytes={ingest.offset}-"} if ingest.offset else {}
        async with self._repository.open("GET", f"/blobs/{self._blob.digest}", headers, self._what) as answer:
            await self._align(answer)
            await self._copy(answer)
        if ingest.offset < self._blob.size:
            raise Transient(f"{self._origin}: {self._what}: ended after {ingest.offset} of {self._blob.size} bytes")

    async def _align(self, answer: Answer) -> None:
        """Brings the ingest to the offset that the answer starts at, or refuses the answer (threats O49)."""
        status, ingest, size = answer.response.status, self._ingest, self._blob.size
        if status == 200:
            if ingest.offset:
                await self._threads.io(ingest.restart)  # the server knows no ranges and begins anew
        elif status in (206, 416):
            match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range").strip())
            right = match and int(match[1]) == ingest.offset and match[3] in ("*", str(size))
            if status == 416 or not right:
                await self._threads.io(ingest.restart)
                raise Transient(f"{self._origin}: {self._what}: answered {status} with another part than was asked for")
        else:
            raise ContentInvalid(f"{self._origin}: {self._what}: answered {status}")
        self._refuse_encoding(answer)
        length = answer.response.content_length
        if length is not None and length > size - ingest.offset:
            announced = f"{ingest.offset + length} bytes, announced were {size}"
            raise ContentInvalid(f"{self._origin}: {self._what}: the registry sends {announced}")

    def _refuse_encoding(self, answer: Answer) -> None:
        if answer.header("Content-Encoding").lower() not in ("", "identity"):
            raise ContentInvalid(f"{self._origin}: {self._what}: came with a content encoding, which hides its digest")

    async def _copy(self, answer: Answer) -> None:
        """Body to ingest. What came before a connection broke is a true prefix and is kept."""
        import aiohttp

        base = self._repository.host.base
        content, ingest = answer.response.content, self._ingest
        watch = _Watch(self._config, base)
        patience = _Patience(self._config, self._blob.size) if self._may_split else None
        writer = _Writer(ingest, self._threads, self._config.batch_bytes)
        try:
            while piece := await content.readany():
                watch.moved(len(piece))
                await self._repository.paced(len(piece))
                if await writer.add(piece):
                    self._report(ingest.offset)
                    if patience is not None and patience.is_over(ingest.offset):
                        raise _Slow
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise worded(error, base) from None
        finally:
            await writer.drain()
        self._report(ingest.offset)

    # ------------------------------------------------------------------------------------------------ several ranges

    async def _ranges(self) -> None:
        """The rest in ranges, each by a connection of its own. Raises _NoRanges, and as `run` does."""
        ingest, step = self._ingest, self._config.range_bytes
        # Under way or waiting for what is before them, in the order of their offsets: twice as many as connections, so
        # that those go on while one of them begins anew.
        flying: deque[asyncio.Task[list[bytes]]] = deque()
        following = ingest.offset
        turns = asyncio.Semaphore(self._config.ranges)
        try:
            while flying or following < self._blob.size:
                while following < self._blob.size and len(flying) < _AHEAD * self._config.ranges:
                    end = min(following + step, self._blob.size)
                    flying.append(asyncio.create_task(self._range(following, end, turns)))
                    following = end
                pieces = await flying[0]
                flying.popleft()
                await self._threads.io(ingest.write, pieces)
                self._report(ingest.offset)
        finally:
            for task in flying:
                task.cancel()
            if flying:
                await asyncio.wait(flying)
            for task in flying:
                task.cancelled() or task.exception()  # seen: the first failure is the one that is told

    async def _range(self, begin: int, end: int, turns: asyncio.Semaphore) -> list[bytes]:
        """The bytes of [begin, end), of as many connections one after another as it takes."""
        async with turns:
            return await self._whole(begin, end)

    async def _whole(self, begin: int, end: int) -> list[bytes]:
        pieces: list[bytes] = []
        got = failures = 0
        while begin + got < end:
            before = got
            try:
                async for piece in self._part(begin + got, end):
                    pieces.append(piece)
                    got += len(piece)
            except (Transient, TimeoutError) as error:
                failures = 0 if got - before >= _WORTHWHILE // 4 else failures + 1
                if failures > self._repository.retries:
                    raise self._repository.final(error, self._what) from None
                await self._repository.pause(failures, error)
        return pieces

    async def _part(self, begin: int, end: int) -> AsyncIterator[bytes]:
        import aiohttp

        headers = {"Range": f"bytes={begin}-{end - 1}"}
        base = self._repository.host.base
        async with self._repository.open("GET", f"/blobs/{self._blob.digest}", headers, self._what) as answer:
            if answer.response.status == 200:
                raise _NoRanges
            match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range").strip())
            right = match and (int(match[1]), int(match[2])) == (begin, end - 1)
            if answer.response.status != 206 or not right or (match and match[3] not in ("*", str(self._blob.size))):
                raise _NoRanges
            self._refuse_encoding(answer)
            watch = _Watch(self._config, base)
            try:
                while piece := await answer.response.content.readany():
                    watch.moved(len(piece))
                    await self._repository.paced(len(piece))
                    begin += len(piece)
                    if begin > end:
                        raise ContentInvalid(f"{self._origin}: {self._what}: a part is longer than was asked for")
                    yield piece
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                raise worded(error, base) from None
        if begin < end:
            raise Transient(f"{self._origin}: {self._what}: a part ended {end - begin} bytes early")


class _Patience:
    """Whether a stream should go on as one: not when it is slow and much is left."""

    __slots__ = ("_began", "_config", "_from", "_size")

    def __init__(self, config: StoreConfig, size: int) -> None:
        self._config, self._size = config, size
        self._began, self._from = time.monotonic(), -1

    def is_over(self, offset: int) -> bool:
        if self._from < 0:
            self._began, self._from = time.monotonic(), offset
        took = time.monotonic() - self._began
        if took < self._config.range_after_s or self._size - offset < 2 * self._config.range_bytes:
            return False
        return (offset - self._from) / took < self._config.range_below


class _Writer:
    """Hashes and writes in a worker thread while the loop collects the next batch: no thread switch per packet."""

    __slots__ = ("_batch", "_failed", "_ingest", "_limit", "_running", "_size", "_threads")

    def __init__(self, ingest: Ingest, threads: Threads, limit: int) -> None:
        self._ingest, self._threads, self._limit = ingest, threads, limit
        self._batch: list[bytes] = []
        self._size = 0
        self._running: asyncio.Future[None] | None = None
        self._failed = False

    async def add(self, piece: bytes) -> bool:
        """True when a batch was handed over. Waits when the disk is slower than the wire, and so the wire waits too.
        Raises what writing raised."""
        self._batch.append(piece)
        self._size += len(piece)
        busy = self._running is not None and not self._running.done()
        if self._size < self._limit or (busy and self._size < 2 * self._limit):
            return False
        await self._turn()
        return True

    async def drain(self) -> None:
        """Writes what is left. After a failure there is nothing left to write."""
        while not self._failed and (self._batch or self._running is not None):
            await self._turn()

    async def _turn(self) -> None:
        running = self._running
        if running is not None:
            await asyncio.wait({running})  # unlike awaiting it, this does not abandon the thread when cancelled
            self._running = None
            if running.exception() is not None:
                self._failed = True
                running.result()
        if self._batch:
            self._running = self._threads.start_io(self._ingest.write, self._batch)
            self._batch, self._size = [], 0


class _Watch:
    """Fails a transfer that hardly moves. It is asked when bytes arrive; silence ends by the socket's own timeout."""

    __slots__ = ("_floor", "_got", "_since", "_url", "_window")

    def __init__(self, config: StoreConfig, url: str) -> None:
        self._window, self._floor, self._url = config.stall_timeout_s, config.stall_bytes, url
        self._since, self._got = time.monotonic(), 0

    def moved(self, count: int) -> None:
        self._got += count
        now = time.monotonic()
        if now - self._since >= self._window:
            if self._got < self._floor:
                raise Transient(f"{place(self._url)}: stalled, {self._got} bytes in {now - self._since:.0f} s")
            self._since, self._got = now, 0
