"""What a shim does once it has had nothing to do for a while: it gives back memory that it no longer needs for itself.

Refuses to come back by itself: one deadline for each time that the shim was busy, then an idle loop sleeps (threats
O33). Invariant: what is done changes nothing but the weight of the process.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.loop import Loop

# Seconds. Longer than what follows one another in a pod's beginning, shorter than the period of a kubelet's probes.
QUIET = 2.0


class Rest:
    """`is_busy` is asked when the quiet time is over; `act`, if there is one, is what is done then, and may raise."""

    def __init__(self, loop: Loop, is_busy: Callable[[], bool]) -> None:
        self.act: Callable[[], object] | None = None
        self._loop = loop
        self._is_busy = is_busy
        self._until = 0.0
        self._is_awaited = False

    def is_due(self) -> None:
        """The last thing that there was to do is done."""
        self._until = time.monotonic() + QUIET
        if self.act is not None and not self._is_awaited:
            self._await(QUIET)

    def _await(self, seconds: float) -> None:
        self._is_awaited = True
        self._loop.after(seconds, self._come)

    def _come(self) -> None:
        self._is_awaited = False
        if self._is_busy() or self.act is None:
            return  # whoever is busy brings us here again
        left = self._until - time.monotonic()
        if left > 0:
            self._await(left)
        else:
            self.act()
