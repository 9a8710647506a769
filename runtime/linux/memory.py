"""Where memory comes from and when it goes back: mmap(2), set_mempolicy(2), and glibc's malloc. Refuses policy; with
other C libraries the last has no effect.

See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import errno

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc, check, syscall

# linux/mman.h
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_FIXED = 0x02, 0x10
_MAP_ANONYMOUS, _MAP_POPULATE = 0x20, 0x8000
MAP_FAILED = ctypes.c_void_p(-1).value
# asm-generic/mman-common.h
MADV_DONTNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 4, 22, 23

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def mallopt(parameter: int, value: int) -> bool:
    """mallopt(3); False where the C library has no such thing."""
    function = getattr(_libc, "mallopt", None)
    return bool(function is not None and function(parameter, value))


def malloc_trim() -> None:
    """malloc_trim(3): gives back whatever whole pages are free."""
    function = getattr(_libc, "malloc_trim", None)
    if function is not None:
        function(0)


def set_mempolicy(mode: int, nodes: int) -> None:
    """set_mempolicy(2) of this thread; `nodes` is a bit mask."""
    size = (nodes.bit_length() + 63) // 64 * 8
    # The kernel takes one bit less than it is told (get_nodes in mm/mempolicy.c).
    mask = nodes.to_bytes(size, "little") if size else None
    syscall("set_mempolicy", mode, mask, size * 8 + 1 if size else 0, subject=f"{mode:#x} {nodes:#x}")


def map_copy(source: bytes | int, size: int, protection: int) -> int:
    """The address of a new private mapping of `size` bytes with what is at `source`. Raises KernelError."""
    copy = _map(size, PROT_READ | PROT_WRITE, _MAP_ANONYMOUS | _MAP_POPULATE)
    _memmove(copy, source, size)
    if protection != PROT_READ | PROT_WRITE:
        check(_mprotect(copy, size, protection), "mprotect", f"{size} bytes")
    return copy


def map_room(size: int) -> int:
    """The address of `size` bytes that take no memory until they are written to. Raises KernelError."""
    return _map(size, PROT_READ | PROT_WRITE, _MAP_ANONYMOUS)


def map_file(fd: int, size: int) -> int:
    """The address of a private mapping of a file that can only be read. Raises KernelError."""
    return _map(size, PROT_READ, 0, fd)


def _map(size: int, protection: int, flags: int, fd: int = -1) -> int:
    address = _mmap(None, size, protection, MAP_PRIVATE | flags, fd, 0)
    if address is None or address == MAP_FAILED:
        raise KernelError(ctypes.get_errno(), "mmap", f"{size} bytes")
    return int(address)


def advise(address: int, size: int, advice: int) -> None:
    """madvise(2). Raises KernelError."""
    check(_madvise(address, size, advice), "madvise", f"{size} bytes")


def read_to(address: int, fd: int, size: int, offset: int) -> None:
    """pread(2) of all of `size` bytes. Raises KernelError."""
    if check(_pread(fd, address, size, offset), "pread", f"{size} bytes") != size:
        raise KernelError(errno.EIO, "pread", f"{size} bytes")


def write_to(address: int, data: bytes) -> None:
    """memmove(3)."""
    _memmove(address, data, len(data))


def thread_block() -> int:
    """An address in the block of this thread that the C library and the kernel write to: that of errno(3)."""
    location = _libc.__errno_location
    location.restype = ctypes.c_void_p
    return int(location())


_mmap, _mprotect, _memmove = _libc.mmap, _libc.mprotect, _libc.memmove
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_memmove.restype = None
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise, _pread = _libc.madvise, _libc.pread
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_pread.restype = ctypes.c_long
_pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
