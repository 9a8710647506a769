"""How long a call's caller waits: gRPC's deadline, for calls that must be over by then and not merely left.

Refuses to end anything: who works asks. Invariant: what is limited by `within` ends before the deadline, so that time
is left to undo it and to say why.
"""

from __future__ import annotations

import time

from cri.errors import DeadlineExceeded

_RESERVE, _MOST_S = 0.1, 2.0  # a part of what is left, and at most so long: to undo things, and to answer


class Patience:
    """That of a caller who goes `left_s` from now; None: it has set no deadline."""

    __slots__ = ("_until",)

    def __init__(self, left_s: float | None = None) -> None:
        self._until = None if left_s is None else time.monotonic() + left_s

    def check(self) -> None:
        """Raises DeadlineExceeded once the caller has gone."""
        if self._until is not None and time.monotonic() >= self._until:
            raise DeadlineExceeded("the caller's deadline has passed")

    def within(self, seconds: float, whose: str) -> tuple[float, str]:
        """For how long something may be waited for that may take `seconds`, and whose limit that is. Raises
        DeadlineExceeded."""
        self.check()
        if self._until is None:
            return seconds, whose
        left = self._until - time.monotonic()
        left = max(0.01, round(left - min(left * _RESERVE, _MOST_S), 2))
        return (left, "the caller's deadline") if left < seconds else (seconds, whose)


FOREVER = Patience()
