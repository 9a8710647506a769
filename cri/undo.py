"""Undo as a stack: each step that succeeded registers its inverse, and a failure runs them in reverse.

Refuses to hide anything: a failing inverse becomes a note on the first error, and the rest still run. Invariant:
once unwinding has begun it goes to its end, whoever cancels the caller (threats R11, O1), each inverse within its own
deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

DEADLINE_S = 30.0

Inverse = Callable[[], Awaitable[object]]


class Undo:
    """`async with Undo() as undo:` … `undo.did("remove netns", inverse)` after each step … `undo.keep_all()`."""

    __slots__ = ("_steps", "_deadline_s")

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._steps: list[tuple[str, Inverse]] = []
        self._deadline_s = deadline_s

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
                error.add_note(f"undo {name}: not done within {self._deadline_s:g} s")
            except Exception as failure:
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
