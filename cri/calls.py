"""Work that outlives its caller: tasks of their own, one for equal calls, and locks by key.

Refuses to cancel anything: a client that hangs up ends its wait, not the work (threats R11, O1, O54). Invariant: a
name is never reserved without a task that works on it or a record that has it (threats O6).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from cri.errors import AlreadyExists

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_UNCLAIMED = 1024


class Locks:
    """An asyncio.Lock per key, there only while somebody holds or wants it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def held(self, key: str) -> AsyncIterator[None]:
        """Holds the lock of `key`."""
        lock, users = self._locks.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)


class Tasks:
    """Detached tasks, kept alive until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()

    def background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Starts `work` that nobody needs to see the end of: `drain` breaks it off."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts `work`; a failure that nobody awaits is logged."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("task %s: %s", task.get_name(), error)

    async def finish(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Runs `work` to its end even when the caller is cancelled meanwhile."""
        return await asyncio.shield(self.spawn(work, name))

    async def drain(self, seconds: float) -> int:
        """Waits for what is running, at most so long; returns how many are left."""
        for task in list(self._background):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        return len(self._tasks)


class _Call(Generic[T]):
    """One piece of work on a name: who asked for it, and how many still wait."""

    __slots__ = ("fingerprint", "task", "waiting")

    def __init__(self, fingerprint: bytes, task: asyncio.Task[T]) -> None:
        self.fingerprint = fingerprint
        self.task = task
        self.waiting = 0


class Reservations(Generic[T]):
    """Names that are being made. The same request for a name joins the work on it, or takes its result when the first
    caller left before it came (a kubelet whose deadline passed asks again); another request is refused as long as
    somebody waits for the first one, and is told by `left_over` what of it is there otherwise."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._calls: dict[Hashable, _Call[T]] = {}
        self._unclaimed: dict[Hashable, tuple[bytes, T]] = {}

    def busy(self, key: Hashable) -> bool:
        """True while `key` is being worked on: a record of it may be there, but its maker has not had its answer."""
        return key in self._calls

    async def forsaken(self, key: Hashable, fingerprint: bytes) -> None:
        """Waits until what nobody waits for any more, and another request had asked for, is done."""
        call = self._calls.get(key)
        if call is not None and call.fingerprint != fingerprint and call.waiting == 0:
            await asyncio.wait({call.task})

    def left_over(self, key: Hashable) -> T | None:
        """Takes the result that nobody was told, whatever request it is of."""
        found = self._unclaimed.pop(key, None)
        return found[1] if found is not None else None

    def unclaimed(self, key: Hashable, fingerprint: bytes) -> T | None:
        """Takes the result that nobody was told, if it is of this request."""
        found = self._unclaimed.get(key)
        if found is None or found[0] != fingerprint:
            return None
        del self._unclaimed[key]
        return found[1]

    async def once(self, key: Hashable, fingerprint: bytes, what: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `make`, of which there is one at a time for `key`. Raises AlreadyExists while another request
        for the same name is being worked on."""
        call = self._calls.get(key)
        if call is None:
            self._unclaimed.pop(key, None)
            call = _Call(fingerprint, self._tasks.spawn(make(), what))
            self._calls[key] = call
            call.task.add_done_callback(lambda _: self._done(key))
        elif call.fingerprint != fingerprint:
            raise AlreadyExists(f"{what}: another request with this name is being worked on")
        call.waiting += 1
        try:
            return await asyncio.shield(call.task)
        finally:
            # A caller that was cancelled heard nothing; one that got result or error did.
            if call.task.done():
                call.waiting = -1
            elif call.waiting > 0:
                call.waiting -= 1

    def _done(self, key: Hashable) -> None:
        call = self._calls.pop(key)
        if call.waiting == 0 and not call.task.cancelled() and call.task.exception() is None:
            while len(self._unclaimed) >= MAX_UNCLAIMED:
                self._unclaimed.pop(next(iter(self._unclaimed)))
            self._unclaimed[key] = (call.fingerprint, call.task.result())
