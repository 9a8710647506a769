"""seccomp(2): puts a classic BPF program in force for this thread, and says what this kernel can do.

Refuses to know what the program does. Invariant: after a return without error the filter is in force for good.
"""

from __future__ import annotations

import errno
import struct

from runtime.linux.libc import KernelError, address, syscall

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_LOG, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 1, 2, 4
SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 8, 32
# linux/audit.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3, "s390x": 0x80000016}


def set_mode_filter(program: bytes, flags: int) -> int:
    """SECCOMP_SET_MODE_FILTER with `program`, an array of struct sock_filter. With SECCOMP_FILTER_FLAG_NEW_LISTENER it
    returns the listener, a CLOEXEC fd of the caller's, else 0."""
    # struct sock_fprog: unsigned short len; struct sock_filter *filter
    fprog = struct.pack("@HP", len(program) // 8, address(program))
    return syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, fprog, subject="filter")


def has_flag(flag: int) -> bool:
    """True when this kernel knows a SECCOMP_FILTER_FLAG_*. Without a program a known flag gives EFAULT (seccomp(2))."""
    if flag == SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV:
        flag |= SECCOMP_FILTER_FLAG_NEW_LISTENER  # the one is refused without the other
    try:
        syscall("seccomp", SECCOMP_SET_MODE_FILTER, flag, None, subject=hex(flag))
    except KernelError as error:
        return error.errno == errno.EFAULT
    return False
