"""A process that another takes the place of: clone3(2) without a copy of the caller's memory.

`succeed`: the new process goes on in the caller's memory, while the caller waits in the kernel (CLONE_VM, CLONE_VFORK)
until the other has executed a program or ended; a moment later it ends itself. `orphan`: the caller ends at once, and
the other has its memory. No page of an interpreter is copied, where a fork copies each that either of the two writes
to.

The caller must not come back from the call into code: the stack that it would return on has been used since. What it
does between the call and its exit is therefore a few instructions that use no memory, and so machine code. Refuses
machines that it is not written for (`AVAILABLE`), and callers with threads. Invariant: in the memory of a caller only
one process ever runs, and a new process that dies at any instant leaves a caller that ends.
"""

from __future__ import annotations

import errno
import struct

from runtime.linux import foreign as ctypes
from runtime.linux import signals
from runtime.linux.libc import KernelError, syscall
from runtime.linux.machine_code import machine_code
from runtime.linux.process import CLONE_INTO_CGROUP, CLONE_PARENT, CLONE_VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# linux/sched.h
_CLONE_VFORK, _CLONE_PARENT_SETTID, _CLONE_CHILD_SETTID = 0x4000, 0x100000, 0x1000000
# long call(struct clone_args *, size_t): the arguments are where clone3 wants them (System V ABI, x86-64).
_BEGIN = bytes.fromhex(
    "f30f1efa"  # endbr64
    "b8b3010000"  # mov $435, %eax    clone3
    "0f05"  # syscall
    "4885c0"  # test %rax, %rax
    "7f01"  # jg 1f                   the caller, once the other has executed or ended
    "c3"  # ret                       the new process, or an error
    "bf03000000"  # 1: mov $3, %edi
    "83ceff"  # or $-1, %esi
    "31d2"  # xor %edx, %edx
    "b8b4010000"  # mov $436, %eax    close_range: who waits for the end of a pipe need not wait for that of our memory
    "0f05"  # syscall
)
_PAUSE = bytes.fromhex(
    "b823000000"  # mov $35, %eax     nanosleep: taking its memory apart takes the processor from what has just begun
    "488d3d0e000000"  # lea 2f(%rip), %rdi
    "31f6"  # xor %esi, %esi
    "0f05"  # syscall
)
_END = bytes.fromhex(
    "31ff"  # xor %edi, %edi
    "b8e7000000"  # mov $231, %eax    exit_group
    "0f05"  # syscall
    "f4"  # hlt
    "0000000000000000"  # 2:          no seconds
    "8096980000000000"  #             10,000,000 ns
)


_call = machine_code(_BEGIN + _PAUSE + _END)
_call_at_once = machine_code(_BEGIN + _END)  # for who is waited for
AVAILABLE = _call is not None


def succeed(flags: int, *, cgroup_fd: int = -1) -> int:
    """clone3(2) with `flags`, the new process a child of the caller's parent. Returns in the new process alone, with
    its pid in the caller's PID namespace. `cgroup_fd` as with runtime.linux.process.clone3. Raises KernelError in the
    caller, which goes on then."""
    pid = ctypes.c_int(0)
    flags |= CLONE_PARENT | CLONE_VM | _CLONE_VFORK | _CLONE_PARENT_SETTID
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    _clone(_call, struct.pack("=11Q", flags, 0, 0, ctypes.addressof(pid), 0, 0, 0, 0, 0, 0, max(cgroup_fd, 0)))
    return pid.value


def orphan(thread_id: int) -> None:
    """Returns in a new process, whose parent, the caller, ends with 0 meanwhile, so that init or a subreaper adopts it.
    The kernel writes its id to the address `thread_id`, where the C library has that of the caller's thread. Raises
    KernelError in the caller, which goes on then."""
    args = struct.pack("=11Q", CLONE_VM | _CLONE_CHILD_SETTID, 0, thread_id, 0, signals.SIGCHLD, 0, 0, 0, 0, 0, 0)
    syscall("set_tid_address", 0)  # or the kernel writes a zero there as the caller ends
    mask = signals.block_all()  # a handler of the caller's would run on the stack of both
    try:
        _clone(_call_at_once, args)
    finally:
        signals.set_mask(mask)


def _clone(call: Callable[..., int] | None, args: bytes) -> None:
    result = -errno.ENOSYS if call is None else call(args, ctypes.c_long(len(args)))
    if result < 0:
        raise KernelError(-result, "clone3")
