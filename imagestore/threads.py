"""Worker threads of the pull path: some for hashing and writing, some for unpacking, some that ask programs; none
while nothing is pulled.

Refuses to share asyncio's default threads: an unpack holds one for seconds, and the rest of the daemon needs those.
Invariant: there are no more than the config's numbers, and none of them outlives the last pull; who waits for a program
holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from imagestore.errands import Errand

T = TypeVar("T")
# A killed program is gone at once; a file of logins on a filesystem that hangs is not waited for.
_ENDS_S = 5.0


class Threads:
    """Three pools that exist between `enter` and the last `leave`. Called on the event loop only."""

    def __init__(self, io: int, unpack: int, ask: int) -> None:
        self._sizes = (io, unpack, ask)
        self._users = 0
        self._io: ThreadPoolExecutor | None = None
        self._unpack: ThreadPoolExecutor | None = None
        self._ask: ThreadPoolExecutor | None = None

    def enter(self) -> None:
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            for pool in (self._io, self._unpack, self._ask):
                if pool is not None:
                    pool.shutdown(wait=False)
            self._io = self._unpack = self._ask = None

    def start_io(self, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Runs a short disk call; the future may be abandoned, the call goes on."""
        if self._io is None:
            self._io = ThreadPoolExecutor(self._sizes[0], thread_name_prefix="image-io")
        running = asyncio.get_running_loop().run_in_executor(self._io, call, *args)
        running.add_done_callback(_seen)
        return running

    async def io(self, call: Callable[..., T], *args: object) -> T:
        """Runs a short disk call to its end."""
        return await self.start_io(call, *args)

    async def take(self, let_go: Callable[[T], None], call: Callable[..., T], *args: object) -> T:
        """As `io`, for what holds a lock or a file and becomes the caller's: `let_go` gets it where the caller was
        cancelled meanwhile, since the thread goes on."""
        taking = self.start_io(call, *args)

        def refuse(done: asyncio.Future[T]) -> None:
            if done.exception() is None:
                let_go(done.result())

        try:
            await asyncio.wait({taking})
        except asyncio.CancelledError:
            taking.add_done_callback(refuse)
            await asyncio.wait({taking})
            raise
        return taking.result()

    async def ask(self, call: Callable[..., T], *args: object) -> T:
        """Runs a call that may wait for programs and services of this machine, with an Errand behind its arguments.
        Cancelled, it ends the errand, and as a rule the call with it."""
        if self._ask is None:
            self._ask = ThreadPoolExecutor(self._sizes[2], thread_name_prefix="image-ask")
        errand = Errand()
        asking = asyncio.get_running_loop().run_in_executor(self._ask, partial(call, *args, errand))
        try:
            await asyncio.wait({asking})
        except asyncio.CancelledError:
            errand.end()
            asking.add_done_callback(_seen)
            await asyncio.wait({asking}, timeout=_ENDS_S)
            raise
        return asking.result()

    def start_unpack(self, call: Callable[..., T], *args: object) -> Future[T]:
        """Runs a call of the unpacker, which may take long; not bound to the event loop, which may end before it."""
        if self._unpack is None:
            self._unpack = ThreadPoolExecutor(self._sizes[1], thread_name_prefix="image-unpack")
        return self._unpack.submit(call, *args)


def _seen(done: asyncio.Future[T]) -> None:
    """Or asyncio prints the failure of what was abandoned: somebody else's has been told."""
    if not done.cancelled():
        done.exception()
