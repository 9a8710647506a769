"""A child that works in its parent's memory while that one waits, and then waits itself, in machine code.

    parent                              child: clone3(CLONE_VM), on the parent's stack, below it
      |-- clone3 ------------------------>|
      |   waits (futex)                   |  `work`, in the interpreter that both have
      |<- its word ---------------------- |  on a stack of its own from here on, which is the end of its Python
      |   goes on                         |  waits for Start, makes the system calls it was given; the last is execve

A fork shares every page of an interpreter anew, and each of the two copies those that it comes to write to: some 600
apiece, 2 to 4 us each, and the clone itself must copy all page tables. Here nothing is copied, and nothing is shared
but memory: descriptors, directories, signals' dispositions and credentials are the child's own (clone(2)).

The interpreter is in one process's hands at a time: the parent does not return from the call before the child has done
with it. What the child reads after that lies in a mapping (`Block`) that the interpreter does not know. A child that
dies in the middle of its work leaves an interpreter in the middle of something: then the parent ends as well, in the
same machine code, after its last words. Refuses machines that it is not written for (`AVAILABLE`), callers with
threads, and Python's handlers for signals: they would note a signal of the child's in the parent. Invariant: a child
that waits touches its block, and no other memory.
"""

from __future__ import annotations

import errno
import struct

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, syscall
from runtime.linux.machine_code import machine_code_at
from runtime.linux.memory import map_room, write_to
from runtime.linux.process import (
    CLONE_CLEAR_SIGHAND,
    CLONE_INTO_CGROUP,
    CLONE_PARENT,
    CLONE_PIDFD,
    CLONE_VM,
    SIGCHLD,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CLONE_CHILD_CLEARTID = 0x200000  # linux/sched.h
# asm/unistd_64.h
_CAPSET, _SECCOMP, _EXECVEAT = 126, 317, 322
_AT_FDCWD = -100
_SECCOMP_SET_MODE_FILTER = 1  # linux/seccomp.h
_SA_RESTORER, _SIZEOF_SIGSET = 0x04000000, 8  # asm/signal.h
_ACTION = struct.Struct("=4Q")  # struct sigaction of the kernel: handler, flags, restorer, mask
# The block: what the machine code reads, at these offsets, above a stack that only handlers of signals use.
_STACK, _HEAD = 1 << 16, 512
_STATE = struct.Struct("=2I")
_CALL = struct.Struct("=8Q")
_MASK = (1 << 64) - 1
_HANDLER = 0x1D3  # offset of the last function
# long born(struct clone_args *, size_t, struct block *), which begins where the code does.
#   block: +0 word (the kernel clears it when the child ends), +4 state (1 works, 2 waits, 3 has failed), +8 work,
#   +16 channel, +24 listener, +32 calls, +40 number of them, +48 "Accepted" and its length, +64 "Refused" and its
#   length, +80 where its errno goes, +88 where the number of calls that were left goes, +96 fd, address and length of
#   the parent's last words, +128 256 bytes to read to
_X86_64 = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push %rbx
    "55"  # push %rbp
    "4154"  # push %r12
    "4155"  # push %r13
    "4883ec08"  # sub $0x8, %rsp
    "4889d3"  # mov %rdx, %rbx
    "b8b3010000"  # mov $0x1b3, %eax
    "0f05"  # syscall
    "4885c0"  # test %rax, %rax
    "7448"  # je child
    "783b"  # js out
    "4889c5"  # mov %rax, %rbp
    "8b13"  # wait: mov (%rbx), %edx
    "85d2"  # test %edx, %edx
    "7411"  # je over
    "4889df"  # mov %rbx, %rdi
    "31f6"  # xor %esi, %esi
    "4531d2"  # xor %r10d, %r10d
    "b8ca000000"  # mov $0xca, %eax
    "0f05"  # syscall
    "ebe9"  # jmp wait
    "4889e8"  # over: mov %rbp, %rax
    "837b0401"  # cmpl $0x1,0x4(%rbx)
    "7518"  # jne out
    "488b7b60"  # mov 0x60(%rbx), %rdi
    "488b7368"  # mov 0x68(%rbx), %rsi
    "488b5370"  # mov 0x70(%rbx), %rdx
    "b801000000"  # mov $0x1, %eax
    "0f05"  # syscall
    "e944010000"  # jmp die
    "4883c408"  # out: add $0x8, %rsp
    "415d"  # pop %r13
    "415c"  # pop %r12
    "5d"  # pop %rbp
    "5b"  # pop %rbx
    "c3"  # ret
    "ff5308"  # child: call *0x8(%rbx)
    "85c0"  # test %eax, %eax
    "750c"  # jne waits
    "c7430403000000"  # movl $0x3,0x4(%rbx)
    "e926010000"  # jmp die
    "4889dc"  # waits: mov %rbx, %rsp
    "31ff"  # xor %edi, %edi
    "b8da000000"  # mov $0xda, %eax
    "0f05"  # syscall
    "c7430402000000"  # movl $0x2,0x4(%rbx)
    "c70300000000"  # movl $0x0, (%rbx)
    "4889df"  # mov %rbx, %rdi
    "be01000000"  # mov $0x1, %esi
    "ba01000000"  # mov $0x1, %edx
    "b8ca000000"  # mov $0xca, %eax
    "0f05"  # syscall
    "4c8b6310"  # mov 0x10(%rbx), %r12
    "e8fd000000"  # call hear
    "0f8eea000000"  # jle die
    "80bb8900000053"  # cmpb $0x53,0x89(%rbx)
    "7477"  # je go
    "e806010000"  # call shut
    "488b7b18"  # next: mov 0x18(%rbx), %rdi
    "31f6"  # xor %esi, %esi
    "31d2"  # xor %edx, %edx
    "41ba00000800"  # mov $0x80000, %r10d
    "b820010000"  # mov $0x120, %eax
    "0f05"  # syscall
    "4883f8fc"  # cmp $0xfffffffffffffffc, %rax
    "74e5"  # je next
    "4883f899"  # cmp $0xffffffffffffff99, %rax
    "74df"  # je next
    "4885c0"  # test %rax, %rax
    "0f88b2000000"  # js die
    "4989c4"  # mov %rax, %r12
    "e8b7000000"  # call hear
    "7e2c"  # jle gone
    "80bb8900000053"  # cmpb $0x53,0x89(%rbx)
    "7523"  # jne gone
    "4c89e7"  # mov %r12, %rdi
    "488b7330"  # mov 0x30(%rbx), %rsi
    "488b5338"  # mov 0x38(%rbx), %rdx
    "41ba00400000"  # mov $0x4000, %r10d
    "4531c0"  # xor %r8d, %r8d
    "4531c9"  # xor %r9d, %r9d
    "b82c000000"  # mov $0x2c, %eax
    "0f05"  # syscall
    "4885c0"  # test %rax, %rax
    "7f07"  # jg accepted
    "e8a1000000"  # gone: call shut
    "eb99"  # jmp next
    "488b7b18"  # accepted: mov 0x18(%rbx), %rdi
    "b803000000"  # mov $0x3, %eax
    "0f05"  # syscall
    "488b6b20"  # go: mov 0x20(%rbx), %rbp
    "4c8b6b28"  # mov 0x28(%rbx), %r13
    "488b4500"  # each: mov 0x0(%rbp), %rax
    "488b7d08"  # mov 0x8(%rbp), %rdi
    "488b7510"  # mov 0x10(%rbp), %rsi
    "488b5518"  # mov 0x18(%rbp), %rdx
    "4c8b5520"  # mov 0x20(%rbp), %r10
    "4c8b4528"  # mov 0x28(%rbp), %r8
    "4c8b4d30"  # mov 0x30(%rbp), %r9
    "0f05"  # syscall
    "4885c0"  # test %rax, %rax
    "780b"  # js refused
    "4883c540"  # add $0x40, %rbp
    "49ffcd"  # dec %r13
    "75d4"  # jne each
    "eb34"  # jmp die
    "f7d8"  # refused: neg %eax
    "488b7b50"  # mov 0x50(%rbx), %rdi
    "b90a000000"  # mov $0xa, %ecx
    "31d2"  # xor %edx, %edx
    "f7f1"  # div %ecx
    "005702"  # add %dl,0x2(%rdi)
    "31d2"  # xor %edx, %edx
    "f7f1"  # div %ecx
    "005701"  # add %dl,0x1(%rdi)
    "0007"  # add %al, (%rdi)
    "488b7b58"  # mov 0x58(%rbx), %rdi
    "44002f"  # add %r13b, (%rdi)
    "4c89e7"  # mov %r12, %rdi
    "488b7340"  # mov 0x40(%rbx), %rsi
    "488b5348"  # mov 0x48(%rbx), %rdx
    "b801000000"  # mov $0x1, %eax
    "0f05"  # syscall
    "bf01000000"  # die: mov $0x1, %edi
    "b8e7000000"  # mov $0xe7, %eax
    "0f05"  # syscall
    "f4"  # hlt
    "4c89e7"  # hear: mov %r12, %rdi
    "488db380000000"  # lea 0x80(%rbx), %rsi
    "ba00010000"  # mov $0x100, %edx
    "31c0"  # xor %eax, %eax
    "0f05"  # syscall
    "4883f8fc"  # cmp $0xfffffffffffffffc, %rax
    "74e7"  # je hear
    "4885c0"  # test %rax, %rax
    "c3"  # ret
    "4c89e7"  # shut: mov %r12, %rdi
    "b803000000"  # mov $0x3, %eax
    "0f05"  # syscall
    "c3"  # ret
    "f30f1efa"  # handler: endbr64
    "83ef80"  # sub $0xffffff80, %edi
    "b8e7000000"  # mov $0xe7, %eax
    "0f05"  # syscall
    "f4"  # hlt
)


