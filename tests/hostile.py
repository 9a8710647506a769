"""What tests of hostile images share: a directory of the host that must stay as it is, and a neighbour that races.

`untouched` compares names, modes, owners, inodes, times and contents, and looks for mounts that were left behind.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.linux.files import RENAME_EXCHANGE, renameat2
from runtime.linux.mount import mountinfo

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


@contextmanager
def untouched(directory: Path) -> Iterator[Path]:
    """Makes `directory / "outside"` with the names that runtimes make or remove; fails if anything of it changes."""
    marker = directory / "outside"
    (marker / "sub").mkdir(parents=True)
    for name in ("ptmx", "fd", "stdin", "core", "null", "console", "sub/file"):
        (marker / name).write_text(name)

    def picture() -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for above, names, files in os.walk(marker):
            for name in (*names, *files, "."):
                status = os.lstat(os.path.join(above, name))
                content = os.path.join(above, name) if name in files else ""
                text = Path(content).read_bytes() if content and stat.S_ISREG(status.st_mode) else b""
                found.append((above, name, status.st_mode, status.st_uid, status.st_ino, status.st_mtime_ns, text))
        return sorted(found, key=str)

    before, core = picture(), CORE_PATTERN.read_text()
    yield marker
    assert picture() == before
    mine = [point for point in mountinfo() if str(directory) in point.target]
    assert mine == [] and CORE_PATTERN.read_text() == core


@contextmanager
def swapping(directory: Path, one: str, two: str) -> Iterator[None]:
    """A process that exchanges two names as fast as it can."""
    pid = os.fork()
    if pid == 0:
        fd = os.open(directory, os.O_PATH)
        while True:
            renameat2(fd, one, fd, two, RENAME_EXCHANGE)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
