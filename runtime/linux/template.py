"""Memory that forked processes give back: what a process has when it takes a template is a file from then on.

A forked process copies each page that it writes to, and keeps the copy also when all that it wrote is as it was before:
counts of references go up and down again. Of the pages that an idle shim has to itself these are half. Nothing in the
kernel makes such a copy one with its original again, unless the original is a page of a file: one of a private mapping
is read anew once its copy is given up (MADV_DONTNEED). So the memory of the interpreter becomes a memfd, mapped
privately at the same addresses; who was forked compares its copies with that, and gives up those that are equal.

Between a look at a page and what is done to it nothing may write to it, and an interpreter always does: both steps are
machine code therefore, which uses registers and nothing else, with all signals blocked. Refuses machines and allocators
that it is not written for (then there is no template, and processes weigh more), and callers with threads. Invariant:
no byte of any process's memory changes its value.
"""

from __future__ import annotations

import os
import struct

from runtime.linux import foreign as ctypes
from runtime.linux import signals
from runtime.linux.files import seal
from runtime.linux.libc import KernelError
from runtime.linux.machine_code import machine_code
from runtime.linux.memory import (
    MADV_DONTNEED,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    advise,
    map_file,
    map_room,
    read_to,
    thread_block,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import RawIOBase

_NAME = "ocid-template"
_PAGE, _ENTRY = 4096, 8
# asm/unistd_64.h
_PWRITE64, _MMAP = 18, 9
_CALL = struct.Struct("=8Q")
# Objects/obmalloc.c of CPython 3.10 and later: pools of 16 KiB, each with a header of which this is the end, from its
# 32nd byte: index of the arena, index of the size, offset of the next fresh block, the highest such offset.
_POOL, _STEP, _SIZES = 1 << 14, 16, 32
_HEADER_END = struct.Struct("=4I")
_HEADER_AT = 32

# long make(const uint64_t (*calls)[8], long n): system calls, each its number, six arguments, and the result without
# which the rest is not made. Returns how many were not.
_MAKE = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push %rbx
    "55"  # push %rbp
    "4889fb"  # mov %rdi, %rbx
    "4889f5"  # mov %rsi, %rbp
    "4885ed"  # 1: test %rbp, %rbp
    "742c"  # jz 2f
    "488b03"  # mov (%rbx), %rax
    "488b7b08"  # mov 8(%rbx), %rdi
    "488b7310"  # mov 16(%rbx), %rsi
    "488b5318"  # mov 24(%rbx), %rdx
    "4c8b5320"  # mov 32(%rbx), %r10
    "4c8b4328"  # mov 40(%rbx), %r8
    "4c8b4b30"  # mov 48(%rbx), %r9
    "0f05"  # syscall
    "483b4338"  # cmp 56(%rbx), %rax
    "7509"  # jne 2f
    "4883c340"  # add $64, %rbx
    "48ffcd"  # dec %rbp
    "ebcf"  # jmp 1b
    "4889e8"  # 2: mov %rbp, %rax
    "5d"  # pop %rbp
    "5b"  # pop %rbx
    "c3"  # ret
)
# long give_back(char *own, const char *file, const uint64_t *pagemap, long n): madvise(own, 4096, MADV_DONTNEED) for
# each of n pages that is present (bit 63 of its pagemap entry), is no file's (bit 61), and equals the file's. Where it
# does not equal it any more then (the template's mapping had gone, and another is in its place), the page is written
# anew. Returns how many were given back.
_GIVE_BACK = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push %rbx
    "55"  # push %rbp
    "4989f8"  # mov %rdi, %r8
    "4989f1"  # mov %rsi, %r9
    "4989d2"  # mov %rdx, %r10
    "4889cd"  # mov %rcx, %rbp
    "31db"  # xor %ebx, %ebx
    "48ffcd"  # 1: dec %rbp
    "7870"  # js 3f
    "498b04ea"  # mov (%r10, %rbp, 8), %rax
    "480fbae03f"  # bt $63, %rax
    "73f0"  # jnc 1b
    "480fbae03d"  # bt $61, %rax
    "72e9"  # jc 1b
    "4889ea"  # mov %rbp, %rdx
    "48c1e20c"  # shl $12, %rdx
    "498d3410"  # lea (%r8, %rdx), %rsi
    "498d3c11"  # lea (%r9, %rdx), %rdi
    "b900020000"  # mov $512, %ecx
    "f348a7"  # repe cmpsq
    "75d0"  # jne 1b
    "498d3c10"  # lea (%r8, %rdx), %rdi
    "be00100000"  # mov $4096, %esi
    "ba04000000"  # mov $4, %edx        MADV_DONTNEED
    "b81c000000"  # mov $28, %eax       madvise
    "0f05"  # syscall
    "4885c0"  # test %rax, %rax
    "75b6"  # jne 1b
    "4889ea"  # mov %rbp, %rdx
    "48c1e20c"  # shl $12, %rdx
    "498d3411"  # lea (%r9, %rdx), %rsi
    "b900020000"  # mov $512, %ecx
    "f348a7"  # repe cmpsq
    "7504"  # jne 2f
    "ffc3"  # inc %ebx
    "eb9d"  # jmp 1b
    "498d3411"  # 2: lea (%r9, %rdx), %rsi
    "498d3c10"  # lea (%r8, %rdx), %rdi
    "b900020000"  # mov $512, %ecx
    "f348a5"  # rep movsq
    "eb8b"  # jmp 1b
    "89d8"  # 3: mov %ebx, %eax
    "5d"  # pop %rbp
    "5b"  # pop %rbx
    "c3"  # ret
)


