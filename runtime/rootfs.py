"""The root filesystem of a container: a pure plan of small operations, then each of them through file descriptors.

Refuses every way out of the root that a hostile image or a racing neighbour can make: nothing inside the root is
reached by a path of the host, only by openat2(RESOLVE_IN_ROOT) from the root's fd, and mounts are prepared detached,
attributes included, before they are moved onto the fd of their target (CVE-2021-30465, CVE-2025-31133,
GHSA-3q8j-pf29-vwv8).
Invariant: `plan_mounts` and `plan_protection` touch nothing; `describe()` prints what `apply()` will do.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, mkdir_in_root, open_in_root
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    AT_SYMLINK_NOFOLLOW,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_I_VERSION,
    MS_PRIVATE,
    MS_SLAVE,
    OPEN_TREE_CLONE,
    FsMount,
    mount_setattr,
    move_mount,
    open_tree,
)
from runtime.linux.record import Record
from runtime.rootfs_devices import DeviceOp, LinksOp, plan_devices
from runtime.rootfs_mounts import MountOp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runtime.spec import Spec

_ENOENT, _ELOOP, _ENOTDIR, _EINVAL = 2, 40, 20, 22


class Root:
    """Where operations apply: the fd of the root's mount, what was opened for it on the host before, and the cgroups.

    `sources` are detached mounts by index of their Mount, made by the caller of create where the init has no right to
    (user namespaces, ids of their own). In a user namespace nodes are bound from the host, since mknod(2) is forbidden,
    and the attributes of sources are locked. `label` is linux.mountLabel.
    """

    def __init__(
        self,
        fd: int,
        bundle: str,
        cgroups: Mapping[str, str],
        *,
        user_namespace: bool,
        cgroupns: bool,
        label: str = "",
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.fd = fd
        self.bundle = bundle
        self.cgroups = cgroups
        self.cgroupns = cgroupns
        self.user_namespace = user_namespace
        self.label = label
        self.warn = warn
        self.sources: dict[int, int] = {}
        self.late_readonly: list[int] = []
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

    def hold_null(self) -> None:
        """For a user namespace, where no device can be made: the host's null, while the host can be seen."""
        fd = open_tree(AT_FDCWD, "/dev/null", OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW)
        _verify_null(fd)
        self._null = fd

    def null(self) -> int:
        """A detached mount of a character device 1:3, neither of the image nor one that a chmod of it would change for
        anybody else (CVE-2025-31133)."""
        if self._null < 0:
            self._null = _private_null()
        name = "" if self.user_namespace else "null"
        flags = OPEN_TREE_CLONE | (AT_EMPTY_PATH if self.user_namespace else AT_SYMLINK_NOFOLLOW)
        try:
            return open_tree(self._null, name, flags)
        except KernelError as error:
            if error.errno != _EINVAL:
                raise
        # Before Linux 6.15 a mount that is in no namespace cannot be cloned: then the container's own, once verified.
        fd = open_in_root(self.fd, "dev/null", os.O_PATH | os.O_NOFOLLOW)
        try:
            _verify_null(fd)
            return open_tree(fd, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
        finally:
            os.close(fd)

    def empty(self) -> int:
        """A detached, empty, read-only directory; one tmpfs serves every mask."""
        if self._empty < 0:
            self._empty = self._make_empty()
        try:
            return open_tree(self._empty, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
        except KernelError as error:
            if error.errno != _EINVAL:  # before Linux 6.15: as above
                raise
            return self._make_empty()

    def _make_empty(self) -> int:
        attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
        options: tuple[tuple[str, str | None], ...] = (("size", "4k"), ("nr_inodes", "1"))
        if self.label:
            options += (("context", self.label),)
        return FsMount("tmpfs", "tmpfs", options, attributes).make()

    def close(self) -> None:
        """Closes every fd but the root's."""
        held = [self._null, self._empty, *self.sources.values(), *self.late_readonly]
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


def _verify_null(fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(1, 3):
        raise RuntimeFailure("/dev/null is no character device 1:3", code="failed_precondition")


# ------------------------------------------------------------------------------------------------------- the root


def open_root(
    rootfs: FsMount | None, path: str, propagation: tuple[int, bool] | None = None, user_namespace: int = -1
) -> int:
    """The root as a detached mount: the snapshot's filesystem, or a copy of what is mounted at `path`. What is mounted
    on it does not reach the host; where linux.rootfsPropagation asks for a slave, what the host mounts there arrives.
    The ids of a snapshot's layers are mapped by the `user_namespace` behind that fd, if there is one.
    """
    if rootfs is not None and user_namespace >= 0:
        from runtime.rootfs_idmap import make_mapped  # few containers have a user namespace

        fd = make_mapped(rootfs, user_namespace)
    elif rootfs is not None:
        fd = rootfs.make()
    else:
        fd = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | AT_RECURSIVE)
    kind = MS_SLAVE if propagation is not None and propagation[0] == MS_SLAVE else MS_PRIVATE
    mount_setattr(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, propagation=kind)
    return fd


# ------------------------------------------------------------------------------------------------- the operations


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
    """tmpfs mounts and a /dev that are to be read-only, after everything is in place in them."""

    def describe(self) -> str:
        return "read-only tmpfs mounts"

    def apply(self, root: Root) -> None:
        for fd in root.late_readonly:
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
    # A /dev that is bound from somewhere has what the config wants it to have.
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


def check(spec: Spec, *, no_pivot: bool) -> None:
    """What this kernel cannot do, or must not, before anything is made. Raises RuntimeFailure."""
    if spec.mount_label and not os.path.exists("/sys/fs/selinux/enforce"):
        raise RuntimeFailure(
            "linux.mountLabel: selinux label is specified in config, but selinux is disabled or not supported",
            code="failed_precondition",
        )
    if no_pivot and spec.rootfs_propagation is not None and spec.rootfs_propagation[0] == MS_PRIVATE:
        raise RuntimeFailure(
            "linux.rootfsPropagation: [r]private is not safe without pivot_root", code="invalid_argument"
        )


def load_for(spec: Spec, *, no_pivot: bool) -> None:
    """Imports what only some entries need, in the caller: an init may import nothing, nor be allowed to read it."""
    if no_pivot:
        import runtime.rootfs_nopivot
    for mount in spec.mounts:
        if mount.kind == "cgroup":
            import runtime.rootfs_cgroup
        if mount.kind == "remount" or mount.superblock & MS_I_VERSION:
            import runtime.rootfs_remount
        if mount.copy_up:
            import runtime.rootfs_copyup  # noqa: F401
        if mount.fstype == "overlay":
            import runtime.linux.overlay_joined  # noqa: F401


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


__all__ = ["Root", "apply", "check", "load_for", "open_root", "plan_mounts", "plan_protection"]
