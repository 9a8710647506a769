"""An overlay mount by mount(2), for kernels whose fsconfig(2) knows no lowerdir+ (before Linux 6.5).

fsconfig(2) takes at most 255 bytes of value, and mount(2) one page for all options; so the directories are opened and
named by their fds, which are short: some 200 layers fit. Refuses to leave anything mounted. Invariant: what comes back
is a detached mount as FsMount.make() gives it, and the caller's mount table is as before.
"""

from __future__ import annotations

import errno
import os
import re

from runtime.linux.files import fd_path
from runtime.linux.libc import KernelError
from runtime.linux.mount import MNT_DETACH, FsMount, mount, open_tree, umount2

# sysconf(_SC_PAGESIZE) minus the ending NUL, for the smallest page there is.
_MAX_DATA = 4095
_DIRECTORIES = ("lowerdir", "upperdir", "workdir")


def make_joined(what: FsMount) -> int:
    """Mounts `what`, an overlay with one joined `lowerdir`, for a moment on the directory that holds its upperdir (or,
    without one, on its first lower one), and takes it off again; an fd the caller owns. Call it where that moment hurts
    nobody: in a private mount namespace. Raises KernelError (E2BIG: too many layers for this kernel)."""
    values = dict(what.options)
    first = re.split(r"(?<!\\):", values.get("lowerdir") or "")[0]
    place = os.path.dirname(values.get("upperdir") or "") or re.sub(r"\\(.)", r"\1", first)
    fds: list[int] = []
    words: list[str] = []
    try:
        for key, value in what.options:
            if value is None:
                words.append(key)
            elif key in _DIRECTORIES:
                paths = [re.sub(r"\\(.)", r"\1", path) for path in re.split(r"(?<!\\):", value)] \
                    if key == "lowerdir" else [value]  # fmt: skip
                for path in paths:
                    fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                words.append(f"{key}={':'.join(fd_path(fd) for fd in fds[-len(paths) :])}")
            else:
                words.append(f"{key}={value}")
        data = ",".join(words)
        if len(data) > _MAX_DATA:
            raise KernelError(errno.E2BIG, f"mount overlay of {len(fds)} directories on", place)
        mount(what.source, place, what.fstype, 0, data)
        try:
            return open_tree(-100, place)
        finally:
            umount2(place, MNT_DETACH)
    finally:
        for fd in fds:
            os.close(fd)
