"""One client of the shim: frames in, frames out, never blocking.

Refuses peers other than root (SO_PEERCRED, threats S50), and lets go of one that does not read what it asked for.
Invariant: `gone` resolves exactly once, when the peer or we have closed.
"""

from __future__ import annotations

import os
import socket

from runtime.errors import RuntimeFailure
from runtime.linux.sockets import peer_uid, send_frame
from runtime.shim import protocol
from runtime.shim.loop import READ, Loop, Promise
from runtime.shim.stdio import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_REPLY_LIMIT = 80 << 20  # two full streams of an exec and a header
EVENT_LIMIT = 256 << 10  # events that a subscriber may lag behind


class Connection:
    """A connected peer. `on_frame(connection, payload)` is called for each frame."""

    def __init__(self, loop: Loop, take_socket: socket.socket, on_frame: Callable[[Connection, bytes], None]) -> None:
        self._loop = loop
        self._socket = take_socket
        self.on_frame = on_frame
        self._out: Sink | None = None
        self.reader = protocol.FrameReader(take_socket)
        self.gone: Promise[None] = Promise()
        self.limit = _REPLY_LIMIT
        take_socket.setblocking(False)
        loop.watch(take_socket.fileno(), READ, self._ready)

    def _ready(self, _events: int) -> None:
        try:
            more = self.reader.read()
            while not self.gone.done and (payload := self.reader.take()) is not None:
                self.on_frame(self, payload)
        except RuntimeFailure as error:
            self.send(protocol.failure(error))
            self.finish()
            return
        except OSError:
            more = False
        if not more:
            self.close()

    def send(self, payload: bytes) -> None:
        """Queues a frame; beyond `limit` waiting bytes the peer is let go."""
        if self.gone.done:
            return
        if self._out is None:
            self._out = Sink(self._loop, os.dup(self._socket.fileno()), self.limit, self.close)
        self._out.write(protocol.frame(payload))

    def send_fd(self, payload: bytes, fd: int) -> None:
        """A small first frame with an fd; the peer waits for it, so it goes at once."""
        if self.gone.done:
            return
        try:
            send_frame(self._socket, payload, (fd,))
        except OSError:
            self.close()

    def finish(self) -> None:
        """Closes once everything queued is written."""
        if self._out is None or not self._out.pending:
            self.close()
        elif not self.gone.done:
            self._out.on_drained = self.close

    def close(self) -> None:
        if self.gone.done:
            return
        self._loop.unwatch(self._socket.fileno())
        if self._out is not None:
            self._out.on_drained = None
            self._out.close()
        self.reader.close()
        self._socket.close()
        self.gone.resolve()


def accept(listener: socket.socket) -> socket.socket | None:
    """The next peer of a nonblocking listener, or None: nobody there, or somebody who is not root."""
    try:
        connection, _ = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    if peer_uid(connection) != 0:
        connection.close()
        return None
    return connection
