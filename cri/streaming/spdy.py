"""The server's end of a SPDY/3.1 connection, as client-go speaks it.

    client                                   ocid
      │ ── SYN_STREAM {streamtype: …} ──────▶ │ a Stream for whoever awaits `accept`
      │ ◀─ SYN_REPLY ──────────────────────── │
      │ ◀▶ DATA … DATA fin ────────────────── │
      │ ◀▶ WINDOW_UPDATE ──────────────────── │ with those who count (windows.py)
      │ ◀─ GOAWAY ─────────────────────────── │ `farewell`

client-go counts no windows: TCP is what slows it down, and a stream whose reader lags stops its connection. Refuses
more than MAX_STREAMS at once, control frames over MAX_CONTROL, and ids that do not grow. Invariant: a frame is never
read as a whole into memory unless its length was bounded; whatever the peer sends costs no more than a stream's inbox
(threats S54).
"""

from __future__ import annotations

import asyncio

from cri.streaming import spdy_frames as frames
from cri.streaming.windows import CONNECTION, Credits, Windows
from cri.streaming.wire import Inbox, ProtocolError, Wire

MAX_STREAMS = 256
_PIECE = 64 << 10


class SpdyStream:
    """A stream that the client opened, with its headers (names in lower case)."""

    def __init__(self, connection: SpdyConnection, number: int, headers: dict[str, str]) -> None:
        self._connection = connection
        self.number = number
        self.headers = headers
        self.inbox = Inbox()
        self.finished = False
        self.gone = False

    async def read(self) -> bytes:
        """Stream.read."""
        data = await self.inbox.get()
        self._connection.credits.taken(self.number, len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Stream.write."""
        while data:
            size = await self._connection.windows.take(self.number, len(data))
            if not size or self.gone or self.finished:
                raise ConnectionResetError("the stream was closed")
            await self._connection.send(frames.data(self.number, data[:size]))
            data = data[size:]

    async def finish(self) -> None:
        """Stream.finish."""
        if self.finished or self.gone:
            return
        self.finished = True
        try:
            await self._connection.send(frames.data(self.number, b"", fin=True))
        except ConnectionError:
            pass

    async def drop(self) -> None:
        """Nobody is at it any more, in either direction."""
        await self.finish()
        self.inbox.drop()
        self._connection.forget(self)


class SpdyConnection:
    """`serve` reads until the client has gone; meanwhile others `accept` streams and use them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._in, self._out = frames.Inflater(), frames.Deflater()
        self._streams: dict[int, SpdyStream] = {}
        self._opened: asyncio.Queue[SpdyStream] = asyncio.Queue()
        self._last = 0
        self.windows = Windows()
        self.credits = Credits(self.windows, lambda number, size: wire.post(frames.window_update(number, size)))

    async def send(self, frame: bytes) -> None:
        """One whole frame. Raises ConnectionError."""
        await self._wire.write(frame)

    async def accept(self) -> SpdyStream:
        """The next stream that the client opens."""
        return await self._opened.get()

    def forget(self, stream: SpdyStream) -> None:
        """Its number means nothing any more: what comes for it is dropped."""
        self._streams.pop(stream.number, None)
        self._close(stream.number)

    def _close(self, number: int) -> None:
        self.windows.close(number)
        self.credits.close(number)

    async def farewell(self) -> None:
        """Says that this was all. Raises ConnectionError."""
        await self.send(frames.goaway(self._last))

    async def serve(self) -> None:
        """Reads frames until the client has gone. Raises ProtocolError, after a GOAWAY that says so."""
        try:
            while True:
                await self._frame()
        except EOFError:
            pass
        except ProtocolError:
            await self.send(frames.goaway(self._last, 1))
            raise
        finally:
            for stream in self._streams.values():
                stream.gone = True
                stream.inbox.end()
                self._close(stream.number)
            # They know this connection: what knows each other waits for the collector, with all that it holds.
            self._streams.clear()
            while not self._opened.empty():
                self._opened.get_nowait()

    async def _frame(self) -> None:
        head = await self._wire.read_exactly(8)
        first, second = int.from_bytes(head[:4]), int.from_bytes(head[4:])
        flags, length = second >> 24, second & 0xFFFFFF
        if not first >> 31:
            await self._data(first, flags, length)
            return
        if first >> 16 & 0x7FFF != frames.VERSION:
            raise ProtocolError(f"read a frame: SPDY version {first >> 16 & 0x7FFF}, expected {frames.VERSION}")
        if length > frames.MAX_CONTROL:
            raise ProtocolError(f"read a control frame: {length} bytes, at most {frames.MAX_CONTROL}")
        payload = await self._wire.read_exactly(length)
        await self._control(first & 0xFFFF, flags, payload)

    async def _data(self, number: int, flags: int, length: int) -> None:
        stream = self._streams.get(number)
        while length:
            piece = await self._wire.read_exactly(min(length, _PIECE))
            length -= len(piece)
            self.credits.came(CONNECTION, len(piece))
            if stream is not None:
                self.credits.came(number, len(piece))
                await stream.inbox.put(piece)
            # The windows of the streams are what bounds what waits here.
            self.credits.taken(CONNECTION, len(piece))
        if stream is not None and flags & frames.FIN:
            self._ended(stream)

    def _ended(self, stream: SpdyStream) -> None:
        stream.inbox.end()
        if stream.finished:
            self.forget(stream)

    async def _control(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == frames.SYN_STREAM:
            await self._syn_stream(flags, payload)
        elif kind == frames.RST_STREAM:
            number, _ = frames.numbers(kind, payload, least=2)
            stream = self._streams.pop(number, None)
            if stream is not None:
                stream.gone = True
                stream.inbox.end()
                self._close(number)
        elif kind == frames.WINDOW_UPDATE:
            number, size = frames.numbers(kind, payload, least=2)
            self.windows.widened(number & 0x7FFFFFFF, size & 0x7FFFFFFF)
        elif kind == frames.PING:
            (number,) = frames.numbers(kind, payload, least=1)
            if number & 1:
                await self.send(frames.ping(number))
        elif kind == frames.SETTINGS:
            initial = frames.settings(payload).get(frames.INITIAL_WINDOW_SIZE)
            if initial is not None:
                self.windows.sized(initial)
        elif kind in (frames.HEADERS, frames.SYN_REPLY):
            self._in.headers(payload[4:])  # to stay in step with the client's compressor
        # GOAWAY asks nothing of us; an unknown type is to be ignored (SPDY/3, 2.2.1).

    async def _syn_stream(self, flags: int, payload: bytes) -> None:
        number, _ = frames.numbers(frames.SYN_STREAM, payload, least=2)
        headers = self._in.headers(payload[10:])
        if not number & 1 or number <= self._last:
            raise ProtocolError(f"read SYN_STREAM: id {number} after {self._last}: expected an odd one that is larger")
        self._last = number
        if len(self._streams) >= MAX_STREAMS:
            await self.send(frames.rst_stream(number, frames.REFUSED_STREAM))
            return
        stream = self._streams[number] = SpdyStream(self, number, headers)
        self.windows.open(number)
        await self.send(frames.syn_reply(number, self._out.block({})))
        if flags & frames.FIN:
            stream.inbox.end()
        self._opened.put_nowait(stream)
