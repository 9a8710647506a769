"""What this processor says that it is and can do, by its own instruction for it (cpuid).

Libraries choose code by that when they are loaded, and what they chose is in a dump of the process (runtime/dump.py).
Refuses other machines than x86-64. Invariant: two processors with one answer can do the same.
"""

from __future__ import annotations

import struct

from runtime.linux import foreign as ctypes
from runtime.linux.machine_code import machine_code

# void ask(uint32_t rows[][4], int count): eax and ecx of each row are the question, all four the answer.
_ASK = bytes.fromhex(
    "f30f1efa"  # endbr64
    "53"  # push %rbx
    "4989f8"  # mov %rdi, %r8
    "418b00"  # 1: mov (%r8), %eax
    "418b4808"  # mov 8(%r8), %ecx
    "0fa2"  # cpuid
    "418900"  # mov %eax, (%r8)
    "41895804"  # mov %ebx, 4(%r8)
    "41894808"  # mov %ecx, 8(%r8)
    "4189500c"  # mov %edx, 12(%r8)
    "4983c010"  # add $16, %r8
    "ffce"  # dec %esi
    "75e0"  # jnz 1b
    "5b"  # pop %rbx
    "31c0"  # xor %eax, %eax
    "c3"  # ret
)
# Leaf and subleaf: vendor; model and features, of which ebx tells one core from another; further features three times;
# the registers that are saved, of which ebx tells how large those are that the kernel has enabled.
_LEAVES = ((0, 0), (1, 0), (7, 0), (7, 1), (0xD, 0), (0x80000001, 0))
_OWN_AT = 5

_ask = machine_code(_ASK)


def processor() -> str:
    """Vendor, model and features, in hexadecimal digits; "" on another machine than x86-64."""
    if _ask is None:
        return ""
    rows = (ctypes.c_uint32 * (4 * len(_LEAVES)))()
    for number, (leaf, subleaf) in enumerate(_LEAVES):
        rows[4 * number], rows[4 * number + 2] = leaf, subleaf
    _ask(rows, ctypes.c_int(len(_LEAVES)))
    rows[_OWN_AT] = 0
    return struct.pack(f"<{len(rows)}I", *rows).hex()
