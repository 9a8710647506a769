"""Blocking calls off the event loop: one helper, on a bounded pool.

Refuses to queue without end in silence: a pool has a named limit, and what waits for a free thread can be cancelled
before it has begun. Invariant: a call that has begun runs to its end even when the waiter was cancelled; who needs it
undone in that case awaits it in a shield (threats O1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# A hung mount or shim holds a thread for as long as it hangs: enough of them that fifty such leave List and Status
# alone (threats R14). A thread that nobody needed yet costs nothing.
LIMIT = 64


class Threads:
    """A pool of its own for a part whose calls may hang together, such as the plugins of the pod network."""

    def __init__(self, name: str, limit: int) -> None:
        self._executor = ThreadPoolExecutor(limit, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function` in a thread of the pool and returns or raises what it does."""
        loop = asyncio.get_running_loop()
        # In there it is known what the call is about (cri/trace).
        work = partial(copy_context().run, function, *args, **kwargs)
        return await loop.run_in_executor(self._executor, work)

    def close(self) -> None:
        """Takes no more calls and drops those that have not begun; waits for nobody."""
        self._executor.shutdown(wait=False, cancel_futures=True)


_shared = Threads("ocid", LIMIT)


async def to_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a blocking `function` in the daemon's shared pool and returns or raises what it does."""
    return await _shared.run(function, *args, **kwargs)
