"""A tar's bytes, taken from a stream of chunks in blocks, records and pieces, without copying what is large.

It refuses to hold more than one chunk. Invariant: `position` counts every byte that was taken or dropped.
"""

from __future__ import annotations

from snapshotter.model import UnpackError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512


class Feed:
    """The raw tar as a stream of chunks; `position` counts what was taken. `more` returns b"" at the end."""

    __slots__ = ("_more", "_view", "_offset", "_length", "position")

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._view = memoryview(b"")
        self._offset = 0
        self._length = 0
        self.position = 0

    def _refill(self) -> bool:
        chunk = self._more()
        self._view, self._offset, self._length = memoryview(chunk), 0, len(chunk)
        return self._length > 0

    def block(self) -> bytes:
        """The next 512 bytes, or b"" at a clean end."""
        start = self._offset
        if self._length - start >= BLOCK:
            self._offset = start + BLOCK
            self.position += BLOCK
            return bytes(self._view[start : start + BLOCK])
        return self.exactly(BLOCK, or_end=True)

    def exactly(self, count: int, *, or_end: bool = False) -> bytes:
        """The next `count` bytes; with `or_end`, b"" when the stream ends right here. Raises UnpackError."""
        data = b"".join(self.pieces(count, short=True))
        if len(data) == count or (or_end and not data):
            return data
        raise UnpackError(f"tar ends in the middle of a record, at byte {self.position}")

    def pieces(self, count: int, *, short: bool = False) -> Iterator[memoryview]:
        """The next `count` bytes in as few views as the chunks allow. Raises UnpackError when the stream is shorter,
        unless `short`."""
        while count:
            if self._offset == self._length and not self._refill():
                if short:
                    return
                raise UnpackError(f"tar ends in the middle of a file's data, at byte {self.position}")
            start = self._offset
            end = min(start + count, self._length)
            self._offset = end
            self.position += end - start
            count -= end - start
            yield self._view[start:end]

    def skip_to(self, position: int) -> None:
        """Drops what lies before `position`."""
        if self._length - self._offset >= position - self.position:
            self._offset += position - self.position
            self.position = position
            return
        for _ in self.pieces(position - self.position):
            pass

    def drain(self) -> None:
        """Reads to the end: what follows the end marker belongs to the diff id too."""
        self.position += self._length - self._offset
        while self._refill():
            self.position += self._length
        self._offset = self._length
