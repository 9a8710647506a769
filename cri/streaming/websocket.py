"""RFC 6455 at the server's end, and the two things that Kubernetes puts on it: numbered channels and a tunnel.

    channels   one message: the channel's number in its first byte, then bytes; "base64." writes both as text
    v5         a message [255, N] says that the client writes no more to channel N
    tunnel     binary messages are the bytes of a SPDY connection ("SPDY/3.1+portforward.k8s.io")

Refuses frames without a mask, extensions, and messages over MAX_MESSAGE. Invariant: after a Close of either side no
message is sent any more.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Collection

from cri.streaming.wire import Inbox, ProtocolError, Wire

MAX_MESSAGE = 4 << 20
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, PROTOCOL_ERROR, TOO_BIG = 1000, 1002, 1009
CLOSE_SIGNAL = 255
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def accept_key(key: str) -> str:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key. SHA-1 is the protocol's; it protects nothing."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def frame(kind: int, payload: bytes, mask: bytes = b"") -> bytes:
    """A whole message as one frame; a client's has a mask of four bytes."""
    size, bit = len(payload), 0x80 if mask else 0
    if size < 126:
        head = struct.pack(">BB", 0x80 | kind, bit | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", 0x80 | kind, bit | 126, size)
    else:
        head = struct.pack(">BBQ", 0x80 | kind, bit | 127, size)
    return head + mask + (masked(payload, mask) if mask else payload)


def masked(payload: bytes, mask: bytes) -> bytes:
    """`payload` with the mask laid over it, or taken off."""
    size = len(payload)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


class WebSocket:
    """Messages in and out."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._closed = False

    async def receive(self) -> bytes | None:
        """The next message of data; None when the client has closed or gone. Raises ProtocolError."""
        pieces: list[bytes] = []
        size = 0
        begun = False
        while True:
            try:
                final, kind, payload = await self._frame(MAX_MESSAGE - size)
            except EOFError:
                return None
            if kind == CLOSE:
                await self.close(NORMAL)
                return None
            if kind >= CLOSE:
                await self._control(kind, payload)
                continue
            if begun != (kind == CONTINUATION):
                raise ProtocolError("read a WebSocket message: it is continued before it begins, or begun twice")
            begun = not final
            pieces.append(payload)
            size += len(payload)
            if final:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _frame(self, room: int) -> tuple[bool, int, bytes]:
        first, second = await self._wire.read_exactly(2)
        kind, size = first & 0x0F, second & 0x7F
        if first & 0x70 or not second & 0x80 or kind not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(f"read a WebSocket frame: unexpected first bytes {first:#04x} {second:#04x}")
        if kind >= CLOSE and (size > 125 or not first & 0x80):
            raise ProtocolError("read a WebSocket frame: a control frame that is long or in pieces")
        if size > 125:
            size = int.from_bytes(await self._wire.read_exactly(2 if size == 126 else 8))
        if size > room:
            raise ProtocolError(f"read a WebSocket message: more than {MAX_MESSAGE} bytes")
        mask = await self._wire.read_exactly(4)
        payload = masked(await self._wire.read_exactly(size), mask) if size else b""
        return bool(first & 0x80), kind, payload

    async def _control(self, kind: int, payload: bytes) -> None:
        if kind == PING and not self._closed:
            await self._wire.write(frame(PONG, payload))

    async def send(self, kind: int, payload: bytes) -> None:
        """One message. Raises ConnectionError."""
        if self._closed:
            raise ConnectionResetError("the WebSocket was closed")
        await self._wire.write(frame(kind, payload))

    def post(self, kind: int, payload: bytes) -> bool:
        """One message, as Wire.post has it."""
        return not self._closed and self._wire.post(frame(kind, payload))

    async def close(self, code: int) -> None:
        """Sends Close, once. Raises nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._wire.write(frame(CLOSE, struct.pack(">H", code)))
        except ConnectionError:
            pass


class Channel:
    """One numbered channel."""

    def __init__(self, socket: WebSocket, number: int, *, text: bool) -> None:
        self._socket = socket
        self._number = number
        self._text = text
        self.inbox = Inbox()

    async def read(self) -> bytes:
        """Stream.read."""
        return await self.inbox.get()

    async def write(self, data: bytes) -> None:
        """Stream.write."""
        if self._text:
            await self._socket.send(TEXT, b"%d" % self._number + base64.b64encode(data))
        else:
            await self._socket.send(BINARY, bytes((self._number,)) + data)

    async def finish(self) -> None:
        """Stream.finish. No version of the protocol has a word for it: the client sees the end of the connection."""


class Channels:
    """All channels of one WebSocket. `serve` reads until the client has gone."""

    def __init__(self, socket: WebSocket, count: int, *, text: bool, readable: Collection[int], closing: bool) -> None:
        self._socket = socket
        self._text = text
        self._readable = readable
        self._closing = closing
        self.channels = [Channel(socket, number, text=text) for number in range(count)]

    async def serve(self) -> None:
        """Raises ProtocolError, after a Close that says so."""
        try:
            while (message := await self._socket.receive()) is not None:
                if message:
                    await self._message(message)
        except ProtocolError:
            await self._socket.close(PROTOCOL_ERROR)
            raise
        finally:
            for channel in self.channels:
                channel.inbox.end()

    async def _message(self, message: bytes) -> None:
        number = message[0] - ord("0") if self._text else message[0]
        if self._closing and number == CLOSE_SIGNAL:
            for closed in message[1:2]:
                if closed in self._readable:
                    self.channels[closed].inbox.end()
            return
        if number not in self._readable:
            return
        data = message[1:]
        if self._text:
            try:
                data = base64.b64decode(data, validate=True)
            except binascii.Error as error:
                raise ProtocolError(f"read channel {number}: {error}") from None
        if data:
            await self.channels[number].inbox.put(data)


class Tunnel:
    """A Wire whose bytes travel in binary messages."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._rest = b""

    async def read_exactly(self, count: int) -> bytes:
        """Wire.read_exactly."""
        pieces: list[bytes] = []
        while count:
            if not self._rest:
                message = await self._socket.receive()
                if message is None:
                    raise EOFError
                self._rest = message
            piece, self._rest = self._rest[:count], self._rest[count:]
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    async def write(self, data: bytes) -> None:
        """Wire.write."""
        await self._socket.send(BINARY, data)

    def post(self, data: bytes) -> bool:
        """Wire.post."""
        return self._socket.post(BINARY, data)
