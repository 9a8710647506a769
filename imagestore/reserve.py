"""A little disk space set aside, so that what takes it can be removed when the disk is full.

    DIRECTORY/.reserve

A removal must write before it frees: SQLite's log and index.json. Refuses nothing: without a reserve a removal on a
full disk fails as any other write. Invariant: `fill` never takes space that is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

_SIZE, _STEP = 512 << 10, 32 << 10


class Reserve:
    """The reserve in one directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".reserve"

    def fill(self) -> None:
        """Sets the space aside, unless it is already; of less than that, what there is."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return
        try:
            have = os.fstat(fd).st_size
            if not any(_allocated(fd, size) for size in range(_SIZE, have, -_STEP)) and not have:
                self._path.unlink(missing_ok=True)
        finally:
            os.close(fd)

    def spend(self) -> bool:
        """Gives the space back to the disk; False when there was none."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True


def _allocated(fd: int, size: int) -> bool:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        return False
    return True
