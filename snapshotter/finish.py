"""The end of a layer: what could not be said before the layers below it were there.

A directory that the tar only implies looks as in the parent chain; one that is a link there was meant through the
link, so the layer has to be unpacked again with that known; a hard link into a lower layer becomes a copy, as
overlayfs itself would make one. It refuses to write anywhere but in the layer. Invariant: everything is read through
`Merged`, and written through fds beneath the layer's root.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.linux.files import fchmodat2, fd_path, open_beneath
from runtime.linux.libc import KernelError
from snapshotter.blame import blame
from snapshotter.extract import PENDING_LINK
from snapshotter.looks import copy_looks
from snapshotter.merged import Merged
from snapshotter.model import UnpackError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_COPY_PIECE = 64 << 20


def finish(
    layer_fd: int, lowers: Sequence[str], implied: Sequence[bytes], links: Sequence[bytes]
) -> dict[bytes, bytes]:
    """Finishes the layer in `layer_fd` on top of `lowers`, topmost first. Returns {} when it is done, or the implied
    directories that are links below, with where they lead: then nothing is finished, unpack again with them as
    aliases. Raises UnpackError, OSError."""
    roots = [layer_fd]
    try:
        for path in lowers:
            roots.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        merged = Merged(roots)
        aliases = _links_below(merged, implied) if lowers else {}
        if not aliases:
            for path_ in implied:
                _adopt(merged, layer_fd, path_)
            for link in links:
                try:
                    _fill(merged, layer_fd, link)
                except OSError as error:
                    raise blame(error, link) from error
        return aliases
    finally:
        for fd in roots[1:]:
            os.close(fd)


def _links_below(merged: Merged, implied: Sequence[bytes]) -> dict[bytes, bytes]:
    aliases: dict[bytes, bytes] = {}
    for path in implied:
        if not path:
            continue
        try:
            found = merged.below(path)
        except KernelError as error:
            if error.errno in _GONE:  # replaced by a later entry
                continue
            raise
        if found is not None and stat.S_ISLNK(found.status.st_mode):
            target = merged.read_link(found.layer, path)
            above = b"" if target.startswith(b"/") else path.rpartition(b"/")[0]
            try:
                aliases[path] = merged.resolve(above + b"/" + target)
            except KernelError as error:
                raise blame(error, path) from error
    return aliases


def _adopt(merged: Merged, layer_fd: int, path: bytes) -> None:
    """Gives the implied directory `path` the looks it has below, or plain ones where it is new."""
    try:
        fd = open_beneath(layer_fd, path or b".", _DIRECTORY)
    except KernelError as error:
        if error.errno in _GONE:  # replaced by a later entry
            return
        raise
    try:
        found = merged.below(path)
        if found is None or not stat.S_ISDIR(found.status.st_mode):
            os.fchmod(fd, 0o755)
            return
        source = merged.open(found.layer, path, _DIRECTORY)
        try:
            copy_looks(source, fd, found.status)
        finally:
            os.close(source)
    finally:
        os.close(fd)


def _fill(merged: Merged, layer_fd: int, path: bytes) -> None:
    """Makes the place holder at `path` what the tar wanted a hard link to. A copy: links cannot cross layers."""
    try:
        fd = open_beneath(layer_fd, path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except KernelError as error:
        if error.errno in (*_GONE, errno.EISDIR, errno.ENXIO):  # replaced by a later entry
            return
        raise
    try:
        try:
            target = os.getxattr(fd, PENDING_LINK)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):  # replaced, or filled under another name
                return
            raise
        above, _, name = target.rpartition(b"/")
        real = merged.resolve(above)
        where = real + b"/" + name if real else name
        found = merged.look_up(where)
        if found is None or stat.S_ISDIR(found.status.st_mode) or (found.layer == 0 and where == path):
            raise UnpackError(f"tar entry {path!r}: hard link to {target!r}, which is in no layer")
        if stat.S_ISREG(found.status.st_mode):
            source = merged.open(found.layer, where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                copy_data(source, fd, found.status.st_size)
                copy_looks(source, fd, found.status)
            finally:
                os.close(source)
            os.removexattr(fd, PENDING_LINK)
            return
    finally:
        os.close(fd)
    _replace(merged, layer_fd, path, found.layer, where, found.status)


def copy_data(source: int, target: int, size: int) -> None:
    """Copies `size` bytes, holes left holes; in the kernel, shared where the filesystem can (copy_file_range(2))."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        while start < end:
            copied = os.copy_file_range(source, target, min(end - start, _COPY_PIECE), start, start)
            if copied == 0:
                raise KernelError(errno.EIO, "copy_file_range", "file shrank")
            start += copied
        at = end
    os.ftruncate(target, size)


def _replace(merged: Merged, layer_fd: int, path: bytes, layer: int, where: bytes, status: os.stat_result) -> None:
    """A link, device or FIFO in place of the place holder; the directory keeps its time."""
    head, _, name = path.rpartition(b"/")
    parent = open_beneath(layer_fd, head or b".", _DIRECTORY)
    try:
        before = os.fstat(parent)
        os.unlink(name, dir_fd=parent)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(merged.read_link(layer, where), name, dir_fd=parent)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=parent)
            fchmodat2(parent, os.fsdecode(name), stat.S_IMODE(status.st_mode))
        os.chown(name, status.st_uid, status.st_gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(status.st_mtime_ns, status.st_mtime_ns), dir_fd=parent, follow_symlinks=False)
        os.utime(fd_path(parent), ns=(before.st_mtime_ns, before.st_mtime_ns))
    finally:
        os.close(parent)
