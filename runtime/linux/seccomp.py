"""seccomp(2): puts a classic BPF program in force for this thread.

Refuses to know what the program does. Invariant: after a return without error the filter is in force for good.
"""

from __future__ import annotations

import struct

from runtime.linux.libc import address, syscall

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_LOG, SECCOMP_FILTER_FLAG_SPEC_ALLOW = 2, 4
# linux/audit.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3, "s390x": 0x80000016}


def set_mode_filter(program: bytes, flags: int) -> None:
    """SECCOMP_SET_MODE_FILTER with `program`, an array of struct sock_filter."""
    # struct sock_fprog: unsigned short len; struct sock_filter *filter
    fprog = struct.pack("@HP", len(program) // 8, address(program))
    syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, fprog, subject="filter")
