"""What is mounted where in a container that came out of images, compared with config.json (threats S71).

The images say which filesystems criu mounts, with which options and how far they may be written to: a mount that
config.json does not have is a way to the host's files, and so is one that it has read-only and they do not. Looks only,
before the processes run. Refuses by naming the mount point. Invariant: what the container mounted itself, which its
config.json cannot know, is refused as well.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import fd_path, open_in_root, path_in_root
from runtime.linux.libc import KernelError
from runtime.linux.mount import mountinfo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from runtime.mounts import Mount
    from runtime.spec import Spec

_WORDS = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
_ATTRIBUTES = {1: "ro", 2: "nosuid", 4: "nodev", 8: "noexec"}  # linux/mount.h: MOUNT_ATTR_*
_CGROUPS = ("cgroup", "cgroup2", "tmpfs")


def verify_mounts(spec: Spec, init: int, root: os.stat_result, sources: Mapping[str, str]) -> None:
    """`root` is the root that was given to criu, `sources` what each bind mount's destination is to show. Raises
    RuntimeFailure."""
    top = os.open(f"/proc/{init}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(top)
        if (found.st_dev, found.st_ino) != (root.st_dev, root.st_ino):
            raise _refused("/", "is another root filesystem than the bundle's")
        known = dict(_known(spec, top))
        for mount in mountinfo(init):
            kinds = known.get(mount.target)
            if kinds is None and not any(
                mount.target.startswith(f"{target}/") and "cgroup" in below for target, below in known.items()
            ):
                raise _refused(mount.target, f"shows {mount.fstype} {mount.source[:80]!r}, which config.json has not")
            if kinds and mount.fstype not in kinds:
                raise _refused(mount.target, f"is of type {mount.fstype}, in config.json of {' or '.join(kinds)}")
        for entry in spec.mounts:
            _verify_mount(entry, top, sources)
        for path in spec.readonly_paths:
            _verify_closed(top, path, masked=False)
        for path in spec.masked_paths:
            _verify_closed(top, path, masked=True)
    finally:
        os.close(top)


def _known(spec: Spec, top: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every mount point that may be, with the filesystems that may be there; () for any: a bind is known by what it
    shows."""
    found: dict[str, tuple[str, ...]] = {"/": ()}
    for path in spec.readonly_paths:
        found.setdefault(path_in_root(top, path), ())
    for path in spec.masked_paths:
        found.setdefault(path_in_root(top, path), ("tmpfs", "devtmpfs"))
    for entry in spec.mounts:
        kinds: tuple[str, ...] = () if entry.kind == "bind" else (entry.fstype,)
        found[path_in_root(top, entry.destination)] = _CGROUPS if entry.kind == "cgroup" else kinds
    if spec.process is not None and spec.process.terminal:
        found["/dev/console"] = ("devpts",)
    found.pop("", None)
    yield from found.items()


def _verify_mount(entry: Mount, top: int, sources: Mapping[str, str]) -> None:
    try:
        fd = open_in_root(top, entry.destination, os.O_PATH)
    except KernelError as error:
        raise _refused(entry.destination, f"is not there: {error}") from None
    try:
        if entry.kind == "bind":
            shown, meant = os.fstat(fd), os.stat(sources[entry.destination])
            if (shown.st_dev, shown.st_ino) != (meant.st_dev, meant.st_ino):
                raise _refused(entry.destination, f"does not show {sources[entry.destination]}")
        flags = os.statvfs(fd_path(fd)).f_flag
        wanted = [word for bit, word in _ATTRIBUTES.items() if entry.attributes.set & bit]
        if missing := [word for word in wanted if not flags & _WORDS[word]]:
            raise _refused(entry.destination, f"is mounted without {', '.join(missing)}")
    finally:
        os.close(fd)


def _verify_closed(top: int, path: str, *, masked: bool) -> None:
    """A path that may not be written to, or that nothing may be read from; one that is not there is closed enough."""
    try:
        fd = open_in_root(top, path, os.O_PATH)
    except KernelError:
        return
    try:
        status = os.fstat(fd)
        read_only = bool(os.statvfs(fd_path(fd)).f_flag & os.ST_RDONLY)
        if not masked and not read_only:
            raise _refused(path, "can be written to")
        if masked and stat.S_ISDIR(status.st_mode) and not (read_only and not os.listdir(fd_path(fd))):
            raise _refused(path, "is not masked")
        if masked and not stat.S_ISDIR(status.st_mode) and not _is_null(status):
            raise _refused(path, "is not masked")
    finally:
        os.close(fd)


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def _refused(target: str, what: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"restored container: mount point {target[:200]} {what}",
        hint="the images are not those of a container with this config.json, or it had mounted something itself",
        code="failed_precondition",
    )
