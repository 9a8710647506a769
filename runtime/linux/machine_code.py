"""Functions of machine code, for the few steps between which an interpreter must not do anything.

Refuses machines that it is not written for, which are all but x86-64. Invariant: what is executed cannot be written to.
"""

from __future__ import annotations

import os
import struct

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError
from runtime.linux.memory import PROT_EXEC, PROT_READ, map_copy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def machine_code(code: bytes) -> Callable[..., int] | None:
    """The C function with that code for x86-64 (System V ABI), which returns an int; None where there can be none."""
    start = machine_code_at(code)
    return None if start is None else ctypes.function_at(start)


def machine_code_at(code: bytes) -> int | None:
    """Where that code for x86-64 is; None where it can be nowhere."""
    if os.uname().machine != "x86_64" or struct.calcsize("P") != 8:
        return None
    try:
        return map_copy(code, len(code), PROT_READ | PROT_EXEC)
    except KernelError:  # a policy of this machine against code that is made while a program runs
        return None
