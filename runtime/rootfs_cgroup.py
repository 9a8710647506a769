"""/sys/fs/cgroup inside a container: its own cgroups bound there, whatever versions the host has.

Refuses to show more than its own part of v1, and of v2 when it has a cgroup namespace. A bind of the container's own
directory is, inside its cgroup namespace, the same as a mount of the hierarchy (cgroup_namespaces(7)), and it works in
a user namespace too, with the host mount's flags locked. Invariant: `ro` holds for everything below (CVE-2023-25809).
"""

from __future__ import annotations

import os

from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    OPEN_TREE_CLONE,
    FsMount,
    mount_setattr,
    move_mount,
    open_tree,
)
from runtime.mounts import Mount
from runtime.rootfs_mounts import open_target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.rootfs import Root

_AT_FDCWD = -100
_BASE = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC


def mount_cgroups(root: Root, mount: Mount) -> None:
    """Puts the container's cgroups at the mount's destination."""
    v1 = {name: path for name, path in root.cgroups.items() if name}
    if v1:
        _mount_v1(root, mount, v1)
    else:
        _mount_v2(root, mount)


def _mount_v2(root: Root, mount: Mount) -> None:
    own = root.cgroups[""]
    source = own if root.cgroupns else _mount_point(own)
    tree = open_tree(_AT_FDCWD, source, OPEN_TREE_CLONE)
    try:
        mount_setattr(tree, "", AT_EMPTY_PATH, set_=mount.attributes.set | _BASE, propagation=MS_PRIVATE)
        target = open_target(root, mount, directory=True, procfs=False)
        try:
            move_mount(tree, target)
        finally:
            os.close(target)
    finally:
        os.close(tree)


def _mount_v1(root: Root, mount: Mount, controllers: dict[str, str]) -> None:
    """A tmpfs with a directory for each hierarchy, named as on the host, and links for controllers that share one."""
    tmpfs = FsMount("tmpfs", "cgroup", (("mode", "755"),), _BASE).make()
    try:
        target = open_target(root, mount, directory=True, procfs=False)
        try:
            move_mount(tmpfs, target)
        finally:
            os.close(target)
        mount_points = {path: _mount_point(path) for path in {*controllers.values(), *root.cgroups.values()}}
        for name, path in _hierarchies(root, controllers, mount_points).items():
            tree = open_tree(_AT_FDCWD, path, OPEN_TREE_CLONE)
            try:
                mount_setattr(tree, "", AT_EMPTY_PATH, set_=mount.attributes.set | _BASE, propagation=MS_PRIVATE)
                # A fresh tmpfs in a mount namespace that nobody else is in yet: names in it are what was made here.
                os.mkdir(name, 0o755, dir_fd=tmpfs)
                move_mount(tree, tmpfs, name)
            finally:
                os.close(tree)
        for controller, path in controllers.items():
            directory = os.path.basename(mount_points[path])
            if controller != directory and "=" not in controller:
                os.symlink(directory, controller, dir_fd=tmpfs)
        if mount.read_only:
            mount_setattr(tmpfs, "", AT_EMPTY_PATH | AT_RECURSIVE, set_=MOUNT_ATTR_RDONLY)
    finally:
        os.close(tmpfs)


def _hierarchies(root: Root, controllers: dict[str, str], mount_points: dict[str, str]) -> dict[str, str]:
    """Directory name on the host: the container's own cgroup in it; the v2 part of a hybrid among them."""
    found = {os.path.basename(mount_points[path]): path for path in controllers.values()}
    if "" in root.cgroups:
        found[os.path.basename(mount_points[root.cgroups[""]])] = root.cgroups[""]
    return found


def _mount_point(path: str) -> str:
    """The mount that `path` is on: the topmost directory upwards with the same device and filesystem."""
    device, here = os.stat(path).st_dev, path
    while (above := os.path.dirname(here)) != here and os.stat(above).st_dev == device:
        here = above
    return here
