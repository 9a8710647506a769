"""Inode flags (ioctl_iflags(2)), as lsattr and chattr show them.

Refuses to decide which. Invariant: flags that were not named stay as they are.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from runtime.linux.libc import KernelError

# linux/fs.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NOATIME_FL, FS_TOPDIR_FL = 0x10, 0x20, 0x80, 0x20000


def add_inode_flags(fd: int, flags: int) -> None:
    """FS_IOC_SETFLAGS of the present flags and `flags`. Raises KernelError (ENOTTY, EOPNOTSUPP: not on this
    filesystem)."""
    try:
        (present,) = struct.unpack("=i", fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("=i", 0)))
        if present & flags != flags:
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=i", present | flags))
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "set inode flags", f"fd {fd}") from error
