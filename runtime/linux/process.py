"""Processes: clone3, namespaces, pidfds, capabilities, execveat, and what /proc says about a pid.

Refuses policy. Invariant: a process is named by a pidfd, or by pid *and* start time; a bare pid is never signalled.
Only single-threaded processes may call `clone3` or join a user or mount namespace here.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import time

from runtime.linux import foreign as ctypes
from runtime.linux.libc import KernelError, _libc, address, check, prctl, room, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

SIGCHLD = 17  # asm/signal.h; importing signal costs 5 ms of enums
# linux/sched.h
CLONE_NEWTIME, CLONE_VM, CLONE_FS, CLONE_PIDFD, CLONE_PARENT = 0x80, 0x100, 0x200, 0x1000, 0x8000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP = 0x100000000, 0x200000000
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME = 1, 4, 8, 15
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 23, 24, 36, 38, 39
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
CLOSE_RANGE_CLOEXEC = 4


# Looked up before any fork: doing it in each child would write to some sixty pages that it shares until then.
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child
_SIGKILL = 9
# linux/pidfd.h: struct pidfd_info as of its first version, of which we read the mask and, last, the exit code.
_PIDFD_INFO = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PARENTS_PATIENCE = 1.0  # seconds


def clone3(flags: int, *, cgroup_fd: int = -1) -> tuple[int, int]:
    """clone3(2) as a fork: (0, -1) in the child, (pid, pidfd) in the parent. The pidfd is CLOEXEC and the caller's.

    Without a stack of its own the child goes on in a copy of this one, as after fork(2); the interpreter's after-fork
    work is done here. `cgroup_fd` >= 0 asks for CLONE_INTO_CGROUP (cgroup v2 directory fd).
    """
    pidfd = ctypes.c_int(-1)
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    exit_signal = 0 if flags & CLONE_PARENT else SIGCHLD
    args = struct.pack(
        "=11Q", flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, exit_signal, 0, 0, 0, 0, 0, max(cgroup_fd, 0)
    )
    pid = syscall("clone3", args, len(args))
    if pid == 0:
        _after_fork_child()
        return 0, -1
    return pid, pidfd.value


def unshare(flags: int) -> None:
    """unshare(2)."""
    syscall("unshare", flags, subject=hex(flags))


def become(program: str, words: Sequence[str]) -> NoReturn:
    """execv(3) for a process with threads that may be making others just now: what libraries start in the background.
    Meanwhile clone(2) is refused with EAGAIN to whoever shares the caller's root and working directory (copy_fs in the
    kernel's kernel/fork.c), and a library says so on stderr. With CLONE_FS undone nobody shares these. Raises
    OSError."""
    unshare(CLONE_FS)
    os.execv(program, list(words))


def setns(fd: int, flags: int = 0) -> None:
    """setns(2); with a pidfd, `flags` may name several namespaces that are joined at once."""
    syscall("setns", fd, flags, subject=f"fd {fd} {hex(flags)}")


def pidfd_open(pid: int) -> int:
    """pidfd_open(2); the caller owns the fd."""
    return syscall("pidfd_open", pid, 0, subject=pid)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a copy of another process's fd, CLOEXEC and the caller's. Takes the right to ptrace it."""
    return syscall("pidfd_getfd", pidfd, number, 0, subject=f"fd {number}")


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """pidfd_send_signal(2)."""
    syscall("pidfd_send_signal", pidfd, number, None, 0, subject=f"signal {number}")


def signal_running(pidfd: int, number: int) -> bool:
    """pidfd_send_signal(2); False once the process has exited and was waited for."""
    try:
        pidfd_send_signal(pidfd, number)
    except KernelError as error:
        if error.errno == errno.ESRCH:
            return False
        raise
    return True


def end_child(pid: int, take_pidfd: int) -> None:
    """SIGKILL for a child, or a sibling, by its pidfd, and a wait for its end; an end of before is fine."""
    try:
        signal_running(take_pidfd, _SIGKILL)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            has_ended(take_pidfd, None)
    finally:
        os.close(take_pidfd)


