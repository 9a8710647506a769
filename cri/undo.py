"""Undo as a stack: each step that succeeded registers its inverse, and a failure runs them in reverse.

Refuses to hide anything: a failing inverse becomes a note on the first error, and the rest still run. Invariant:
once unwinding has begun it goes to its end, whoever cancels the caller (threats R11, O1), each inverse within its own
deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

DEADLINE_S = 30.0

A = TypeVar("A")
B = TypeVar("B")
Inverse = Callable[[], Awaitable[object]]


class Undo:
    """`async with Undo() as undo:` … `undo.did("remove netns", inverse)` after each step … `undo.keep_all()`."""

    __slots__ = ("_steps", "_deadline_s", "failed")

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._steps: list[tuple[str, Inverse]] = []
        self._deadline_s = deadline_s
        self.failed = False
        """An inverse has failed: something is left, and a record of it must stay (threats R11, O2)."""

    def did(self, name: str, inverse: Inverse) -> None:
        """A step has happened, or may have: `inverse` takes it back, and is fine with its not having happened."""
        self._steps.append((name, inverse))

    def keep_all(self) -> None:
        """What was done stays."""
        self._steps.clear()

    async def unwind(self, error: BaseException) -> None:
        """Runs the inverses, last first; each failure is a note on `error`."""
        while self._steps:
            name, inverse = self._steps.pop()
            try:
                await asyncio.wait_for(_run(inverse), self._deadline_s)
            except TimeoutError:
                self.failed = True
                error.add_note(f"undo {name}: not done within {self._deadline_s:g} s")
            except Exception as failure:
                self.failed = True
                error.add_note(f"undo {name}: {failure}")

    async def __aenter__(self) -> Undo:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._steps:
            return
        await uncancelled(self.unwind(error))


async def _run(inverse: Inverse) -> None:
    await inverse()


async def uncancelled(work: Awaitable[None]) -> None:
    """Awaits `work` to its end; a cancellation that comes meanwhile is raised only then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except Exception:
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    task.result()


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Runs both at once and to their ends, also when one fails; then raises the first failure."""
    one, two = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        if isinstance(two, BaseException):
            one.add_note(f"also: {two}")
        raise one
    if isinstance(two, BaseException):
        raise two
    return one, two
