"""Work that several callers want at once and that is done once.

Event loop only. Refuses to outlive its callers: when the last of them is cancelled the work is cancelled too, and the
caller waits until it has let go. Invariant: every caller gets the result, or its own copy of the failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E")


class SharedWork(Generic[T, E]):
    """Running pieces of work by key. `tell` spreads an event to the listeners of all who wait for that work."""

    def __init__(self, patience_s: float) -> None:
        self._running: dict[Hashable, _Work[T, E]] = {}
        self._patience_s = patience_s

    async def join(
        self,
        key: Hashable,
        start: Callable[[Callable[[E], None]], Awaitable[T]],
        listener: Callable[[E], None] | None,
    ) -> T:
        """The result of the work under `key`, started when nobody does it yet."""
        work = self._running.get(key)
        if work is None or work.abandoned:
            work = _Work(start)
            self._running[key] = work
            work.task.add_done_callback(lambda task: self._forget(key, work, task))
        return await work.wait(listener, self._patience_s)

    def _forget(self, key: Hashable, work: _Work[T, E], task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # seen: asyncio must not complain about a failure that nobody waited for any more
        if self._running.get(key) is work:
            del self._running[key]


class _Work(Generic[T, E]):
    def __init__(self, start: Callable[[Callable[[E], None]], Awaitable[T]]) -> None:
        self._listeners: list[Callable[[E], None]] = []
        self._waiters = 0
        self.abandoned = False

        async def run() -> T:
            return await start(self._tell)

        self.task: asyncio.Task[T] = asyncio.create_task(run())

    def _tell(self, event: E) -> None:
        for listener in tuple(self._listeners):
            listener(event)

    async def wait(self, listener: Callable[[E], None] | None, patience_s: float) -> T:
        self._waiters += 1
        if listener is not None:
            self._listeners.append(listener)
        try:
            await asyncio.wait({self.task})  # a cancelled caller does not take the others' work with it
        finally:
            self._waiters -= 1
            if listener is not None:
                self._listeners.remove(listener)
            if self._waiters == 0 and not self.task.done():
                self.abandoned = True
                self.task.cancel()
                await asyncio.wait({self.task}, timeout=patience_s)
        return self.task.result()


class Slots:
    """A semaphore that serves whichever event loop runs: a program may have one loop after another."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._loop: asyncio.AbstractEventLoop | None = None
        self._semaphore = asyncio.Semaphore(count)

    def here(self) -> asyncio.Semaphore:
        """The semaphore of the running loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._semaphore = loop, asyncio.Semaphore(self._count)
        return self._semaphore


class Flights:
    """One at a time per key: for whoever comes second the work is usually done when its turn comes."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, list[Callable[[str, int], None]]]] = {}

    @asynccontextmanager
    async def turn(self, key: str, listener: Callable[[str, int], None]) -> AsyncIterator[Callable[[str, int], None]]:
        """Waits for the turn; yields a function that tells every waiter of `key` (phase, done)."""
        lock, listeners = self._locks.setdefault(key, (asyncio.Lock(), []))
        listeners.append(listener)

        def announce(phase: str, done: int) -> None:
            for tell in tuple(listeners):
                tell(phase, done)

        try:
            async with lock:
                yield announce
        finally:
            listeners.remove(listener)
            if not listeners:
                del self._locks[key]


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the group; what followed from cancelling the others says nothing."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