def wait_or_look(pid: int, pidfd: int) -> tuple[int, int]:
    """(pid, status as of wait(2)) of a child that has ended, (0, 0) if it lives. Of a sibling the status is what the
    kernel tells of its pidfd (PIDFD_GET_INFO, Linux 6.15) once its parent has waited for it. Raises ChildProcessError
    where it cannot be known."""
    try:
        return os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        if not has_ended(pidfd, 0):
            return 0, 0
        status = _status_told(pidfd)
        if status is None:
            raise
        return pid, status


def _status_told(pidfd: int) -> int | None:
    import fcntl  # for what goes wrong

    told = bytearray(_PIDFD_INFO.size)
    deadline = time.monotonic() + _PARENTS_PATIENCE
    while time.monotonic() < deadline:
        _PIDFD_INFO.pack_into(told, 0, _PIDFD_INFO_EXIT, 0)
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, told)
        except OSError:
            return None
        mask, status = _PIDFD_INFO.unpack(told)
        if mask & _PIDFD_INFO_EXIT:
            return int(status)
        os.sched_yield()  # to the parent
    return None


def has_ended(pidfd: int, seconds: float | None) -> bool:
    """pidfd_open(2): with all of its threads, waited for or not, within that time; None: however long it takes."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """close_range(2)."""
    syscall("close_range", first, last, flags, subject=f"{first}-{last}")


def close_all_but(*keep: int) -> None:
    """Every fd but these and the first three."""
    first = 3
    for fd in sorted(fd for fd in keep if fd >= 3):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


def start_time(pid: int) -> int:
    """Field 22 of proc_pid_stat(5), clock ticks since boot: with the pid it names one process for ever.
    Raises ProcessLookupError."""
    return _stat(pid)[1]


def process_state(pid: int) -> str:
    """Field 3 of proc_pid_stat(5): "R", "S", "Z", … Raises ProcessLookupError."""
    return _stat(pid)[0]


def _stat(pid: int) -> tuple[str, int]:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name may hold blanks and parentheses: the last ')' ends it.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from None
    return fields[0].decode(), int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """True while the process that had `pid` and this start time exists and is no zombie."""
    try:
        state, ticks = _stat(pid)
    except ProcessLookupError:
        return False
    return ticks == started and state not in "ZX"


def capget() -> tuple[int, int, int]:
    """capget(2) of this thread: (effective, permitted, inheritable) bit sets."""
    header, data = struct.pack("=Ii", 0x20080522, 0), room()
    syscall("capget", header, data)
    e0, p0, i0, e1, p1, i1 = struct.unpack_from("=6I", data.raw)
    return e0 | e1 << 32, p0 | p1 << 32, i0 | i1 << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) of this thread."""
    header, low = struct.pack("=Ii", 0x20080522, 0), 0xFFFFFFFF
    sets = (effective, permitted, inheritable)
    data = struct.pack("=6I", *(s & low for s in sets), *(s >> 32 for s in sets))
    syscall("capset", header, data, subject="capabilities")


def capbset_drop(capability: int) -> None:
    """PR_CAPBSET_DROP."""
    prctl(PR_CAPBSET_DROP, capability)


