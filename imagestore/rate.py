"""Limits on bytes per second: of one pull, and of the node.

Event loop only. Refuses nothing: who takes more than there is waits. Invariant: over any time, what was let through is
at most the rate times that time, and one burst.
"""

from __future__ import annotations

import asyncio
import time

# As much as may go at once after a pause: large enough that a loop wakes up seldom, small enough for a slow line.
_BURST_S = 0.1


class Rate:
    """A token bucket; `bytes_per_s` 0 is no limit."""

    __slots__ = ("_at", "_have", "_per_s")

    def __init__(self, bytes_per_s: int) -> None:
        self._per_s = bytes_per_s
        self._have = 0.0
        self._at = time.monotonic()

    async def take(self, count: int) -> None:
        """Waits until `count` bytes, which came already, are within the rate."""
        if not self._per_s:
            return
        now = time.monotonic()
        self._have = min(self._have + (now - self._at) * self._per_s, self._per_s * _BURST_S) - count
        self._at = now
        if self._have < 0:
            # Whoever takes next waits for this debt, too: the order of the takers is that of their sleeps' ends.
            await asyncio.sleep(-self._have / self._per_s)
