"""A writable layer as a layer's tar: what overlayfs keeps in an upper directory, in the image spec's words.

Refuses to follow links and to enter mounts: every step down is openat2 beneath a directory's fd, and content is read
from what was looked at. Invariant: a character device 0:0 becomes a whiteout, an opaque directory has one, and nothing
of overlayfs's own is in the archive. Names that begin as whiteouts do are not whiteouts, and are left out.
See the OCI image-spec, layer.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from runtime.linux.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, fd_path, openat2
from snapshotter.tar_out import BLOCK, CHARACTER, DIRECTORY, FIFO, LINK, REGULAR, SYMLINK, Item, TarOut
from snapshotter.tree import OPAQUE, WHITEOUT_PREFIX, is_whiteout

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
_MAX_DEPTH = 256  # each costs a descriptor and two frames
_KEPT_XATTRS = ("user.", "security.capability", "system.posix_acl_")
_OPAQUE_NAME = b".wh..wh..opq"


class Pack:
    """One packing of the directory `top` into `archive`."""

    def __init__(self, archive: TarOut) -> None:
        self._archive = archive
        self._linked: dict[tuple[int, int], bytes] = {}

    def run(self, top: int) -> None:
        """Everything below `top`. Raises OSError."""
        self._directory(top, b"", 0)
        self._archive.end()

    def _directory(self, fd: int, path: bytes, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise OSError(f"{os.fsdecode(path[:80])}…: more than {_MAX_DEPTH} directories deep")
        if _xattrs(fd).get(os.fsencode(OPAQUE)) == b"y":
            self._archive.add(Item(path + _OPAQUE_NAME))
        for name in sorted(os.listdir(fd)):
            raw = os.fsencode(name)
            if raw.startswith(WHITEOUT_PREFIX):
                continue
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                self._entry(fd, name, path + raw, status, depth)
            except FileNotFoundError:  # it went since it was listed
                continue

    def _entry(self, parent: int, name: str, path: bytes, status: os.stat_result, depth: int) -> None:
        if is_whiteout(status):
            head, _, last = path.rpartition(b"/")
            self._archive.add(Item((head + b"/" if head else b"") + WHITEOUT_PREFIX + last))
            return
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            first = self._linked.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                self._archive.add(_item(status, path, LINK, link=first))
                return
        if stat.S_ISDIR(status.st_mode):
            fd = openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE)
            try:
                self._archive.add(_item(os.fstat(fd), path + b"/", DIRECTORY, xattrs=_kept(fd)))
                self._directory(fd, path + b"/", depth + 1)
            finally:
                os.close(fd)
        elif stat.S_ISREG(status.st_mode):
            # Not blocking: a fifo may have taken its place.
            fd = openat2(parent, name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0, _RESOLVE)
            try:
                now = os.fstat(fd)
                if stat.S_ISREG(now.st_mode):
                    self._archive.add_file(_item(now, path, REGULAR, size=now.st_size, xattrs=_kept(fd)), fd)
            finally:
                os.close(fd)
        elif stat.S_ISLNK(status.st_mode):
            link = os.fsencode(os.readlink(name, dir_fd=parent))
            self._archive.add(_item(status, path, SYMLINK, link=link))
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
            kind = CHARACTER if stat.S_ISCHR(status.st_mode) else BLOCK
            self._archive.add(_item(status, path, kind, device=device))
        elif stat.S_ISFIFO(status.st_mode):
            self._archive.add(_item(status, path, FIFO))


def _item(status: os.stat_result, name: bytes, kind: bytes, **more: object) -> Item:
    return Item(
        name,
        kind,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        **more,  # type: ignore[arg-type]
    )


def _xattrs(fd: int) -> dict[bytes, bytes]:
    found = {}
    for key in os.listxattr(fd_path(fd)):
        try:
            found[os.fsencode(key)] = os.getxattr(fd_path(fd), key)
        except OSError:  # it went
            continue
    return found


def _kept(fd: int) -> dict[bytes, bytes]:
    return {key: value for key, value in _xattrs(fd).items() if os.fsdecode(key).startswith(_KEPT_XATTRS)}


def pack(top: int, fd: int, check: Callable[[], object] = lambda: None) -> None:
    """The directory `top`, an upper of overlayfs, as a tar at `fd`; both stay the caller's. `check` may end it by
    raising. Raises OSError."""
    Pack(TarOut(fd, check)).run(top)
