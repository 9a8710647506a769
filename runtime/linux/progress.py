"""A page shared with a forked child, in which it leaves how far it came: readable also when it died without a word.

Refuses more than one small number. Invariant: unmapped by execve, so nothing of it reaches a container.
"""

from __future__ import annotations

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc

_SIZE = 4096
_READ_WRITE, _SHARED_ANONYMOUS = 1 | 2, 0x01 | 0x20  # linux/mman.h
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class Progress:
    """One number from 0 to 255. (The module mmap is a library of its own, and loading one costs more than all this.)"""

    def __init__(self) -> None:
        self._page = _mmap(None, _SIZE, _READ_WRITE, _SHARED_ANONYMOUS, -1, 0)
        if self._page == _FAILED:
            raise KernelError(ctypes.get_errno(), "mmap", f"{_SIZE} bytes")
        self._number = ctypes.c_ubyte.from_address(self._page)

    def at(self, number: int) -> None:
        """Notes that `number` has been reached."""
        self._number.value = number

    def reached(self) -> int:
        """What was noted last."""
        return self._number.value

    def close(self) -> None:
        page, self._page = self._page, None
        if page is not None:
            self._number = ctypes.c_ubyte(self._number.value)  # what is asked for later is not read from there
            _munmap(page, _SIZE)
