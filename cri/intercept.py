"""What is around every call: readiness, logging with duration, translation of failures.

Refuses everything but Version until recovery is done. Invariant: a failure leaves as a code and one bounded sentence,
and an unexpected one leaves its traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from typing import Any, Protocol, TypeVar

from grpc import StatusCode

from cri import trace
from cri.errors import CallFailed, code_of, sentence
from runtime.linux.dataclass import dataclass

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


@dataclass(frozen=True, slots=True)
class Call:
    """A call as those see it who watch: its name in the service's, what it asks, and what came along with it."""

    service: str
    name: str
    request: Any = None
    metadata: Sequence[tuple[str, Any]] = ()
    streaming: bool = False


class Observer(Protocol):
    """Somebody who watches calls (cri.observe)."""

    def call(self, call: Call) -> AbstractContextManager[None]:
        """Around a call. Leaves with its CallFailed where it failed, with CancelledError where its caller left."""
        ...


class Intercept:
    """One per server. `observers` watch its calls, and with `subjects` it is known in there what a call is about."""

    def __init__(self, why_not: str = "") -> None:
        self._why_not = why_not
        self.told: list[Callable[[], None]] = []
        self.observers: tuple[Observer, ...] = ()
        self.subjects = False

    @property
    def why_not(self) -> str:
        """Why calls are refused; who is in `told` hears of each change."""
        return self._why_not

    @why_not.setter
    def why_not(self, reason: str) -> None:
        self._why_not = reason
        for tell in self.told:
            tell()

    @property
    def watched(self) -> bool:
        """Whether anybody looks at calls at all."""
        return self.subjects or bool(self.observers)

    @contextmanager
    def _watch(self, call: Call) -> Iterator[None]:
        with ExitStack() as stack:
            if self.subjects:
                stack.enter_context(trace.scope(**_subject(call.request)))
            for observer in self.observers:
                stack.enter_context(observer.call(call))
            yield

    async def run(self, call: Call, work: Awaitable[T]) -> T:
        """Awaits `work` for `call`. Raises CallFailed."""
        if not self.watched:
            return await self._run(call.name, work)
        with self._watch(call):
            return await self._run(call.name, work)

    async def _run(self, name: str, work: Awaitable[T]) -> T:
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

    async def stream(self, call: Call, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Passes on `items` of a streaming call, whose end is not a failure of anybody. Raises CallFailed."""
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.call(call))
            async with aclosing(self._stream(call.name, items)) as passed:
                async for item in passed:
                    yield item

    async def _stream(self, name: str, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
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


def _subject(request: Any) -> dict[str, str]:
    """The pod and the container that a request names, as it names them."""
    return {"pod": getattr(request, "pod_sandbox_id", ""), "container": getattr(request, "container_id", "")}


def _ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000
