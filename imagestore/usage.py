"""What a directory tree takes on disk: allocated blocks and inodes, each inode once.

Refuses to follow links or to leave the tree by one. Invariant: a tree that changes meanwhile gives a number, not an
error.
"""

from __future__ import annotations

import os
from pathlib import Path

from imagestore.model import Usage


def disk_usage(root: Path) -> Usage:
    """Blocks and inodes of `root` and all below it."""
    seen: set[tuple[int, int]] = set()
    used = 0
    pending = [os.fspath(root)]
    while pending:
        path = pending.pop()
        try:
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            used += found.st_blocks * 512
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    inner = entry.stat(follow_symlinks=False)
                    if (inner.st_dev, inner.st_ino) not in seen:
                        seen.add((inner.st_dev, inner.st_ino))
                        used += inner.st_blocks * 512
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed while we looked
    return Usage(used, len(seen))
