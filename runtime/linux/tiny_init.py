"""A program that is PID 1 for one other process: it reaps orphans, passes signals on, and ends as that process ends.

A quarter of a kilobyte of machine code, two pages of memory once it runs. Whoever becomes it has blocked all signals,
and so it takes them one by one with rt_sigtimedwait(2): SIGCHLD means to wait for whoever has ended, every other number
goes to the process. Signals that were sent before it ran have waited, since PID 1 drops none that it has blocked.

Refuses other machines than x86-64. Invariant: its exit code is that of the process, or 128 and the number of the signal
that killed it.
"""

from __future__ import annotations

import os

from runtime.linux.elf import program
from runtime.linux.files import sealed_memfd
from runtime.linux.process import execveat

NAME = b"ocid-init"
_BASE = 0x400000
_AT_EMPTY_PATH = 0x1000
_CODE = bytes.fromhex(
    "b89d000000"  # mov $157, %eax      prctl
    "bf0f000000"  # mov $15, %edi       PR_SET_NAME
    "488d357b000000"  # lea name(%rip), %rsi
    "0f05"  # syscall
    "50"  # push %rax               room for a status
    "488d3d69000000"  # 1: lea all(%rip), %rdi
    "31f6"  # xor %esi, %esi
    "31d2"  # xor %edx, %edx
    "41ba08000000"  # mov $8, %r10d
    "b880000000"  # mov $128, %eax      rt_sigtimedwait
    "0f05"  # syscall
    "85c0"  # test %eax, %eax
    "78e4"  # js 1b                 EINTR, after SIGSTOP
    "83f811"  # cmp $17, %eax         SIGCHLD
    "7411"  # je 2f
    "89c6"  # mov %eax, %esi
    "8b3d5b000000"  # mov pid(%rip), %edi
    "b83e000000"  # mov $62, %eax       kill
    "0f05"  # syscall
    "ebce"  # jmp 1b
    "4883cfff"  # 2: or $-1, %rdi       any child
    "4889e6"  # mov %rsp, %rsi
    "ba01000000"  # mov $1, %edx        WNOHANG
    "4531d2"  # xor %r10d, %r10d
    "b83d000000"  # mov $61, %eax       wait4
    "0f05"  # syscall
    "85c0"  # test %eax, %eax
    "7eb4"  # jle 1b
    "3b0532000000"  # cmp pid(%rip), %eax
    "75de"  # jne 2b
    "0fb67c2401"  # movzbl 1(%rsp), %edi  its exit code
    "8b0424"  # mov (%rsp), %eax
    "83e07f"  # and $127, %eax      or the signal that has killed it
    "7406"  # jz 3f
    "8db880000000"  # lea 128(%rax), %edi
    "b8e7000000"  # 3: mov $231, %eax   exit_group
    "0f05"  # syscall
    "9090"  # nop
    "ffffffffffffffff"  # all
)


def can_be() -> bool:
    """True on machines that it is written for."""
    return os.uname().machine == "x86_64"


def become(pid: int) -> None:
    """This process goes on as PID 1 for its child `pid`. Returns only by raising KernelError."""
    fd = sealed_memfd(NAME.decode(), program(_BASE, _CODE + NAME.ljust(12, b"\0") + pid.to_bytes(4, "little")))
    try:
        execveat(fd, "", [NAME], [], _AT_EMPTY_PATH)
    finally:
        os.close(fd)
