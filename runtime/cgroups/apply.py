"""Puts planned writes into force: all of them, or none.

Refuses to guess: what a file held is read before it is changed, and written back in reverse order when a later write
fails. Invariant: the first error is the one raised; a failing undo is a note on it (`add_note`), never in its place.
"""

from __future__ import annotations

import errno
import os

from runtime.cgroups.tree import read_at, write_at
from runtime.errors import RuntimeFailure
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.cgroups.plan import Write


class Step(Record):
    """A write and the directory it goes to; `directory` is for people."""

    dir_fd: int
    directory: str
    write: Write


class Journal:
    """What was in force before, newest last: `undo()` goes back to it."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done: list[tuple[int, str, list[str]]] = []

    def record(self, dir_fd: int, file: str, values: list[str]) -> None:
        """`values`, written to `file`, restore what is about to change."""
        self._done.append((dir_fd, file, values))

    def undo(self, error: BaseException) -> None:
        """Writes everything back, in reverse: each state on the way was legal on the way here as well."""
        while self._done:
            dir_fd, file, values = self._done.pop()
            try:
                for value in values:
                    write_at(dir_fd, file, value)
            except OSError as second:
                error.add_note(f"writing {values!r} back to {file} failed too: {second}")


def apply(steps: list[Step], journal: Journal | None) -> None:
    """Does the steps in order; with a journal (an update, not a fresh cgroup) each is recorded before it is done.
    Raises RuntimeFailure for the first that fails; undoing is the caller's, which may have more to undo."""
    for step in steps:
        write: Write | None = step.write
        while write is not None:
            try:
                if journal is not None:
                    journal.record(step.dir_fd, write.file, [previous(write, read_at(step.dir_fd, write.file))])
                write_at(step.dir_fd, write.file, write.value)
                break
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise failure(step, write, error) from error
                if write.otherwise is None and not write.optional:
                    raise failure(step, write, error) from error
            write = write.otherwise


def previous(write: Write, text: str) -> str:
    """What to write in order to get back to the content `text`, as reading and writing differ for some files."""
    lines = text.splitlines()
    if write.file == "memory.oom_control":
        return next((line.split()[1] for line in lines if line.startswith("oom_kill_disable")), "0")
    key, _, rest = write.value.partition(" ")
    if rest and (":" in key or write.file in ("rdma.max", "net_prio.ifpriomap")):
        # One line a device: "8:0 1048576", "8:0 rbps=1048576 wbps=max riops=max wiops=max", "8:0 200", "eth0 5".
        held = next((line for line in lines if line.split(" ")[0] == key), "")
        if held:
            return held
        if "=" in rest:
            return " ".join((key, *(f"{word.partition('=')[0]}=max" for word in rest.split())))
        return f"{key} default" if write.file == "io.weight" else f"{key} 0"
    return lines[0].strip() if lines else ""


_HINTS = {
    "memory.limit_in_bytes": "the processes use more than that now, and it cannot be reclaimed",
    "memory.memsw.limit_in_bytes": "the sum may not be less than the memory limit, nor than what is used now",
    "cpu.cfs_quota_us": "at least 1000 and the burst, and no larger a share than the parent cgroup has",
    "cpu.cfs_period_us": "1000 to 1000000, and no larger a share than the parent cgroup has",
    "cpu.cfs_burst_us": "at most the quota",
    "cpu.max": "quota and period are 1000 at least, the period 1000000 at most, and the burst is within the quota",
    "cpu.max.burst": "at most the quota",
    "cpuset.cpus": "only processors that are online and that the parent cgroup has",
    "cpuset.mems": "only memory nodes that the parent cgroup has",
    "blkio.bfq.weight_device": "only a disk whose scheduler is bfq has weights",
    "io.bfq.weight": "only a disk whose scheduler is bfq has weights",
    "cpu.rt_runtime_us": "the parent cgroup has no real-time budget to give",
}


def busy_memory(limit: object, usage: object, peak: object) -> str:
    """Why a limit cannot be set, in the words that callers of runc look for."""
    return (
        f"linux.resources.memory.limit: unable to set memory limit to {limit} "
        f"(current usage: {usage}, peak usage: {peak})"
    )


def failure(step: Step, write: Write, error: OSError) -> RuntimeFailure:
    """`error` as a sentence that names the field of config.json, the value and the file."""
    number = error.errno or 0
    name = errno.errorcode.get(number, str(number))
    hint = _HINTS.get(write.file, "")
    if number == errno.EBUSY and write.file == "memory.limit_in_bytes":
        usage, peak = (read_at(step.dir_fd, f"memory.{name}_in_bytes").strip() for name in ("usage", "max_usage"))
        message = busy_memory(write.value, usage, peak)
    elif number == errno.ENOENT:
        message = f"linux.resources.{write.field}: this kernel's cgroups have no {write.file} in {step.directory}"
        hint = "the controller is not on in this cgroup, or the kernel was built without it"
    else:
        words = os.strerror(number).lower()
        message = (
            f"linux.resources.{write.field}: write {write.value!r} to {step.directory}/{write.file}: {name} {words}"
        )
    refused = number in (
        errno.EINVAL,
        errno.ERANGE,
        errno.EBUSY,
        errno.ENOENT,
        errno.ENODEV,
        errno.EACCES,
        errno.ENOSPC,
        errno.EOPNOTSUPP,
    )
    return RuntimeFailure(
        message, step="cgroup", errno=number, hint=hint, code="invalid_argument" if refused else "internal"
    )
