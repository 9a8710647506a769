"""Commands in a running container, each in a helper of its own: run to the end with bounded output (ExecSync), or with
somebody's own fds.

A timeout kills the command and everything below it, as does the caller's going away: nobody would read the answer.
Output is kept up to a limit and read on beyond it, so that the command neither blocks nor fills memory or disk
(threats S51); after its exit the streams get DRAIN seconds to end, then a background child that holds them open is
left with a broken pipe (S52). Invariant: the exit code in an answer is the kernel's, never a guess.
"""

from __future__ import annotations

import os
import select
import time

from runtime.linux.progress import phase
from runtime.shim.reaper import exit_code
from runtime.shim.tree import kill_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runtime.shim.engine import Engine, Made
    from runtime.shim.protocol import ExecMessage, StreamMessage

DRAIN = 0.25
MAX_OUTPUT = 31 << 20  # what fits into a frame, whatever the caller asks for
_CHUNK = 65536


class Collector:
    """Reads a stream to its end and keeps the first `limit` bytes."""

    def __init__(self, take_fd: int, limit: int) -> None:
        self.fd = take_fd
        self._left = limit
        self._pieces: list[bytes] = []
        self.truncated = False
        os.set_blocking(take_fd, False)

    def read(self) -> bool:
        """Takes what is there; False at the end of the stream."""
        try:
            piece = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:  # a pty whose last slave is closed reads as EIO
            return False
        if len(piece) <= self._left:
            self._left -= len(piece)
            self._pieces.append(piece)
        else:
            self._pieces.append(piece[: self._left])
            self._left, self.truncated = 0, True
        return bool(piece)

    def kept(self) -> bytes:
        return b"".join(self._pieces)


class Finished:
    """A command that ran to its end."""

    __slots__ = ("code", "stderr", "stdout", "timed_out", "truncated")

    def __init__(self, code: int, stdout: bytes, stderr: bytes, timed_out: bool, truncated: bool) -> None:
        self.code = code
        self.stdout = stdout
        self.stderr = stderr
        self.timed_out = timed_out
        self.truncated = truncated


def run_on_fds(engine: Engine, message: StreamMessage, fds: Sequence[int]) -> Made:
    """Starts the command on `fds`, or on a terminal of its own. Closes our copies of the fds."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stdio = (null, null, null) if message.terminal else tuple(fds)
    try:
        return engine.execute(message.id, message.process, stdio)
    finally:
        for fd in {null, *fds}:
            os.close(fd)


def run_to_end(engine: Engine, message: ExecMessage, caller: int, status_of: Callable[[int], int]) -> Finished:
    """Runs the command; `caller` is the connection of who wants the answer, `status_of(pid)` waits for the command's
    status. Raises RuntimeFailure if it cannot start."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # before the engine takes us elsewhere
    limit = max(0, min(int(message.output_limit), MAX_OUTPUT))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    try:
        made = engine.execute(message.id, message.process, (null, out_write, err_write))
    finally:
        for fd in (null, out_write, err_write):
            os.close(fd)
    streams = [Collector(out_read, limit), Collector(err_read, limit)]
    if made.console >= 0:  # a terminal that nobody is at: its output is the command's
        streams.append(Collector(made.console, limit))
    phase("run")
    watch = _Watch(streams, made, caller, proc)
    timed_out = watch.until_exit(message.timeout_s)
    status = status_of(made.pid)
    phase("drain")
    watch.drain()
    stdout = streams[-1].kept() if made.console >= 0 else streams[0].kept()
    truncated = any(stream.truncated for stream in streams)
    return Finished(exit_code(status)[0], stdout, streams[1].kept(), timed_out, truncated)


class _Watch:
    """Reads the streams while it waits for the command, the clock and the caller."""

    def __init__(self, streams: list[Collector], made: Made, caller: int, proc: int) -> None:
        self._pid = made.pid
        self._pidfd = made.pidfd
        self._caller = caller
        self._proc = proc
        self._streams = {stream.fd: stream for stream in streams}
        self._poll = select.poll()
        for fd in (*self._streams, self._pidfd):
            self._poll.register(fd, select.POLLIN)
        self._poll.register(caller, select.POLLRDHUP)

    def until_exit(self, timeout_s: float) -> bool:
        """True when the time was up, and the command was killed for it."""
        deadline = time.monotonic() + timeout_s if timeout_s > 0 else None
        timed_out = False
        while not self._turn(deadline):
            if deadline is not None and time.monotonic() >= deadline:
                timed_out, deadline = True, None
                kill_tree(self._pid, self._proc)
        return timed_out

    def _turn(self, deadline: float | None) -> bool:
        """Handles what is ready. True once the command has ended."""
        patience = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ended = False
        for fd, _ in self._poll.poll(patience):
            if fd == self._pidfd:
                ended = True
            elif fd == self._caller:
                self._poll.unregister(fd)
                kill_tree(self._pid, self._proc)
            elif not self._streams[fd].read():
                self._poll.unregister(fd)
                del self._streams[fd]
        return ended

    def drain(self) -> None:
        """The rest of the output, for DRAIN seconds at most."""
        self._poll.unregister(self._pidfd)
        deadline = time.monotonic() + DRAIN
        while self._streams and time.monotonic() < deadline:
            self._turn(deadline)
