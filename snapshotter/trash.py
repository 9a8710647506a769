"""Removing without making anybody wait: rename into the trash, then delete there.

It refuses to enter a mount (remove_tree: EXDEV) and to hold a lock while it deletes. Invariant: what is in the trash
belongs to nobody; what could not be deleted stays there for `retry`, and for the sweep of the next start (threats O38,
O43, O51).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from runtime.linux.files import remove_tree


class Trash:
    """`directory` is on the filesystem of what is thrown away."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed = threading.Condition()
        self._deleting: set[str] = set()
        self._sweeper: threading.Thread | None = None

    def take(self, path: Path, name: str = "") -> str | None:
        """Moves `path` into the trash under `name` (default: one nobody else has); None when it does not exist."""
        name = name or f"{path.parent.name}-{path.name}-{os.urandom(4).hex()}"
        try:
            path.rename(self._directory / name)
        except FileNotFoundError:
            return None
        return name

    def discard(self, path: Path, name: str = "") -> None:
        """Removes `path` by way of the trash; gone already is fine. With a fixed `name`, an earlier attempt that
        failed is taken up. Raises OSError: the rest is in the trash."""
        self.delete(self.take(path, name) or name)

    def undo(self, error: BaseException, *paths: Path) -> None:
        """Takes away what a failed call made; what goes wrong with that is a note on its error."""
        for path in paths:
            try:
                self.discard(path)
            except OSError as undoing:
                error.add_note(f"removing {path} failed as well, the next start will: {undoing}")

    def retry(self) -> None:
        """Tries once more to delete what is left over; what fails again stays."""
        for name in os.listdir(self._directory):
            try:
                self.delete(name, wait=False)
            except OSError:
                continue

    def sweep(self) -> None:
        """Deletes what earlier runs left, in a thread: a start does not wait for it."""
        if os.listdir(self._directory):
            self._sweeper = threading.Thread(target=self.retry, name="trash", daemon=True)
            self._sweeper.start()

    def close(self, seconds: float = 5.0) -> None:
        """Gives the sweep a moment to end; the next start finishes it."""
        if self._sweeper is not None:
            self._sweeper.join(seconds)

    def delete(self, name: str | None, *, wait: bool = True) -> None:
        """Deletes what `take` took, None being nothing; where another thread is at it, waits for that one, or leaves
        it to it. Raises OSError: the rest stays."""
        if not name:
            return
        with self._changed:
            if name in self._deleting and not wait:
                return
            self._changed.wait_for(lambda: name not in self._deleting)
            self._deleting.add(name)
        try:
            remove_tree(self._directory / name)
        finally:
            with self._changed:
                self._deleting.discard(name)
                self._changed.notify_all()
