"""Entering the root without pivot_root(2), for a host that runs from a ramdisk: the mount is moved over the old root.

The old root stays in the namespace, under the new one and out of reach of names. Refuses to leave the host's procfs and
sysfs there: a process that may mount could mount its own without the masks of the container's, since the kernel would
find a whole one in sight (user_namespaces(7)). Invariant: the caller's directory is the new root, before and after.
"""

from __future__ import annotations

import errno
import os

from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_FDCWD,
    MNT_DETACH,
    MS_MOVE,
    MS_PRIVATE,
    UMOUNT_NOFOLLOW,
    FsMount,
    mount,
    mount_setattr,
    mountinfo,
    move_mount,
    umount2,
)


def move_root(path: str) -> None:
    """Makes the current directory, which is the mount at `path`, the root."""
    for point in list(mountinfo()):
        inside = point.target == path or point.target.startswith(path.rstrip("/") + "/")
        if point.fstype in ("proc", "sysfs") and not inside:
            _take_away(point.target)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")


def _take_away(path: str) -> None:
    try:
        mount_setattr(AT_FDCWD, path, 0, propagation=MS_PRIVATE)
        umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return  # it was below another one
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        # Locked: it came from a more privileged namespace. Covered, it is visible no more.
        cover = FsMount("tmpfs", "tmpfs").make()
        try:
            move_mount(cover, AT_FDCWD, path)
        finally:
            os.close(cover)
