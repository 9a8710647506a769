"""The windows of a SPDY/3.1 connection: how many bytes of a stream, and of all together, may be under way.

    peer ── SETTINGS initial window ──▶  `sized`     from then on it is known to count,
    peer ── WINDOW_UPDATE ────────────▶  `widened`   and is sent no more than it has room for
    peer ◀─ WINDOW_UPDATE ─────────────  `Credits`   what was taken of what it had sent

The draft gives every window 64 KiB to begin with, and a sender nothing to tell by whether the other side counts at all.
client-go (moby/spdystream) does not: it waits for no update and sends none, so whoever kept to that window would stand
still with it for ever. Hence a peer's windows are kept from the first byte on, but bind only once it has shown that it
counts. Refuses what no window may be. Invariant: what was sent while the peer had not shown it is counted, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cri.streaming.wire import ProtocolError

INITIAL = 64 << 10
LARGEST = (1 << 31) - 1
CONNECTION = 0  # the number of the window that all streams have together
_WORTH_TELLING = INITIAL // 2
_PLENTY = 1 << 30


class Windows:
    """What may be sent on one connection."""

    def __init__(self) -> None:
        self.binding = False
        self._initial = INITIAL
        self._left = {CONNECTION: INITIAL}
        self._changed = asyncio.Event()

    def open(self, number: int) -> None:
        """A stream begins."""
        self._left[number] = self._initial

    def close(self, number: int) -> None:
        """It has ended: who waits for room in it waits no more. Idempotent."""
        self._left.pop(number, None)
        self._changed.set()

    async def take(self, number: int, wanted: int) -> int:
        """Waits until something may be sent of `wanted` bytes, and counts it as sent: how much. 0: the stream ended."""
        while number in self._left:
            room = min(self._left[number], self._left[CONNECTION])
            size = wanted if not self.binding else min(wanted, room)
            if size > 0:
                self._left[number] -= size
                self._left[CONNECTION] -= size
                return size
            self._changed.clear()
            await self._changed.wait()
        return 0

    def sized(self, initial: int) -> None:
        """SETTINGS with a window: for streams to come, and by how much it changes for those there are. Raises
        ProtocolError."""
        _within(initial, 0)
        for number in self._left.keys() - {CONNECTION}:
            self._left[number] = _within(self._left[number] + initial - self._initial)
        self._initial = initial
        self._bind()

    def widened(self, number: int, by: int) -> None:
        """WINDOW_UPDATE; one for a stream that has ended says nothing. Raises ProtocolError."""
        _within(by, 1)
        if number in self._left:
            self._left[number] = _within(self._left[number] + by)
        self._bind()

    def _bind(self) -> None:
        self.binding = True
        self._changed.set()


def _within(size: int, least: int = -LARGEST) -> int:
    if not least <= size <= LARGEST:
        raise ProtocolError(f"read a window: {size} bytes, expected {least} to {LARGEST}")
    return size


class Credits:
    """What a peer is told that it may send. `tell(number, size)` sends an update, unless the peer takes nothing now.

    Who counts is given back what was taken, so that a stream that nobody reads never stops the others. Who may or may
    not count is given so much at once that it hears of it once in a gigabyte: it must not stand still if it does, and
    have nothing to read if it does not."""

    def __init__(self, windows: Windows, tell: Callable[[int, int], bool]) -> None:
        self._windows = windows
        self._tell = tell
        self._left: dict[int, int] = {}
        self._owed: dict[int, int] = {}

    def came(self, number: int, size: int) -> None:
        """So many bytes for a stream, or for the connection."""
        self._left[number] = self._left.get(number, INITIAL) - size

    def taken(self, number: int, size: int) -> None:
        """So many of them need no room any more."""
        if number not in self._left:
            return
        owed = self._owed[number] = self._owed.get(number, 0) + size
        if self._windows.binding:
            more = owed if owed >= _WORTH_TELLING else 0
        else:
            more = _PLENTY if self._left[number] < _WORTH_TELLING else 0
        if more and self._tell(number, more):
            self._left[number] += more
            self._owed[number] = 0

    def close(self, number: int) -> None:
        """The stream has ended."""
        self._left.pop(number, None)
        self._owed.pop(number, None)
