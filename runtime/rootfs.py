"""The root filesystem of a container: a pure plan of small operations, then each of them through file descriptors.

Refuses mounts inside /proc but for a fixed list (CVE-2019-16884), a /proc or /sys that is a link (CVE-2023-28642), and
every way out of the root that a hostile image or a racing neighbour can make: nothing inside the root is reached by a
path of the host, only by openat2(RESOLVE_IN_ROOT) from the root's fd, and mounts are prepared detached, attributes
included, before they are moved onto the fd of their target (CVE-2021-30465, CVE-2025-31133, GHSA-3q8j-pf29-vwv8).
Invariant: `plan_mounts` and `plan_protection` touch nothing; `describe()` prints what `apply()` will do.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import MAX_LINKS, PROC_SUPER_MAGIC, fstatfs_type, mkdir_in_root, open_beneath, open_in_root
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_SLAVE,
    OPEN_TREE_CLONE,
    FsMount,
    mount_setattr,
    move_mount,
    open_tree,
)
from runtime.linux.record import Record
from runtime.mounts import SUPERBLOCK, Attributes, Mount
from runtime.rootfs_devices import DeviceOp, LinksOp, plan_devices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runtime.spec import Spec

_AT_FDCWD = -100
_ENOENT, _ELOOP, _ENOTDIR = 2, 40, 20
# What lxcfs and the like put over procfs; the same list as the peers'.
PROC_ALLOWED = frozenset(
    f"/proc/{name}"
    for name in (
        *("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo"),
        *("net/dev", "sys/kernel/ns_last_pid", "sys/crypto/fips_enabled"),
    )
)


class Root:
    """Where operations apply: the fd of the root's mount, what was opened for it on the host before, and the cgroups.

    `sources` are detached mounts by index of their Mount, made by the caller of create where the init has no right to
    (user namespaces); `host_devices` says that nodes are bound from the host, since mknod(2) is forbidden there.
    """

    def __init__(
        self, fd: int, bundle: str, cgroups: Mapping[str, str], *, user_namespace: bool, cgroupns: bool
    ) -> None:
        self.fd = fd
        self.bundle = bundle
        self.cgroups = cgroups
        self.cgroupns = cgroupns
        self.user_namespace = user_namespace
        self.sources: dict[int, int] = {}
        self.late_readonly: list[tuple[int, str]] = []
        self.own_dev = True
        self._null = -1
        self._empty = -1

    def path_of(self, fd: int) -> str:
        """Where `fd` is inside the root, as the kernel names it now."""
        root, path = os.readlink(f"/proc/self/fd/{self.fd}"), os.readlink(f"/proc/self/fd/{fd}")
        if root == "/" or path == root:
            return path if root == "/" else "/"
        if not path.startswith(root + "/"):
            raise RuntimeFailure(f"{path} lies outside of the root {root}", code="failed_precondition")
        return path[len(root) :]

    def null(self) -> int:
        """A detached mount of a character device 1:3 that is neither the host's nor the image's (CVE-2025-31133)."""
        if self._null < 0:
            self._null = _private_null() if not self.user_namespace else _host_null()
        if self.user_namespace:
            return open_tree(self._null, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
        return open_tree(self._null, "null", OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW)

    def empty(self) -> int:
        """A detached, empty, read-only directory; one tmpfs serves every mask."""
        if self._empty < 0:
            attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
            self._empty = FsMount("tmpfs", "tmpfs", (("size", "4k"), ("nr_inodes", "1")), attributes).make()
        return open_tree(self._empty, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)

    def close(self) -> None:
        """Closes every fd but the root's."""
        held = [self._null, self._empty, *self.sources.values(), *(fd for fd, _ in self.late_readonly)]
        self._null, self._empty, self.sources, self.late_readonly = -1, -1, {}, []
        for fd in held:
            if fd >= 0:
                os.close(fd)


