"""/sys/fs/cgroup inside a container: its own cgroups bound there, whatever versions the host has.

Refuses to show more than its own part of v1, and of v2 when it has a cgroup namespace. Of a hybrid, `cgroup` shows all
and `cgroup2` the v2 part. A bind of the container's own
directory is, inside its cgroup namespace, the same as a mount of the hierarchy (cgroup_namespaces(7)), and it works in
a user namespace too, with the host mount's flags locked. Invariant: `ro` holds for everything below (CVE-2023-25809).
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    MOUNT_ATTR_ATIME,
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
from runtime.linux.record import Record
from runtime.mounts import Mount
from runtime.rootfs_mounts import open_target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtime.rootfs import Root

_BASE = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC


class CgroupPlan(Record):
    """What goes to the destination: `own`, a directory of cgroup2, or below a tmpfs of its own `directories` (name and
    host path of each hierarchy) and `links` (name and target) for controllers whose hierarchy has another name."""

    own: str = ""
    directories: tuple[tuple[str, str], ...] = ()
    links: tuple[tuple[str, str], ...] = ()


def plan_cgroups(fstype: str, cgroups: Mapping[str, str], mount_points: Mapping[str, str], *, own: bool) -> CgroupPlan:
    """Pure. `cgroups`: the container's directory by controller, "name=…" for a hierarchy without one, "" for cgroup2;
    `mount_points`: where each of those directories is mounted; `own`: the container has a cgroup namespace."""
    v1 = {name: path for name, path in cgroups.items() if name}
    if "" in cgroups and (not v1 or fstype == "cgroup2"):
        return CgroupPlan(own=cgroups[""] if own else mount_points[cgroups[""]])
    names = {path: os.path.basename(mount_points[path]) for path in cgroups.values()}
    links: dict[str, str] = {}
    for controller, path in v1.items():
        for alias in (*names[path].split(","), controller):
            if alias not in names.values() and "=" not in alias:
                links[alias] = names[path]
    return CgroupPlan(
        directories=tuple(sorted((name, path) for path, name in names.items())), links=tuple(sorted(links.items()))
    )


def mount_cgroups(root: Root, mount: Mount) -> None:
    """Puts the container's cgroups at the mount's destination."""
    if not root.cgroups:
        raise RuntimeFailure(f"{mount.destination}: the container has no cgroup to show", code="failed_precondition")
    if mount.fstype == "cgroup2" and "" not in root.cgroups:
        raise RuntimeFailure("this host has no cgroup2", code="failed_precondition", hint="its type is cgroup")
    mount_points = {path: _mount_point(path) for path in {*root.cgroups.values()}}
    plan = plan_cgroups(mount.fstype, root.cgroups, mount_points, own=root.cgroupns)
    if plan.own:
        _place(root, mount, _tree(root, mount, plan.own))
    else:
        _place_v1(root, mount, plan)


def planned_binds(mount: Mount, cgroups: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(name below the destination, host path) of what a container without a cgroup namespace is shown of v1."""
    mount_points = {path: _mount_point(path) for path in {*cgroups.values()}}
    return plan_cgroups(mount.fstype, cgroups, mount_points, own=False).directories


def _tree(root: Root, mount: Mount, path: str) -> int:
    """A detached copy of the cgroup directory at the host's `path`, with the attributes of the entry."""
    tree = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE)
    try:
        set_, clear = mount.attributes.set | _BASE, mount.attributes.clear & MOUNT_ATTR_ATIME
        if root.user_namespace:  # its access times are locked, and say nothing about files that are none
            set_, clear = set_ & ~MOUNT_ATTR_ATIME, 0
        mount_setattr(tree, "", AT_EMPTY_PATH, set_=set_, clear=clear, propagation=MS_PRIVATE)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _place(root: Root, mount: Mount, take_tree: int) -> None:
    try:
        target = open_target(root, mount, directory=True, procfs=False)
        try:
            move_mount(take_tree, target)
        finally:
            os.close(target)
    finally:
        os.close(take_tree)


def _place_v1(root: Root, mount: Mount, plan: CgroupPlan) -> None:
    options: tuple[tuple[str, str | None], ...] = (("mode", "755"),)
    if root.label:
        options += (("context", root.label),)
    tmpfs = FsMount("tmpfs", "cgroup", options, _BASE).make()
    try:
        _place(root, mount, os.dup(tmpfs))
        for name, path in plan.directories:
            tree = _tree(root, mount, path)
            try:
                # A fresh tmpfs in a mount namespace that nobody else is in yet: names in it are what was made here.
                os.mkdir(name, 0o755, dir_fd=tmpfs)
                move_mount(tree, tmpfs, name)
            finally:
                os.close(tree)
        for name, target in plan.links:
            os.symlink(target, name, dir_fd=tmpfs)
        if mount.read_only:
            mount_setattr(tmpfs, "", AT_EMPTY_PATH | AT_RECURSIVE, set_=MOUNT_ATTR_RDONLY)
    finally:
        os.close(tmpfs)


def _mount_point(path: str) -> str:
    """The mount that `path` is on: the topmost directory upwards with the same device and filesystem."""
    device, here = os.stat(path).st_dev, path
    while (above := os.path.dirname(here)) != here and os.stat(above).st_dev == device:
        here = above
    return here
