"""Directories and files of a cgroup hierarchy: made, opened, read, written and removed through directory fds.

Refuses to write to anything that is not a cgroup filesystem (threats R2): the top of each hierarchy is checked with
fstatfs(2), and from there no step crosses a mount or follows a link. Invariant: what fails half-way is taken back.
"""

from __future__ import annotations

import errno
import os
import time

from runtime.errors import RuntimeFailure
from runtime.linux.files import (
    CGROUP2_SUPER_MAGIC,
    CGROUP_SUPER_MAGIC,
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    fstatfs_type,
    openat2,
)
from runtime.linux.libc import KernelError

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from runtime.cgroups.hierarchy import Hierarchy, Place

    Verify = Callable[[int, Hierarchy], None]

_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_LONGEST_FILE = 1 << 20
_RACES = 20


def verify_cgroup(fd: int, hierarchy: Hierarchy) -> None:
    """Raises RuntimeFailure unless `fd` is on a cgroup filesystem of the version that `hierarchy` says."""
    if fstatfs_type(fd) != (CGROUP_SUPER_MAGIC if hierarchy.version == 1 else CGROUP2_SUPER_MAGIC):
        raise RuntimeFailure(
            f"open cgroup hierarchy {hierarchy.mount}: it is no cgroup v{hierarchy.version} filesystem", step="cgroup"
        )


def open_top(hierarchy: Hierarchy, verify: Verify) -> int:
    """The mount point of a hierarchy, checked; the caller owns the fd."""
    fd = os.open(hierarchy.mount, _DIRECTORY | os.O_CLOEXEC)
    try:
        verify(fd, hierarchy)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_place(place: Place, verify: Verify) -> int:
    """The directory of a place as an O_PATH fd that the caller owns. Raises KernelError (ENOENT when there is none)."""
    return _open_below(place, place.relative, _DIRECTORY, verify)


def open_to_write(place: Place, file: str, verify: Verify) -> int:
    """A file of a place's directory; the caller owns the fd. Raises KernelError (ENOENT when there is none)."""
    return _open_below(place, f"{place.relative}/{file}", os.O_WRONLY, verify)


def _open_below(place: Place, path: str, flags: int, verify: Verify) -> int:
    top = open_top(place.hierarchy, verify)
    try:
        return openat2(top, path, flags, 0, _BENEATH)
    finally:
        os.close(top)


def make_place(place: Place, verify: Verify, each: Callable[[int, int], None] | None = None) -> tuple[int, list[str]]:
    """Makes the directory of a place with its parents: (O_PATH fd that the caller owns, what was made, top first).

    `each` is called with the fds of parent and child at every level, and may prepare either. On failure nothing that
    was made here is left. Whoever takes back a parent that it made may take it from under us: then we start again.
    """
    for _ in range(_RACES):
        try:
            return _make_place(place, verify, each)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    return _make_place(place, verify, each)


def _make_place(place: Place, verify: Verify, each: Callable[[int, int], None] | None) -> tuple[int, list[str]]:
    made: list[str] = []
    current = open_top(place.hierarchy, verify)
    walked = place.hierarchy.mount
    try:
        for part in place.relative.split("/"):
            walked = f"{walked}/{part}"
            try:
                os.mkdir(part, 0o755, dir_fd=current)
                made.append(walked)
            except FileExistsError:
                pass
            child = openat2(current, part, _DIRECTORY, 0, _BENEATH)
            try:
                if each is not None:
                    each(current, child)
            except BaseException:
                os.close(child)
                raise
            os.close(current)
            current = child
    except BaseException:
        os.close(current)
        unmake(made)
        raise
    return current, made


def unmake(made: Iterable[str]) -> None:
    """Removes directories that were just made, deepest first; one that somebody else has begun to use stays."""
    for path in reversed(list(made)):
        try:
            os.rmdir(path)
        except OSError:
            pass


