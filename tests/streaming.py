"""The client's side of streaming, as client-go and a WebSocket client have it, and a server to try it on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cri.config import StreamSection
from cri.interfaces import Sandbox
from cri.streaming import spdy_frames as frames
from cri.streaming import websocket
from cri.streaming.server import Server
from cri.streaming.sessions import Attach, Exec, PortForward, Sessions
from cri.threads import Threads
from tests.costs import SOON_S
from tests.fakes.streams import ProcessStreams

SANDBOX = Sandbox("pod", Path("/nowhere"), 1, 1)


class Site:
    """A server with commands of this machine behind it."""

    def __init__(self, config: StreamSection, streams: ProcessStreams) -> None:
        self.streams = streams
        self.threads = Threads("exec", 16)
        self.server = Server(config, Sessions(streams, self.threads))

    def exec(self, *words: str, stdin: bool = False, terminal: bool = False) -> str:
        process = {"args": list(words)}
        return self.server.offer(
            Exec(SANDBOX, "c", process, stdin=stdin, stdout=True, stderr=not terminal, terminal=terminal)
        )

    def attach(self, *, stdin: bool = False, terminal: bool = False) -> str:
        return self.server.offer(Attach(SANDBOX, "c", stdin=stdin, stdout=True, stderr=not terminal, terminal=terminal))

    def forward(self, *ports: int) -> str:
        return self.server.offer(PortForward(SANDBOX, "uid u", ports))


def on_site(
    body: Callable[[Site], Coroutine[Any, Any, None]], *, attached: tuple[str, ...] = ("cat",), **config: Any
) -> None:
    """Runs `body`; afterwards no fd is open that was not before, and no task is left."""

    async def run() -> None:
        site = Site(replace(StreamSection(), **config), ProcessStreams(attached))
        await site.server.start()
        try:
            await asyncio.wait_for(body(site), 60)
        finally:
            await site.server.close()
            # Calls in threads that were under way are let come to their end, and what they give is dropped: before the
            # commands are ended, since such a call may be starting one.
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            if left:
                _, left_over = await asyncio.wait(left, timeout=SOON_S)
                assert not left_over, left_over
            await asyncio.get_running_loop().run_in_executor(None, site.streams.close)
            site.threads.close()

    gc.freeze()  # to collect what all the tests before have left would take a second, twice for each test
    try:
        before = _fds()
        asyncio.run(run())
        # What an earlier test left may be closed meanwhile, which is nobody's leak.
        left = {name: target for name, target in _fds().items() if before.get(name) != target}
        assert not left, left
    finally:
        gc.unfreeze()


def _fds() -> dict[str, str]:
    """What is open. A socket that had bytes to send when its loop ended is closed by the collector."""
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


async def dial(url: str, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    """A connection to the URL's server, and the URL's path."""
    _, _, host, path = url.split("/", 3)
    address, _, port = host.rpartition(":")
    reader, writer = await asyncio.open_connection(address, int(port), limit=1 << 22, **options)
    return reader, writer, f"/{path}"


async def ask(url: str, fields: Mapping[str, str], method: str = "POST") -> tuple[int, dict[str, str], str]:
    """Status, fields and body of a plain answer."""
    reader, writer, path = await dial(url)
    with contextlib.closing(writer):
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: here\r\n{lines}\r\n".encode())
        status, answer = await head(reader)
        body = await reader.readexactly(int(answer.get("content-length", "0")))
        return status, answer, body.decode()


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}


class Spdy:
    """A SPDY client. What comes is sorted by stream: `got` bytes, `ended` streams, `other` frames by type."""

    def __init__(self, read: Callable[[int], Coroutine[Any, Any, bytes]], write: Callable[[bytes], Any]) -> None:
        self._read = read
        self.write = write
        self.deflater, self.inflater = frames.Deflater(), frames.Inflater()
        self.got: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.other: list[tuple[int, bytes]] = []
        self.names: dict[str, int] = {}
        self._next = 1

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, protocol: str = "v4.channel.k8s.io", **options: Any) -> AsyncIterator[Spdy]:
        reader, writer, path = await dial(url, **options)
        try:
            lines = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
            lines += f"X-Stream-Protocol-Version: {protocol}\r\n" if protocol else ""
            writer.write(f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n{lines}\r\n".encode())
            status, fields = await head(reader)
            assert status == 101 and fields.get("x-stream-protocol-version", "") == protocol, (status, fields)
            client = cls(reader.readexactly, writer.write)
            client.reader, client.writer = reader, writer  # type: ignore[attr-defined]  # for tests that go away
            yield client
        finally:
            writer.close()

    def stream(self, **headers: str) -> int:
        """Opens a stream."""
        number, self._next = self._next, self._next + 2
        self.write(frames.syn_stream(number, self.deflater.block(headers)))
        self.got[number] = bytearray()
        self.names[headers.get("streamtype", "")] = number
        return number

    def streams(self, *names: str) -> None:
        for name in names:
            self.stream(streamtype=name)

    def send(self, name: str, data: bytes, *, fin: bool = False) -> None:
        self.write(frames.data(self.names[name], data, fin=fin))

    async def turn(self) -> bool:
        """Takes a frame; False when the server has closed."""
        try:
            first = await self._read(8)
            number, length = int.from_bytes(first[:4]), int.from_bytes(first[5:8])
            payload = await self._read(length) if length else b""
        except (EOFError, ConnectionResetError):
            return False
        if number >> 31:
            self.other.append((number & 0xFFFF, payload))
        else:
            self.got[number] += payload
            if first[4] & frames.FIN:
                self.ended.add(number)
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert await self.turn(), "the server closed the connection"

    async def to_end(self) -> None:
        while await self.turn():
            pass

    def said(self, name: str) -> bytes:
        return bytes(self.got[self.names[name]])

    async def status(self) -> dict[str, Any]:
        """metav1.Status, once the error stream has ended."""
        await self.until(lambda: self.names["error"] in self.ended)
        status: dict[str, Any] = json.loads(self.said("error"))
        return status


def code(status: dict[str, Any]) -> int:
    if status["status"] == "Success":
        return 0
    assert status["reason"] == "NonZeroExitCode", status
    (cause,) = status["details"]["causes"]
    assert cause["reason"] == "ExitCode"
    return int(cause["message"])


class Ws:
    """A WebSocket client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.closed_with = 0
        self._rest = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, protocol: str = "v5.channel.k8s.io") -> AsyncIterator[Ws]:
        reader, writer, path = await dial(url)
        try:
            key = base64.b64encode(os.urandom(16)).decode()
            lines = f"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: {key}\r\n"
            lines += "Sec-WebSocket-Version: 13\r\n"
            lines += f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
            writer.write(f"GET {path} HTTP/1.1\r\nHost: here\r\n{lines}\r\n".encode())
            status, fields = await head(reader)
            assert status == 101 and fields["sec-websocket-accept"] == websocket.accept_key(key)
            assert fields.get("sec-websocket-protocol", "") == protocol
            yield cls(reader, writer)
        finally:
            writer.close()

    def send(self, data: bytes, kind: int = websocket.BINARY) -> None:
        self.writer.write(websocket.frame(kind, data, os.urandom(4)))

    async def receive(self) -> tuple[int, bytes] | None:
        try:
            first, size = await self.reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8))
            payload = await self.reader.readexactly(size)
        except EOFError:
            return None
        if first & 0x0F == websocket.CLOSE:
            self.closed_with = int.from_bytes(payload[:2])
            return None
        return first & 0x0F, payload

    async def channels(self) -> dict[int, bytes]:
        """All that comes until the end, by channel."""
        got: dict[int, bytes] = {}
        while (message := await self.receive()) is not None:
            kind, payload = message
            if kind in (websocket.BINARY, websocket.TEXT):
                text = kind == websocket.TEXT
                number = payload[0] - 48 if text else payload[0]
                got[number] = got.get(number, b"") + (base64.b64decode(payload[1:]) if text else payload[1:])
        return got

    async def read_exactly(self, count: int) -> bytes:
        """As the bytes of a tunnel."""
        while len(self._rest) < count:
            message = await self.receive()
            if message is None:
                raise EOFError
            self._rest += message[1]
        data, self._rest = self._rest[:count], self._rest[count:]
        return data
