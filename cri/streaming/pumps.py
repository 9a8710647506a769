"""Bytes between the daemon's ends of pipes or a terminal and a client's streams, on the event loop.

Refuses to hold bytes: the next are read once the client has taken the last, so a slow client slows the command, and
nothing is lost. Invariant: what the command wrote before it ended is sent; a child of it that keeps the pipe open
delays the end by QUIET_S without a byte, no more (threats S52).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from cri.streaming.wire import Stream

T = TypeVar("T")

QUIET_S = 0.25
PIPE_BYTES = 256 << 10
_CHUNK = 128 << 10


def pipe() -> tuple[int, int]:
    """A wider pipe than usual, CLOEXEC: its reader is seldom waited for."""
    ends = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: it stays at 64 KiB
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


async def copy_out(fd: int, write: Callable[[bytes], Awaitable[None]], over: asyncio.Event) -> None:
    """Copies from a nonblocking `fd` until its end, or until `over` is set and it is quiet. Raises ConnectionError of
    `write`. The fd stays the caller's."""
    while True:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            if not await _comes_more(fd, over):
                return
            continue
        except OSError:  # a pty whose last slave is closed reads as EIO
            return
        if not data:
            return
        await write(data)
        await asyncio.sleep(0)  # a command that prints without end must not have the loop to itself


async def _comes_more(fd: int, over: asyncio.Event) -> bool:
    """True once `fd` can be read."""
    readable = asyncio.ensure_future(_ready(fd, write=False))
    ended = asyncio.ensure_future(over.wait())
    try:
        await asyncio.wait((readable, ended), return_when=asyncio.FIRST_COMPLETED)
        if not readable.done():
            await asyncio.wait((readable,), timeout=QUIET_S)
        return readable.done()
    finally:
        readable.cancel()
        ended.cancel()


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        remove(fd)


async def copy_in(stream: Stream, fd: int) -> None:
    """Copies to a nonblocking `fd` until the stream ends. When nobody reads there any more, what still comes is
    dropped: a command that closes its input is no error. The fd stays the caller's."""
    while data := await stream.read():
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                await _ready(fd, write=True)
            except OSError:
                rest = memoryview(b"")


class Copies:
    """Copies of one session: `main` ones are waited for, `side` ones end with it; none outlives the block."""

    def __init__(self) -> None:
        self._main: list[asyncio.Task[Any]] = []
        self._side: list[asyncio.Task[Any]] = []

    def main(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._main.append(task)
        return task

    def side(self, work: Coroutine[Any, Any, None]) -> None:
        self._side.append(asyncio.get_running_loop().create_task(work))

    async def done(self) -> None:
        """All main ones have ended. Raises what the first to fail raised, and what a side one did until then."""
        waiting = set(self._main)
        while waiting:
            done, _ = await asyncio.wait(
                waiting | {task for task in self._side if not task.done()}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            waiting -= done

    async def __aenter__(self) -> Copies:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (*self._main, *self._side):
            task.cancel()
        await asyncio.gather(*self._main, *self._side, return_exceptions=True)
