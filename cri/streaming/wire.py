"""What everything here is made of: the bytes of one connection, and what has come for one stream of many on it.

Refuses to hold more than it was told: a reader who lags stops the connection, never fills memory; a writer waits until
the peer has taken what it was sent. Invariant: bytes leave in the order they were written, whole frame by whole frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Protocol

# What one stream may have waiting for whoever reads it; one piece more may come on top.
INBOX_BYTES = 64 << 10
WRITE_BUFFER_BYTES = 256 << 10
_CLOSE, _CLOSE_WAIT = 7, 8  # states in the first byte of struct tcp_info (linux/tcp.h, include/net/tcp_states.h)


class ProtocolError(Exception):
    """The peer does not keep to the protocol; one sentence. The connection ends."""


class Wire(Protocol):
    """A connection, or a tunnel through one."""

    async def read_exactly(self, count: int) -> bytes:
        """So many bytes. Raises EOFError when the peer has gone."""
        ...

    async def write(self, data: bytes) -> None:
        """Sends it, and waits while the peer is far behind. Raises ConnectionError."""
        ...

    def post(self, data: bytes) -> bool:
        """Sends a few bytes without waiting; False, and they are not sent, while the peer is far behind or gone."""
        ...


class Stream(Protocol):
    """One direction or two of something that was opened on a connection."""

    async def read(self) -> bytes:
        """What has come, b"" at its end."""
        ...

    async def write(self, data: bytes) -> None:
        """Sends it; raises ConnectionError when the peer wants no more."""
        ...

    async def finish(self) -> None:
        """Nothing more will be written. Idempotent; raises nothing."""
        ...


class Connection:
    """A TCP (or TLS) connection. `touched` is the loop's time of the last byte in either direction."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._time = asyncio.get_running_loop().time
        self.touched = self._time()
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    async def read_exactly(self, count: int) -> bytes:
        """Wire.read_exactly."""
        data = await self._reader.readexactly(count)
        self.touched = self._time()
        return data

    async def read_head(self) -> bytes:
        """Up to the empty line that ends an HTTP head. Raises asyncio.LimitOverrunError, EOFError."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def write(self, data: bytes) -> None:
        """Wire.write."""
        if self._writer.is_closing():
            raise ConnectionResetError("the client has gone")
        self._writer.write(data)
        await self._writer.drain()
        self.touched = self._time()

    def hung_up(self) -> bool:
        """True once the peer has closed its end, also while nothing is read that would tell so, as there is no room."""
        try:
            state = self._writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return True
        return state in (_CLOSE, _CLOSE_WAIT)

    def post(self, data: bytes) -> bool:
        """Wire.post."""
        if self._writer.is_closing() or self._writer.transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            return False
        self._writer.write(data)
        return True

    async def linger(self, seconds: float) -> None:
        """Ends our direction, and gives the peer time to take the rest and go: closing with bytes unread would reset
        the connection, and what is under way to the peer would be lost with it."""
        try:
            if self._writer.can_write_eof():
                self._writer.write_eof()
            else:  # TLS has no half-close: a client that waits for our end would wait for all of it
                seconds = min(seconds, 1.0)
            async with asyncio.timeout(seconds):
                while await self._reader.read(1 << 16):
                    pass
        except (TimeoutError, OSError):
            pass

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Drops what was not sent yet."""
        self._writer.transport.abort()


class Inbox:
    """What has come for one stream: whoever brings it waits while there is too much."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, data: bytes) -> None:
        """Waits until there is room for more; after `end` it is dropped."""
        if self._ended:
            return
        self._pieces.append(data)
        self._size += len(data)
        self._changed.set()
        if self._size >= INBOX_BYTES:
            self._room.clear()
        await self._room.wait()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._changed.set()
        self._room.set()

    def drop(self) -> None:
        """Nobody reads on: what waits and what comes is dropped."""
        self._pieces.clear()
        self._size = 0
        self.end()

    async def get(self) -> bytes:
        """What has come, b"" at the end."""
        while not self._pieces:
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        piece = self._pieces.popleft()
        self._size -= len(piece)
        if self._size < INBOX_BYTES:
            self._room.set()
        return piece
