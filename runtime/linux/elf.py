"""Programs of machine code as files that execve(2) takes; see elf(5).

Refuses nothing and knows no instruction. Invariant: what is executed is mapped read-only, and nothing writable is but
stack and heap.
"""

from __future__ import annotations

import struct

_ET_EXEC, _EM_X86_64, _PT_LOAD, _PT_GNU_STACK = 2, 62, 1, 0x6474E551
_X, _W, _R = 1, 2, 4
_HEADER = struct.Struct("<HHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")


def headers_size(*, heap: bool = False) -> int:
    """How far behind the base address the code begins."""
    return 64 + (3 if heap else 2) * _SEGMENT.size


def program(base: int, code: bytes, heap_end: int = 0) -> bytes:
    """An x86-64 program without a section, mapped at `base`, that begins with the first byte of `code`. With `heap_end`
    there is a page of nothing there: the kernel lets the heap grow (brk(2)) from behind the last segment on."""
    size = headers_size(heap=bool(heap_end))
    segments = [_SEGMENT.pack(_PT_LOAD, _R | _X, 0, base, base, size + len(code), size + len(code), 4096)]
    if heap_end:
        segments.append(_SEGMENT.pack(_PT_LOAD, _R | _W, 0, heap_end, heap_end, 0, 4096, 4096))
    segments.append(_SEGMENT.pack(_PT_GNU_STACK, _R | _W, 0, 0, 0, 0, 0, 16))
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = _HEADER.pack(_ET_EXEC, _EM_X86_64, 1, base + size, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return ident + header + b"".join(segments) + code
