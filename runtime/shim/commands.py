"""The daemon's side of ExecSync: a command on pipes of ours, run to the end, with bounded output.

Its shim answers when it has ended; at its timeout we close our sending half of the connection, and the shim kills the
command and everything below it, as it does when we are gone altogether: nobody would read the answer. Output is kept
up to a limit and read on beyond it, so that the command neither blocks nor fills memory or disk (threats S51); after
its exit the streams get DRAIN seconds to end, then a background child that holds them open is left with a broken pipe
(S52). Refuses to wait for a shim for longer than GRACE after a timeout. Invariant: the exit code is the kernel's, never
a guess.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.linux.sockets import send_frame
from runtime.shim import protocol
from runtime.shim.model import ExecResult, ExecSpec
from runtime.shim.wire import receive

if TYPE_CHECKING:
    from runtime.linux.progress import Phase

DRAIN = 0.25
GRACE = 30.0  # what an exec may take beyond its own timeout: start, kill
_CHUNK = 65536
_MAX_POLL_MS = 1_000_000_000


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


def run_to_end(
    connection: socket.socket, container_id: str, spec: ExecSpec, tell: Callable[[list[Phase]], None] | None = None
) -> ExecResult:
    """Asks the shim at the other end for the command, which has no terminal. `tell` hears where the time went. Raises
    RuntimeFailure (the shim's), OSError, FrameError."""
    process = {**spec.process, "terminal": False}
    message = protocol.ExecMessage(container_id, process, float(spec.timeout_s), spec.output_limit)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    try:
        send_frame(connection, protocol.request("exec", message, timed=tell is not None), (null, out_write, err_write))
        streams = [Collector(fd, spec.output_limit) for fd in (out_read, err_read)]
    except BaseException:
        os.close(out_read)
        os.close(err_read)
        raise
    finally:
        for fd in (null, out_write, err_write):
            os.close(fd)
    try:
        return _Run(connection, streams, tell).result(spec.timeout_s)
    finally:
        for stream in streams:
            os.close(stream.fd)


class _Run:
    """Reads the streams while it waits for the answer and the clock."""

    def __init__(
        self, connection: socket.socket, streams: list[Collector], tell: Callable[[list[Phase]], None] | None
    ) -> None:
        self._connection = connection
        self._tell = tell
        self._all = streams
        self._open = {stream.fd: stream for stream in streams}
        self._poll = select.poll()
        for fd in (*self._open, connection.fileno()):
            self._poll.register(fd, select.POLLIN)

    def result(self, timeout_s: float) -> ExecResult:
        phases: list[Phase] = []
        timed_out, answer = self._answer(time.monotonic() + timeout_s if timeout_s > 0 else None, phases)
        if "timed_out" in answer:
            # A shim of before the daemon collected: the output follows. Shims outlive the daemon that started them.
            out, err = receive(self._connection), receive(self._connection)
            if self._tell is not None:
                self._tell(phases)
            return ExecResult(answer["exit_code"], out, err, timed_out or answer["timed_out"], answer["truncated"])
        begun = time.time_ns()
        self._drain()
        if self._tell is not None:
            since = max((end for _, _, _, end in phases), default=begun)
            self._tell([*phases, ("run", "", since, begun), ("drain", "", begun, time.time_ns())])
        out, err = (stream.kept() for stream in self._all)
        return ExecResult(answer["exit_code"], out, err, timed_out, any(stream.truncated for stream in self._all))

    def _answer(self, deadline: float | None, phases: list[Phase]) -> tuple[bool, dict[str, Any]]:
        """Whether the time was up, and what the shim says of the command's end; before that come its phases."""
        timed_out = False
        while True:
            if not self._until(deadline):
                if timed_out:
                    raise TimeoutError
                timed_out, deadline = True, time.monotonic() + GRACE
                self._connection.shutdown(socket.SHUT_WR)
                continue
            answer = protocol.parse_reply(receive(self._connection))
            if "phases" in answer:
                phases += [(name, of, since, end) for name, of, since, end in answer["phases"]]
                answer = answer["value"]
            if "pid" not in answer:
                return timed_out, answer

    def _until(self, deadline: float | None) -> bool:
        """Reads until there is an answer, or the time is up."""
        while not self._turn(deadline):
            if deadline is not None and time.monotonic() >= deadline:
                return False
        return True

    def _drain(self) -> None:
        """The rest of the output, for DRAIN seconds at most."""
        self._poll.unregister(self._connection)
        deadline = time.monotonic() + DRAIN
        while self._open and time.monotonic() < deadline:
            self._turn(deadline)

    def _turn(self, deadline: float | None) -> bool:
        """Handles what is ready. True once there is an answer."""
        # poll(2) takes an int of milliseconds, 24 days; whoever calls looks at the time again.
        patience = None if deadline is None else min(max(0.0, deadline - time.monotonic()) * 1000, _MAX_POLL_MS)
        answered = False
        for fd, _ in self._poll.poll(patience):
            stream = self._open.get(fd)
            if stream is None:
                answered = True
            elif not stream.read():
                self._poll.unregister(fd)
                del self._open[fd]
        return answered
