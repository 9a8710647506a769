"""Processes below a process: found in /proc, all stopped, then all killed.

Refuses to trust one look: it looks again until it finds nobody new, so that a process forked in between is found in the
next round. Invariant: nobody is killed before everybody is stopped.
"""

from __future__ import annotations

import os
import time

from runtime.linux import signals
from runtime.linux.libc import KernelError
from runtime.linux.process import has_ended, pidfd_open, pidfd_send_signal

_ROUNDS = 50


class _Entry:
    __slots__ = ("parent", "pid", "session")

    def __init__(self, pid: int, parent: int, session: int) -> None:
        self.pid = pid
        self.parent = parent
        self.session = session


def _processes() -> list[_Entry]:
    """Parent and session of every process that is no zombie: fields 3, 4 and 6 of proc_pid_stat(5)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{name}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fields = os.read(fd, 4096).rpartition(b")")[2].split()
        except OSError:
            continue
        finally:
            os.close(fd)
        if fields and fields[0] not in b"ZX":
            found.append(_Entry(int(name), int(fields[1]), int(fields[3])))
    return found


def members(root: int) -> set[int]:
    """`root`, everybody in the session that it leads, and all descendants of these."""
    table = _processes()
    inside = {root} | {entry.pid for entry in table if entry.session == root}
    while True:
        more = {entry.pid for entry in table if entry.parent in inside} - inside
        if not more:
            break
        inside |= more
    return inside & {entry.pid for entry in table}


def children(pid: int) -> set[int]:
    """Of a process with one thread: who it has to wait for (proc_pid_task_tid_children(5), where the kernel has it)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return {int(word) for word in file.read().split()}
    except FileNotFoundError:
        return {entry.pid for entry in _processes() if entry.parent == pid}


def kill_tree(root: int) -> None:
    """SIGKILL for `root`, which leads a session and is not waited for yet, and for all of its tree.

    All are stopped before any is killed: a stopped parent forks no more and stays the parent that its children are
    found by. What left both the tree and the session earlier is a daemon of the container and dies with that.
    """
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        new = members(root) - stopped
        if not new:
            break
        for pid in new:
            _signal(pid, signals.SIGSTOP)
        stopped |= new
    for pid in stopped | {root}:
        _signal(pid, signals.SIGKILL)


def kill_children(parent: int, keep: int, seconds: float) -> None:
    """SIGKILL for every child of `parent` but `keep`, with its tree, and for who becomes one by that, where `parent` is
    a subreaper. Returns once none of them runs, or after `seconds`: who is stuck in a system call ends later."""
    deadline = time.monotonic() + seconds
    while left := children(parent) & {entry.pid for entry in _processes()} - {keep}:
        for pid in left:
            try:
                pidfd = pidfd_open(pid)
            except KernelError:
                continue
            try:
                kill_tree(pid)
                if not has_ended(pidfd, max(0.0, deadline - time.monotonic())):
                    return
            finally:
                os.close(pidfd)


def _signal(pid: int, number: int) -> None:
    try:
        pidfd = pidfd_open(pid)
    except KernelError:
        return
    try:
        pidfd_send_signal(pidfd, number)
    except KernelError:
        pass
    finally:
        os.close(pidfd)
