"""Applies the entries of one layer's tar to one directory, its own and nobody else's.

It refuses entries that leave the root, names that begin with .wh., owners and devices out of range. Invariant: every
entry is made by a single name in a directory fd from `Tree`, exclusively and without following links; owner, mode,
times and xattrs are set through the fd of what was just made, or by that single name with NOFOLLOW where no fd can be
had (links, devices); nothing is looked up again later, but for directories, whose metadata comes last, through
openat2 without links (threats S23, S38, S39). See the OCI image-spec, layer.md, and overlayfs.rst, "whiteouts and
opaque directories".
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.linux.files import fchmodat2, open_beneath, remove_tree, write_all
from runtime.linux.libc import KernelError
from runtime.linux.record import Record
from snapshotter import tar
from snapshotter.blame import blame
from snapshotter.looks import Metadata, apply_metadata, kept_xattrs
from snapshotter.model import Limits, UnpackError
from snapshotter.tree import META_PREFIX, OPAQUE, WHITEOUT_PREFIX, Ignored, Tree, clean, is_whiteout, set_opaque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Marks a file that stands for a hard link's target in a lower layer, until the commit fills it.
PENDING_LINK = "trusted.ocid.link"
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_OPAQUE_NAME = b".wh..wh..opq"
# ext4 keeps 34 bits of seconds; the kernel clamps what is beyond a filesystem's range, Python must not overflow first.
_EARLIEST, _LATEST = -(2**31) * 10**9, (2**34 - 1) * 10**9


class Extracted(Record):
    """What is left to do at commit, and what there is: `implied` directories and `links` into lower layers depend on
    the parent, `opaque` says that nothing below the layer's root shows through. `inodes` is 0 where entries replaced
    others: how many there are is then to be looked up."""

    inodes: int
    implied: list[bytes]
    links: list[bytes]
    opaque: bool


class Extractor:
    """One layer. `base`: it has no parent, so whiteouts have nothing to hide and are left out."""

    def __init__(
        self,
        root_fd: int,
        walker: tar.Walker,
        limits: Limits,
        *,
        base: bool = False,
        aliases: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self._walker = walker
        self._limits = limits
        self._base = base
        self._root_fd = root_fd
        self._tree = Tree(root_fd, limits, aliases or {})
        self._planned: dict[bytes, Metadata] = {}
        self._planned_bytes = 0
        self._links: dict[bytes, None] = {}
        self._opaque = False
        self._inodes = 1
        self._replaced = False
        # With a umask open(2) gives less than the mode asked for: then fchmod for every file. A worker has none.
        self._exact = process_umask() == 0

    def run(self) -> Extracted:
        """Applies everything. Raises UnpackError (the layer's fault), OSError (the machine's)."""
        entry = None
        makers = {
            tar.FILE: self._file,
            tar.LINK: self._hard_link,
            tar.SYMLINK: self._symlink,
            tar.CHAR: self._node,
            tar.BLOCK_DEVICE: self._node,
            tar.FIFO: self._node,
        }
        directory = self._tree.directory
        try:
            for entry in self._walker:
                head, _, base = entry.name.rpartition(b"/")
                if not base or base == b"." or base == b".." or base.startswith(WHITEOUT_PREFIX):
                    self._unusual(entry, makers)
                    continue
                try:
                    parent, real = directory(head)
                except Ignored:
                    continue
                if entry.kind is tar.DIRECTORY:
                    self._directory(entry, parent, base, real)
                else:
                    makers[entry.kind](entry, parent, base, real)
            entry = None
            self._finish_directories()
        except OSError as error:
            raise blame(error, entry.name if entry else b".") from error
        finally:
            self._tree.close()
        implied = list(self._tree.implied)
        if b"" not in self._planned:
            implied.insert(0, b"")
        return Extracted(
            0 if self._replaced else self._inodes + self._tree.made,
            implied,
            list(self._links),
            self._opaque,
        )

    def _unusual(self, entry: tar.Entry, makers: Mapping[bytes, object]) -> None:
        """Entries whose last part is no plain name: "a/", "./", "a/..", whiteouts."""
        name = entry.name.rstrip(b"/")
        head, _, base = name.rpartition(b"/")
        try:
            if base.startswith(WHITEOUT_PREFIX):
                self._whiteout(entry, head, base)
                return
            real = clean(name, self._limits)
            if not real:
                if entry.kind is not tar.DIRECTORY:
                    raise UnpackError(f"tar entry {entry.name!r}: only a directory can be the root")
                self._plan(b"", entry)
                return
            head, _, base = real.rpartition(b"/")
            parent, where = self._tree.directory(head)
        except Ignored:
            return
        if entry.kind is tar.DIRECTORY:
            self._directory(entry, parent, base, where)
        else:
            make = makers[entry.kind]
            assert callable(make)
            make(entry, parent, base, where)

    # -------------------------------------------------------------------------------------------------- each kind

    def _file(self, entry: tar.Entry, parent: int, name: bytes, where: bytes) -> None:
        mode = entry.mode
        plain = mode & 0o777
        try:
            fd = os.open(name, _CREATE, plain, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name)
            fd = os.open(name, _CREATE, plain, dir_fd=parent)
        try:
            if entry.regions is not None:
                self._write_sparse(fd, entry)
            else:
                for piece in self._walker.data():
                    written = os.write(fd, piece)
                    if written != len(piece):
                        write_all(fd, bytes(piece[written:]))
            # Writing and changing the owner clear set-id bits and capabilities: mode after owner, xattrs after both.
            if entry.uid or entry.gid:
                os.fchown(fd, entry.uid, entry.gid)
            if mode != plain or not self._exact:
                os.fchmod(fd, mode)
            if entry.xattrs:
                for key, value in kept_xattrs(entry.xattrs):
                    os.setxattr(fd, key, value)
            mtime = entry.mtime if _EARLIEST <= entry.mtime <= _LATEST else 0
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)
        self._inodes += 1

    def _write_sparse(self, fd: int, entry: tar.Entry) -> None:
        """Data to their regions, and the length: what no region covers stays a hole."""
        pieces = self._walker.data()
        rest = memoryview(b"")
        for offset, length in entry.regions or ():
            while length:
                if not rest:
                    rest = next(pieces)
                written = os.pwrite(fd, rest[:length], offset)
                rest = rest[written:]
                offset += written
                length -= written
        os.ftruncate(fd, entry.size)

    def _directory(self, entry: tar.Entry, parent: int, name: bytes, where: bytes) -> None:
        path = where + b"/" + name if where else name
        # 0700 root until the end: a set-gid bit or a default ACL would be passed on to what is made inside.
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            self._inodes += 1
        except FileExistsError:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                self._clear(parent, name)
                os.mkdir(name, 0o700, dir_fd=parent)
                self._inodes += 1
                if is_whiteout(status):  # removed and made anew in one layer: nothing of the old one shows
                    set_opaque(parent, name)
        self._plan(path, entry)

    def _plan(self, path: bytes, entry: tar.Entry) -> None:
        if path not in self._planned:
            self._planned_bytes += len(path)
            limits = self._limits
            if len(self._planned) >= limits.directories:
                raise UnpackError(f"tar has more than {limits.directories} directories (limit directories)")
        xattrs = dict(kept_xattrs(entry.xattrs)) if entry.xattrs else None
        if xattrs:
            self._planned_bytes += sum(len(key) + len(value) for key, value in xattrs.items())
        if self._planned_bytes > self._limits.directory_bytes:
            raise UnpackError(
                f"tar: the directories' paths and xattrs take more than {self._limits.directory_bytes} "
                "bytes (limit directory_bytes)"
            )
        mtime = entry.mtime if _EARLIEST <= entry.mtime <= _LATEST else 0
        self._planned[path] = Metadata(entry.mode, entry.uid, entry.gid, mtime, xattrs)
        self._tree.implied.pop(path, None)

    def _symlink(self, entry: tar.Entry, parent: int, name: bytes, where: bytes) -> None:
        if not entry.link:
            raise UnpackError(f"tar entry {entry.name!r}: symlink without a target")
        try:
            os.symlink(entry.link, name, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name)
            os.symlink(entry.link, name, dir_fd=parent)
        self._inodes += 1
        self._dress(entry, parent, name)

    def _node(self, entry: tar.Entry, parent: int, name: bytes, where: bytes) -> None:
        kinds = {tar.CHAR: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK, tar.FIFO: stat.S_IFIFO}
        # linux/kdev_t.h: 12 bits of major, 20 of minor
        if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
            raise UnpackError(f"tar entry {entry.name!r}: device {entry.major}:{entry.minor} is out of range")
        device = os.makedev(entry.major, entry.minor)
        mode = kinds[entry.kind] | entry.mode
        try:
            os.mknod(name, mode, device, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name)
            os.mknod(name, mode, device, dir_fd=parent)
        self._inodes += 1
        self._dress(entry, parent, name)

    def _dress(self, entry: tar.Entry, parent: int, name: bytes) -> None:
        """Owner, mode, xattrs and time of what cannot be opened: by its one name in `parent`, never followed."""
        if entry.uid or entry.gid:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.kind is not tar.SYMLINK and (not self._exact or entry.mode & 0o7000):
            fchmodat2(parent, os.fsdecode(name), entry.mode)
        if entry.xattrs:
            path = f"/proc/self/fd/{parent}/".encode() + name
            for key, value in kept_xattrs(entry.xattrs):
                # user.* and ACLs exist on files and directories only (xattr(7)).
                if key.startswith((b"trusted.", b"security.")):
                    os.setxattr(path, key, value, follow_symlinks=False)
        mtime = entry.mtime if _EARLIEST <= entry.mtime <= _LATEST else 0
        os.utime(name, ns=(mtime, mtime), dir_fd=parent, follow_symlinks=False)

    def _hard_link(self, entry: tar.Entry, parent: int, name: bytes, where: bytes) -> None:
        path = where + b"/" + name if where else name
        try:
            target = clean(entry.link, self._limits)
        except Ignored:
            target = b""
        except UnpackError:
            raise UnpackError(f"tar entry {entry.name!r}: hard link to {entry.link!r}, outside the root") from None
        if not target:
            raise UnpackError(f"tar entry {entry.name!r}: hard link to {entry.link!r}, which is no file")
        head, _, base = target.rpartition(b"/")
        here = os.dup(parent)  # looking for the target's directory may close `parent`
        try:
            found = self._tree.existing(head)
            if found is None or not self._link(entry, found, base, here, name, path):
                self._await_target(target, here, name, path)
        finally:
            os.close(here)

    def _link(
        self, entry: tar.Entry, found: tuple[int, bytes], base: bytes, parent: int, name: bytes, path: bytes
    ) -> bool:
        """Links to a target in this layer; False when it has none."""
        source, where = found
        origin = where + b"/" + base if where else base
        try:
            status = os.stat(base, dir_fd=source, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(status.st_mode) or is_whiteout(status) or origin == path:
            raise UnpackError(f"tar entry {entry.name!r}: hard link to {entry.link!r}, which is no other file")
        # follow_symlinks=False: the link itself is linked, not what it points to (CVE-2026-82049).
        try:
            os.link(base, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            self._clear(parent, name)
            os.link(base, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        if origin in self._links:
            self._links[path] = None
            self._tree.add_pending(path)
        return True

    def _await_target(self, target: bytes, parent: int, name: bytes, path: bytes) -> None:
        """The target lies in a lower layer, which may not be there yet: an empty file holds the place until commit.
        Its xattr says what for, so a file that takes the place meanwhile is not mistaken for it."""
        try:
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        except FileExistsError:
            self._clear(parent, name)
            fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
        try:
            os.setxattr(fd, PENDING_LINK, target)
        finally:
            os.close(fd)
        self._inodes += 1
        self._links[path] = None
        self._tree.add_pending(path)

    # ------------------------------------------------------------------------------------- whiteouts and replacing

    def _whiteout(self, entry: tar.Entry, head: bytes, base: bytes) -> None:
        if base != _OPAQUE_NAME and base.startswith(META_PREFIX):
            return
        target = base[len(WHITEOUT_PREFIX) :]
        if target in (b"", b".", b".."):
            raise UnpackError(f"tar entry {entry.name!r}: whiteout of nothing")
        if self._base:
            clean(head, self._limits)
            return
        parent, real = self._tree.directory(head)
        if base == _OPAQUE_NAME:
            self._opaque = self._opaque or not real
            os.setxattr(parent, OPAQUE, b"y")
            return
        try:
            os.mknod(target, stat.S_IFCHR, 0, dir_fd=parent)
            self._inodes += 1
        except FileExistsError:
            # Whiteouts are about lower layers only (layer.md): what this layer has stays, and a directory of it
            # shows nothing of the one below.
            if stat.S_ISDIR(os.stat(target, dir_fd=parent, follow_symlinks=False).st_mode):
                set_opaque(parent, target)

    def _clear(self, parent: int, name: bytes) -> None:
        """Removes what a later entry of the same name replaces. `parent` stays open until the next look-up."""
        self._replaced = True
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._tree.forget()
            remove_tree(os.fsdecode(name), dirfd=parent)
        else:
            if stat.S_ISLNK(status.st_mode):
                self._tree.forget()
            os.unlink(name, dir_fd=parent)

    def _finish_directories(self) -> None:
        """Mode, owner, xattrs, times, through fds. A directory that was replaced since is not there any more, or
        was planned anew; through a link nothing is reached."""
        for path, metadata in self._planned.items():
            try:
                fd = open_beneath(self._root_fd, path or b".", _DIRECTORY)
            except KernelError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue
                raise
            try:
                apply_metadata(fd, metadata)
            finally:
                os.close(fd)


def process_umask() -> int:
    """This process's umask, read without changing it (proc_pid_status(5))."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777
