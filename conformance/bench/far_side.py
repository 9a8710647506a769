"""The far end of a simulated line, in a network namespace of its own: a registry, and before it a small proxy that
holds everything back for a while and now and then resets a connection.

    python -m conformance.bench.far_side DIRECTORY ADDRESS DELAY_MS RESET_MB LAYOUT

Prints "PORT_OF_PROXY PORT_OF_SOURCE" once it serves, and ends with its stdin. The source sends zeros to whoever
connects, as fast as the line takes them: what a line can carry is measured, not believed.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from conformance.images import push
from conformance.registry import registry

_PIECE = 64 << 10
# What may be on its way in one direction: far more than the line holds in the delay, and not without end.
_IN_FLIGHT = 4 << 20
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: close sends RST


class Delayed:
    """Bytes from one side, written to the other `delay_s` later."""

    def __init__(self, delay_s: float, writer: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
        self._delay_s, self._writer, self._count = delay_s, writer, count
        self._line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT // _PIECE)

    async def take(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(_PIECE):
            await self._line.put((loop.time() + self._delay_s, data))
        await self._line.put((loop.time() + self._delay_s, b""))

    async def give(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._line.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                self._writer.write_eof()
                return
            self._writer.write(data)
            await self._writer.drain()
            self._count(len(data))


class Proxy:
    """Forwards to the registry at `port`; a connection that has carried its share of bytes is reset."""

    def __init__(self, port: int, delay_s: float, reset_bytes: float) -> None:
        self._port, self._delay_s, self._reset_bytes = port, delay_s, reset_bytes
        self._random = random.Random(20261126)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._port, limit=_PIECE)
        left = self._random.expovariate(1 / self._reset_bytes) if self._reset_bytes else float("inf")

        def count(size: int) -> None:
            nonlocal left
            left -= size
            if left < 0:
                self._reset(writer)
                raise ConnectionResetError

        out, back = Delayed(self._delay_s, there, lambda _: None), Delayed(self._delay_s, writer, count)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(out.take(reader))
                group.create_task(out.give())
                group.create_task(back.take(there_reader))
                group.create_task(back.give())
        except* (OSError, asyncio.IncompleteReadError):
            pass  # a reset of ours or of either side ends all four
        finally:
            there.close()
            writer.close()

    @staticmethod
    def _reset(writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()


async def _source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    zeros = bytes(_PIECE)
    try:
        while True:
            writer.write(zeros)
            await writer.drain()
    except OSError:
        writer.close()


async def _serve(address: str, proxy: Proxy) -> None:
    first = await asyncio.start_server(proxy.serve, address, 0, limit=_PIECE)
    second = await asyncio.start_server(_source, address, 0)
    print(first.sockets[0].getsockname()[1], second.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.buffer.read)


def main(directory: str, address: str, delay_ms: str, reset_mb: str, layout: str) -> None:
    with registry(Path(directory)) as images:
        push(Path(layout), images.address)
        port = int(images.address.rpartition(":")[2])
        asyncio.run(_serve(address, Proxy(port, float(delay_ms) / 1000, float(reset_mb) * 1e6)))


if __name__ == "__main__":
    main(*sys.argv[1:])
