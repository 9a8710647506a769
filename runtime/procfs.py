"""Writes to procfs on a container's behalf, through a handle of the runtime's own.

Refuses a file that is not on procfs (CVE-2019-19921, CVE-2025-52881), and a path with a link in it. Invariant: what a
container has mounted, on its own /proc or elsewhere, is never written to.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.linux.files import PROC_SUPER_MAGIC, fstatfs_type, open_beneath, write_all


def write_proc(proc_fd: int, path: str, value: bytes, what: str) -> None:
    """Writes `value` to `path` below `proc_fd`; `what` is for the error. Raises RuntimeFailure."""
    try:
        fd = open_beneath(proc_fd, path, os.O_WRONLY)
        try:
            if fstatfs_type(fd) != PROC_SUPER_MAGIC:
                raise RuntimeFailure(f"{what}: {path} is not on procfs", code="failed_precondition")
            write_all(fd, value)
        finally:
            os.close(fd)
    except OSError as error:
        raise RuntimeFailure.of(error, what=what) from None