def read_at(dir_fd: int, file: str) -> str:
    """The content of a cgroup file. Raises OSError, and EFBIG rather than read without end."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        pieces, size = [], 0
        while piece := os.read(fd, 65536):
            pieces.append(piece)
            size += len(piece)
            if size > _LONGEST_FILE:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), file)
        return b"".join(pieces).decode("ascii", "replace")
    finally:
        os.close(fd)


def write_at(dir_fd: int, file: str, *values: str) -> None:
    """Writes each value to a cgroup file by one write(2), as cgroupfs wants it. Raises OSError."""
    fd = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        for value in values:
            # write(2) of nothing never reaches cgroupfs: an empty value is an empty line.
            os.write(fd, value.encode() or b"\n")
    finally:
        os.close(fd)


def number_at(dir_fd: int, file: str) -> int | None:
    """A file that holds one number, -1 for "max"; None when it is not there."""
    try:
        text = read_at(dir_fd, file).strip()
    except FileNotFoundError:
        return None
    return -1 if text == "max" else int(text)


def remove_place(place: Place, verify: Verify, deadline: float, wait: Callable[[], None]) -> None:
    """Removes the directory of a place, deepest children first. A missing one is a removed one.

    rmdir(2) fails with EBUSY while a dying process is not quite gone (threats O35): tried again, with `wait` in
    between, until `deadline` (time.monotonic). Raises RuntimeFailure that names the processes in it.
    """
    top = open_top(place.hierarchy, verify)
    try:
        parent, _, name = place.relative.rpartition("/")
        try:
            above = openat2(top, parent or ".", _DIRECTORY, 0, _BENEATH)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
    finally:
        os.close(top)
    try:
        while True:
            try:
                _remove_below(above, name)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise _not_removed(place, error) from error
            wait()
    finally:
        os.close(above)


def _remove_below(parent: int, name: str) -> None:
    """rmdir(2) of `name` and the cgroups in it; files in a cgroup go with it. Children first, without recursion: how
    deep a container nests its cgroups is its own choice."""
    pending = [name]
    while pending:
        path = pending[-1]
        try:
            os.rmdir(path, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            # EBUSY is for children as well as for processes; ENOTEMPTY never comes from cgroupfs but may from others.
            children = _children(parent, path) if error.errno in (errno.EBUSY, errno.ENOTEMPTY) else []
            if not children or len(pending) > 4096:
                raise
            pending += [f"{path}/{child}" for child in children]
            continue
        pending.pop()


def _children(parent: int, path: str) -> list[str]:
    try:
        fd = openat2(parent, path, os.O_RDONLY | os.O_DIRECTORY, 0, _BENEATH)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return []
        raise
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:  # getdents(2) of a directory that is removed meanwhile
        return []
    finally:
        os.close(fd)


def _not_removed(place: Place, error: OSError) -> RuntimeFailure:
    held: list[int] = []
    try:
        held = all_pids(place.directory)
    except OSError:
        pass
    reason = f"it still holds process {', '.join(map(str, held[:10]))}" if held else "it is in use"
    if error.errno != errno.EBUSY:
        return RuntimeFailure.of(error, step="cgroup", what=f"remove cgroup {place.directory}")
    return RuntimeFailure(
        f"remove cgroup {place.directory}: EBUSY {reason}", step="cgroup", errno=errno.EBUSY, code="failed_precondition"
    )


def all_pids(directory: str, recursive: bool = True) -> list[int]:
    """The processes in a cgroup and those below it; [] when it is gone. The pids are of this PID namespace: a process
    of another one that is not below ours reads as 0 and is left out."""
    found: list[int] = []
    pending = [directory]
    while pending:
        path = pending.pop()
        try:
            fd = os.open(f"{path}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                pieces = []
                while piece := os.read(fd, 65536):
                    pieces.append(piece)
            finally:
                os.close(fd)
            # Every cgroup has "." and ".." and its children as links, and no other directories.
            if recursive and os.stat(path).st_nlink > 2:
                with os.scandir(path) as entries:
                    pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            # ENODEV: removed between open and read; EOPNOTSUPP: a threaded v2 cgroup, whose root lists its processes.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                raise
            continue
        found += [int(pid) for pid in b"".join(pieces).split() if pid != b"0"]
    return found
