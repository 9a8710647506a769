"""tmpcopyup: what a directory of the image holds is copied into the tmpfs that is about to cover it.

The tree is hostile: it is walked through fds, follows no link, opens no device, FIFO or socket, enters no other mount,
and copies no hole, so that a sparse file costs nothing. Refuses a path of more than PATH_MAX bytes (the kernel does).
Invariant: everything is written into a detached tmpfs that nobody else can reach; its own limits bound what is copied.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.errors import RuntimeFailure
from runtime.linux.files import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    fd_path,
    openat2,
)
from runtime.linux.libc import KernelError

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def copy_up(source: int, target: int, *, keep_owner: bool) -> None:
    """Copies below the directory `source` into the root of the detached mount `target`: contents, links, nodes, modes,
    owners and times; not extended attributes, as in the peers. `keep_owner`: the root of the tmpfs has its own."""
    # Paths, not fds, are what waits: depth and width of the tree are the image's choice, the number of fds is not.
    pending = [""]
    while pending:
        path = pending.pop()
        try:
            _copy_directory(source, target, path, pending, keep_owner=keep_owner and not path)
        except OSError as error:
            raise RuntimeFailure.of(error, what=f"tmpcopyup: failed to copy /{path}") from None


def _copy_directory(source: int, target: int, path: str, pending: list[str], *, keep_owner: bool) -> None:
    here = openat2(source, path or ".", _DIRECTORY, 0, _RESOLVE)
    try:
        there = openat2(target, path or ".", _DIRECTORY, 0, _RESOLVE)
        try:
            for name in sorted(os.listdir(here)):
                if _copy_entry(here, there, name):
                    pending.append(f"{path}/{name}" if path else name)
            status = os.fstat(here)
            if not keep_owner:
                os.fchown(there, status.st_uid, status.st_gid)
            if path:  # the root's mode is the mount's option
                os.fchmod(there, stat.S_IMODE(status.st_mode))
            os.utime(there, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(there)
    finally:
        os.close(here)


def _copy_entry(here: int, there: int, name: str) -> bool:
    """Makes `name` in `there`; True for a directory, which is still empty then."""
    try:
        fd = openat2(here, name, os.O_PATH | os.O_NOFOLLOW, 0, _RESOLVE)
    except KernelError as error:
        if error.errno == errno.EXDEV:
            return _mounted_over(here, there, name)
        if error.errno == errno.ENOENT:
            return False  # gone meanwhile
        raise
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=there)
            return True
        if stat.S_ISREG(status.st_mode):
            _copy_file(fd, there, name)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink("", dir_fd=fd), name, dir_fd=there)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=there)
    finally:
        os.close(fd)
    # `there` is out of anybody's reach, so a name in it is what was made just now.
    os.chown(name, status.st_uid, status.st_gid, dir_fd=there, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=there)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=there, follow_symlinks=False)
    return False


def _mounted_over(here: int, there: int, name: str) -> bool:
    """Something that an earlier entry mounted there is not the image's: of a directory its place remains."""
    if stat.S_ISDIR(os.stat(name, dir_fd=here, follow_symlinks=False).st_mode):
        os.mkdir(name, 0o755, dir_fd=there)
    return False


def _copy_file(fd: int, there: int, name: str) -> None:
    # By way of the fd that was looked at: whatever the name leads to now, this is that regular file.
    source = os.open(fd_path(fd), os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=there)
        try:
            size = os.fstat(source).st_size
            os.ftruncate(target, size)
            end = 0
            while (begin := _next_data(source, end)) < size:
                end = min(os.lseek(source, begin, os.SEEK_HOLE), size)
                _copy_range(source, target, begin, end)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _next_data(fd: int, offset: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return 1 << 63  # nothing but a hole from here on
        raise


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    os.lseek(target, begin, os.SEEK_SET)
    while begin < end:
        copied = os.sendfile(target, source, begin, min(end - begin, 1 << 24))
        if copied == 0:
            return  # cut off meanwhile
        begin += copied
