"""Each kind of request over each protocol: which streams there are, and how the end is told.

    over SPDY         streams by their header `streamtype`: error, stdin, stdout, stderr, resize; for port-forward
                      pairs of data and error by `port` and `requestid`
    over WebSocket    channels by number: 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize; for port-forward 2n data and
                      2n+1 error of the n-th port, or SPDY in a tunnel

Refuses a client that does not open its streams within OPEN_S (threats S54). Invariant: output is sent before the
status, and the status before the end (threats O28).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Coroutine
from typing import Any

from cri.streaming import spdy_frames
from cri.streaming.sessions import Attach, Exec, Peer, PortForward, Sessions
from cri.streaming.spdy import SpdyConnection, SpdyStream
from cri.streaming.status import Status
from cri.streaming.websocket import NORMAL, Channels, Tunnel, WebSocket
from cri.streaming.wire import ProtocolError, Stream, Wire

Remote = Exec | Attach

OPEN_S = 30.0
CHANNEL = "channel.k8s.io"
SPDY_REMOTE = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", CHANNEL)
WEBSOCKET_REMOTE = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    CHANNEL,
    "base64.channel.k8s.io",
)
FORWARD = "portforward.k8s.io"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
WEBSOCKET_FORWARD = (TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _ERROR, _RESIZE = range(5)


def _version(protocol: str) -> int:
    """The number in "v4.channel.k8s.io"; 1 for what has none."""
    return int(protocol[1]) if protocol[:1] == "v" else 1


async def _together(reading: Coroutine[Any, Any, None], session: Coroutine[Any, Any, None]) -> None:
    """The session, for as long as there is a client to read from."""
    tasks = [asyncio.ensure_future(reading), asyncio.ensure_future(session)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(sessions: Sessions, request: Remote, peer: Peer) -> Status:
    if isinstance(request, Exec):
        return await sessions.exec(request, peer)
    return await sessions.attach(request, peer)


async def _tell(status: Status, version: int, error: Stream) -> None:
    body = status.as_json() if version >= 4 else status.as_text()
    if body:
        await error.write(body)


# ------------------------------------------------------------------------------------------------------------- SPDY


async def remote_over_spdy(sessions: Sessions, request: Remote, wire: Wire, protocol: str) -> None:
    """Exec or attach. Raises ProtocolError, ConnectionError."""
    connection = SpdyConnection(wire)
    version = _version(protocol)

    async def session() -> None:
        streams = await _opened(connection, _wanted(request, version))
        error = streams.pop("error")
        status = await _run(sessions, request, Peer(**streams))
        for name in ("stdout", "stderr"):
            if name in streams:
                await streams[name].finish()
        await _tell(status, version, error)
        await error.finish()
        await connection.farewell()

    await _together(connection.serve(), session())


def _wanted(request: Remote, version: int) -> set[str]:
    wanted = {"error"} | {name for name in ("stdin", "stdout") if getattr(request, name)}
    if request.stderr and not request.terminal:
        wanted.add("stderr")
    if request.terminal and version >= 3:
        wanted.add("resize")
    return wanted


async def _opened(connection: SpdyConnection, wanted: set[str]) -> dict[str, SpdyStream]:
    streams: dict[str, SpdyStream] = {}
    try:
        async with asyncio.timeout(OPEN_S):
            while streams.keys() != wanted:
                stream = await connection.accept()
                name = stream.headers.get("streamtype", "")
                if name not in wanted or name in streams:
                    raise ProtocolError(f"open streams: {name!r:.40} is not one of those to come: {sorted(wanted)}")
                streams[name] = stream
    except TimeoutError:
        raise ProtocolError(f"open streams: {sorted(wanted - streams.keys())} missing after {OPEN_S:.0f} s") from None
    return streams


async def forward_over_spdy(sessions: Sessions, request: PortForward, wire: Wire) -> None:
    """Port-forward, until the client has gone. Raises ProtocolError, ConnectionError."""
    connection = SpdyConnection(wire)
    await _together(connection.serve(), _Forwarder(sessions, request, connection).run())


class _Forwarder:
    """Finds the two streams of each forwarded connection together."""

    def __init__(self, sessions: Sessions, request: PortForward, connection: SpdyConnection) -> None:
        self._sessions = sessions
        self._request = request
        self._connection = connection
        self._waiting: dict[tuple[str, int], tuple[SpdyStream, asyncio.TimerHandle]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while True:
                await self._one(await self._connection.accept())
        finally:
            for _, timer in self._waiting.values():
                timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _one(self, stream: SpdyStream) -> None:
        kind, port = stream.headers.get("streamtype"), _port(stream.headers.get("port", ""))
        if kind not in ("data", "error") or not port:
            await self._refuse(stream)
            return
        # Without a request id the error stream is opened first, and data is the next of the client's numbers.
        number = stream.number if kind == "error" else stream.number - 2
        key = (stream.headers.get("requestid", f"#{number}"), port)
        other = self._waiting.pop(key, None)
        if other is None:
            timer = asyncio.get_running_loop().call_later(OPEN_S, self._give_up, key)
            self._waiting[key] = (stream, timer)
            return
        other[1].cancel()
        if other[0].headers["streamtype"] == kind:
            await self._refuse(stream)
            await self._refuse(other[0])
            return
        data, error = (stream, other[0]) if kind == "data" else (other[0], stream)
        self._spawn(self._forward(port, data, error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, port: int, data: SpdyStream, error: SpdyStream) -> None:
        try:
            await self._sessions.forward(self._request, port, data, error)
        finally:
            for stream in (data, error):
                await stream.drop()

    def _give_up(self, key: tuple[str, int]) -> None:
        stream, _ = self._waiting.pop(key)
        self._spawn(self._refuse(stream))

    async def _refuse(self, stream: SpdyStream) -> None:
        self._connection.forget(stream)
        stream.gone = True
        stream.inbox.drop()
        with contextlib.suppress(ConnectionError):
            await self._connection.send(spdy_frames.rst_stream(stream.number, spdy_frames.REFUSED_STREAM))


def _port(text: str) -> int:
    """0 for what is no port."""
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        return 0
    return int(text) if int(text) < 65536 else 0


# -------------------------------------------------------------------------------------------------------- WebSocket


async def remote_over_websocket(sessions: Sessions, request: Remote, wire: Wire, protocol: str) -> None:
    """Exec or attach. Raises ProtocolError, ConnectionError."""
    socket = WebSocket(wire)
    version = _version(protocol)
    readable = {_STDIN} if request.stdin else set()
    if request.terminal:
        readable.add(_RESIZE)
    all_of = Channels(socket, 5, text="base64" in protocol, readable=readable, closing=version >= 5)
    channels = all_of.channels

    async def session() -> None:
        peer = Peer(
            stdin=channels[_STDIN] if request.stdin else None,
            stdout=channels[_STDOUT] if request.stdout else None,
            stderr=channels[_STDERR] if request.stderr and not request.terminal else None,
            resize=channels[_RESIZE] if request.terminal else None,
        )
        # So that a client knows that the connection stands before there is any output.
        await (peer.stdout or peer.stderr or channels[_ERROR]).write(b"")
        status = await _run(sessions, request, peer)
        await _tell(status, version, channels[_ERROR])
        await socket.close(NORMAL)

    await _together(all_of.serve(), session())


async def forward_over_websocket(sessions: Sessions, request: PortForward, wire: Wire, protocol: str) -> None:
    """Port-forward of the ports in the request, or through a tunnel. Raises ProtocolError, ConnectionError."""
    socket = WebSocket(wire)
    if protocol == TUNNEL:
        await forward_over_spdy(sessions, request, Tunnel(socket))
        await socket.close(NORMAL)
        return
    ports = request.ports
    readable = range(0, 2 * len(ports), 2)
    all_of = Channels(socket, 2 * len(ports), text="base64" in protocol, readable=readable, closing=False)

    async def session() -> None:
        pairs = list(zip(ports, all_of.channels[::2], all_of.channels[1::2], strict=True))
        for port, *pair in pairs:
            for channel in pair:
                await channel.write(struct.pack("<H", port))
        await asyncio.gather(*(sessions.forward(request, port, data, error) for port, data, error in pairs))
        await socket.close(NORMAL)

    await _together(all_of.serve(), session())
