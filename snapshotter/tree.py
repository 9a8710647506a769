"""The directories of a layer that is being made: how a path of the tar becomes a directory fd.

It refuses to let the kernel resolve a link: a path is opened beneath the layer's root without links, and where there
is one it is read and walked here, clamped at the root, as a process chrooted into the layer would see it. Invariant:
a cached fd is the directory its path names; whoever removes a directory or a link calls `forget` first, so nothing
is resolved by a name that has changed meaning (threats S38, R10).
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.linux.files import open_beneath
from runtime.linux.libc import KernelError
from snapshotter.model import Limits, UnpackError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

OPAQUE = "trusted.overlay.opaque"
WHITEOUT_PREFIX = b".wh."
META_PREFIX = b".wh..wh."
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # as the kernel's MAXSYMLINKS
_CACHED = 128
_RETRY_BY_HAND = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


class Ignored(Exception):
    """The path is AUFS bookkeeping (".wh..wh.…"): the entry is to be left out, as everybody does."""


def clean(path: bytes, limits: Limits) -> bytes:
    """`path` in its shortest form, relative to the root, b"" being the root: absolute is made relative, `..` is
    resolved as text (image-spec layer.md speaks of paths, and Go cleans them so). Raises UnpackError, Ignored."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not parts:
                raise UnpackError(f"tar entry {path!r} leaves the root")
            parts.pop()
        else:
            if part.startswith(WHITEOUT_PREFIX):
                if part.startswith(META_PREFIX):
                    raise Ignored
                raise UnpackError(f"tar entry {path!r}: a name that begins with .wh. is no directory")
            parts.append(part)
    if len(parts) > limits.depth:
        raise UnpackError(f"tar entry {path[:60]!r}…: deeper than {limits.depth} directories (limit depth)")
    return b"/".join(parts)


def is_whiteout(status: os.stat_result) -> bool:
    """overlayfs's mark for "nothing here": a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class Tree:
    """Directory fds of one layer. `aliases` maps directories that are links in the parent chain to where those lead:
    an implied directory is then not made but followed. `implied` lists those that were made without an entry."""

    def __init__(self, root_fd: int, limits: Limits, aliases: Mapping[bytes, bytes]) -> None:
        self.root_fd = root_fd
        self.limits = limits
        self.implied: dict[bytes, None] = {}
        self.pending_bytes = 0
        self.made = 0
        self._aliases = aliases
        self._cache: dict[bytes, tuple[int, bytes]] = {}
        self._stale: list[int] = []

    def directory(self, path: bytes) -> tuple[int, bytes]:
        """The fd (borrowed until the next call) and real path of directory `path`, made where missing.
        Raises UnpackError, OSError."""
        found = self._cache.get(path) or self._look_up(path, make=True)
        assert found is not None
        return found

    def existing(self, path: bytes) -> tuple[int, bytes] | None:
        """As `directory`, but None where there is none in this layer."""
        return self._cache.get(path) or self._look_up(path, make=False)

    def forget(self) -> None:
        """Empties the cache: a directory or a link is about to go, and paths through it with it. The fds close with
        the next look-up, as borrowed ones are good until then."""
        self._stale += [fd for fd, _ in self._cache.values()]
        self._cache.clear()

    def close(self) -> None:
        """Closes what is open."""
        self.forget()
        self._close_stale()

    def _close_stale(self) -> None:
        for fd in self._stale:
            os.close(fd)
        self._stale.clear()

    def add_pending(self, path: bytes) -> None:
        """Counts a path that the commit will have to look at."""
        self.pending_bytes += len(path) + 16
        if self.pending_bytes > self.limits.pending_bytes:
            raise UnpackError(
                f"tar: paths that depend on lower layers take more than {self.limits.pending_bytes} "
                "bytes (limit pending_bytes)"
            )

    def _look_up(self, path: bytes, make: bool) -> tuple[int, bytes] | None:
        self._close_stale()
        real = clean(path, self.limits)
        plain = True
        try:
            fd = open_beneath(self.root_fd, real or b".", os.O_RDONLY | os.O_DIRECTORY)
        except KernelError as error:
            if error.errno not in _RETRY_BY_HAND:
                raise
            walked = self._walk(real, make)
            if walked is None:
                return None
            fd, walked_path = walked
            plain, real = walked_path == real, walked_path
        if len(self._cache) >= _CACHED:
            os.close(self._cache.pop(next(iter(self._cache)))[0])
        # A path that went through a link or an alias is kept under a key no tar path can have, only to be closed:
        # what it means may change without a directory being removed.
        self._cache[path if plain else b"\0" + real + b"\0" + os.urandom(8)] = (fd, real)
        return fd, real

    def _walk(self, path: bytes, make: bool) -> tuple[int, bytes] | None:
        """One component at a time, links and aliases by hand."""
        todo = path.split(b"/")[::-1]
        real: list[bytes] = []
        links = 0
        here = os.open(".", _OPEN, dir_fd=self.root_fd)
        try:
            while todo:
                part = todo.pop()
                if part in (b"", b"."):
                    continue
                if part == b"..":  # out of a link's target; above the root is the root
                    real = real[:-1]
                    here = self._replace(here, open_beneath(self.root_fd, b"/".join(real) or b".", _OPEN))
                    continue
                if len(real) >= self.limits.depth:
                    raise UnpackError(
                        f"tar entry {path[:60]!r}…: deeper than {self.limits.depth} directories (limit depth)"
                    )
                where = b"/".join([*real, part])
                try:
                    here = self._replace(here, os.open(part, _OPEN, dir_fd=here))
                    real.append(part)
                    continue
                except FileNotFoundError:
                    target = self._aliases.get(where)
                    if target is None and not make:
                        os.close(here)
                        here = -1
                        return None
                    absolute = True
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                    target = self._link(here, part)
                    absolute = target is not None and target.startswith(b"/")
                if target is None:
                    self._make(here, part, where, path)
                    todo.append(part)
                    continue
                links += 1
                todo += target.split(b"/")[::-1]
                if links > _MAX_LINKS or len(todo) > 2 * self.limits.depth:
                    raise UnpackError(f"tar entry below {path!r}: too many links")
                if absolute:
                    real = []
                    here = self._replace(here, os.open(".", _OPEN, dir_fd=self.root_fd))
        except BaseException:
            if here >= 0:
                os.close(here)
            raise
        return here, b"/".join(real)

    @staticmethod
    def _replace(old: int, new: int) -> int:
        os.close(old)
        return new

    @staticmethod
    def _link(parent: int, name: bytes) -> bytes | None:
        """The target of a symlink; None where `name` is something else."""
        try:
            return os.readlink(name, dir_fd=parent)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None
            raise

    def _make(self, parent: int, name: bytes, where: bytes, path: bytes) -> None:
        """An implied directory. Over a whiteout it hides what was below, so it is opaque."""
        hides = False
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not is_whiteout(os.stat(name, dir_fd=parent, follow_symlinks=False)):
                raise UnpackError(f"tar entry below {path!r}: {where!r} is no directory") from None
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o700, dir_fd=parent)
            hides = True
        self.made += 1
        if hides:
            set_opaque(parent, name)
        if where not in self.implied:
            self.implied[where] = None
            self.add_pending(where)


def set_opaque(parent: int, name: bytes) -> None:
    """Marks the directory `name`: overlayfs shows nothing of it from below."""
    fd = os.open(name, _OPEN, dir_fd=parent)
    try:
        os.setxattr(fd, OPAQUE, b"y")
    finally:
        os.close(fd)
