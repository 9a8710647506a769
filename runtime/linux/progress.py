"""How far something came, and when: a page shared with a forked child, and the phases of this process.

The page is readable also when the child died without a word. Phases are for who traces a request: until `begin` they
cost a look at one variable. Refuses more than small numbers and names. Invariant: the page is unmapped by execve, so
nothing of it reaches a container.
"""

from __future__ import annotations

import time

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    # Name, the phase that it is a part of or "", begin and end in ns since the epoch.
    Phase = tuple[str, str, int, int]

_SIZE = 4096
_STAMPS = 8  # where they begin in the page
_READ_WRITE, _SHARED_ANONYMOUS = 1 | 2, 0x01 | 0x20  # linux/mman.h
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value

_marks: list[tuple[str, int]] | None = None
_parts: list[Phase] = []


def begin() -> None:
    """From now on this process keeps its phases, and none of before."""
    global _marks
    _marks = []
    _parts.clear()


def end() -> None:
    """From now on it does not."""
    global _marks
    _marks = None
    _parts.clear()


def kept() -> bool:
    """Whether it does."""
    return _marks is not None


def phase(name: str) -> str:
    """The phase `name` begins, and with it the one before ends. Returns `name`."""
    if _marks is not None:
        _marks.append((name, time.time_ns()))
    return name


def phases() -> list[Phase]:
    """All that `begin` made this process keep, up to now; nothing without it."""
    if not _marks:
        return []
    ends = [stamp for _, stamp in _marks[1:]] + [time.time_ns()]
    return [(name, "", since, end) for (name, since), end in zip(_marks, ends, strict=True)] + _parts


class Progress:
    """One number from 0 to 255, and, where phases are kept, when each was reached. (The module mmap is a library of its
    own, and loading one costs more than all this.)"""

    def __init__(self) -> None:
        self._page = _mmap(None, _SIZE, _READ_WRITE, _SHARED_ANONYMOUS, -1, 0)
        if self._page == _FAILED:
            raise KernelError(ctypes.get_errno(), "mmap", f"{_SIZE} bytes")
        self._number = ctypes.c_ubyte.from_address(self._page)
        self._timed = _marks is not None

    def at(self, number: int) -> None:
        """Notes that `number` has been reached."""
        self._number.value = number
        if self._timed:
            self._stamp(number).value = time.time_ns()

    def reached(self) -> int:
        """What was noted last."""
        return self._number.value

    def keep_as_parts(self, of: str, names: Sequence[str]) -> None:
        """Makes the numbers that were reached, `names` in their order, parts of the phase `of`."""
        if not self._timed:
            return
        stamps = [self._stamp(number).value for number in range(len(names) + 1)]
        reached = [number for number, stamp in enumerate(stamps) if stamp]
        for number, after in zip(reached, reached[1:], strict=False):
            _parts.append((names[number], of, stamps[number], stamps[after]))

    def _stamp(self, number: int) -> ctypes.c_uint64:
        assert self._page is not None
        return ctypes.c_uint64.from_address(self._page + _STAMPS + 8 * number)

    def close(self) -> None:
        page, self._page = self._page, None
        if page is not None:
            self._number = ctypes.c_ubyte(self._number.value)  # what is asked for later is not read from there
            self._timed = False
            _munmap(page, _SIZE)