def cap_ambient_clear() -> None:
    """PR_CAP_AMBIENT_CLEAR_ALL."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def cap_ambient_raise(capability: int) -> None:
    """PR_CAP_AMBIENT_RAISE: must be permitted and inheritable already."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def set_no_new_privs() -> None:
    """PR_SET_NO_NEW_PRIVS."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(on: bool) -> None:
    """PR_SET_DUMPABLE: off, /proc/PID/{exe,fd,…} belong to root and ptrace is refused to the unprivileged."""
    prctl(PR_SET_DUMPABLE, int(on))


def set_child_subreaper(on: bool) -> None:
    """PR_SET_CHILD_SUBREAPER. Plain ints, as these are: a shim pays for each object that it makes."""
    check(_libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0), "prctl", PR_SET_CHILD_SUBREAPER)


def set_keepcaps(on: bool) -> None:
    """PR_SET_KEEPCAPS: permitted capabilities outlive setuid from 0, until execve."""
    prctl(PR_SET_KEEPCAPS, int(on))


def set_parent_death_signal(number: int) -> None:
    """PR_SET_PDEATHSIG; 0 clears it."""
    prctl(PR_SET_PDEATHSIG, number)


def set_name(name: str) -> None:
    """PR_SET_NAME: what ps shows as comm, 15 bytes."""
    buffer = ctypes.create_string_buffer(os.fsencode(name)[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def sethostname(name: str) -> None:
    """sethostname(2)."""
    raw = os.fsencode(name)
    check(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), "sethostname", name)


def setdomainname(name: str) -> None:
    """setdomainname(2)."""
    raw = os.fsencode(name)
    check(_libc.setdomainname(raw, ctypes.c_size_t(len(raw))), "setdomainname", name)


def execveat(dirfd: int, path: str, argv: Sequence[bytes], env: Sequence[bytes], flags: int = 0) -> None:
    """execveat(2) with an environment of raw KEY=VALUE bytes. Returns only by raising KernelError."""
    c_argv = struct.pack(f"@{len(argv) + 1}P", *map(address, argv), 0)
    c_env = struct.pack(f"@{len(env) + 1}P", *map(address, env), 0)
    syscall("execveat", dirfd, os.fsencode(path), c_argv, c_env, flags, subject=path)


def personality(persona: int) -> None:
    """personality(2)."""
    check(_libc.personality(ctypes.c_ulong(persona)), "personality", hex(persona))


def ioprio_set(kind: int, priority: int) -> None:
    """ioprio_set(2) of this process; `kind` is IOPRIO_CLASS_*."""
    syscall("ioprio_set", 1, 0, kind << 13 | priority, subject=f"class {kind} priority {priority}")


def sched_setattr(policy: int, flags: int, nice: int, priority: int, times: tuple[int, int, int]) -> None:
    """sched_setattr(2) of this thread; `times` are runtime, deadline and period in nanoseconds."""
    attributes = struct.pack("=2IQiI3Q2I", 56, policy, flags, nice, priority, *times, 0, 0)  # SCHED_ATTR_SIZE_VER1
    syscall("sched_setattr", 0, attributes, 0, subject=f"policy {policy}")


# struct sigaction of the kernel (asm-generic/signal.h): handler, flags, restorer, mask; all zero is SIG_DFL.
_SIZEOF_SIGACTION, _SIZEOF_SIGSET = 32, 8


def reset_all_signals(*, handled: bool = True) -> None:
    """SIG_DFL for every signal and an empty mask, as execve(2) should find them. Without `handled` only those that are
    ignored: the others are at their default already, by CLONE_CLEAR_SIGHAND."""
    import _signal  # type: ignore[import-not-found]  # signal wraps it in enums, at 5 ms

    for number in range(1, _signal.NSIG):
        if not handled and _signal.getsignal(number) != _signal.SIG_IGN:
            continue
        try:
            _signal.signal(number, _signal.SIG_DFL)
        except (OSError, ValueError):
            pass  # SIGKILL, SIGSTOP, and the two that the C library keeps for itself
    for number in (32, 33):
        syscall("rt_sigaction", number, bytes(_SIZEOF_SIGACTION), None, _SIZEOF_SIGSET, subject=number)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def set_comm(name: str) -> None:
    """/proc/self/comm: what ps shows, 15 bytes, as PR_SET_NAME. Makes no ctypes buffer: each one makes a new array
    type, which writes to a hundred pages that a forked process shares until then."""
    fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(name)[:15])
    finally:
        os.close(fd)


RLIM_INFINITY = (1 << 64) - 1


def prlimit(resource: int, limit: tuple[int, int] | None = None) -> tuple[int, int]:
    """prlimit(2) of this process: sets (soft, hard) where given, and returns what was before. Raises KernelError.

    The module resource is a library of its own, and loading one costs more than this."""
    new = None if limit is None else struct.pack("=QQ", *limit)
    old = room()
    syscall("prlimit64", 0, resource, new, old, subject=f"resource {resource}")
    soft, hard = struct.unpack_from("=QQ", old)
    return soft, hard
