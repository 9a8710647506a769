"""Room for the records on a disk that is full: what fills it must be stopped and removed, which takes writes.

    ROOT/.reserve      space set aside; given up where not even the database can be opened
    ROOT/ocid.db-wal   has blocks ahead of its end, which nobody else can take; as many as SQLite fills until it starts
                       at the front again (its wal_autocheckpoint, 1000 pages) in a process that stays

Refuses nothing: where there is no room to set aside, or no fallocate(2), a full disk fails what it fails. Invariant: a
reserve is given up for opening the database only, and made anew once there is space.
See https://www.sqlite.org/wal.html.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from imagestore.reserve import Reserve
from runtime.linux.files import FALLOC_FL_KEEP_SIZE, fallocate

# A page with its header, 1000 times and some; and what a single command writes.
STAYING, PASSING, _STEP = 1050 * 4120, 256 << 10, 32 << 10
# With less than this SQLite says that it cannot read or write (its -shm file), not that the disk is full.
_LITTLE = 256 << 10

T = TypeVar("T")


class Room:
    """The room of the database at `path`; `ahead` bytes of it in the log."""

    def __init__(self, path: Path, ahead: int) -> None:
        self._wal = path.with_name(f"{path.name}-wal")
        self._reserve = Reserve(path.parent)
        self._ahead = ahead

    def opened(self, open_: Callable[[], T]) -> T:
        """What `open_` returns, which opens the database and leaves it open. Raises sqlite3.Error."""
        try:
            made = open_()
        except sqlite3.OperationalError:
            if not self._is_full() or not self._reserve.spend():
                raise
            made = open_()
        self._set_ahead()
        self._reserve.fill()
        return made

    def closed(self) -> None:
        """Sets aside again what the database has let go of."""
        self._reserve.fill()

    def _set_ahead(self) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(self._wal, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)  # no file that SQLite holds locks of
            try:
                for size in range(self._ahead, 0, -_STEP):
                    with contextlib.suppress(OSError):
                        fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size)
                        break
            finally:
                os.close(fd)

    def _is_full(self) -> bool:
        with contextlib.suppress(OSError):
            there = os.statvfs(self._wal.parent)
            return there.f_bavail * there.f_frsize < _LITTLE
        return False
