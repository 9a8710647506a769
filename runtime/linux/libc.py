"""libc and syscall(2): one library object, one way to fail.

Refuses to hold policy. Invariant: `check` turns every -1 into a `KernelError` naming the call and its object.
"""

from __future__ import annotations

import errno
import os

from runtime.linux import foreign as ctypes

TYPE_CHECKING = False  # typing costs 10 ms to import, and this module is on every hot path
if TYPE_CHECKING:
    from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_Room: Final = ctypes.c_char * 256

# asm/unistd_64.h and asm-generic/unistd.h share every number above 424.
_X86_64: Final = {
    "pivot_root": 155,
    "capget": 125,
    "capset": 126,
    "setns": 308,
    "unshare": 272,
    "mount": 165,
    "umount2": 166,
    "seccomp": 317,
    "bpf": 321,
    "execveat": 322,
    "keyctl": 250,
    "ioprio_set": 251,
    "sched_setattr": 314,
    "memfd_create": 319,
    "rt_sigaction": 13,
    "set_tid_address": 218,
    "fallocate": 285,
    "set_mempolicy": 238,
    "prlimit64": 302,
}
_AARCH64: Final = {
    "pivot_root": 41,
    "capget": 90,
    "capset": 91,
    "setns": 268,
    "unshare": 97,
    "mount": 40,
    "umount2": 39,
    "seccomp": 277,
    "bpf": 280,
    "execveat": 281,
    "keyctl": 219,
    "ioprio_set": 30,
    "sched_setattr": 274,
    "memfd_create": 279,
    "rt_sigaction": 134,
    "set_tid_address": 96,
    "fallocate": 47,
    "set_mempolicy": 237,
    "prlimit64": 261,
}
_GENERIC: Final = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "fchmodat2": 452,
}
_NUMBERS: Final = {**({"x86_64": _X86_64, "aarch64": _AARCH64}.get(os.uname().machine, {})), **_GENERIC}


class KernelError(OSError):
    """A system call failed. `call` is its name, `subject` what it was done to; `str()` reads as one sentence."""

    def __init__(self, code: int, call: str, subject: object = "") -> None:
        super().__init__(code, os.strerror(code))
        self.call = call
        self.subject = os.fsdecode(subject) if isinstance(subject, bytes) else str(subject)

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        on = f" {self.subject}" if self.subject else ""
        return f"{self.call}{on}: {name} {(self.strerror or '').lower()}"


def check(result: int, call: str, subject: object = "") -> int:
    """`result` itself unless it is negative. Raises KernelError with the thread's errno."""
    if result < 0:
        raise KernelError(ctypes.get_errno(), call, subject)
    return result


def syscall(name: str, *args: object, subject: object = "") -> int:
    """syscall(2) by name; ints are passed as long, bytes as pointers. Raises KernelError."""
    try:
        number = _NUMBERS[name]
    except KeyError:
        raise KernelError(errno.ENOSYS, name, subject) from None
    passed = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return check(_libc.syscall(ctypes.c_long(number), *passed), name, subject)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2)."""
    values = (ctypes.c_ulong(arg2), ctypes.c_ulong(arg3), ctypes.c_ulong(arg4), ctypes.c_ulong(arg5))
    return check(_libc.prctl(ctypes.c_int(option), *values), "prctl", option)


def room() -> ctypes.Array[ctypes.c_char]:
    """256 zero bytes for a call to fill in. Of one type, made at import: see `address`."""
    return _Room()


def address(data: bytes) -> int:
    """Where `data` lies, for structures that hold pointers; keep it until the call is over.

    No ctypes array is made for it: each length is a type of its own, and making a type writes to a hundred pages that
    a forked process shares until then."""
    return ctypes.c_void_p.from_buffer(ctypes.c_char_p(data)).value or 0


for _name in ("syscall", "prctl", "fstatfs", "sethostname", "setdomainname"):
    getattr(_libc, _name)  # ctypes makes the function object at its first use: before a fork is the better time
