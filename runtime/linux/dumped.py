"""A process that goes on where another one had stopped: in a copy of that one's memory, which the installation made.

The launcher, a program of half a kilobyte in front of a table, maps the regions of the dump privately at the addresses
that they had, takes over the thread's block and the stack, and jumps to behind the system call that the other process
stopped in (runtime/dump.py makes both files). An interpreter with its modules is there in a millisecond and a half, of
which most is faults of pages; to make one takes eight times as long.

What a dump cannot have is what a kernel gives to each process anew: arguments, environment, signal dispositions, the
thread's id, and the vDSO, whose functions are system calls here. Refuses other machines than x86-64. Invariant: where a
region cannot be mapped, or what was dumped is not what the files of this machine say, the command starts the slow way.
"""

from __future__ import annotations

import os
import posix
import struct
import sys

from runtime.linux import foreign as ctypes
from runtime.linux import signals, successor
from runtime.linux.libc import _libc, syscall
from runtime.linux.machine_code import machine_code
from runtime.linux.memory import PROT_EXEC, PROT_READ, map_copy, map_room, write_to

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# void stop(uint64_t place[2]): leaves the stack pointer and an address there, and stops the process with SIGSTOP. Who
# jumps to that address with that stack returns.
_STOP = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push %rbx
    "55"  # push %rbp
    "4154"  # push %r12
    "4155"  # push %r13
    "4156"  # push %r14
    "4157"  # push %r15
    "488927"  # mov %rsp, (%rdi)
    "488d0519000000"  # lea 1f(%rip), %rax
    "48894708"  # mov %rax, 8(%rdi)
    "b827000000"  # mov $39, %eax       getpid
    "0f05"  # syscall
    "89c7"  # mov %eax, %edi
    "be13000000"  # mov $19, %esi       SIGSTOP
    "b83e000000"  # mov $62, %eax       kill
    "0f05"  # syscall
    "415f"  # 1: pop %r15
    "415e"  # pop %r14
    "415d"  # pop %r13
    "415c"  # pop %r12
    "5d"  # pop %rbp
    "5b"  # pop %rbx
    "31c0"  # xor %eax, %eax
    "c3"  # ret
)
# Where a process begins, with argc at its stack pointer. Behind it lies DATA, and behind that ROWs.
LAUNCHER = bytes.fromhex(
    "4989e4"  # mov %rsp, %r12
    "488b3d3e010000"  # mov path(%rip), %rdi
    "be00000800"  # mov $0x80000, %esi  O_CLOEXEC
    "31d2"  # xor %edx, %edx
    "b802000000"  # mov $2, %eax        open
    "0f05"  # syscall
    "85c0"  # test %eax, %eax
    "0f88b2000000"  # js 2f
    "4189c5"  # mov %eax, %r13d
    "89c7"  # mov %eax, %edi
    "31f6"  # xor %esi, %esi
    "ba02000000"  # mov $2, %edx        SEEK_END
    "b808000000"  # mov $8, %eax        lseek
    "0f05"  # syscall
    "483b052e010000"  # cmp size(%rip), %rax
    "0f8592000000"  # jne 2f
    "488d1d31010000"  # lea rows(%rip), %rbx
    "488b2d22010000"  # mov count(%rip), %rbp
    "488b3b"  # 1: mov (%rbx), %rdi
    "488b7308"  # mov 8(%rbx), %rsi
    "8b5310"  # mov 16(%rbx), %edx
    "448b5314"  # mov 20(%rbx), %r10d
    "4d89e8"  # mov %r13, %r8
    "4c8b4b18"  # mov 24(%rbx), %r9
    "b809000000"  # mov $9, %eax        mmap
    "0f05"  # syscall
    "483b03"  # cmp (%rbx), %rax
    "7563"  # jne 2f
    "4883c320"  # add $32, %rbx
    "48ffcd"  # dec %rbp
    "75d6"  # jnz 1b
    "4489ef"  # mov %r13d, %edi
    "b803000000"  # mov $3, %eax        close
    "0f05"  # syscall
    "488b358f000000"  # mov block(%rip), %rsi
    "bf02100000"  # mov $0x1002, %edi   ARCH_SET_FS
    "b89e000000"  # mov $158, %eax      arch_prctl
    "0f05"  # syscall
    "488b3d84000000"  # mov tid(%rip), %rdi
    "4889fb"  # mov %rdi, %rbx
    "b8da000000"  # mov $218, %eax      set_tid_address
    "0f05"  # syscall
    "8903"  # mov %eax, (%rbx)
    "31ff"  # xor %edi, %edi
    "b80c000000"  # mov $12, %eax       brk
    "0f05"  # syscall
    "488b3d78000000"  # mov brk(%rip), %rdi
    "488907"  # mov %rax, (%rdi)
    "488b3d66000000"  # mov words(%rip), %rdi
    "4c8927"  # mov %r12, (%rdi)
    "488b256c000000"  # mov stack(%rip), %rsp
    "ff256e000000"  # jmp *resume(%rip)
    "488b3d77000000"  # 2: mov slow(%rip), %rdi
    "498d742408"  # lea 8(%r12), %rsi
    "498b1424"  # mov (%r12), %rdx
    "488d54d608"  # lea 8(%rsi, %rdx, 8), %rdx
    "b83b000000"  # mov $59, %eax       execve
    "0f05"  # syscall
    "bf02000000"  # mov $2, %edi
    "488b355e000000"  # mov said(%rip), %rsi
    "488b155f000000"  # mov length(%rip), %rdx
    "b801000000"  # mov $1, %eax        write
    "0f05"  # syscall
    "bf7f000000"  # mov $127, %edi
    "b8e7000000"  # mov $231, %eax      exit_group
    "0f05"  # syscall
    "0f1f4000"  # nop
)
# block, tid, words, brk, stack, resume: addresses in the dump. path, slow, said: addresses in the launcher. length of
# said, size of the dump, count of rows.
DATA = struct.Struct("=12Q")
ROW = struct.Struct("=QQIIQ")  # address, size, protection, flags and offset for mmap(2)
# Functions of the vDSO that the C library keeps pointers to, as mov $number, %eax; syscall; ret.
VDSO = {
    name: bytes.fromhex("f30f1efab8") + struct.pack("<I", number) + bytes.fromhex("0f05c3")
    for name, number in {
        "clock_gettime": 228,
        "clock_getres": 229,
        "gettimeofday": 96,
        "time": 201,
        "getcpu": 309,
    }.items()
}
# glibc's struct pthread: the thread's id in the block that %fs points to.
_TID_AT = 0x2D0
_SIGSETXID = 33
_WORDS_AT = 16  # in the place that stop writes to

