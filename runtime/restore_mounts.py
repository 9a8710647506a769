"""The mounts that a restore needs before criu has any: the places for them in the root, and a mount namespace for criu.

criu wants the root to be a mount of its own, and binds what masks files from a place that it can name: both are made in
a mount namespace that only lives as long as the restore, so the host's mount table never sees them. Refuses to follow a
link in the container's root. Invariant: at the end the caller is where it was, in its mounts and its directory.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager

from runtime.linux.files import AT_FDCWD, mkdir_in_root, open_in_root
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_RECURSIVE,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_SLAVE,
    FsMount,
    mount_setattr,
    move_mount,
)
from runtime.linux.process import CLONE_NEWNS, setns, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.spec import Spec


def make_mount_points(spec: Spec, root: int, bundle: str) -> None:
    """What create makes in the root for its mounts, where this is not the root that they were made in. Those on a tmpfs
    are in the images."""
    tmpfs = [f"{mount.destination}/" for mount in spec.mounts if mount.fstype == "tmpfs"]
    for mount in spec.mounts:
        if mount.kind == "cgroup" or mount.destination.startswith(tuple(tmpfs)):
            continue
        if mount.kind == "bind" and not os.path.isdir(os.path.join(bundle, mount.source)):
            _make_file(root, mount.destination)
        else:
            os.close(mkdir_in_root(root, mount.destination))


def _make_file(root: int, path: str) -> None:
    directory, name = os.path.split(path)
    parent = mkdir_in_root(root, directory)
    try:
        os.close(open_in_root(parent, name, os.O_PATH | os.O_NOFOLLOW))
    except KernelError:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))
    finally:
        os.close(parent)


class PrivateMounts:
    """A mount namespace for the time of a restore, and in it a mount of its own for the root, as criu wants: `tree`, a
    detached one that stays the caller's. `null` is what files are masked with, a device that nobody else has
    (CVE-2025-31133)."""

    def __init__(self, directory: str, tree: int) -> None:
        self.root = f"{directory}/criu-root"
        self.null = f"{directory}/criu-null/null"
        self._tree = tree
        self._home = self._own = self._cwd = -1

    def __enter__(self) -> PrivateMounts:
        for path in (self.root, os.path.dirname(self.null)):
            os.mkdir(path, 0o700)
        self._home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        unshare(CLONE_NEWNS)
        try:
            self._own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            self._mount()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _mount(self) -> None:
        mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, propagation=MS_SLAVE)
        null = os.path.dirname(self.null)
        tmpfs = FsMount("tmpfs", "tmpfs", (("size", "4k"), ("nr_inodes", "4"), ("mode", "700"))).make()
        os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=tmpfs)
        try:
            for tree, path in ((self._tree, self.root), (tmpfs, null)):
                target = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    move_mount(tree, target)
                finally:
                    os.close(target)
        finally:
            os.close(tmpfs)
        os.chmod(self.null, 0o666)  # whatever the umask was
        mount_setattr(AT_FDCWD, null, 0, propagation=MS_PRIVATE)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """For what has to happen in the caller's mounts: hooks."""
        self._go(self._home)
        try:
            yield
        finally:
            self._go(self._own)

    def protect_root(self, pid: int) -> None:
        """Makes the root of the container that `pid` is in read-only."""
        inside = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(inside, CLONE_NEWNS)
            mount_setattr(AT_FDCWD, "/", 0, set_=MOUNT_ATTR_RDONLY)
        finally:
            os.close(inside)
            self._go(self._own)

    def _go(self, namespace: int) -> None:
        setns(namespace, CLONE_NEWNS)
        os.fchdir(self._cwd)

    def __exit__(self, *_: object) -> None:
        self._go(self._home)
        for fd in (self._home, self._own, self._cwd):
            if fd >= 0:
                os.close(fd)
        for path in (self.root, os.path.dirname(self.null)):
            os.rmdir(path)
