"""A checkpoint as one file: a tar of criu's images, the writable layer, and what they are of.

    config.dump          who it was: id, name, image, runtime, times        (names as the peers' tools read them)
    spec.dump            config.json
    checkpoint/…         criu's images; dump.log beside them
    rootfs-diff.tar      the writable layer, as a layer's tar

Of a pod: pod.dump, and the same below containers/NAME/. Refuses to replace a file, and to write more than it may.
Invariant: the file has its name only once it is whole and on disk; before that it has none, so a kill leaves nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cri.errors import AlreadyExists, InvalidArgument, LimitExceeded
from runtime.linux.files import fd_path
from snapshotter.tar_out import DIRECTORY, Item, TarOut

_MODE = 0o600
# What the archive of a pod is called in the directory that a kubelet has made for it.
POD_FILE = "pod.tar"


def check_output(field: str, text: str) -> Path:
    """The path of a new archive of a pod: in the empty directory that a request names, as the CRI has it, or of a file
    in one. Raises InvalidArgument, AlreadyExists."""
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts or "\0" in text or path.is_symlink() or not path.is_dir():
        return check_target(field, text)
    if os.listdir(path):
        raise InvalidArgument(f"{field}: {text[:200]} is not empty")
    return path / POD_FILE


def check_target(field: str, text: str) -> Path:
    """The path that a request names for a new archive. Raises InvalidArgument, AlreadyExists."""
    path = Path(text)
    if not text or not path.is_absolute() or "\0" in text or ".." in path.parts or not path.name:
        raise InvalidArgument(f"{field}: {text[:200]!r} is no absolute path of a file")
    if not path.parent.is_dir():
        raise InvalidArgument(f"{field}: {str(path.parent)[:200]} is no directory")
    if os.path.lexists(path):
        raise AlreadyExists(f"{field}: {text[:200]} is there already; it is not replaced")
    return path


def write(source: Path, target: Path, most: int, check: Callable[[], object] = lambda: None) -> None:
    """All that is in the directory `source` becomes the archive `target`, unless `check` raises meanwhile. Raises
    CriError, OSError."""
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, _MODE, dir_fd=directory)
        try:
            _fill(TarOut(fd, check), source, most)
            os.fsync(fd)
            check()
            os.link(fd_path(fd), target.name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            raise AlreadyExists(f"{target} has come to be meanwhile; it is not replaced") from None
        finally:
            os.close(fd)
        os.fsync(directory)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise OSError(error.errno, f"{target.parent}: its filesystem makes no unnamed files") from error
        raise
    finally:
        os.close(directory)


def _fill(archive: TarOut, source: Path, most: int) -> None:
    """Nobody but us and criu has made files there, all below a directory that only root can enter."""
    total = 0
    for top, directories, files in os.walk(source):
        directories.sort()
        inside = os.path.relpath(top, source)
        prefix = b"" if inside == "." else os.fsencode(inside) + b"/"
        if prefix:
            archive.add(Item(prefix, DIRECTORY, mode=0o700))
        for name in sorted(files):
            fd = os.open(f"{top}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    continue
                total += status.st_size
                if total > most:
                    raise LimitExceeded(f"the checkpoint is larger than {most} bytes (checkpoint.archive_bytes)")
                item = Item(prefix + os.fsencode(name), size=status.st_size, mode=_MODE, mtime_ns=status.st_mtime_ns)
                archive.add_file(item, fd)
            finally:
                os.close(fd)
    archive.end()
