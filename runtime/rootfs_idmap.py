"""A root filesystem of layers whose files show the ids of the container's user namespace, without a chown of any.

    caller ── clone ──▶ mapper    in a mount namespace of its own: covers each lower directory with an id-mapped mount
       ◀─ overlay (fd) ─┘         of itself, then makes the overlay as it would be made without: ends with its mounts

Overlayfs keeps private copies of the mounts that its layers are on (overlayfs.rst), so the covers are needed no longer
than that, and an overlay itself cannot be mapped. What is written goes to the upper directory with the ids of the host,
whose owner has to be the container's root already: the snapshotter's business. Refuses what is no overlay.
Invariant: the caller's mount table is never touched; nothing of a mapper that is killed is left.
"""

from __future__ import annotations

import errno
import os
import re

from runtime.errors import RuntimeFailure
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    MOUNT_ATTR_IDMAP,
    MS_PRIVATE,
    mount_setattr,
    move_mount,
    open_tree,
)
from runtime.linux.process import CLONE_NEWNS, clone3
from runtime.sync import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from runtime.linux.mount import FsMount


def make_mapped(what: FsMount, user_namespace: int) -> int:
    """`what`, detached, its lower layers mapped by the user namespace behind that fd. Raises RuntimeFailure."""
    if what.fstype != "overlay":
        raise RuntimeFailure(
            f"map the ids of {what.describe()}: only an overlay can be mapped", step="rootfs", code="invalid_argument"
        )
    mine, its = Channel.pair()
    try:
        pid, pidfd = clone3(CLONE_NEWNS)
        if pid == 0:
            mine.close()
            _map(what, user_namespace, its)
        os.close(pidfd)
        its.close()
        try:
            return mine.receive("Child")[1][0]
        finally:
            os.waitpid(pid, 0)
    finally:
        mine.close()
        its.close()


def _map(what: FsMount, user_namespace: int, channel: Channel) -> NoReturn:
    try:
        mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, propagation=MS_PRIVATE)
        for path in lower_directories(what):
            _cover(path, user_namespace)
        channel.send("Child", pid=os.getpid(), fds=(what.make(),))
    except BaseException as error:
        channel.fail(RuntimeFailure.of(error, step="rootfs", what="map the ids of the root filesystem"))
        os._exit(1)
    os._exit(0)


def _cover(path: str, user_namespace: int) -> None:
    tree = open_tree(AT_FDCWD, path)
    try:
        mount_setattr(tree, "", AT_EMPTY_PATH, set_=MOUNT_ATTR_IDMAP, userns_fd=user_namespace)
    except KernelError as error:
        if error.errno == errno.EINVAL:
            error.add_note("the filesystem of the image layers may not support id-mapped mounts on this kernel")
        raise
    place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    move_mount(tree, place)
    os.close(place)
    os.close(tree)


def lower_directories(what: FsMount) -> list[str]:
    """The layers of an overlay, in either way of naming them: lowerdir+ for each, or one lowerdir with escapes."""
    found: list[str] = []
    for key, value in what.options:
        if key == "lowerdir+":
            found.append(value or "")
        elif key == "lowerdir":
            found += (re.sub(r"\\(.)", r"\1", path) for path in re.split(r"(?<!\\):", value or ""))
    return found
