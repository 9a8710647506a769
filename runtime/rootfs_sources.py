"""Bind sources that the caller of create opens, since the init has no right to: for user namespaces, with mapped ids.

Refuses ids that only a process of the host could map. Invariant: sources are detached mounts, so nothing of them is in
any mount table until the init moves them to their targets, and what is not moved goes with its fd; the user namespaces
that carry mappings have no process any more when this returns.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.failpoint import failpoint
from runtime.linux.files import fd_path
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    MOUNT_ATTR_IDMAP,
    MS_SLAVE,
    FsMount,
    mount_setattr,
)
from runtime.linux.process import CLONE_NEWUSER, clone3
from runtime.mounts import init_propagation
from runtime.newborn import write_mappings
from runtime.rootfs_mounts import open_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.mounts import IdMap, Mount
    from runtime.spec import Spec
    from runtime.spec_namespaces import IdMapping


def open_sources(spec: Spec, bundle: str, root: str) -> dict[int, int]:
    """Detached mounts by index in `spec.mounts`; the caller's to close. Raises RuntimeFailure."""
    found: dict[int, int] = {}
    namespaces = IdSpaces(spec)
    in_user_namespace = spec.has("user")
    try:
        for index, mount in enumerate(spec.mounts):
            if mount.fstype == "overlay" and mount.idmap is not None:
                found[index] = _overlay(mount, spec, namespaces)
                continue
            if mount.kind != "bind" or not (in_user_namespace or mount.idmap is not None):
                continue
            if mount.idmap is None and _is_made_later(mount, spec.mounts[:index], bundle, root):
                continue
            found[index] = _open(mount, bundle, spec, namespaces)
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise
    finally:
        namespaces.close()
    return found


def _is_made_later(mount: Mount, earlier: tuple[Mount, ...], bundle: str, root: str) -> bool:
    """True for a source inside the root that an earlier entry mounts first: only the init will see that."""
    try:
        fd = os.open(os.path.join(bundle, mount.source), os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False  # opening it as the source will say what is wrong
    try:
        source = os.readlink(fd_path(fd)) + "/"
    finally:
        os.close(fd)
    return any(source.startswith(f"{root}{os.path.normpath(entry.destination)}/") for entry in earlier)


def _overlay(mount: Mount, spec: Spec, namespaces: IdSpaces) -> int:
    """One whose layers are mapped: they lie where the root of a user namespace may not even look."""
    from runtime.rootfs_idmap import make_mapped
    from runtime.rootfs_mounts import filesystem_options

    assert mount.idmap is not None  # the caller looked
    options = filesystem_options(mount, spec.mount_label, None)
    what = FsMount("overlay", mount.source or "overlay", options, mount.attributes.set)
    try:
        return make_mapped(what, namespaces.of(mount.idmap))
    except OSError as error:
        raise RuntimeFailure.of(error, step="mounts", what=mount.describe()) from None


def _open(mount: Mount, bundle: str, spec: Spec, namespaces: IdSpaces) -> int:
    try:
        tree = open_source(mount, bundle)
        try:
            if mount.idmap is not None:
                _map_ids(tree, mount, mount.idmap, namespaces)
            # The init's copy of the mounts is made so, and this one bypasses it: in a user namespace a mount is never a
            # peer of the host's (mount_namespaces(7)), otherwise linux.rootfsPropagation decides.
            kind, recursive = init_propagation(spec.rootfs_propagation)
            if spec.has("user"):
                kind, recursive = MS_SLAVE, True
            mount_setattr(tree, "", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), propagation=kind)
        except BaseException:
            os.close(tree)
            raise
        return tree
    except OSError as error:
        wrong = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        code = "invalid_argument" if wrong else "internal"
        raise RuntimeFailure.of(error, step="mounts", what=mount.describe(), code=code) from None


def _map_ids(tree: int, mount: Mount, idmap: IdMap, namespaces: IdSpaces) -> None:
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if idmap.recursive else 0)
    try:
        mount_setattr(tree, "", flags, set_=MOUNT_ATTR_IDMAP, userns_fd=namespaces.of(idmap))
    except KernelError as error:
        hint = ""
        if error.errno == errno.EINVAL:
            hint = "the filesystem, or one below it, may not support id-mapped mounts on this kernel"
        words = f"{mount.describe()}: failed to set MOUNT_ATTR_IDMAP on {mount.source}: {error}"
        code = "failed_precondition"
        raise RuntimeFailure(words, step="mounts", errno=error.errno or 0, hint=hint, code=code) from None


class IdSpaces:
    """User namespaces that stand for mappings, one for each set of them."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._fds: dict[tuple[tuple[IdMapping, ...], tuple[IdMapping, ...]], int] = {}

    def of(self, idmap: IdMap) -> int:
        """The fd of one with these mappings; without any, of the container's own."""
        if os.geteuid() != 0:
            raise RuntimeFailure(
                "id-mapped mounts are not supported for rootless containers", step="mounts", code="invalid_argument"
            )
        if not idmap.uids:
            return self.own()
        key = idmap.uids, idmap.gids
        if key not in self._fds:
            self._fds[key] = _with_mappings(*key)
        return self._fds[key]

    def own(self) -> int:
        """The fd of the container's own, or of one with its mappings."""
        uids, gids = self._spec.uid_mappings, self._spec.gid_mappings
        if (uids, gids) not in self._fds:
            joined = self._joined()
            self._fds[uids, gids] = (
                os.open(joined, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if joined else _with_mappings(uids, gids)
            )
        return self._fds[uids, gids]

    def _joined(self) -> str:
        return next((namespace.path for namespace in self._spec.namespaces if namespace.kind == "user"), "")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}


def _with_mappings(uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> int:
    """A new user namespace, which only the fd keeps: a child makes it by being born, and ends once it is open."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = clone3(CLONE_NEWUSER)
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)  # until the other end is closed, by a parent that is killed, too
            os._exit(0)
        os.close(pidfd)
        try:
            write_mappings(pid, uids, gids)
            failpoint("idmap.mapped")
            return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writer)
            writer = -1
            os.waitpid(pid, 0)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
