"""Limits as a list of small writes: what v1 and v2 have in common.

Refuses to touch a file. Invariant: a plan is data, in the order in which it must be applied, and each write knows
which field of config.json asked for it.
"""

from __future__ import annotations

from runtime.linux.record import Record

CONTROLLERS = ("cpuset", "cpu", "memory", "pids", "blkio", "hugetlb", "rdma", "net_cls", "net_prio")


class Write(Record):
    """`value` into `file` of the cgroup; `field` is the path below linux.resources that asked for it.

    `optional`: a kernel without that file already does what is asked. `otherwise`: what to write where `file` is
    missing, the same wish under its other name.
    """

    file: str
    value: str
    field: str
    optional: bool = False
    otherwise: Write | None = None

    def describe(self) -> str:
        return f"{self.field}: write {self.value!r} to {self.file}"


class Now(Record):
    """What is in force, as far as the order of writes hangs on it. None: a fresh cgroup, with nothing in force.
    -1 is unlimited."""

    memory_limit: int | None = None
    memory_swap: int | None = None
    cpu_quota: int | None = None
    cpu_period: int | None = None


UNLIMITED = 1 << 63


def above(value: int) -> int:
    """A number that compares as the limit does: -1 is more than anything."""
    return UNLIMITED if value < 0 else value
