"""Mounts with the option `remount`: other attributes for what an earlier entry, or the root, has at that place already.

Refuses a place that is no mount, since the kernel does. Invariant: with `bind` only the mount itself changes; without
it the filesystem is reconfigured too, as mount(2) does with MS_REMOUNT, wherever else it is mounted.
"""

from __future__ import annotations

import os

from runtime.linux.files import fd_path, open_in_root
from runtime.linux.mount import (
    AT_RECURSIVE,
    MOUNT_ATTR_ATIME,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_RDONLY,
    MS_RELATIME,
    MS_REMOUNT,
    MS_STRICTATIME,
)
from runtime.linux.mount import mount as mount2
from runtime.mounts import Mount
from runtime.rootfs_mounts import propagate, set_attributes, set_own_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.rootfs import Root

_BITS = (
    (MOUNT_ATTR_RDONLY, MS_RDONLY),
    (MOUNT_ATTR_NOSUID, MS_NOSUID),
    (MOUNT_ATTR_NODEV, MS_NODEV),
    (MOUNT_ATTR_NOEXEC, MS_NOEXEC),
    (MOUNT_ATTR_NODIRATIME, MS_NODIRATIME),
    (MOUNT_ATTR_NOSYMFOLLOW, MS_NOSYMFOLLOW),
)
_ATIMES = {0: MS_RELATIME, MOUNT_ATTR_NOATIME: MS_NOATIME, MOUNT_ATTR_STRICTATIME: MS_STRICTATIME}


def remount(root: Root, mount: Mount) -> None:
    """Changes the topmost mount at the entry's destination."""
    fd = open_in_root(root.fd, mount.destination, os.O_PATH)
    try:
        late = mount.read_only and (mount.fstype == "tmpfs" or os.path.normpath(mount.destination) == "/dev")
        if mount.fstype == "bind":
            set_own_attributes(fd, mount, locked=root.user_namespace, late_readonly=late)
            set_attributes(fd, mount.recursive_attributes, AT_RECURSIVE)
        else:
            remount_superblock(fd, mount, without=MS_RDONLY if late else 0)
        propagate(fd, mount)
        if late:
            root.late_readonly.append(os.dup(fd))
    finally:
        os.close(fd)


def remount_superblock(fd: int, mount: Mount, *, without: int = 0) -> None:
    """mount(2) with MS_REMOUNT: attributes, flags of the filesystem, and its own options, all at once."""
    data = ",".join(key if value is None else f"{key}={value}" for key, value in mount.data)
    flags = (mount_flags(mount) | MS_REMOUNT) & ~without
    mount2(None, fd_path(fd), None, flags, data or None)


def mount_flags(mount: Mount) -> int:
    """MS_* of an entry. Access times that nothing is said about are left to the kernel, which keeps them."""
    own = mount.attributes
    flags = mount.superblock
    for attribute, bit in _BITS:
        flags |= bit if own.set & attribute else 0
    if own.clear & MOUNT_ATTR_ATIME:
        flags |= _ATIMES[own.set & MOUNT_ATTR_ATIME]
    return flags
