"""mount(2), the new mount API, pivot_root(2) and /proc/self/mountinfo.

Refuses to decide what is mounted where: callers hold the policy and the fds. Invariant: returned fds are CLOEXEC.
See mount(2), fsopen(2), mount_setattr(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import struct

from runtime.linux.libc import KernelError, syscall
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# sys/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_REMOUNT = 1, 2, 4, 8, 16, 32
MS_MANDLOCK, MS_DIRSYNC, MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME = 64, 128, 256, 1024, 2048
MS_BIND, MS_MOVE, MS_REC, MS_SILENT = 4096, 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_I_VERSION, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 23, 1 << 24, 1 << 25
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

# linux/mount.h
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x8000, 0x100
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_SET_FD, FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE = 0, 1, 5, 6, 7
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_ATIME, MOUNT_ATTR_RELATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_STRICTATIME = 0x70, 0, 0x10, 0x20
MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_IDMAP, MOUNT_ATTR_NOSYMFOLLOW = 0x80, 0x100000, 0x200000
_MAX_VALUE = 255  # fs/fsopen.c: strndup_user(value, 256)


class FsMount(Record):
    """One filesystem to make, as data: nothing happens until `make()`.

    `options` go to fsconfig(2) one by one (None: a flag), so that their sum is not bound by a page as mount(2)'s is.
    `attributes` are MOUNT_ATTR_* bits of the mount itself.
    """

    fstype: str
    source: str
    options: tuple[tuple[str, str | None], ...] = ()
    attributes: int = 0

    def describe(self) -> str:
        words = [key if value is None else f"{key}={value}" for key, value in self.options]
        return f"{self.fstype} {self.source} ({','.join(words)})"

    def make(self) -> int:
        """A detached mount of it: an O_PATH-like CLOEXEC fd that the caller owns. Raises KernelError with the
        kernel's own message, where it gave one (fsopen(2), "Message retrieval").

        An overlay with one `lowerdir` that is longer than fsconfig(2) takes a value (kernels without lowerdir+) goes
        through runtime.linux.overlay_joined: see there for what that needs."""
        if self.fstype == "overlay" and any(
            key == "lowerdir" and len(os.fsencode(value or "")) > _MAX_VALUE for key, value in self.options
        ):
            from runtime.linux.overlay_joined import make_joined

            return make_joined(self)
        fs = fsopen(self.fstype)
        try:
            try:
                fsconfig(fs, FSCONFIG_SET_STRING, "source", self.source)
                for key, value in self.options:
                    fsconfig(fs, FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING, key, value)
                fsconfig(fs, FSCONFIG_CMD_CREATE, None, None)
                return fsmount(fs, self.attributes)
            except KernelError as error:
                said = kernel_messages(fs)
                if said:
                    error.add_note(f"kernel: {said}")
                raise
        finally:
            os.close(fs)


def mount(source: str | None, target: str | bytes, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). `target` is a path: give /proc/self/fd/N of an fd from openat2 where it lies in a rootfs."""
    raw = [None if text is None else os.fsencode(text) for text in (source, target, fstype, data)]
    syscall(
        "mount", raw[0], raw[1], raw[2], flags, raw[3], subject=f"{source or fstype or ''} on {os.fsdecode(target)}"
    )


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    syscall("umount2", os.fsencode(target), flags, subject=target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2). Both must be directories on mounts other than the current root; "." twice stacks them."""
    syscall("pivot_root", os.fsencode(new_root), os.fsencode(put_old), subject=new_root)


def open_tree(dirfd: int, path: str, flags: int = OPEN_TREE_CLONE) -> int:
    """open_tree(2): with OPEN_TREE_CLONE a detached copy of the mount at `path` (AT_RECURSIVE: and below)."""
    return syscall("open_tree", dirfd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC, subject=path)


def move_mount(from_fd: int, to_fd: int, to_path: str = "") -> None:
    """move_mount(2) of the detached mount `from_fd` onto `to_path` under `to_fd` ("" : onto `to_fd` itself)."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (MOVE_MOUNT_T_EMPTY_PATH if not to_path else 0)
    syscall("move_mount", from_fd, b"", to_fd, os.fsencode(to_path), flags, subject=to_path or f"fd {to_fd}")


def fsopen(fstype: str) -> int:
    """fsopen(2)."""
    return syscall("fsopen", os.fsencode(fstype), FSOPEN_CLOEXEC, subject=fstype)


def fsconfig(fd: int, command: int, key: str | None, value: str | None, aux: int = 0) -> None:
    """fsconfig(2)."""
    raw_key, raw_value = (None if text is None else os.fsencode(text) for text in (key, value))
    syscall("fsconfig", fd, command, raw_key, raw_value, aux, subject=f"{key}={value}" if key else "create")


def fsmount(fd: int, attributes: int = 0) -> int:
    """fsmount(2): the mount as a detached, CLOEXEC fd."""
    return syscall("fsmount", fd, FSMOUNT_CLOEXEC, attributes)


def kernel_messages(fs_fd: int) -> str:
    """What the kernel wrote about the fsopen(2) context, joined by "; ", or ""."""
    lines = []
    while True:
        try:
            lines.append(os.read(fs_fd, 1024).decode("utf-8", "replace").strip())
        except OSError:
            return "; ".join(lines)


def mount_setattr(
    dirfd: int, path: str, flags: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0
) -> None:
    """mount_setattr(2); `flags` takes AT_EMPTY_PATH and AT_RECURSIVE, `propagation` an MS_* of propagation."""
    attr = struct.pack("=QQQQ", set_, clear, propagation, userns_fd)
    syscall("mount_setattr", dirfd, os.fsencode(path), flags, attr, len(attr), subject=path or f"fd {dirfd}")


class MountPoint(Record):
    """A line of proc_pid_mountinfo(5)."""

    id: int
    parent: int
    device: str
    root: str
    target: str
    options: str
    propagation: str
    fstype: str
    source: str
    super_options: str


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def mountinfo(pid: int | str = "self") -> Iterator[MountPoint]:
    """The mounts that process `pid` sees, parents first as the kernel lists them."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            words, tail = left.split(" "), right.split(" ")
            yield MountPoint(
                int(words[0]),
                int(words[1]),
                words[2],
                _unescape(words[3]),
                _unescape(words[4]),
                words[5],
                " ".join(words[6:]),
                tail[0],
                _unescape(tail[1]),
                tail[2] if len(tail) > 2 else "",
            )
