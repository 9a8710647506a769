"""fs-verity (the kernel's filesystems/fsverity.rst): a file sealed by a hash tree, which every read is checked against.

Refuses to decide which files. Invariant: a file that was sealed can be removed and replaced, and never be changed; what
the disk gives otherwise is EIO, not other bytes.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from runtime.linux.libc import KernelError

# linux/fsverity.h
FS_IOC_ENABLE_VERITY, FS_IOC_MEASURE_VERITY = 0x40806685, 0xC0046686
FS_VERITY_HASH_ALG_SHA256 = 1
_BLOCK = 4096
_ARGUMENT = struct.Struct(
    "=IIIIQIIQ88x"
)  # version, algorithm, block size, salt size, salt, signature size, 0, signature
_DIGEST = struct.Struct("=HH64s")
# The kernel has it not, the filesystem has it not, or was made without it.
NOT_HERE = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS})


def enable_verity(fd: int) -> None:
    """FS_IOC_ENABLE_VERITY with SHA-256; `fd` is open for reading, and nobody has the file open for writing. Takes as
    long as hashing does. Raises KernelError (NOT_HERE; EEXIST: sealed already; ETXTBSY)."""
    try:
        fcntl.ioctl(fd, FS_IOC_ENABLE_VERITY, _ARGUMENT.pack(1, FS_VERITY_HASH_ALG_SHA256, _BLOCK, 0, 0, 0, 0, 0))
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "enable fs-verity", f"fd {fd}") from error


def measure_verity(fd: int) -> bytes | None:
    """FS_IOC_MEASURE_VERITY: the digest of the tree, None for a file that is not sealed. Raises KernelError
    (NOT_HERE)."""
    room = bytearray(_DIGEST.pack(0, 64, b""))
    try:
        fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, room)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise KernelError(error.errno or errno.EIO, "measure fs-verity", f"fd {fd}") from error
    _, size, digest = _DIGEST.unpack(room)
    return bytes(digest[:size])