class Template:
    """Of the process that took it, and of all that are forked from it."""

    def __init__(self, regions: list[tuple[int, int]], file: int) -> None:
        self._regions = regions  # address and number of pages, in the order of the file
        self._file = file  # address of a mapping of the whole file that nobody writes to
        self._room = max(pages for _, pages in regions) * _ENTRY
        self._entries = map_room(self._room)
        self._copied_by = 0  # a fork of who has copied has not
        self.size = sum(pages for _, pages in regions) * _PAGE

    def copy(self) -> None:
        """Copies all pages at once, rather than one by one as this process comes to write to them; who has done so is
        asked in vain, since a look at them all takes as long as some copies. Raises OSError."""
        if self._copied_by == os.getpid():
            return
        for address, pages in self._regions:
            advise(address, pages * _PAGE, MADV_POPULATE_WRITE)
        self._copied_by = os.getpid()

    def give_back(self) -> int:
        """Gives up this process's copies of pages that equal the template's. How many they were. Raises OSError."""
        given, file, self._copied_by = 0, self._file, 0
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        mask = signals.block_all()  # the interpreter's handler notes a signal in its data
        try:
            for address, pages in self._regions:
                read_to(self._entries, pagemap, pages * _ENTRY, address // _PAGE * _ENTRY)
                given += _call(_give_back, address, file, self._entries, pages)
                file += pages * _PAGE
        finally:
            signals.set_mask(mask)
            os.close(pagemap)
        advise(self._entries, self._room, MADV_DONTNEED)
        advise(self._file, self.size, MADV_DONTNEED)  # the mapping stays; what the look took of page tables goes
        return given


def rehearse(rounds: int) -> None:
    """Gives back a page of nothing, so that the interpreter has seen the way before the template is taken."""
    if _give_back is not None:
        template = Template([(map_room(_PAGE), 1)], map_room(_PAGE))
        for _ in range(rounds):
            template.give_back()


def take() -> Template | None:
    """A template of the interpreter's memory as it is now, for this process and those forked from it; None where there
    can be none. Raises OSError."""
    if _make is None or _give_back is None or os.sysconf("SC_PAGE_SIZE") != _PAGE:
        return None
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        moved, size = [], 0
        for start, end in list(_regions()):
            os.truncate(fd, size + end - start)
            if _move(start, end - start, fd, size):
                moved.append((start, (end - start) // _PAGE))
                size += end - start
        if not moved:
            return None
        os.truncate(fd, size)
        seal(fd)
        return Template(moved, map_file(fd, size))
    finally:
        os.close(fd)


def _move(address: int, size: int, fd: int, offset: int) -> bool:
    """Memory becomes a part of the file, mapped where it was; or, as where it is there no more, stays as it is."""
    protection, flags = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED
    calls = _CALL.pack(_PWRITE64, fd, address, size, offset, 0, 0, size)
    calls += _CALL.pack(_MMAP, address, size, protection, flags, fd, offset, address)
    mask = signals.block_all()
    try:
        missing = _call(_make, calls, len(calls) // _CALL.size)
    finally:
        signals.set_mask(mask)
    if missing:
        return False
    try:
        advise(address, size, MADV_POPULATE_READ)  # a fork copies entries of pages; without one each is a fault
    except KernelError:  # Linux before 5.14
        pass
    return True


def _regions() -> Iterator[tuple[int, int]]:
    """Start and end of where the interpreter has its objects: its own data, the heap, and the pools of its arenas.

    Not where the kernel writes unasked (the thread's block: rseq(2)), and not what malloc has mapped for a single
    allocation: mremap(2) would let that grow past the end of the file."""
    block, data_end = thread_block(), 0
    with open("/proc/self/maps", encoding="utf-8") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps.readlines():
            addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            if permissions != "rw-p" or start <= block < end:
                continue
            if start <= id(None) < end or start == data_end:
                data_end = end if start != data_end else 0  # what follows it are its zeros, not in its file
                yield start, end
            elif path == ["[heap]\n"]:
                yield start, end
            elif inode == "0" and not path:
                yield from _pools(memory, start, end)


def _pools(memory: RawIOBase, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of a mapping are pools of the interpreter's allocator, as far as they lie side by side."""
    first = 0
    for pool in range(-(-start // _POOL) * _POOL, end + 1, _POOL):
        if pool + _POOL <= end and _is_pool(os.pread(memory.fileno(), _HEADER_END.size, pool + _HEADER_AT)):
            first = first or pool
        elif first:
            yield first, pool
            first = 0


def _is_pool(header_end: bytes) -> bool:
    size: int
    _, size, fresh, last = _HEADER_END.unpack(header_end)
    block = (size + 1) * _STEP
    return size < _SIZES and last == _POOL - block and _HEADER_AT < fresh <= _POOL


def _call(function: Callable[..., int] | None, *arguments: int | bytes) -> int:
    assert function is not None
    return function(*[word if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments])


_make, _give_back = machine_code(_MAKE), machine_code(_GIVE_BACK)
