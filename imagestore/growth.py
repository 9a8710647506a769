"""A blob that is being written, for one who reads it meanwhile: what of it is there, and whether it became right.

    Ingest ── follow ──▶ Growth ── open ──▶ the file, and an eventfd(2) that counts its bytes
           ── grew, verify | give_up ──▶    ── verified ──▶ True | ContentInvalid

Any thread. It refuses to be opened once its writer has given up. Invariant: a byte that was counted was hashed for the
digest that `verified` speaks of, and is never written again: a blob that begins anew gives its Growth up.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from imagestore.model import ContentInvalid, Descriptor

# As snapshotter.arriving has it: no size, but twice of it is no more than an eventfd counts to.
_GIVEN_UP = 1 << 62


class Growth:
    """imagestore.model.Arriving. `path` is the partial file, of which `there` bytes were hashed already.
    Raises OSError."""

    def __init__(self, path: Path, blob: Descriptor, there: int) -> None:
        self.size = blob.size
        self.given_up = False
        self._digest = blob.digest
        self._verified = False
        self._changed = threading.Condition()
        # A description of its own: the writer's carries a lock that must end with the writer.
        self._fds = _opened(path, there)

    # ----------------------------------------------------------------------------------------------- the reader's side

    def open(self) -> tuple[int, int]:
        """See imagestore.model.Arriving."""
        with self._changed:
            if self.given_up or not self._fds:
                raise ContentInvalid(f"blob {self._digest}: it arrives no more")
            file = os.dup(self._fds[0])
            try:
                return file, os.dup(self._fds[1])
            except OSError:
                os.close(file)
                raise

    def verified(self, seconds: float) -> bool:
        """See imagestore.model.Arriving."""
        with self._changed:
            self._changed.wait_for(lambda: self._verified or self.given_up, seconds)
            if self.given_up:
                raise ContentInvalid(f"blob {self._digest}: it was not what it should be, or not all of it")
            return self._verified

    # ----------------------------------------------------------------------------------------------- the writer's side

    def grew(self, count: int) -> None:
        """`count` more bytes were hashed and written."""
        if count:
            os.eventfd_write(self._fds[1], count)

    def verify(self) -> None:
        """All of it is there and has the digest."""
        with self._changed:
            self._verified = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """The writer lets go: what was not verified never will be. Idempotent."""
        with self._changed:
            if not self._verified and not self.given_up:
                self.given_up = True
                os.eventfd_write(self._fds[1], _GIVEN_UP)
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody will open it any more, and the writer has let go. Idempotent."""
        with self._changed:
            fds, self._fds = self._fds, ()
            for fd in fds:
                os.close(fd)


def _opened(path: Path, there: int) -> tuple[int, ...]:
    # `there` is added, since it may be more than the unsigned int that an eventfd(2) begins with.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        credit = os.eventfd(0, os.EFD_CLOEXEC)
    except OSError:
        os.close(file)
        raise
    if there:
        os.eventfd_write(credit, there)
    return file, credit