def _private_null() -> int:
    """A tmpfs with a `null` of its own: chmod through a masked path then changes nobody's /dev/null but the mask's.
    The fd of the tmpfs is what keeps it: a detached mount ends with its last fd."""
    tmpfs = FsMount("tmpfs", "tmpfs", (("size", "4k"), ("nr_inodes", "4"), ("mode", "700"))).make()
    try:
        os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=tmpfs)
    except BaseException:
        os.close(tmpfs)
        raise
    return tmpfs


def _host_null() -> int:
    """The host's, verified: in a user namespace nobody may make one, nor change this one's mode."""
    fd = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
        os.close(fd)
        raise RuntimeFailure("/dev/null of the host is no character device 1:3", code="failed_precondition")
    return fd


# ------------------------------------------------------------------------------------------------------- the root


def open_source(mount: Mount, bundle: str) -> int:
    """A detached copy of the tree at a bind mount's source. Relative sources start at the bundle (runtime-spec)."""
    path = os.path.join(bundle, mount.source)
    flags = OPEN_TREE_CLONE | (AT_RECURSIVE if mount.recursive else 0)
    return open_tree(_AT_FDCWD, path, flags)


def open_root(rootfs: FsMount | None, path: str) -> int:
    """The root as a detached, private mount: the snapshot's filesystem, or a copy of what is mounted at `path`."""
    if rootfs is not None:
        fd = rootfs.make()
    else:
        fd = open_tree(_AT_FDCWD, path, OPEN_TREE_CLONE | AT_RECURSIVE)
    mount_setattr(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, propagation=MS_PRIVATE)
    return fd


# ------------------------------------------------------------------------------------------------- the operations


class MountOp(Record):
    """One entry of config.json's mounts."""

    index: int
    mount: Mount

    def describe(self) -> str:
        return self.mount.describe()

    def apply(self, root: Root) -> None:
        mount = self.mount
        if mount.kind == "cgroup":
            from runtime.rootfs_cgroup import mount_cgroups

            mount_cgroups(root, mount)
            return
        tree = self._bind(root) if mount.kind == "bind" else self._filesystem()
        try:
            directory = stat.S_ISDIR(os.fstat(tree).st_mode)
            target = open_target(root, mount, directory=directory, procfs=_is_procfs_root(tree))
            try:
                move_mount(tree, target)
            finally:
                os.close(target)
            if mount.kind == "filesystem":
                self._propagate(tree)
                if mount.read_only and mount.fstype == "tmpfs":
                    # Later entries may need a directory in it.
                    root.late_readonly.append((os.dup(tree), mount.destination))
        finally:
            os.close(tree)
        if mount.kind == "bind" and mount.destination.rstrip("/") == "/dev":
            root.own_dev = False

    def _bind(self, root: Root) -> int:
        mount = self.mount
        tree = root.sources.pop(self.index, -1)
        if tree < 0:
            tree = open_source(mount, root.bundle)
        try:
            _set(tree, mount.attributes, 0)
            _set(tree, mount.recursive_attributes, AT_RECURSIVE)
            self._propagate(tree)
        except BaseException:
            os.close(tree)
            raise
        return tree

    def _propagate(self, tree: int) -> None:
        for propagation, recursive in self.mount.propagation:
            mount_setattr(tree, "", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), propagation=propagation)

    def _filesystem(self) -> int:
        mount = self.mount
        attributes = mount.attributes.set
        if mount.fstype == "tmpfs":
            attributes &= ~MOUNT_ATTR_RDONLY
        options = tuple((key, value) for key, value in mount.data if not (value is None and key in SUPERBLOCK))
        options += tuple((key, value) for key, value in mount.data if value is None and key in SUPERBLOCK)
        if mount.read_only and mount.source.startswith("/"):
            options += (("ro", None),)  # a block device may be read-only itself
        return FsMount(mount.fstype, mount.source or mount.fstype, options, attributes).make()


def _set(tree: int, attributes: Attributes, flags: int) -> None:
    if attributes.set or attributes.clear:
        mount_setattr(tree, "", AT_EMPTY_PATH | flags, set_=attributes.set, clear=attributes.clear)


