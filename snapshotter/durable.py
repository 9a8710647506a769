"""One syncfs(2) for everybody who waits for one.

A layer is 70,000 files: an fsync each takes minutes, one syncfs of the filesystem takes about as long as the disk
needs for the bytes. It refuses to answer for anything written after the call. Invariant: `sync` returns only after a
syncfs that began after `sync` was called; equal waiters share it.
"""

from __future__ import annotations

import threading

from runtime.linux.writeback import syncfs


class Syncer:
    """`fd` is of the filesystem; it stays open, since the kernel reports writeback errors to fds open by then."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changed = threading.Condition()
        self._begun = 0
        self._done = 0
        self._running = False
        self._errors: dict[int, OSError] = {}

    def sync(self) -> None:
        """Everything written before the call is durable. Raises OSError."""
        with self._changed:
            wanted = self._begun + 1
            while self._done < wanted:
                if self._running:
                    self._changed.wait()
                    continue
                self._running = True
                self._begun += 1
                number = self._begun
                self._changed.release()
                error: OSError | None = None
                try:
                    syncfs(self._fd)
                except OSError as raised:
                    error = raised
                finally:
                    self._changed.acquire()
                    self._running = False
                    self._done = number
                    if error is not None:
                        self._errors = {number: error}
                    self._changed.notify_all()
            if wanted in self._errors:
                raise self._errors[wanted]
