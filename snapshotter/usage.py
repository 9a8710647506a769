"""Disk usage of a tree that somebody may be changing: allocated blocks and inodes.

It refuses to follow links or to enter mounts. Invariant: a constant number of fds whatever the depth, which is the
container's choice; the way back up is `..`, and only believed when it leads to the directory we came from.
"""

from __future__ import annotations

import os
import stat

from runtime.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from snapshotter.model import Usage

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV


def measure(fd: int) -> Usage:
    """Usage of the directory `fd` and everything below it on its filesystem; a hard-linked file counts once."""
    status = os.fstat(fd)
    blocks, inodes = status.st_blocks, 1
    linked: set[int] = set()
    # Each level: the directory's identity, and the names of its directories still to visit.
    levels: list[tuple[tuple[int, int], list[str]]] = []
    here = os.open(".", _DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        pending: list[str] | None = None
        while True:
            if pending is None:
                status = os.fstat(here)
                more_blocks, more_inodes, pending = _one(here, status.st_dev, linked)
                blocks += more_blocks
                inodes += more_inodes
                levels.append(((status.st_dev, status.st_ino), pending))
            if pending:
                try:
                    below = openat2(here, pending.pop(), _DIRECTORY, 0, _RESOLVE)
                except OSError:  # gone, or a mount, since it was listed
                    continue
                os.close(here)
                here, pending = below, None
                continue
            levels.pop()
            if not levels:
                return Usage(blocks * 512, inodes)
            above = os.open("..", _DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = above
            status = os.fstat(here)
            if (status.st_dev, status.st_ino) != levels[-1][0]:
                # Moved away while we were inside: what is left of the levels above cannot be reached from here.
                return Usage(blocks * 512, inodes)
            pending = levels[-1][1]
    finally:
        os.close(here)


def _one(fd: int, device: int, linked: set[int]) -> tuple[int, int, list[str]]:
    """Blocks and inodes of what is right in `fd`, and the names of its directories."""
    blocks = inodes = 0
    directories = []
    with os.scandir(fd) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if status.st_dev != device:
                continue
            if stat.S_ISDIR(status.st_mode):
                directories.append(entry.name)
            elif status.st_nlink > 1:
                if status.st_ino in linked:
                    continue
                linked.add(status.st_ino)
            blocks += status.st_blocks
            inodes += 1
    return blocks, inodes, directories
