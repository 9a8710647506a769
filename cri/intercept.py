"""What is around every call: readiness, logging with duration, translation of failures.

Refuses everything but Version until recovery is done. Invariant: a failure leaves as a code and one bounded sentence,
and an unexpected one leaves its traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from grpc import StatusCode

from cri.errors import CallFailed, code_of, sentence

log = logging.getLogger(__name__)

T = TypeVar("T")

# gRPC sends it as a trailer, of which all together may have 8 KiB; what is not ASCII takes three bytes a byte there.
MAX_SENTENCE = 2000
_ALWAYS = frozenset({"Version"})
_QUIET = ("List", "Version", "Status", "RuntimeConfig", "ImageStatus", "ImageFsInfo", "ExecSync", "Container", "Pod")
_EXPECTED = frozenset(
    {
        StatusCode.NOT_FOUND,
        StatusCode.INVALID_ARGUMENT,
        StatusCode.ALREADY_EXISTS,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.UNIMPLEMENTED,
        StatusCode.UNAVAILABLE,
    }
)


class Intercept:
    """One per server. `why_not` is the reason for refusing calls, "" when there is none."""

    def __init__(self, why_not: str = "") -> None:
        self.why_not = why_not

    async def run(self, name: str, work: Awaitable[T]) -> T:
        """Awaits `work` for the call `name`. Raises CallFailed."""
        try:
            self._require_ready(name)
        except CallFailed:
            if asyncio.iscoroutine(work):
                work.close()
            raise
        started = time.perf_counter()
        try:
            result = await work
        except asyncio.CancelledError:
            log.info("%s: the caller left after %.1f ms", name, _ms(started))
            raise
        except Exception as error:
            raise self._failed(name, error, started) from error
        level = logging.DEBUG if name.startswith(_QUIET) else logging.INFO
        log.log(level, "%s: %.1f ms", name, _ms(started))
        return result

    async def stream(self, name: str, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Passes on `items` of the streaming call `name`, whose end is not a failure of anybody. Raises CallFailed."""
        self._require_ready(name)
        started = time.perf_counter()
        async with aclosing(items):
            try:
                async for item in items:
                    yield item
            except Exception as error:
                raise self._failed(name, error, started) from error
            finally:
                log.debug("%s: %.1f ms", name, _ms(started))

    def _require_ready(self, name: str) -> None:
        if self.why_not and name not in _ALWAYS:
            raise CallFailed(StatusCode.UNAVAILABLE, f"{name}: {self.why_not}")

    def _failed(self, name: str, error: Exception, started: float) -> CallFailed:
        code = code_of(error)
        words = sentence(error)
        if len(words) > MAX_SENTENCE:
            words = words[: MAX_SENTENCE - 4] + " ..."
        unexpected = code is StatusCode.INTERNAL and not isinstance(error, OSError) and not hasattr(error, "hint")
        log.log(
            logging.INFO if code in _EXPECTED else logging.WARNING,
            "%s: %s after %.1f ms: %s",
            name,
            code.name,
            _ms(started),
            words,
            exc_info=error if unexpected else None,
        )
        return CallFailed(code, words)


def _ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000
