"""A page shared with a forked child, in which it leaves how far it came: readable also when it died without a word.

Refuses more than one small number. Invariant: unmapped by execve, so nothing of it reaches a container.
"""

from __future__ import annotations

import mmap


class Progress:
    """One number from 0 to 255."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def at(self, number: int) -> None:
        """Notes that `number` has been reached."""
        self._page[0] = number

    def reached(self) -> int:
        """What was noted last."""
        return self._page[0]

    def close(self) -> None:
        self._page.close()