def _is_procfs_root(fd: int) -> bool:
    return fstatfs_type(fd) == PROC_SUPER_MAGIC and os.fstat(fd).st_ino == 1


def open_target(root: Root, mount: Mount, *, directory: bool, procfs: bool) -> int:
    """The fd of a mount's target, made where missing; verified to be one that may be covered."""
    destination = mount.destination
    if mount.fstype in ("proc", "sysfs") or destination in ("/proc", "/sys"):
        fd = _plain_directory(root, destination, mount)
    elif directory:
        fd = mkdir_in_root(root.fd, destination)
    else:
        fd = _open_or_create_file(root, destination)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise RuntimeFailure(
                f"the source is no directory, and {destination} is a directory", code="invalid_argument"
            )
    try:
        _refuse_inside_proc(root.path_of(fd), fd, destination, procfs=procfs)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _plain_directory(root: Root, destination: str, mount: Mount) -> int:
    """/proc and /sys must be directories of their own: through a link, what is written there later would land on a
    filesystem that somebody else controls (CVE-2019-19921, CVE-2023-27561)."""
    try:
        try:
            return open_beneath(root.fd, destination.lstrip("/"), os.O_PATH | os.O_DIRECTORY)
        except KernelError as error:
            if error.errno != _ENOENT:
                raise
            os.close(mkdir_in_root(root.fd, destination))
            return open_beneath(root.fd, destination.lstrip("/"), os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise RuntimeFailure(
            f"{mount.fstype or 'this'} filesystem must be mounted on an ordinary directory: {destination} is none",
            errno=error.errno or 0,
            code="invalid_argument",
            hint="the image has a link or a file at that place",
        ) from None


def _open_or_create_file(root: Root, destination: str) -> int:
    try:
        return open_in_root(root.fd, destination, os.O_PATH)
    except KernelError as error:
        if error.errno != _ENOENT:
            raise
    path = destination
    for _ in range(MAX_LINKS):
        directory, name = os.path.split(path)
        parent = mkdir_in_root(root.fd, directory)
        try:
            # A dangling link is followed by hand, since its directory may have to be made, too.
            target = os.readlink(name, dir_fd=parent)
        except OSError:
            # NONBLOCK in case a FIFO has appeared meanwhile; NOFOLLOW in case a link has.
            flags = os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=parent))
            break
        finally:
            os.close(parent)
        path = target if target.startswith("/") else f"{directory}/{target}"
    return open_in_root(root.fd, destination, os.O_PATH)


def _refuse_inside_proc(place: str, fd: int, destination: str, *, procfs: bool) -> None:
    for path in {place, os.path.normpath(destination)}:
        if path == "/proc" and not procfs:
            problem = "only a proc filesystem may be mounted there"
        elif path.startswith("/proc/") and path not in PROC_ALLOWED:
            problem = "it is inside /proc"
        elif path == place and fstatfs_type(fd) == PROC_SUPER_MAGIC and path not in PROC_ALLOWED and path != "/proc":
            problem = "it is inside a proc filesystem"
        else:
            continue
        raise RuntimeFailure(f'"{destination}" cannot be mounted because {problem}', code="invalid_argument")


class ReadOnlyOp(Record):
    """A path that becomes read-only, with what is mounted below it as it is. Missing: nothing to do."""

    path: str

    def describe(self) -> str:
        return f"read-only {self.path}"

    def apply(self, root: Root) -> None:
        target = _open_if_there(root, self.path)
        if target < 0:
            return
        try:
            tree = open_tree(target, "", OPEN_TREE_CLONE | AT_RECURSIVE | AT_EMPTY_PATH)
            try:
                mount_setattr(tree, "", AT_EMPTY_PATH, set_=MOUNT_ATTR_RDONLY)
                move_mount(tree, target)
            finally:
                os.close(tree)
        finally:
            os.close(target)


