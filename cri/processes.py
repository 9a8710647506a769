"""What the processes of a container hold: how many there are, their descriptors and sockets, the init's limit of files.

Read from /proc; blocks. Refuses to be held up by a container that holds without end: what is over the bounds is not
counted (threats R5). Invariant: a process that ends meanwhile is left out, and no file of a container is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded

MAX_PROCESSES = 4096
MAX_FILES = 1 << 16
_LIMITS_SIZE = 1 << 14
_OPEN_FILES = b"Max open files"


@dataclass(frozen=True, slots=True)
class Processes:
    """`open_files` is the init's soft limit; None where there is none, or no init."""

    count: int
    files: int
    sockets: int
    open_files: int | None


def look(pids: Sequence[int], init: int) -> Processes:
    """What those processes hold now."""
    files = sockets = 0
    for pid in pids[:MAX_PROCESSES]:
        found = _descriptors(pid, MAX_FILES - files)
        files += found[0]
        sockets += found[1]
        if files >= MAX_FILES:
            break
    return Processes(len(pids), files, sockets, _open_files(init))


def _descriptors(pid: int, most: int) -> tuple[int, int]:
    files = sockets = 0
    try:
        directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return 0, 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if files >= most:
                    break
                files += 1
                try:
                    sockets += os.readlink(entry.name, dir_fd=directory).startswith("socket:")
                except OSError:
                    files -= 1
    except OSError:
        pass
    finally:
        os.close(directory)
    return files, sockets


def _open_files(pid: int) -> int | None:
    try:
        text = read_bounded(AT_FDCWD, f"/proc/{pid}/limits", _LIMITS_SIZE)
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(_OPEN_FILES):
            soft = line[len(_OPEN_FILES) :].split()[0]
            return int(soft) if soft.isdigit() else None
    return None
