"""Where memory comes from and when it goes back: mmap(2), set_mempolicy(2), and glibc's malloc. Refuses policy; with
other C libraries the last has no effect.

See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc, check, syscall

# linux/mman.h
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
_PRIVATE_ANONYMOUS_POPULATED = 0x02 | 0x20 | 0x8000
MAP_FAILED = ctypes.c_void_p(-1).value

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
    copy = _mmap(None, size, PROT_READ | PROT_WRITE, _PRIVATE_ANONYMOUS_POPULATED, -1, 0)
    if copy == MAP_FAILED:
        raise KernelError(ctypes.get_errno(), "mmap", f"{size} bytes")
    _memmove(copy, source, size)
    if protection != PROT_READ | PROT_WRITE:
        check(_mprotect(copy, size, protection), "mprotect", f"{size} bytes")
    return int(copy)


_mmap, _mprotect, _memmove = _libc.mmap, _libc.mprotect, _libc.memmove
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_memmove.restype = None
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
