"""How long the programs and services that one call asks may take together, and how the call ends them.

    event loop  Threads.ask ────────▶ a worker thread ──▶ programs.ask, key_services.call: each within what is left
                cancelled: end ─────────────────────────▶ a program is killed, a service's call cancelled, at once

Any thread. Refuses to begin anything once it has ended or its time is over. Invariant: after `end` nobody waits for
what was asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imagestore.model import ImageError

_TOGETHER_S = 90.0


class Errand:
    """One call's; `limit_s` is for all that it asks, beside the limit that each of them has."""

    def __init__(self, limit_s: float = _TOGETHER_S) -> None:
        self._limit_s = limit_s
        self._until = time.monotonic() + limit_s
        self._lock = threading.Lock()
        self._ended = False
        self._enders: list[Callable[[], object]] = []

    def share(self, most_s: float) -> float:
        """The seconds that the next one may take, `most_s` at most. Raises ImageError when there are none left."""
        left = self._until - time.monotonic()
        if self._ended:
            raise ImageError("it was given up")
        if left <= 0:
            raise ImageError(f"what was asked before it has taken all of {self._limit_s:g} s")
        return min(most_s, left)

    @contextmanager
    def ended_by(self, end: Callable[[], object]) -> Iterator[None]:
        """While the block lasts, `end` is called when the errand ends, and at once when it has. It must not block."""
        with self._lock:
            self._enders.append(end)
            if self._ended:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._enders.remove(end)

    def end(self) -> None:
        """Ends what is being asked. Idempotent."""
        with self._lock:
            self._ended = True
            for end in self._enders:
                end()
