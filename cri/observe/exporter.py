"""GET /metrics over HTTP, for a Prometheus that scrapes.

Refuses every other path and method, and a body. Invariant: one scrape at a time is worked on, so that scraping cannot
become the load that it measures.
"""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from cri.config import MetricsSection
from cri.observe.metrics import Metrics
from cri.threads import to_thread

_BACKLOG = 16


class Exporter:
    """The server of `metrics` at the section's address."""

    def __init__(self, section: MetricsSection, metrics: Metrics) -> None:
        self._section = section
        self._metrics = metrics
        self._one = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listens; "ADDRESS:PORT". Raises OSError naming the address."""
        application = web.Application(client_max_size=1024)
        application.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await self._runner.setup()
        address, port = self._section.address, self._section.port
        try:
            site = web.TCPSite(self._runner, address, port, backlog=_BACKLOG, reuse_address=True)
            await site.start()
        except OSError as error:
            await self.close()
            raise OSError(error.errno, f"metrics.address: listen on {address} port {port}: {error.strerror}") from error
        found: tuple[str, int] = self._runner.addresses[0][:2]
        return f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"

    async def _scrape(self, request: web.Request) -> web.Response:
        async with self._one:
            body = await to_thread(self._metrics.text)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"})

    async def close(self) -> None:
        """Listens no more."""
        if self._runner is not None:
            with contextlib.suppress(OSError):
                await self._runner.cleanup()
            self._runner = None
