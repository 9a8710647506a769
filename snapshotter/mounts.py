"""An overlay mount as data, and what the running kernel's overlayfs can do.

It refuses to mount. Invariant: options depend on nothing but the arguments, in an order that keeps the topmost layer
first. Why these options (overlayfs.rst):
- lowerdir+ (Linux 6.5): one option a layer, so 500 layers fit (threats O53); before, one joined lowerdir.
- index=off, metacopy=off, redirect_dir=nofollow: whatever the kernel's defaults are, nothing in a layer, which came
  from a registry, may make overlayfs look elsewhere, and a layer may be under many mounts.
- volatile: without it the end of a mount, which is the end of the container's last process, waits for a sync of the
  whole filesystem (threats O40), and fsync inside writes through; the writable layer of a container does not outlive
  the machine's crash anyway: `Overlay.mount` refuses one that was mounted then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from runtime.linux.files import remove_tree
from runtime.linux.libc import KernelError
from runtime.linux.mount import FSCONFIG_SET_STRING, FsMount, fsconfig, fsopen
from snapshotter.model import SnapshotError

_MAX_LOWERS = 500  # fs/overlayfs/params.h, OVL_MAX_STACK


def overlay_mount(lowers: Sequence[Path], directory: Path, *, volatile: bool, plus: bool) -> FsMount:
    """The mount of `directory`/{upper,work} over `lowers`, topmost first. Raises SnapshotError."""
    if len(lowers) > _MAX_LOWERS:
        raise SnapshotError(f"image of {len(lowers)} layers: overlayfs takes {_MAX_LOWERS} at most")
    options: list[tuple[str, str | None]]
    if plus:
        options = [("lowerdir+", str(path)) for path in lowers]
    else:
        escaped = (str(path).replace("\\", "\\\\").replace(":", "\\:") for path in lowers)
        options = [("lowerdir", ":".join(escaped))]
    options += [
        ("upperdir", str(directory / "upper")),
        ("workdir", str(directory / "work")),
        ("index", "off"),
        ("metacopy", "off"),
        ("redirect_dir", "nofollow"),
    ]
    if volatile:
        options.append(("volatile", None))
    return FsMount("overlay", "overlay", tuple(options))


def has_lowerdir_plus(directory: Path) -> bool:
    """Whether this kernel knows lowerdir+: it is asked, and where we may not ask, its version is."""
    try:
        fs = fsopen("overlay")
    except KernelError:
        major, minor = os.uname().release.split(".")[:2]
        return (int(major), int("".join(c for c in minor if c.isdigit()) or 0)) >= (6, 5)
    try:
        # Before 6.5 overlayfs had no parser for fsconfig(2): anything is taken, and refused when it comes to the mount.
        return not _takes(fs, "no-such-option", "") and _takes(fs, "lowerdir+", str(directory))
    finally:
        os.close(fs)


def _takes(fs: int, option: str, value: str) -> bool:
    try:
        fsconfig(fs, FSCONFIG_SET_STRING, option, value)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def boot_id() -> str:
    """proc_sys_kernel(5): random, the same until the machine goes down."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def settle_volatile(work: Path, key: str, *, same_boot: bool) -> None:
    """Overlayfs leaves a mark in a volatile mount's workdir and refuses to mount it a second time. In the boot it was
    made in, nothing can have been lost: the mark goes. Raises SnapshotError otherwise."""
    mark = work / "work" / "incompat" / "volatile"
    if not mark.is_dir():
        return
    if not same_boot:
        raise SnapshotError(
            f"snapshot {key} was mounted volatile before the machine went down, so its files may be "
            "torn; remove it and prepare a new one"
        )
    remove_tree(mark)
