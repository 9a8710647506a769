"""Commands in a running container: run to the end with bounded output (ExecSync), or with somebody's own fds.

A timeout kills the command and everything below it, as does the caller's going away: nobody would read the answer.
Output is kept up to a limit and read on beyond it, so that the command neither blocks nor fills memory or disk
(threats S51); after its exit the streams get DRAIN seconds to end, then a background child that holds them open is
left with a broken pipe (S52). Invariant: the exit code in an answer is the kernel's, never a guess.
"""

from __future__ import annotations

import os

from runtime.linux.memory import malloc_trim
from runtime.shim.loop import READ, Loop, Promise, Task
from runtime.shim.reaper import exit_code
from runtime.shim.tree import kill_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.shim.engine import Engine
    from runtime.shim.protocol import ExecMessage

DRAIN = 0.25
MAX_OUTPUT = 31 << 20  # what fits into a frame, whatever the caller asks for
_CHUNK = 65536
_TRIM_AFTER = 1 << 20  # bytes of output after which freed memory is given back


class Collector:
    """Reads a stream to its end and keeps the first `limit` bytes."""

    def __init__(self, loop: Loop, take_fd: int, limit: int) -> None:
        self._loop = loop
        self._fd = take_fd
        self._left = limit
        self._pieces: list[bytes] = []
        self.truncated = False
        self.received = 0
        self.ended: Promise[None] = Promise()
        os.set_blocking(take_fd, False)
        loop.watch(take_fd, READ, self._ready)

    def _ready(self, _events: int) -> None:
        try:
            piece = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        if not piece:
            self.close()
            return
        self.received += len(piece)
        if len(piece) <= self._left:
            self._left -= len(piece)
            self._pieces.append(piece)
        else:
            self._pieces.append(piece[: self._left])
            self._left, self.truncated = 0, True

    def close(self) -> None:
        """Ends reading; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)
        self.ended.resolve()

    def take(self) -> bytes:
        """What was kept; it is not kept here any longer."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


class Finished:
    """A command that ran to its end."""

    __slots__ = ("code", "stderr", "stdout", "timed_out", "truncated")

    def __init__(self, code: int, stdout: bytes, stderr: bytes, timed_out: bool, truncated: bool) -> None:
        self.code = code
        self.stdout = stdout
        self.stderr = stderr
        self.timed_out = timed_out
        self.truncated = truncated


def run_to_end(loop: Loop, engine: Engine, message: ExecMessage, gone: Promise[None]) -> Task[Finished]:
    """Runs the command of `message`; `gone` resolves when the caller is. Raises RuntimeFailure if it cannot start."""
    limit = max(0, min(int(message.output_limit), MAX_OUTPUT))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    streams = [Collector(loop, out_read, limit), Collector(loop, err_read, limit)]
    try:
        try:
            made = yield from engine.execute(message.id, message.process, (null, out_write, err_write))
        finally:
            for fd in (null, out_write, err_write):
                os.close(fd)
        if made.console >= 0:  # a terminal nobody is at: its output is the command's
            streams.append(Collector(loop, made.console, limit))
        ended = made.ended
        timed_out = yield from _until(loop, ended, gone, message.timeout_s)
        if not ended.done:
            kill_tree(made.pid)
        status = yield ended
        yield from _drain(loop, streams)
        code, _ = exit_code(status)
        stdout, stderr = streams[-1].take() if len(streams) > 2 else streams[0].take(), streams[1].take()
        return Finished(code, stdout, stderr, timed_out, any(stream.truncated for stream in streams))
    finally:
        for stream in streams:
            stream.close()
        if any(stream.received > _TRIM_AFTER for stream in streams):
            malloc_trim()


def _until(loop: Loop, ended: Promise[int], gone: Promise[None], seconds: float) -> Task[bool]:
    """Waits for the end, the time limit or the caller's end, whatever is first. True when it was the time."""
    first: Promise[str] = Promise()
    timer = loop.after(seconds, lambda: first.resolve("time")) if seconds > 0 else None
    ended.when_done(lambda: first.resolve("ended"))
    gone.when_done(lambda: first.resolve("gone"))
    which = yield first
    if timer is not None:
        timer.cancel()
    return bool(which == "time")


def _drain(loop: Loop, streams: list[Collector]) -> Task[None]:
    """Waits until the streams have ended, DRAIN seconds at most."""
    over: Promise[None] = Promise()
    timer = None if all(stream.ended.done for stream in streams) else loop.after(DRAIN, over.resolve)
    for stream in streams:
        over.when_done(stream.ended.resolve)
        yield stream.ended
    if timer is not None:
        timer.cancel()