_stop = machine_code(_STOP)
is_resumed = False
_setxid = ctypes.create_string_buffer(32)
_place = 0
_slow = ""


def prepare(slow: str) -> dict[str, int] | None:
    """What a launcher has to know of this thread, its process's only one: addresses by name, those of the stand-ins
    for the vDSO's functions among them. None on a machine that this is not written for. `slow` is for `go_slowly`."""
    global _place, _slow
    _slow = slow
    if _stop is None:
        return None
    block = _pthread_self()
    if _quad(block + _TID_AT) & 0xFFFFFFFF != os.getpid():
        return None  # another C library
    _place = map_room(4096)
    known = {"place": _place, "words": _place + _WORDS_AT, "block": block, "tid": block + _TID_AT}
    try:
        known["brk"] = ctypes.symbol_address(_libc, "__curbrk")  # brk(2): where the heap ends is this kernel's to say
    except AttributeError:
        return None  # another C library
    for name, code in VDSO.items():
        known[name] = map_copy(code, len(code), PROT_READ | PROT_EXEC)
    return known


def stop() -> None:
    """Stops this process for good; returns in those that a launcher resumes, as processes with words, an environment
    and signal dispositions of their own."""
    global is_resumed
    assert _stop is not None
    syscall("rt_sigaction", _SIGSETXID, 0, _setxid, 8)
    _stop(ctypes.c_long(_place))
    is_resumed = True
    stack = _quad(_place + _WORDS_AT)
    environment = stack + 8 * (_quad(stack) + 2)
    write_to(ctypes.symbol_address(_libc, "environ"), struct.pack("=Q", environment))
    sys.argv = [os.fsdecode(word) for word in _strings(stack + 8)]
    posix.environ.clear()  # what os.environ and os.environb look into
    for pair in _strings(environment):
        name, equal, value = pair.partition(b"=")
        if equal:
            posix.environ.setdefault(name, value)  # of two with one name the first, as ever
    signals.as_at_start()


def begin_threads() -> None:
    """What the C library did before the first thread, which it takes for done: the handler of the signal that makes
    each of them change its ids (nptl(7))."""
    syscall("rt_sigaction", _SIGSETXID, _setxid, 0, 8)


def outlive_starter() -> bool:
    """In a resumed process: what goes on is a new one, in its memory, and a child of init's or of a subreaper's, since
    this one ends. False where nothing has happened."""
    if not is_resumed or not successor.AVAILABLE:
        return False
    successor.orphan(_pthread_self() + _TID_AT)
    return True


def go_slowly() -> NoReturn:
    """The same command in this process's place, started as an interpreter: for who is not to go on from a dump."""
    os.execve(_slow, sys.argv, os.environb)
    raise AssertionError("execve returned")


def _strings(address: int) -> list[bytes]:
    """Those that an array of pointers leads to, which ends in a null pointer."""
    found = []
    while pointer := _quad(address):
        found.append(ctypes.c_char_p(pointer).value or b"")
        address += 8
    return found


def _quad(address: int) -> int:
    return int(ctypes.c_uint64.from_address(address).value)


_pthread_self = _libc.pthread_self
_pthread_self.restype = ctypes.c_ulong
