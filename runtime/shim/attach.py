"""Somebody's fds, connected to a container's streams.

Refuses to change flags of fds that others share (a user's terminal): pipes and terminals are reopened for themselves.
Invariant: nobody attached holds up the log; who lags more than MAX_LAG behind is let go.
"""

from __future__ import annotations

import os
import stat

from runtime.shim.loop import READ, Loop
from runtime.shim.sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from runtime.shim.stdio import Stdio

MAX_LAG = 4 << 20  # bytes an attached reader may lag behind
_CHUNK = 65536


class Attachment:
    """One of them. `on_end` is told whether a reader was let go before the output was over."""

    def __init__(
        self, loop: Loop, stdio: Stdio, take_fds: Sequence[int], *, stdin: bool, on_end: Callable[[bool], None]
    ) -> None:
        self._loop = loop
        self._stdio = stdio
        self._on_end = on_end
        self._in = -1
        self._sinks: list[Sink] = []
        self.had_input = stdin
        self._closed = False
        self._let_go = False
        fds = list(take_fds)
        if stdin and fds:
            self._in = _own(fds.pop(0), os.O_RDONLY)
            self._read_on()
        for name, fd in zip(("stdout", "stderr"), fds, strict=False):
            output = stdio.outputs.get(name)
            if output is None or not output.open:
                os.close(fd)
                continue
            sink = Sink(loop, _own(fd, os.O_WRONLY), MAX_LAG, self._sink_broken)
            sink.on_drained = output.resume
            output.taps.append(sink)
            self._sinks.append(sink)
        for fd in fds[2:]:
            os.close(fd)

    def _read_on(self) -> None:
        if self._in < 0:
            return
        try:
            self._loop.watch(self._in, READ, self._input_ready)
        except PermissionError:  # epoll refuses regular files: they are always ready
            self._loop.after(0, lambda: self._input_ready(READ))

    def _input_ready(self, _events: int) -> None:
        if self._in < 0:
            return
        target = self._stdio.input
        try:
            data = os.read(self._in, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up
            data = b""
        self._loop.unwatch(self._in)
        if not data or target is None:
            self._close_input()
            if not data:
                self._stdio.input_ended()
            return
        target.on_drained = self._read_on
        target.write(data)  # calls _read_on once it is all written: a container that does not read is waited for

    def _close_input(self) -> None:
        fd, self._in = self._in, -1
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)

    def _sink_broken(self) -> None:
        self._let_go = True
        if not any(sink.open for sink in self._sinks):
            self.close()

    def output_ended(self) -> None:
        """The container's output is over: closes once what waits has been written."""
        if not any(sink.pending for sink in self._sinks):
            self.close()
            return
        for sink in self._sinks:
            sink.on_drained = self.output_ended

    def close(self) -> None:
        """Detaches and tells so; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._close_input()
        for sink in self._sinks:
            sink.on_drained = None
            sink.close()
        self._stdio.detached(self)
        self._on_end(self._let_go)


def _own(take_fd: int, flags: int) -> int:
    """An fd with an open file description of our own, nonblocking, for what `take_fd` refers to. Sockets and regular
    files stay as they are: the one are sent to with MSG_DONTWAIT, the other do not block."""
    mode = os.fstat(take_fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return take_fd
    try:
        return os.open(f"/proc/self/fd/{take_fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(take_fd)
