"""Whose fault a failed system call is while a layer is unpacked: the entry's, or the machine's.

Refuses to guess by anything but the errno. Invariant: what says "no space" or "I/O error" is never said of an image, so
that the same pull may work later.
"""

from __future__ import annotations

import errno

from runtime.linux.libc import KernelError
from snapshotter.model import UnpackError

# What the entry is to blame for; everything else (ENOSPC, EIO, …) is the machine's.
_BAD_ENTRY = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EMLINK,
        errno.EINVAL,
        errno.ENOENT,
        errno.EFBIG,
        errno.ERANGE,
        errno.E2BIG,
    }
)


def blame(error: OSError, name: bytes) -> Exception:
    """An UnpackError where the entry is wrong, else the same errno with the entry's name (ENOSPC, EIO, …)."""
    if error.errno in _BAD_ENTRY:
        return UnpackError(f"tar entry {name[:200]!r}: {(error.strerror or str(error)).lower()}")
    return KernelError(error.errno or errno.EIO, "unpack", name[:200])
