"""config.json's mounts, each prepared detached and then moved onto the fd of its target: operations of the rootfs plan.

Refuses targets inside /proc but for a fixed list (CVE-2019-16884), a /proc or /sys that is a link (CVE-2023-28642), and
the root itself. Invariant: a target is resolved once, by openat2(RESOLVE_IN_ROOT), and what is moved there has all of
its attributes already, so that nobody ever sees it with more rights than it will have.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import (
    AT_FDCWD,
    MAX_LINKS,
    PROC_SUPER_MAGIC,
    fd_path,
    fstatfs_type,
    mkdir_in_root,
    open_beneath,
    open_in_root,
)
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    MNT_DETACH,
    MOUNT_ATTR_RDONLY,
    MS_DIRSYNC,
    MS_I_VERSION,
    MS_LAZYTIME,
    MS_MANDLOCK,
    MS_SYNCHRONOUS,
    OPEN_TREE_CLONE,
    FsMount,
    mount_setattr,
    move_mount,
    open_tree,
    umount2,
)
from runtime.linux.record import Record
from runtime.mounts import Attributes, Mount, own_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.rootfs import Root

_EPERM, _ENOENT, _EINVAL = 1, 2, 22
# statvfs(3) and mount_setattr(2) number these alike: read-only, nosuid, nodev, noexec.
_VISIBLE = 0xF
# What fsconfig(2) takes by name; MS_I_VERSION it does not, and MS_SILENT is for mount(2)'s printk only.
_SUPERBLOCK = ((MS_SYNCHRONOUS, "sync"), (MS_DIRSYNC, "dirsync"), (MS_LAZYTIME, "lazytime"), (MS_MANDLOCK, "mand"))
# Filesystems that no label can be given at the mount (SELinux has rules of its own for them).
_UNLABELLED = frozenset({"proc", "sysfs", "mqueue", "cgroup", "cgroup2"})
# What lxcfs and the like put over procfs; the same list as the peers'.
PROC_ALLOWED = frozenset(
    f"/proc/{name}"
    for name in (
        *("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo"),
        *("sys/kernel/ns_last_pid", "sys/crypto/fips_enabled"),
    )
)


def open_source(mount: Mount, bundle: str) -> int:
    """A detached copy of the tree at a bind mount's source. Relative sources start at the bundle (runtime-spec)."""
    path = os.path.join(bundle, mount.source)
    return open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | (AT_RECURSIVE if mount.recursive else 0))


class MountOp(Record):
    """One entry of config.json's mounts; `index` is its place there."""

    index: int
    mount: Mount

    def describe(self) -> str:
        return self.mount.describe()

    def apply(self, root: Root) -> None:
        # The modules that only some configs need were imported before the clone: runtime.rootfs.load_for.
        if self.mount.kind == "cgroup":
            from runtime.rootfs_cgroup import mount_cgroups

            mount_cgroups(root, self.mount)
        elif self.mount.kind == "remount":
            from runtime.rootfs_remount import remount

            remount(root, self.mount)
        elif self.mount.kind == "bind":
            self._bind(root)
        else:
            self._filesystem(root)

    def _bind(self, root: Root) -> None:
        mount = self.mount
        tree = root.sources.pop(self.index, -1)
        if tree < 0:
            tree = open_source(mount, root.bundle)
        try:
            late = mount.read_only and os.path.normpath(mount.destination) == "/dev"
            set_own_attributes(tree, mount, locked=root.user_namespace, late_readonly=late)
            set_attributes(tree, mount.recursive_attributes, AT_RECURSIVE)
            propagate(tree, mount)
            directory = stat.S_ISDIR(os.fstat(tree).st_mode)
            target = open_target(root, mount, directory=directory, procfs=_is_procfs_root(tree))
            try:
                move_mount(tree, target)
            finally:
                os.close(target)
            if late:
                root.late_readonly.append(os.dup(tree))  # the console has to get a place in it
        finally:
            os.close(tree)

    def _filesystem(self, root: Root) -> None:
        mount = self.mount
        mode = _mode_of(root, mount.destination) if mount.fstype == "tmpfs" else None
        target = open_target(root, mount, directory=True, procfs=mount.fstype == "proc")
        try:
            tree = root.sources.pop(self.index, -1)
            if tree < 0:
                tree = _make(root, mount, mode)
            try:
                if mount.copy_up:
                    from runtime.rootfs_copyup import copy_up

                    copy_up(target, tree, keep_owner=any(key in ("uid", "gid") for key, _ in mount.data))
                move_mount(tree, target)
                if mount.subdir:
                    whole, tree = tree, -1
                    tree = _narrowed(whole, target, mount)
                propagate(tree, mount)
                if mount.superblock & MS_I_VERSION:
                    from runtime.rootfs_remount import remount_superblock

                    remount_superblock(tree, mount)
                if mount.read_only and mount.fstype == "tmpfs":
                    root.late_readonly.append(os.dup(tree))  # later entries may need a directory in it
                if root.label and mount.fstype == "mqueue":
                    os.setxattr(fd_path(tree), "security.selinux", os.fsencode(root.label))
            finally:
                if tree >= 0:
                    os.close(tree)
        finally:
            os.close(target)


