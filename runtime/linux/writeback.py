"""Writeback and the page cache: syncfs(2), sync_file_range(2), cachestat(2).

Refuses to decide when to sync. Invariant: nothing here changes a file's content.
"""

from __future__ import annotations

import struct

from runtime.linux import foreign as ctypes
from runtime.linux.libc import _libc, check

# linux/fs.h
SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4
_CACHESTAT = 451  # asm-generic/unistd.h: the same everywhere, Linux 6.5


def syncfs(fd: int) -> None:
    """syncfs(2): writes back the whole filesystem of `fd` and waits. Since 5.8 it reports writeback errors once for
    each open file, from the moment that was opened."""
    check(_libc.syncfs(ctypes.c_int(fd)), "syncfs", f"fd {fd}")


def sync_file_range(fd: int, offset: int = 0, count: int = 0, flags: int = SYNC_FILE_RANGE_WRITE) -> None:
    """sync_file_range(2); by default starts writeback of the whole file and does not wait. Makes nothing durable."""
    check(
        _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(count), ctypes.c_uint(flags)),
        "sync_file_range",
        f"fd {fd}",
    )


def cachestat(fd: int, offset: int = 0, count: int = 0) -> tuple[int, int]:
    """cachestat(2): how many pages of the file are in the page cache, and how many of those are dirty."""
    area, result = struct.pack("=QQ", offset, count), ctypes.create_string_buffer(40)
    check(
        _libc.syscall(ctypes.c_long(_CACHESTAT), ctypes.c_long(fd), area, result, ctypes.c_long(0)),
        "cachestat",
        f"fd {fd}",
    )
    cached, dirty = struct.unpack_from("=QQ", result.raw)
    return cached, dirty
