"""glibc's malloc: when freed memory goes back to the kernel. Refuses policy; other C libraries: no effect.

See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

from runtime.linux.libc import _libc

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
