"""The directory in which a copy verifies blobs before its target has them: made, locked, removed; and those of copies
that were killed.

    PLACE/.ocid-copy-RANDOM        flock(2)ed while its copy lives; free: that is dead

Refuses to touch what another user has made under such a name. Invariant: whatever happens, the directory is gone at the
end, or when the next copy to the same place begins.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagestore.content import is_named
from runtime.linux.files import remove_tree

_PREFIX = ".ocid-copy-"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A directory below `place`. Raises OSError."""
    _sweep(place)
    path, fd = _made(place)
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(fd)


def _made(place: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        fd = os.open(path, _OPEN)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if is_named(fd, path):
            return path, fd
        os.close(fd)  # another copy began just then, and took it for one that was left


def _sweep(place: Path) -> None:
    for entry in os.scandir(place):
        if not entry.name.startswith(_PREFIX):
            continue
        try:
            fd = os.open(entry.path, _OPEN)
        except OSError:
            continue  # gone by now, or nothing of ours
        try:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(entry.path)
        except OSError:
            continue  # its copy lives
        finally:
            os.close(fd)
