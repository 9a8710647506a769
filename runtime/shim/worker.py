"""Work in a forked child of the shim: it may block, use memory or even crash, and the shim does not.

    shim ── fork ──▶ worker ── does it ──▶ one frame (and perhaps an fd) ──▶ ends
                        └─ processes it made are orphans then: the subreaper, the shim, adopts them

So what a set-up dirties is gone with the worker (the shim stays at a few hundred KiB of its own), a mount that hangs
stalls nobody's log, and the shim is the parent of every container's init all the same. Refuses to inherit: a worker
closes every fd but those it is given. Invariant: a worker answers, or is reported dead with its signal.
"""

from __future__ import annotations

import os
import socket

from runtime.errors import RuntimeFailure
from runtime.linux import signals
from runtime.linux.process import close_range
from runtime.linux.sockets import send_frame
from runtime.shim import protocol
from runtime.shim.loop import READ, Loop, Promise, Task
from runtime.shim.reaper import Reaper, exit_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

DEADLINE = 120.0  # seconds; longer is stuck in the kernel, and the worker is killed


class Answer:
    """What a worker said; `fd` is -1 or the caller's."""

    __slots__ = ("fd", "value")

    def __init__(self, value: object, fd: int) -> None:
        self.value = value
        self.fd = fd


class Workers:
    """Forks workers of one shim."""

    def __init__(self, loop: Loop, reaper: Reaper) -> None:
        self.loop = loop
        self.reaper = reaper

    def run(self, what: str, job: Callable[[], tuple[object, int]], keep: tuple[int, ...] = ()) -> Task[Answer]:
        """`job()` in a worker that keeps the fds `keep`; it returns a JSON value and an fd to hand over, or -1.
        Raises RuntimeFailure: the job's own, or that the worker died."""
        ours, theirs = socket.socketpair()
        # Processes that the job leaves to us may end before we have heard of them.
        self.reaper.hold()
        try:
            pid = os.fork()
            if pid == 0:
                _work(job, theirs.fileno(), keep)
            theirs.close()
            ended = self.reaper.expect(pid)
            timer = self.loop.after(DEADLINE, lambda: os.kill(pid, signals.SIGKILL))
            try:
                answer = yield from self._receive(ours, ended)
                status = yield ended
            finally:
                timer.cancel()
            if answer is None:
                raise _death(what, status)
            return answer
        finally:
            ours.close()
            self.reaper.release()

    def _receive(self, connection: socket.socket, ended: Promise[int]) -> Task[Answer | None]:
        """The worker's one frame; None when it ended without. A process that it left behind may hold the other end
        of the socket, so the end of the worker counts, not only that of the stream."""
        connection.setblocking(False)
        fd = connection.fileno()
        reader = protocol.FrameReader(connection)
        try:
            while True:
                last = ended.done
                more = reader.read()
                payload = reader.take()
                if payload is not None:
                    value = protocol.parse_reply(payload)
                    fds = reader.take_fds()
                    return Answer(value, fds[0] if fds else -1)
                if last or not more:
                    return None
                news: Promise[None] = Promise()
                self.loop.watch(fd, READ, news.waker())
                ended.when_done(news.resolve)
                yield news
        finally:
            self.loop.unwatch(fd)
            reader.close()


def _work(job: Callable[[], tuple[object, int]], fd: int, keep: tuple[int, ...]) -> NoReturn:
    """In the child: never returns."""
    try:
        signals.wake_up(-1)
        for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
            signals.handle(number, None)
        close_others({0, 1, 2, fd, *keep})
        connection = socket.socket(fileno=fd)
        try:
            value, passed = job()
            send_frame(connection, protocol.reply(value), (passed,) if passed >= 0 else ())
        except Exception as error:
            send_frame(connection, protocol.failure(error))
        os._exit(0)
    finally:
        os._exit(1)


def close_others(keep: set[int]) -> None:
    """Closes every fd that is not in `keep`."""
    first = 0
    for fd in sorted(keep):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def _death(what: str, status: int) -> RuntimeFailure:
    code, number = exit_code(status)
    how = f"signal {number}" if number else f"exit code {code}"
    hint = f"it took more than {DEADLINE:.0f} s" if number == signals.SIGKILL else ""
    return RuntimeFailure(f"{what}: the process that did it died ({how})", code="unavailable", hint=hint)
