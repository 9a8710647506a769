"""A thread that somebody waits for. `threading` does more, and is a fifth of what a worker takes to start.

Refuses to be told what the thread returned or raised: its function hands that over itself. Invariant: none of them
keeps the process from ending.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Thread:
    """Runs `function` with `args`, from now on."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._running = _thread.allocate_lock()
        self._running.acquire()
        try:
            _thread.start_new_thread(self._run, (function, args))
        except BaseException:
            self._running.release()
            raise

    def _run(self, function: Callable[..., object], args: tuple[object, ...]) -> None:
        try:
            function(*args)
        finally:
            self._running.release()

    def is_alive(self) -> bool:
        return self._running.locked()

    def join(self) -> None:
        with self._running:
            return
