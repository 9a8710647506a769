"""Where memory comes from and when it goes back: set_mempolicy(2), and glibc's malloc. Refuses policy; with other C
libraries the latter has no effect.

See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

from runtime.linux.libc import _libc, syscall

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
