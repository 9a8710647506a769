"""seccomp(2): puts a classic BPF program in force for this thread.

Refuses to know what the program does. Invariant: after a return without error the filter is in force for good.
"""

from __future__ import annotations

import ctypes
import struct

from runtime.linux.libc import syscall

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1
# linux/audit.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3, "s390x": 0x80000016}


def set_mode_filter(program: bytes, flags: int) -> None:
    """SECCOMP_SET_MODE_FILTER with `program`, an array of struct sock_filter."""
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short len; struct sock_filter *filter
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, fprog, subject="filter")
