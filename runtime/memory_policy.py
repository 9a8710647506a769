"""`linux.memoryPolicy`: from which NUMA nodes a container's memory comes (set_mempolicy(2)).

Refuses modes, flags and nodes that no kernel has; what this kernel has not, it says itself. Invariant: set by a process
on itself before its execve, so all that it starts has it too.
"""

from __future__ import annotations

from runtime.errors import RuntimeFailure
from runtime.linux.libc import KernelError
from runtime.linux.memory import set_mempolicy
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.fields import Fields

# linux/mempolicy.h
MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
FLAGS = {"MPOL_F_STATIC_NODES": 1 << 15, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_NUMA_BALANCING": 1 << 13}
_MOST_NODES = 1024  # MAX_NUMNODES of the largest configuration


class MemoryPolicy(Record):
    """`mode` holds the flags as well, as the system call wants it; `nodes` is a list such as "0-3,7"."""

    mode: int
    nodes: str = ""


def parse(fields: Fields) -> MemoryPolicy:
    """The object `linux.memoryPolicy`. Raises FieldError naming what is wrong by its path."""
    mode = MODES[fields.str("mode", required=True, choices=MODES)]
    for name in fields.strs("flags", choices=FLAGS):
        mode |= FLAGS[name]
    nodes = fields.str("nodes").replace(" ", "")
    try:
        _mask(nodes)
    except ValueError:
        problem = f'expected a list of nodes below {_MOST_NODES} such as 0-3,7, got "{nodes:.60}"'
        raise fields.error("nodes", problem) from None
    return MemoryPolicy(mode, nodes)


def _mask(nodes: str) -> int:
    """The nodes as bits. Raises ValueError."""
    mask = 0
    for part in nodes.split(",") if nodes else ():
        first, dash, last = part.partition("-")
        if not all(
            word.isascii() and word.isdecimal() and len(word) < 6 for word in ((first, last) if dash else (first,))
        ):
            raise ValueError(part)
        low, high = int(first), int(last or first)
        if not low <= high < _MOST_NODES:
            raise ValueError(part)
        mask |= (1 << high + 1) - (1 << low)
    return mask


def apply(policy: MemoryPolicy) -> None:
    """Puts it in force for this process. Raises RuntimeFailure."""
    try:
        set_mempolicy(policy.mode, _mask(policy.nodes))
    except KernelError as error:
        what = f"linux.memoryPolicy: mode {policy.mode:#x} nodes {policy.nodes or 'none'}"
        raise RuntimeFailure.of(error, step="memory policy", what=what, code="invalid_argument") from None
