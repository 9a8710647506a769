"""Files: openat2(2) inside roots, owned fds, durable records, sealed copies, removal that crosses no mount.

Refuses to resolve an untrusted path by name twice: what lies inside a root is reached through an fd. Invariant: every
fd is CLOEXEC; `write_durable` leaves the old file or the new one, whole, whatever happens in between.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc, check, room, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

# linux/openat2.h
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16
MAX_LINKS = 40  # linux/namei.h, MAXSYMLINKS
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
# linux/magic.h
PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC = 0x9FA0, 0x62656572, 0x27E0EB, 0x63677270
TMPFS_MAGIC, NSFS_MAGIC, OVERLAYFS_SUPER_MAGIC = 0x01021994, 0x6E736673, 0x794C7630
# linux/fcntl.h, linux/memfd.h
F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8


class Fd:
    """An fd with one owner: closed once, by `close()` or at the end of a `with`. `take()` hands it on."""

    __slots__ = ("_fd",)

    def __init__(self, take_fd: int) -> None:
        self._fd = take_fd

    def fileno(self) -> int:
        return self._fd

    def take(self) -> int:
        """The number, owned by the caller from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def openat2(dirfd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), always CLOEXEC. EAGAIN (a rename raced a `..`) is tried again, as the man page asks."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for attempt in range(128):
        try:
            return syscall("openat2", dirfd, os.fsencode(path), how, len(how), subject=path)
        except KernelError as error:
            if error.errno != errno.EAGAIN or attempt == 127:
                raise
    raise AssertionError("unreachable")


