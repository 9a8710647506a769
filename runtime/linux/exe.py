"""What /proc/self/exe of this process leads to, changed without an execve: prctl(PR_SET_MM, PR_SET_MM_MAP).

Only for a process that was started through the dynamic loader (`ld.so PROGRAM …`), or by the launcher of a dump: the
kernel lets go of the old file once nothing of it is mapped. A launcher is a page that has been left for good; the
loader is a few pages, and its data does not change while nothing is loaded or bound.
Of a program with an interpreter in it the same copy would lose what is written while it is made. Refuses everything
else. Invariant: on failure the process goes on as it was; each mapping is replaced by an equal one in one step.
"""

from __future__ import annotations

import errno
import os
import struct

from runtime.linux import dumped
from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc, address, prctl
from runtime.linux.memory import MAP_FAILED, PROT_EXEC, PROT_READ, PROT_WRITE, map_copy

# linux/prctl.h, linux/mman.h
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_PROT = {"r": PROT_READ, "w": PROT_WRITE, "x": PROT_EXEC}
_MAYMOVE_FIXED = 1 | 2
# The loader is some 200 KiB; what is larger than this is none.
_MOST_BYTES = 2 << 20


def is_loader(path: str) -> bool:
    """True for the name of a dynamic loader (ld.so(8)) of the C libraries there are."""
    return os.path.basename(path).startswith(("ld-linux", "ld64.so", "ld-musl", "ld.so"))


def set_exe_file(fd: int) -> None:
    """Makes /proc/self/exe lead to the regular, executable file `fd`, which stays the caller's.

    Raises KernelError: EOPNOTSUPP when this process was started in neither of these ways, EPERM without
    CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, EINVAL from a kernel without CONFIG_CHECKPOINT_RESTORE."""
    path = os.readlink("/proc/self/exe")
    found = _mappings(path) if dumped.is_resumed or is_loader(path) else []
    if not found or sum(size for _, size, _ in found) > _MOST_BYTES:
        raise KernelError(errno.EOPNOTSUPP, "replace the exe file", path)
    # In the order of their addresses: the writable one is the last, when every function needed has been called before.
    for start, size, protection in found:
        _replace(start, size, protection)
    layout = _layout(fd)
    prctl(_PR_SET_MM, _PR_SET_MM_MAP, address(layout), len(layout))


def _mappings(path: str) -> list[tuple[int, int, int]]:
    """(start, size, protection) of each mapping of `path`, from proc_pid_maps(5)."""
    found = []
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            fields = line.rstrip(b"\n").split(maxsplit=5)
            if len(fields) == 6 and os.fsdecode(fields[5]) == path:
                start, end = (int(number, 16) for number in fields[0].split(b"-"))
                protection = sum(bit for letter, bit in _PROT.items() if letter in fields[1].decode())
                found.append((start, end - start, protection))
    return found


def _replace(start: int, size: int, protection: int) -> None:
    """An anonymous copy takes the place of the mapping, in one step."""
    copy = map_copy(start, size, protection)
    if _mremap(copy, size, size, _MAYMOVE_FIXED, start) == MAP_FAILED:
        raise KernelError(ctypes.get_errno(), "mremap", f"{size} bytes")


def _layout(fd: int) -> bytes:
    """struct prctl_mm_map of linux/prctl.h: what proc_pid_stat(5) says of this process, but for the exe file."""
    with open("/proc/self/stat", "rb") as file:
        stat = file.read()
    fields = stat[stat.rindex(b")") + 2 :].split()
    code, data, arguments, environment, start_brk, stack = (
        [int(fields[number - 3]) for number in numbers]
        for numbers in ((26, 27), (45, 46), (48, 49), (50, 51), (47,), (28,))
    )
    now = _sbrk(0) or 0
    return struct.pack("<12QII", *code, *data, *start_brk, now, *stack, *arguments, *environment, 0, 0, fd)


_mremap, _sbrk = _libc.mremap, _libc.sbrk
_mremap.restype = _sbrk.restype = ctypes.c_void_p
_mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_sbrk.argtypes = (ctypes.c_long,)
