"""GET /metrics over HTTP, for a Prometheus that scrapes.

On asyncio's streams and the streaming server's parser of heads: a web framework would take ten times the memory of all
that is measured here. Refuses every other path and method, a body, and clients beyond a few. Invariant: one scrape at a
time is worked on, so that scraping cannot become the load that it measures; a client that says nothing is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from prometheus_client import CONTENT_TYPE_LATEST

from cri.config import MetricsSection
from cri.observe.metrics import Metrics
from cri.streaming.http import BadRequest, answer, parse
from cri.threads import to_thread

log = logging.getLogger(__name__)

_CLIENTS = 16
_HEAD_SIZE = 16 << 10
_PATIENCE_S = 10.0


class Exporter:
    """The server of `metrics` at the section's address."""

    def __init__(self, section: MetricsSection, metrics: Metrics) -> None:
        self._section = section
        self._metrics = metrics
        self._one = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listens; "ADDRESS:PORT". Raises OSError naming the address."""
        address, port = self._section.address, self._section.port
        try:
            self._server = await asyncio.start_server(self._connected, address, port, limit=_HEAD_SIZE)
        except OSError as error:
            raise OSError(error.errno, f"metrics.address: listen on {address} port {port}: {error.strerror}") from error
        host, found = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{found}" if ":" in host else f"{host}:{found}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= _CLIENTS:
            writer.transport.abort()
            return
        self._clients.add(task)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                raw = await reader.readuntil(b"\r\n\r\n")
            reply = await self._reply(raw)
            async with asyncio.timeout(_PATIENCE_S):
                writer.write(reply)
                await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
            log.debug("metrics: %s", error or type(error).__name__)
        except asyncio.CancelledError:
            writer.transport.abort()  # the server ends
        finally:
            self._clients.discard(task)
            writer.close()

    async def _reply(self, raw: bytes) -> bytes:
        try:
            head = parse(raw)
            if head.path != "/metrics":
                raise BadRequest(404, "there is /metrics, and nothing else")
            if head.method != "GET":
                raise BadRequest(405, "expected GET")
        except BadRequest as error:
            return answer(error.status, error.fields, str(error))
        async with self._one:
            body = await to_thread(self._metrics.text)
        fields = f"Content-Type: {CONTENT_TYPE_LATEST}\r\nContent-Length: {len(body)}\r\nConnection: close"
        return f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + body

    async def close(self) -> None:
        """Listens no more."""
        if self._server is None:
            return
        self._server.close()
        for task in self._clients:
            task.cancel()
        with contextlib.suppress(OSError):
            await asyncio.gather(*self._clients, return_exceptions=True)
        self._server = None
