"""Room for the records on a disk that is full: what fills it must be stopped and removed, which takes writes.

    ROOT/.ocid.db-wal, .ocid.db-shm   second names of the files that SQLite makes beside ocid.db, and removes with the
                                      last connection: so their blocks are still ours, and are there for the next

A full disk is never full for long: what fills it tries again and again, and has a block as soon as it is free. So these
files are handed from one opening to the next, and nothing is set free in between: not by a removal (the second name),
not by the truncation of a fresh -shm (a lock tells SQLite that somebody has it). The log has blocks ahead of its end,
as many as SQLite fills until it starts at the front again (its wal_autocheckpoint, 1000 pages) in a process that stays;
and the database has free pages, so that what is in the log finds its place there.

Refuses nothing: where there was no space to keep, no fallocate(2) or no second names, a full disk fails what it fails.
The caller holds the lock of the root. Invariant: SQLite never finds anything of an earlier life in a file that is
handed over: the log's header and the index's are zero before they have their names, which is an empty log and an index
to be made anew. A log that was not written back (its name is there) is not touched.
See https://www.sqlite.org/walformat.html.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

from runtime.linux.files import FALLOC_FL_KEEP_SIZE, fallocate

# A page with its header, 1000 times and some; and what a single command writes.
STAYING, PASSING, _STEP = 1050 * 4120, 256 << 10, 32 << 10
_WAL_HEADER, _SHM_HEADER = 32, 136
_IN_USE = 128  # the byte of -shm of which every connection holds a read lock
_FREE_PAGES, _FEW_PAGES, _PAGE = 48, 24, 4096
_PLENTY = 4 << 20  # free pages are made with so much space only: on a full disk they would take the log's


class Room:
    """The room of the database at `path`; `ahead` bytes of it in the log."""

    def __init__(self, path: Path, ahead: int) -> None:
        self._wal, self._kept_wal = _names(path, "wal")
        self._shm, self._kept_shm = _names(path, "shm")
        self._ahead = ahead
        self._held = -1  # closing any descriptor of -shm would give up SQLite's locks on it (fcntl(2))

    def opened(self, open_: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """What `open_` returns, which opens the database and leaves it open. Raises sqlite3.Error."""
        with contextlib.suppress(OSError):
            self._hand_over_wal()
        with contextlib.suppress(OSError):
            self._hand_over_shm()
        try:
            made = open_()
        except BaseException:
            self.closed()
            raise
        for live, kept in ((self._wal, self._kept_wal), (self._shm, self._kept_shm)):
            with contextlib.suppress(OSError):
                _keep(live, kept)
        self._set_ahead()
        with contextlib.suppress(sqlite3.Error, OSError):
            self._set_pages_free(made)
        return made

    def closed(self) -> None:
        """To be told once the last connection is closed."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _hand_over_wal(self) -> None:
        if not _is_free(self._kept_wal, self._wal):
            return
        fd = os.open(self._kept_wal, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if any(os.pread(fd, _WAL_HEADER, 0)):
                # On disk before it has its name: half of the old log after a power cut would be believed. In one call,
                # so that no kill comes between.
                os.pwritev(fd, [bytes(_WAL_HEADER)], 0, os.RWF_DSYNC)
        finally:
            os.close(fd)
        os.link(self._kept_wal, self._wal)

    def _hand_over_shm(self) -> None:
        """With a lock on it as another process would have: who is first makes the file empty, and takes its blocks one
        by one."""
        is_free = _is_free(self._kept_shm, self._shm)
        if not is_free and not self._shm.samefile(self._kept_shm):
            return
        fd = os.open(self._kept_shm, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _lock(fd, fcntl.F_WRLCK)  # fails where somebody reads the database beside us, whose index this is
            os.pwrite(fd, bytes(_SHM_HEADER), 0)
            _lock(fd, fcntl.F_RDLCK)
            if is_free:
                os.link(self._kept_shm, self._shm)
        except BaseException:
            os.close(fd)
            raise
        self._held = fd

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

    def _set_pages_free(self, db: sqlite3.Connection) -> None:
        there = os.statvfs(self._wal.parent)
        if db.execute("PRAGMA freelist_count").fetchone()[0] >= _FEW_PAGES:
            return
        if there.f_bavail * there.f_frsize < _PLENTY:
            return
        db.execute("CREATE TABLE IF NOT EXISTS cri_room (filler BLOB NOT NULL) STRICT")
        db.execute("INSERT INTO cri_room VALUES (zeroblob(?))", (_FREE_PAGES * _PAGE,))
        db.execute("DELETE FROM cri_room")


def _names(path: Path, kind: str) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}-{kind}"), path.with_name(f".{path.name}-{kind}")


def _is_free(kept: Path, live: Path) -> bool:
    """Whether `kept` is there and nobody's. One that went aside with a damaged database is not."""
    return not live.exists() and kept.exists() and kept.lstat().st_nlink == 1


def _keep(live: Path, kept: Path) -> None:
    """`kept` becomes a second name of what SQLite has made itself."""
    if kept.exists() and kept.samefile(live):
        return
    kept.unlink(missing_ok=True)
    os.link(live, kept)


def _lock(fd: int, kind: int) -> None:
    """An open file description's lock, which counts as another process's for those that SQLite takes in this one.
    struct flock of fcntl(2): type, whence, start, length, pid."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, _IN_USE, 1, 0))
