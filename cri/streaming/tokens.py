"""One-time URLs: what was asked for by gRPC, until somebody comes for it by HTTP.

A token has 192 random bits, works once and for TTL_S seconds (threats S56). Only its digest is kept, and looked up by:
how long a wrong guess takes says nothing about any token. Refuses more than MAX_WAITING unclaimed requests.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cri.errors import LimitExceeded

TTL_S = 30.0
MAX_WAITING = 1000

T = TypeVar("T")


class Tokens(Generic[T]):
    """Requests by token."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._waiting: dict[bytes, tuple[float, T]] = {}  # in the order of their deadlines

    def offer(self, request: T) -> str:
        """A token for `request`. Raises LimitExceeded."""
        self._expire()
        if len(self._waiting) >= MAX_WAITING:
            raise LimitExceeded(f"{MAX_WAITING} exec, attach and port-forward URLs wait to be used; try again later")
        import secrets  # which brings random and hmac along

        token = secrets.token_urlsafe(24)
        self._waiting[_digest(token)] = (self._now() + TTL_S, request)
        return token

    def take(self, token: str) -> T | None:
        """The request, once; None for a token that is wrong, used or too old."""
        self._expire()
        found = self._waiting.pop(_digest(token), None)
        return None if found is None else found[1]

    def _expire(self) -> None:
        now = self._now()
        while self._waiting:
            digest = next(iter(self._waiting))
            if self._waiting[digest][0] > now:
                break
            del self._waiting[digest]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
