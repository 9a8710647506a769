"""What a chain of layers shows, read without mounting it: overlayfs's rules over directory fds.

It refuses to write, and to let the kernel follow a link inside a layer. Invariant: a path is looked up one directory
at a time in just those layers in which the directory above is part of the merged one, so whiteouts, opaque directories
and files in the way hide what overlayfs would hide (overlayfs.rst, "Merged directories").
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.linux.files import fd_path, open_beneath
from runtime.linux.libc import KernelError
from snapshotter.tree import OPAQUE, is_whiteout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_LINKS, _MAX_PARTS = 40, 2048
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_MEMO = 100_000


class Found:
    """An object of the merged tree: which layer it comes from (0: the topmost) and its lstat."""

    __slots__ = ("layer", "status")

    def __init__(self, layer: int, status: os.stat_result) -> None:
        self.layer = layer
        self.status = status


class Merged:
    """`roots` are fds of the layers' directories, topmost first; the caller keeps them open."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self._memo: dict[bytes, tuple[int, ...]] = {b"": tuple(range(len(roots)))}

    def directories(self, path: bytes) -> tuple[int, ...]:
        """The layers, topmost first, that together make the directory `path`; empty where it is none."""
        at, layers = 0, self._memo[b""]
        while path and layers:
            cut = path.find(b"/", at)
            prefix = path if cut < 0 else path[:cut]
            known = self._memo.get(prefix)
            if known is None:
                known = self._narrow(layers, prefix)
                if len(self._memo) >= _MEMO:
                    self._memo = {b"": self._memo[b""]}
                self._memo[prefix] = known
            layers = known
            if cut < 0:
                break
            at = cut + 1
        return layers

    def _narrow(self, above: tuple[int, ...], path: bytes) -> tuple[int, ...]:
        """Of the layers that make the directory above `path`, those that make `path`."""
        layers = []
        for layer in above:
            status = self._lstat(layer, path)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode):
                break
            layers.append(layer)
            if self._is_opaque(layer, path):
                break
        return tuple(layers)

    def look_up(self, path: bytes, *, below: int = 0) -> Found | None:
        """The object at `path`, no link followed; `below` leaves out the layers above that one."""
        if not path:
            return Found(below, os.fstat(self._roots[below])) if below < len(self._roots) else None
        for layer in self.directories(path.rpartition(b"/")[0]):
            if layer < below:
                continue
            status = self._lstat(layer, path)
            if status is not None:
                return None if is_whiteout(status) else Found(layer, status)
        return None

    def below(self, path: bytes) -> Found | None:
        """What the topmost layer's directory `path` would show of the layers below: nothing when it is opaque."""
        if len(self._roots) < 2 or (path and self._is_opaque(0, path)):
            return None
        return self.look_up(path, below=1)

    def open(self, layer: int, path: bytes, flags: int) -> int:
        """An fd of `path` in one layer, through no link."""
        return open_beneath(self._roots[layer], path or b".", flags)

    def resolve(self, path: bytes) -> bytes:
        """Where `path` leads when links are followed, as in a process chrooted here; the last part, and what comes
        after a missing one, need not exist. Raises KernelError (ELOOP)."""
        todo = path.split(b"/")[::-1]
        real: list[bytes] = []
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                real = real[:-1]
                continue
            where = b"/".join([*real, part])
            found = self.look_up(where)
            if found is None or not stat.S_ISLNK(found.status.st_mode):
                real.append(part)
                continue
            links += 1
            target = self.read_link(found.layer, where)
            if links > _MAX_LINKS or len(todo) + len(real) > _MAX_PARTS:
                raise KernelError(errno.ELOOP, "resolve", path)
            todo += target.split(b"/")[::-1]
            if target.startswith(b"/"):
                real = []
        return b"/".join(real)

    def read_link(self, layer: int, path: bytes) -> bytes:
        """A link's target."""
        fd = self._link_fd(layer, path)
        try:
            return os.readlink(b"", dir_fd=fd)  # readlinkat(2): an empty path means the O_PATH fd's own link
        finally:
            os.close(fd)

    def _link_fd(self, layer: int, path: bytes) -> int:
        # RESOLVE_NO_SYMLINKS refuses a trailing link unless O_PATH|O_NOFOLLOW is given (openat2(2)).
        return open_beneath(self._roots[layer], path, os.O_PATH | os.O_NOFOLLOW)

    def _lstat(self, layer: int, path: bytes) -> os.stat_result | None:
        try:
            fd = self._link_fd(layer, path)
        except KernelError as error:
            if error.errno in _ABSENT:
                return None
            raise
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _is_opaque(self, layer: int, path: bytes) -> bool:
        fd = self.open(layer, path, os.O_PATH | os.O_DIRECTORY)
        try:
            return os.getxattr(fd_path(fd), OPAQUE) == b"y"
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return False
            raise
        finally:
            os.close(fd)