class Block:
    """Memory of a child that waits: `size` bytes for what it is to use then. It is never given back: the child may
    outlive its parent. Raises KernelError."""

    def __init__(self, size: int) -> None:
        self.address = map_room(_STACK + _HEAD + size) + _STACK
        self._next = self.address + _HEAD
        self._end = self._next + size
        self._calls: list[bytes] = []
        self._names: list[str] = []

    def put(self, data: bytes) -> int:
        """A copy of `data` in the block: its address."""
        where = self._next
        self._next += len(data) + -len(data) % 8
        if self._next > self._end:
            raise KernelError(errno.ENOMEM, "put", f"{len(data)} bytes into a block")
        write_to(where, data)
        return where

    def call(self, name: str, number: int, *arguments: int) -> None:
        """A system call, after those before. A failure of it is the child's end, and told by `name`."""
        padding = (0,) * (7 - len(arguments))
        self._calls.append(_CALL.pack(number, *(word & _MASK for word in arguments), *padding))
        self._names.append(name)

    def load_filter(self, name: str, program: bytes, flags: int) -> None:
        """As runtime.linux.seccomp.set_mode_filter, without a listener."""
        fprog = self.put(struct.pack("@HP", len(program) // 8, self.put(program)))
        self.call(name, _SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, fprog)

    def capset(self, name: str, effective: int, permitted: int, inheritable: int) -> None:
        """As runtime.linux.process.capset."""
        low, sets = 0xFFFFFFFF, (effective, permitted, inheritable)
        header = self.put(struct.pack("=Ii", 0x20080522, 0))
        data = self.put(struct.pack("=6I", *(s & low for s in sets), *(s >> 32 for s in sets)))
        self.call(name, _CAPSET, header, data)

    def execute(self, name: str, path: bytes, argv: Sequence[bytes], env: Sequence[bytes]) -> None:
        """execveat(2), the last one."""
        c_argv, c_env = (
            self.put(struct.pack(f"@{len(words) + 1}P", *(self.put(word + b"\0") for word in words), 0))
            for words in (argv, env)
        )
        self.call(name, _EXECVEAT, _AT_FDCWD, self.put(path + b"\0"), c_argv, c_env, 0)

    def wait_for_start(
        self, channel: int, listener: int, accepted: bytes, refused: Callable[[list[str]], tuple[bytes, int, int]]
    ) -> None:
        """What the child does once it waits: hears Go or Start on `channel`; after a Go, Start from whom it accepts on
        `listener`, whom it tells `accepted`; makes the calls. Messages are told apart by their tenth byte, which is "S"
        in Start. `refused(names)` makes the message about a call that fails, of which three digits, its errno, and one,
        the place of its name among `names`, are still to be added at two offsets."""
        names = [*reversed(self._names)]
        message, digits, digit = refused(["", *names])
        calls, told = self.put(b"".join(self._calls)), self.put(message)
        self._write(16, channel, listener, calls, len(self._calls), self.put(accepted), len(accepted))
        self._write(64, told, len(message), told + digits, told + digit)

    def _write(self, offset: int, *words: int) -> None:
        write_to(self.address + offset, struct.pack(f"={len(words)}Q", *(word & _MASK for word in words)))

    def begin(self, last_words: tuple[int, bytes]) -> None:
        """Of `clone`: what the block has to say before there is a child."""
        assert _entry is not None
        write_to(self.address, _STATE.pack(1, 1))
        self._write(8, _entry)
        fd, words = last_words
        self._write(96, fd, self.put(words), len(words))


def clone(
    flags: int,
    block: Block,
    work: Callable[[], bool],
    *,
    cgroup_fd: int = -1,
    last_words: tuple[int, bytes] = (-1, b""),
) -> tuple[int, int]:
    """(pid, pidfd) of a new child, once it waits or has ended, having done `work` in this very interpreter. What that
    returns says which: True, it is to wait as it has told the `block`. `last_words` are what is written to an fd if it
    dies meanwhile, and this process with it. `flags` and `cgroup_fd` as with runtime.linux.process.clone3.
    Raises KernelError."""
    global _work
    if _born is None:
        raise KernelError(errno.ENOSYS, "clone3")
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_VM | CLONE_PIDFD | CLONE_CLEAR_SIGHAND | _CLONE_CHILD_CLEARTID
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    exit_signal = 0 if flags & CLONE_PARENT else SIGCHLD
    args = struct.pack(
        "=11Q", flags, ctypes.addressof(pidfd), block.address, 0, exit_signal, 0, 0, 0, 0, 0, max(cgroup_fd, 0)
    )
    block.begin(last_words)
    _work = work
    try:
        result = _born(args, ctypes.c_long(len(args)), ctypes.c_long(block.address))
    finally:
        _work = _nothing
    if result < 0:
        raise KernelError(-result, "clone3")
    return result, pidfd.value


def end_by_signals(*numbers: int) -> None:
    """In the child: it exits with 128 and the number when one of these comes, also as pid 1 of a PID namespace. execve
    makes them what they are by default."""
    assert _start is not None
    _set_actions(_ACTION.pack(_start + _HANDLER, _SA_RESTORER, _start + _HANDLER, 0), numbers)


def unignore(*numbers: int) -> None:
    """In the child: these are at their default again."""
    _set_actions(bytes(_ACTION.size), numbers)


def _set_actions(action: bytes, numbers: Sequence[int]) -> None:
    """rt_sigaction(2): the interpreter's own table is the parent's, too, and stays as it is."""
    for number in numbers:
        syscall("rt_sigaction", number, action, None, _SIZEOF_SIGSET, subject=number)


def _nothing() -> bool:
    return False


_work: Callable[[], bool] = _nothing


def _run() -> int:
    try:
        return int(_work())
    except BaseException:  # whoever works tells of its errors itself: from here they could go nowhere
        return 0


_start = machine_code_at(_X86_64)
_born = None if _start is None else ctypes.locked_function_at(_start)
_callback = None if _start is None else ctypes.callback(_run)
_entry = None if _callback is None else ctypes.c_ulong.from_address(ctypes.addressof(_callback)).value
AVAILABLE = _born is not None