def _narrowed(take_tree: int, target: int, mount: Mount) -> int:
    """What is mounted on `target` gives way to one directory of it. Links are followed inside of it only. By way of the
    mounted tree, since before Linux 6.15 a mount that is in no namespace cannot be cloned."""
    try:
        try:
            inside = open_in_root(take_tree, mount.subdir, os.O_PATH | os.O_DIRECTORY)
        except KernelError as error:
            raise RuntimeFailure.of(error, what="X-mount.subdir", code="invalid_argument") from None
        try:
            tree = open_tree(inside, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
        finally:
            os.close(inside)
        umount2(fd_path(take_tree), MNT_DETACH)
    finally:
        os.close(take_tree)
    move_mount(tree, target)
    return tree


def set_own_attributes(fd: int, mount: Mount, *, locked: bool, late_readonly: bool = False) -> None:
    """The attributes of a bind's or a remount's own mount. Where the kernel keeps some locked, they stay as they are,
    unless the config names one to be lifted. Raises KernelError (EPERM) then."""
    if not mount.named:
        return
    # Locked ones are only found out about by asking to change them.
    current = os.fstatvfs(fd).f_flag & _VISIBLE
    for is_locked in (locked, True):
        wanted = own_attributes(mount, current, locked=is_locked)
        if wanted is None:
            raise KernelError(_EPERM, "lift a locked attribute of", mount.source or mount.destination)
        if late_readonly:
            wanted = Attributes(wanted.set & ~MOUNT_ATTR_RDONLY, wanted.clear & ~MOUNT_ATTR_RDONLY)
        try:
            set_attributes(fd, wanted, 0)
            return
        except KernelError as error:
            if error.errno != _EPERM or is_locked:
                raise


def set_attributes(fd: int, attributes: Attributes, flags: int) -> None:
    """mount_setattr(2) where there is something to do; AT_RECURSIVE in `flags`: for all below too."""
    if attributes.set or attributes.clear:
        mount_setattr(fd, "", AT_EMPTY_PATH | flags, set_=attributes.set, clear=attributes.clear)


def propagate(fd: int, mount: Mount) -> None:
    """The propagation that an entry asks for."""
    for propagation, recursive in mount.propagation:
        mount_setattr(fd, "", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), propagation=propagation)


# ------------------------------------------------------------------------------------------------------- filesystems


def _make(root: Root, mount: Mount, mode: int | None) -> int:
    attributes = mount.attributes.set
    if mount.fstype == "tmpfs":
        attributes &= ~MOUNT_ATTR_RDONLY
    options = filesystem_options(mount, root.label, mode)
    try:
        return FsMount(mount.fstype, mount.source or mount.fstype, options, attributes).make()
    except KernelError as error:
        if mount.fstype == "devpts" and error.errno == _EINVAL and root.user_namespace:
            kept = tuple(option for option in options if not _is_unmapped_gid(option))
            if kept != options:
                # As crun does. The gid is for the group of terminals, which then is that of the one who opens them.
                root.warn(f"{mount.describe()}: this user namespace has no such gid, it is left out")
                return FsMount(mount.fstype, mount.source or mount.fstype, kept, attributes).make()
        if error.errno == _EPERM and root.user_namespace and mount.fstype in ("proc", "sysfs"):
            needed = "pid" if mount.fstype == "proc" else "network"
            error.add_note(f"a user namespace may mount {mount.fstype} only with a {needed} namespace of its own")
        raise


def filesystem_options(mount: Mount, label: str, mode: int | None) -> tuple[tuple[str, str | None], ...]:
    """What fsconfig(2) is told. `mode`: of the directory that a tmpfs covers, unless the entry has one of its own."""
    options: list[tuple[str, str | None]] = []
    if mode is not None and not any(key == "mode" for key, _ in mount.data):
        options.append(("mode", f"{mode:o}"))
    options += mount.data
    options += ((name, None) for bit, name in _SUPERBLOCK if mount.superblock & bit)
    if mount.read_only and mount.source.startswith("/"):
        options.append(("ro", None))  # a block device may be read-only itself
    if label and mount.fstype not in _UNLABELLED:
        options.append(("context", label))
    return tuple(options)


def _is_unmapped_gid(option: tuple[str, str | None]) -> bool:
    if option[0] != "gid" or not (option[1] or "").isdigit():
        return False
    with open("/proc/self/gid_map", "rb") as lines:
        ranges = [[int(word) for word in line.split()] for line in lines]
    return not any(first <= int(option[1] or "") < first + size for first, _, size in ranges)


def _mode_of(root: Root, destination: str) -> int | None:
    try:
        fd = open_in_root(root.fd, destination, os.O_PATH | os.O_DIRECTORY)
    except KernelError:
        return None  # not there yet; what is wrong with it otherwise is said when it is opened as the target
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _is_procfs_root(fd: int) -> bool:
    return fstatfs_type(fd) == PROC_SUPER_MAGIC and os.fstat(fd).st_ino == 1


# ----------------------------------------------------------------------------------------------------------- targets


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
        place = root.path_of(fd)
        if place == "/":
            raise RuntimeFailure(f'"{destination}" is the root, which no mount may cover', code="invalid_argument")
        _refuse_inside_proc(place, fd, destination, procfs=procfs)
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
