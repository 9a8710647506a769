"""Writing without ever blocking: to attached readers, to containers that do not read, to event subscribers.

Refuses to wait and to hold more than it was allowed: a reader who falls further behind is let go. Invariant: bytes go
out in the order they came in, or the sink is broken.
"""

from __future__ import annotations

import os
import stat
from collections import deque

from runtime.shim.loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000  # bits/socket.h


class Sink:
    """Writes to an fd without ever blocking on it; what does not go yet waits, up to `limit` bytes."""

    def __init__(self, loop: Loop, take_fd: int, limit: int, on_broken: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = take_fd
        self._limit = limit
        self._on_broken = on_broken
        self._waiting: deque[memoryview] = deque()
        self._closing = False
        self._socket = stat.S_ISSOCK(os.fstat(take_fd).st_mode)
        self.pending = 0
        self.on_drained: Callable[[], None] | None = None

    @property
    def open(self) -> bool:
        return self._fd >= 0 and not self._closing

    def write(self, data: bytes) -> None:
        """Takes all of `data`, or breaks off: when the reader is gone, or further behind than the limit."""
        if not self.open:
            return
        self._waiting.append(memoryview(data))
        self.pending += len(data)
        if self.pending == len(data):
            self._flush(0)
        if self.pending > self._limit and self._fd >= 0:
            self._break()

    def _put(self, data: memoryview) -> int:
        if self._socket:
            import _socket  # the module socket wraps every call in enums

            peer = _socket.socket(fileno=self._fd)
            try:
                return peer.send(data, _MSG_DONTWAIT | _MSG_NOSIGNAL)
            finally:
                peer.detach()
        return os.write(self._fd, data)

    def _flush(self, _events: int) -> None:
        try:
            while self._waiting:
                count = self._put(self._waiting[0])
                self.pending -= count
                if count == len(self._waiting[0]):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = self._waiting[0][count:]
        except BlockingIOError:
            self._loop.watch(self._fd, WRITE, self._flush)
            return
        except OSError:
            self._break()
            return
        self._loop.unwatch(self._fd)
        if self._closing:
            self.close()
        if self.on_drained is not None:
            self.on_drained()

    def _break(self) -> None:
        self.close()
        self._on_broken()

    def finish(self) -> None:
        """Closes once what waits is written."""
        self._closing = True
        if not self._waiting:
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        self._waiting.clear()
        self.pending = 0
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)
