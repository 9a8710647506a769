"""Owner, mode, xattrs and times: what a directory or file looks like, and which xattrs a layer may set.

It refuses overlayfs's own xattrs and the labels of security modules. Invariant: everything is set through an fd.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_KEPT_XATTRS = (b"user.", b"trusted.")
_KEPT_NAMES = frozenset({b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"})
_DROPPED_XATTRS = (b"trusted.overlay.", b"trusted.ocid.")


class Metadata:
    """What a directory gets once everything is in it."""

    __slots__ = ("mode", "uid", "gid", "mtime", "xattrs")

    def __init__(self, mode: int, uid: int, gid: int, mtime: int, xattrs: dict[bytes, bytes] | None) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.xattrs = xattrs


def kept_xattrs(xattrs: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Those that a layer may set: file capabilities, ACLs, user.* and trusted.*, but never overlayfs's own, which
    would make it look elsewhere; labels of security modules are the node's to give."""
    for name, value in xattrs.items():
        if name in _KEPT_NAMES or (name.startswith(_KEPT_XATTRS) and not name.startswith(_DROPPED_XATTRS)):
            yield name, value


def apply_metadata(fd: int, metadata: Metadata) -> None:
    """Sets what `metadata` says on the directory `fd`."""
    os.fchown(fd, metadata.uid, metadata.gid)
    os.fchmod(fd, metadata.mode)
    for key, value in (metadata.xattrs or {}).items():
        os.setxattr(fd, key, value)
    os.utime(fd, ns=(metadata.mtime, metadata.mtime))


def copy_looks(source: int, target: int, status: os.stat_result) -> None:
    """Owner, mode, xattrs and times of `source` for `target`."""
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    xattrs = {os.fsencode(name): os.getxattr(source, name) for name in os.listxattr(source)}
    for name, value in kept_xattrs(xattrs):
        os.setxattr(target, name, value)
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
