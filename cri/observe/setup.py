"""Who watches this node, as its configuration has it: put in place at the daemon's start, taken down at its end.

Refuses to import what is not configured: SDK and exporters are memory that is a budget. Invariant: with none of it
configured nothing watches, and the calls find nobody to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cri import trace
from cri.config import Config
from cri.intercept import Intercept
from cri.store import Store

if TYPE_CHECKING:
    from cri.observe.metrics import Metrics
    from cri.observe.tracing import Tracing
    from cri.trace import PullWatch

log = logging.getLogger(__name__)


def set_up_logs(config: Config) -> None:
    """Log lines on stderr, in the format and from the level that are configured."""
    # No line says from where it is: a call's answer waits while that is found out (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    if config.log_format == "json":
        from cri.observe.logs import JsonFormatter

        handler.setFormatter(JsonFormatter())
    else:
        form = "%(asctime)s %(levelname).1s %(message)s"
        handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])


@contextlib.asynccontextmanager
async def watched(config: Config, intercept: Intercept, store: Store) -> AsyncIterator[None]:
    """Traces and metrics, as far as they are configured. Raises OSError when metrics cannot be served."""
    async with contextlib.AsyncExitStack() as stack:
        metrics, tracing = None, None
        if config.log_format == "json" or config.tracing.endpoint:
            intercept.subjects = True
        if config.metrics.enabled:
            metrics = await _serve_metrics(config, intercept, store, stack)
        if config.tracing.endpoint:
            tracing = await _send_spans(config, intercept, stack)
        if metrics is not None or tracing is not None:
            trace.configure(tracing, lambda: _pull_watch(metrics, tracing))
            stack.callback(trace.configure, None, None)
        yield


async def _serve_metrics(
    config: Config, intercept: Intercept, store: Store, stack: contextlib.AsyncExitStack
) -> Metrics:
    from cri.observe.exporter import Exporter
    from cri.observe.metrics import Metrics

    metrics = Metrics(store.pods, store.containers)
    exporter = Exporter(config.metrics, metrics)
    where = await exporter.start()
    stack.push_async_callback(exporter.close)
    intercept.observers += (metrics,)
    log.info("serving metrics on http://%s/metrics", where)
    return metrics


async def _send_spans(config: Config, intercept: Intercept, stack: contextlib.AsyncExitStack) -> Tracing:
    from cri.observe.tracing import open_tracing

    tracing = open_tracing(config.tracing)
    # What waits is sent or, after the exporter's own time limit, dropped: a collector that is away keeps no daemon.
    stack.push_async_callback(asyncio.get_running_loop().run_in_executor, None, tracing.close)
    intercept.observers += (tracing,)
    log.info("sending spans to %s", config.tracing.endpoint)
    return tracing


def _pull_watch(metrics: Metrics | None, tracing: Tracing | None) -> PullWatch:
    from cri.observe.pulls import PullTimes

    downloaded = None if metrics is None else metrics.downloaded
    return PullTimes(downloaded, None if tracing is None else tracing.phases)