class MaskOp(Record):
    """A path that reads as nothing: an empty directory, or a null device. Missing: nothing to do."""

    path: str

    def describe(self) -> str:
        return f"mask {self.path}"

    def apply(self, root: Root) -> None:
        target = _open_if_there(root, self.path)
        if target < 0:
            return
        try:
            tree = root.empty() if stat.S_ISDIR(os.fstat(target).st_mode) else root.null()
            try:
                move_mount(tree, target)
            finally:
                os.close(tree)
        finally:
            os.close(target)


def _open_if_there(root: Root, path: str) -> int:
    try:
        return open_in_root(root.fd, path, os.O_PATH)
    except KernelError as error:
        if error.errno in (_ENOENT, _ENOTDIR):
            return -1
        raise


class LateReadOnlyOp(Record):
    """tmpfs mounts that asked for ro, after everything is in place in them."""

    def describe(self) -> str:
        return "read-only tmpfs mounts"

    def apply(self, root: Root) -> None:
        for fd, _ in root.late_readonly:
            mount_setattr(fd, "", AT_EMPTY_PATH, set_=MOUNT_ATTR_RDONLY)


class RootReadOnlyOp(Record):
    """root.readonly."""

    def describe(self) -> str:
        return "read-only /"

    def apply(self, root: Root) -> None:
        mount_setattr(root.fd, "", AT_EMPTY_PATH, set_=MOUNT_ATTR_RDONLY)


class WorkingDirectoryOp(Record):
    """process.cwd, made where missing as the peers do."""

    path: str

    def describe(self) -> str:
        return f"directory {self.path}"

    def apply(self, root: Root) -> None:
        try:
            os.close(mkdir_in_root(root.fd, self.path))
        except OSError:
            pass  # chdir will say what is wrong with it, as the user who needs it


TYPE_OP = MountOp | DeviceOp | LinksOp | ReadOnlyOp | MaskOp | LateReadOnlyOp | RootReadOnlyOp | WorkingDirectoryOp


# ------------------------------------------------------------------------------------------------------- the plans


def plan_mounts(spec: Spec) -> list[TYPE_OP]:
    """Everything that is put into the root before it is pivoted to, in order: sources and devices are of the host."""
    plan: list[TYPE_OP] = [MountOp(index, mount) for index, mount in enumerate(spec.mounts)]
    if not any(mount.kind == "bind" and os.path.normpath(mount.destination) == "/dev" for mount in spec.mounts):
        plan += plan_devices(spec)
    if spec.process is not None and spec.process.cwd != "/":
        plan.append(WorkingDirectoryOp(spec.process.cwd))
    return plan


def plan_protection(spec: Spec) -> list[TYPE_OP]:
    """What is taken away after everything is in place."""
    plan: list[TYPE_OP] = [LateReadOnlyOp()]
    plan += [ReadOnlyOp(path) for path in spec.readonly_paths]
    plan += [MaskOp(path) for path in spec.masked_paths]
    if spec.root_readonly:
        plan.append(RootReadOnlyOp())
    return plan


def apply(plan: list[TYPE_OP], root: Root, log: Callable[[str], None] | None = None) -> None:
    """Applies each; an error is prefixed with what was being done."""
    for number, op in enumerate(plan, 1):
        if log is not None:
            log(f"rootfs {number}/{len(plan)}: {op.describe()}")
        try:
            op.apply(root)
        except OSError as error:
            raise RuntimeFailure.of(error, what=op.describe(), code=_code_of(error, op)) from error
        except RuntimeFailure as failure:
            raise RuntimeFailure.of(failure, what=op.describe()) from failure


def _code_of(error: OSError, op: TYPE_OP) -> str:
    """A source that is missing is the config's fault, not ours."""
    if isinstance(op, MountOp) and error.errno in (_ENOENT, _ENOTDIR, _ELOOP):
        return "invalid_argument"
    return "internal"


__all__ = ["MS_SLAVE", "Root", "apply", "open_root", "open_source", "plan_mounts", "plan_protection"]
