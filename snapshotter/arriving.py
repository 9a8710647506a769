"""A blob that is read while it is still being written: the reader waits where the writer is.

    writer ──▶ the file, then eventfd += bytes ──▶ reader: no further than the sum of what it was told
           ──▶ eventfd += GIVEN_UP             ──▶ reader: UnpackError

It refuses to read a byte that the writer has not counted, so what the file holds beyond that does not matter. What is
read is not verified yet: whoever commits what was made of it waits for the writer's word first. Invariant: a reader
holds no bytes, and one that was told to stop waits no more.
"""

from __future__ import annotations

import os

from snapshotter.model import UnpackError

# Beyond every size; twice of it still is no more than an eventfd(2) counts to.
GIVEN_UP = 1 << 62


class Reader:
    """The bytes of `fd` from its beginning, `size` of them; `credit_fd` is the eventfd, -1 for a blob that is whole.
    Both fds stay the caller's. One thread reads, another may `stop` it."""

    def __init__(self, fd: int, size: int, credit_fd: int = -1) -> None:
        self._fd = fd
        self.size = size
        self._credit_fd = credit_fd
        self._credit = size if credit_fd < 0 else 0
        self._at = 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes, b"" only at the end. Raises UnpackError when there will be no more, OSError."""
        while self._at == self._credit and self._at < self.size:
            self._wait()
        data = os.pread(self._fd, min(count, self._credit - self._at), self._at)
        self._at += len(data)
        return data

    def _wait(self) -> None:
        self._credit += os.eventfd_read(self._credit_fd)
        if self._credit > self.size:
            raise UnpackError("the layer's blob will not be whole")

    def stop(self) -> None:
        """Ends a wait, and every later one."""
        if self._credit_fd >= 0:
            os.eventfd_write(self._credit_fd, GIVEN_UP)