def open_in_root(root_fd: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Opens `path` as a process chrooted to `root_fd` would: absolute links and `..` stay inside, magic links are
    refused. The caller owns the fd. Raises KernelError (ELOOP for a magic link)."""
    return openat2(root_fd, path, flags, mode, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_beneath(dirfd: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Opens `path` below `dirfd` and follows no symlink at all. Raises KernelError (ELOOP, EXDEV)."""
    return openat2(dirfd, path, flags, mode, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)


def mkdir_in_root(root_fd: int, path: str, mode: int = 0o755) -> int:
    """The directory `path` inside `root_fd`, made with its parents where missing; an O_PATH fd the caller owns.

    Walks one component at a time: an existing prefix is followed in the root, a new part is made in the fd of its
    parent, so a swapped link can lead elsewhere in the root but never out of it (CVE-2024-45310). Where a link leads to
    nothing yet (/etc/resolv.conf of many images, /var/run), that is made, too.
    """
    for _ in range(MAX_LINKS):
        made = _walk_and_make(root_fd, path, mode)
        if isinstance(made, int):
            return made
        path = made
    raise KernelError(errno.ELOOP, "make directory", path)


def _walk_and_make(root_fd: int, path: str, mode: int) -> int | str:
    """An O_PATH fd of `path`, or the path to go on with when a part of it is a dangling link."""
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    walked = ""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for number, part in enumerate(parts):
        above, walked = walked, f"{walked}/{part}"
        try:
            try:
                following = open_in_root(root_fd, walked, os.O_PATH | os.O_DIRECTORY)
            except KernelError as error:
                if error.errno != errno.ENOENT or part == "..":
                    raise
                try:
                    os.mkdir(part, mode, dir_fd=current)
                except FileExistsError:  # a dangling link, or somebody was faster
                    try:
                        target = os.readlink(part, dir_fd=current)
                    except OSError:
                        following = open_in_root(root_fd, walked, os.O_PATH | os.O_DIRECTORY)
                    else:
                        return "/".join(
                            [target if target.startswith("/") else f"{above}/{target}", *parts[number + 1 :]]
                        )
                else:
                    following = open_beneath(current, part, os.O_PATH | os.O_DIRECTORY)
        finally:
            os.close(current)
        current = following
    return current


def fd_path(fd: int) -> str:
    """The name by which a path-taking syscall reaches exactly what `fd` refers to."""
    return f"/proc/self/fd/{fd}"


def path_in_root(root_fd: int, path: str) -> str:
    """`path` as mountinfo has it below that root, links followed inside of it; "" where there is nothing."""
    try:
        fd = open_in_root(root_fd, path, os.O_PATH)
    except KernelError:
        return ""
    try:
        found, top = os.readlink(fd_path(fd)), os.readlink(fd_path(root_fd))
        return found if top == "/" else found.removeprefix(top)
    finally:
        os.close(fd)


def fstatfs_type(fd: int) -> int:
    """f_type of fstatfs(2): compare with the *_MAGIC constants before writing to a procfs or sysfs file."""
    buffer = room()
    check(_libc.fstatfs(ctypes.c_int(fd), buffer), "fstatfs", fd)
    return int(struct.unpack_from("=l", buffer.raw)[0]) & 0xFFFFFFFF


def fchmodat2(dirfd: int, path: str, mode: int, flags: int = AT_SYMLINK_NOFOLLOW) -> None:
    """fchmodat2(2); with AT_EMPTY_PATH and path "" it changes what `dirfd` itself refers to, even O_PATH."""
    syscall("fchmodat2", dirfd, os.fsencode(path), mode, flags, subject=path or f"fd {dirfd}")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    syscall("fallocate", fd, mode, offset, length, subject=f"fd {fd}")


def renameat2(old_dir: int, old: str, new_dir: int, new: str, flags: int = 0) -> None:
    """renameat2(2)."""
    check(
        _libc.renameat2(old_dir, os.fsencode(old), new_dir, os.fsencode(new), ctypes.c_uint(flags)),
        "renameat2",
        f"{old} to {new}",
    )


def write_durable(path: str | Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> None:
    """Replaces `path` with `data`: temporary name, fsync, rename, fsync of the directory. `sync=False` is for a
    tmpfs, where only the rename matters."""
    directory, name = os.path.split(os.fspath(path))
    temporary = os.path.join(directory, f".{name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if sync:
        sync_directory(directory or ".")


def write_all(fd: int, data: bytes) -> None:
    """write(2) until nothing is left."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_directory(path: str | Path) -> None:
    """fsync(2) of a directory: makes the names in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_bounded(dirfd: int, path: str, limit: int, *, in_root: bool = False) -> bytes:
    """A regular file's content, at most `limit` bytes. Never blocks on a FIFO and never reads a device.
    Raises KernelError: EFBIG when it is larger, EINVAL when it is no regular file."""
    opener = open_in_root if in_root else openat2
    fd = opener(dirfd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise KernelError(errno.EINVAL, "read a regular file", path)
        pieces, left = [], limit + 1
        # The size is a guess (procfs says 0), and keeps small files from costing fresh memory of a mebibyte.
        guess = min(max(status.st_size + 1, 4096), 1 << 20)
        while left > 0 and (piece := os.read(fd, min(left, guess))):
            pieces.append(piece)
            left -= len(piece)
        if left <= 0:
            raise KernelError(errno.EFBIG, f"read at most {limit} bytes of", path)
        return b"".join(pieces)
    finally:
        os.close(fd)


def remove_tree(path: str | Path, *, dirfd: int = AT_FDCWD) -> None:
    """Removes a directory tree through fds, follows no link, and refuses to enter a mount (EXDEV) (threats O38, P12).
    A missing tree is a removed one. Raises KernelError."""
    try:
        parent = openat2(dirfd, os.path.dirname(os.fspath(path)) or ".", os.O_PATH | os.O_DIRECTORY)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return
        raise
    try:
        _remove_entry(parent, os.path.basename(os.fspath(path)))
    finally:
        os.close(parent)


def _remove_entry(parent: int, name: str) -> None:
    # Not recursive: depth in a container's tree is the container's choice, and Python's stack is not. And with one fd
    # at a time, for their number is limited too: the way up is "..", checked to be where the way down came from.
    stack: list[tuple[str, tuple[int, int], list[str]]] = []
    here, pending = os.dup(parent), [name]
    try:
        while True:
            while pending:
                entry = pending.pop()
                child = _unlink_or_open(here, entry)
                if child >= 0:
                    stack.append((entry, _identity(here), pending))
                    here, above = child, here
                    os.close(above)
                    pending = _names(here)
            if not stack:
                return
            entry, identity, pending = stack.pop()
            above = openat2(here, "..", os.O_RDONLY | os.O_DIRECTORY, 0, RESOLVE_NO_XDEV)
            os.close(here)
            here = above
            if _identity(here) != identity:
                raise KernelError(errno.ESTALE, "remove a tree that somebody moves about, at", entry)
            try:
                os.rmdir(entry, dir_fd=here)
            except FileNotFoundError:
                pass
    finally:
        os.close(here)


def _names(fd: int) -> list[str]:
    try:
        return os.listdir(fd)
    except FileNotFoundError:  # getdents(2) of a directory that somebody else has removed
        return []


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _unlink_or_open(dirfd: int, name: str) -> int:
    """Unlinks `name`; a directory's fd instead, which the caller owns; -1 when it is gone."""
    try:
        os.unlink(name, dir_fd=dirfd)
        return -1
    except FileNotFoundError:
        return -1
    except (IsADirectoryError, PermissionError) as error:
        refused = error
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mode):
            raise KernelError(refused.errno or errno.EPERM, "unlink", name) from refused
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        return openat2(dirfd, name, flags, 0, RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS)
    except OSError as error:
        if error.errno == errno.ENOENT:  # somebody else removes the tree as well
            return -1
        raise


def seal(fd: int) -> None:
    """From now on nobody can change that memfd (F_ADD_SEALS). Raises OSError."""
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)


def sealed_memfd(name: str, data: bytes) -> int:
    """A memfd with `data` that nobody can change any more (memfd_create(2), F_SEAL_WRITE). The caller owns it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_all(fd, data)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
