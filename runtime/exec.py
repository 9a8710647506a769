"""exec: a further process in a running container, with its namespaces, cgroup, filter and what its spec asks for.

The process between joins all namespaces at once through the init's pidfd and clones the process itself, which is a
child of the caller. Refuses paused and stopped containers. Invariant: the caller learns whether execve succeeded, and
a process that failed before it is gone when the failure arrives.
"""

from __future__ import annotations

import errno
import os

from runtime import exec_cgroup, labels, namespaces, process, state, sync
from runtime.cgroups.manager import Gate, manager_from_paths
from runtime.entering import STEPS, Inside
from runtime.errors import RuntimeFailure
from runtime.linux import successor
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable
from runtime.linux.libc import KernelError
from runtime.linux.process import clone3, end_child, is_running, pidfd_open
from runtime.linux.progress import Progress, kept, phase
from runtime.linux.record import Record
from runtime.spec_process import Process
from runtime.state import State
from runtime.terminal import send_master

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from runtime.entering import Caller

    _R = TypeVar("_R")

_STOPPED = "cannot exec in a stopped container"
# What joining says of an init that has ended, cloning of a pid namespace that is being emptied (pid_namespaces(7)), and
# writing to a process that went with it.
_ENDING = (errno.ESRCH, errno.ENOMEM, errno.EPIPE)
_MAX_FILTER = 4096 * 8  # BPF_MAXINSNS of linux/filter.h, eight bytes each


class ExecRequest(Record):
    """What exec is asked for; the fields are those of runtime.create.CreateRequest. `cgroups` names cgroups below the
    container's, by controller or by "" for all. `ignore_paused` runs into a frozen container, where the process waits
    until it is thawed. `disposable`: the caller ends after this and stands in for the process between; it is in the
    container's namespaces afterwards, and the process is its parent's child."""

    root: str
    id: str
    process: Process
    stdio: tuple[int, ...] = (0, 1, 2)
    console_socket: str = ""
    pid_file: str = ""
    pidfd_socket: str = ""
    preserve_fds: int = 0
    cgroups: tuple[tuple[str, str], ...] = ()
    ignore_paused: bool = False
    disposable: bool = False


class Executed:
    """The new process: a child of the caller, past its execve. `pidfd` and `console` (or -1) are the caller's."""

    __slots__ = ("console", "pid", "pidfd", "warnings")

    def __init__(self, pid: int, pidfd: int, console: int, warnings: tuple[str, ...]) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.console = console
        self.warnings = warnings


def execute(request: ExecRequest) -> Executed:
    """See the module. Raises RuntimeFailure with the step that failed."""
    return _with_entry(request, _Entry.run)


def succeed(request: ExecRequest, caller: Caller) -> Executed:
    """As `execute` with a disposable caller, but for a process that asks for nothing but its execve this one does not
    return: it has ended then, `caller` hears of the process. Elsewhere it executes and returns."""
    return _with_entry(request, lambda entry: entry.succeed(caller))


def rehearse(request: ExecRequest) -> None:
    """What `execute` computes and looks up, without entering or making anything (runtime.shim.rehearsal)."""
    _with_entry(request, _Entry.rehearse)


def _with_entry(request: ExecRequest, act: Callable[[_Entry], _R]) -> _R:
    phase("look up")
    facts = state.load(request.root, request.id)
    init_fd = _hold(facts)
    try:
        own = manager_from_paths(dict(facts.cgroup_paths))
        if not request.ignore_paused and state.is_frozen(facts, own):
            words = "cannot exec in a paused container (use --ignore-paused to override)"
            raise RuntimeFailure(words, hint="resume it first", code="failed_precondition")
        labels.check(request.process)
        program = _filter_of(request.root, facts)
        with exec_cgroup.gate(facts, request.cgroups, own) as gate:
            return act(_Entry(request, facts, init_fd, gate, program))
    except (RuntimeFailure, OSError) as error:
        if (isinstance(error, sync.Closed) or error.errno in _ENDING) and _ends(init_fd):
            raise RuntimeFailure(_STOPPED, code="failed_precondition") from None
        raise
    finally:
        os.close(init_fd)


def _ends(init_fd: int) -> bool:
    """Whether the init has ended, or does so now: the last of it is to wait for what else its pid namespace holds."""
    import select  # imported here: an exec that succeeds has no need of it

    poll = select.poll()
    poll.register(init_fd, select.POLLIN)
    return bool(poll.poll(1000))


def _hold(facts: State) -> int:
    try:
        fd = pidfd_open(facts.pid)
    except KernelError:
        raise RuntimeFailure(_STOPPED, code="failed_precondition") from None
    if not is_running(facts.pid, facts.started):
        os.close(fd)
        raise RuntimeFailure(_STOPPED, code="failed_precondition")
    return fd


def _filter_of(root: str, facts: State) -> bytes:
    """The program that create kept: what confines the init confines every process that joins it."""
    if facts.filter_flags == state.NO_FILTER:
        return b""
    path = f"{state.directory(root, facts.id)}/{state.FILTER}"
    try:
        program = read_bounded(AT_FDCWD, path, _MAX_FILTER)
    except OSError as error:
        raise RuntimeFailure.of(error, what="read the container's seccomp filter", code="failed_precondition") from None
    if not program or len(program) % 8:
        raise RuntimeFailure(f"{path} is damaged: it is no seccomp filter", code="failed_precondition")
    return program


class _Entry:
    """One exec as its caller sees it."""

    def __init__(self, request: ExecRequest, facts: State, init_fd: int, gate: Gate, program: bytes) -> None:
        self._request = request
        self._facts = facts
        self._init_fd = init_fd
        self._gate = gate
        self._program = program
        self._warnings: list[str] = []

    def run(self) -> Executed:
        phase("join")
        mine, its = sync.Channel.pair()
        pid = pidfd = console = -1
        progress = Progress() if kept() else None
        # Held from before the caller joins anything: the container's own /proc is not asked (CVE-2025-52881).
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        waits = self._waits()
        inside = Inside(self._request, self._facts, self._init_fd, self._gate, self._program, proc, waits, progress)
        try:
            # Who has joined the container may no longer take an fd out of a process, nor reach resctrl or a bus.
            if self._request.disposable and not self._acts():
                pid, pidfd = inside.join_and_clone(its, mine)
                its.close()
            else:
                pid, pidfd = self._clone_between(inside, mine, its)
            if self._facts.intel_rdt is not None:
                from runtime import intel_rdt  # for machines that have it

                intel_rdt.enter(self._facts.intel_rdt, pid)
            if self._gate.late is not None:
                self._gate.late(pid)
            failpoint("exec.cloned")
            phase("process")
            if waits:
                mine.send("Go")
            console = self._hear(mine, pid, pidfd)
            if progress is not None:
                progress.at(len(STEPS))  # it has become its command, which closes its end
                progress.keep_as_parts("process", STEPS)
            if self._request.pidfd_socket:
                from runtime.inherited import send_fd

                send_fd(self._request.pidfd_socket, pidfd, "setns", "send the pidfd to pidfd socket")
            if self._request.pid_file:
                write_durable(self._request.pid_file, str(pid).encode(), 0o644, sync=False)
            return Executed(pid, pidfd, console, tuple(self._warnings))
        except BaseException:
            if console >= 0:
                os.close(console)
            if pidfd >= 0:  # it did not come to its execve
                end_child(pid, pidfd)
            raise
        finally:
            mine.close()
            os.close(proc)
            if progress is not None:
                progress.close()

    def succeed(self, caller: Caller) -> Executed:
        """See runtime.exec.succeed."""
        asks = self._request.process.terminal or self._request.pid_file or self._request.pidfd_socket
        if asks or self._waits() or not successor.AVAILABLE:
            return self.run()
        phase("join")
        progress = Progress() if kept() else None
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        inside = Inside(self._request, self._facts, self._init_fd, self._gate, self._program, proc, False, progress)
        try:
            inside.join_and_succeed(caller)
        finally:
            os.close(proc)

    def rehearse(self) -> None:
        """The parts of both sides that change nothing."""
        wanted = self._request.process
        Inside(self._request, self._facts, self._init_fd, self._gate, self._program, -1, self._waits())
        namespaces.others(self._facts.pid)
        mine, its = sync.Channel.pair()
        its.expects(("rehearsed",), always=True)
        mine.receive("Ready")
        its.close()
        self._hear(mine, -1, -1)
        mine.close()
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            process.find_command(wanted.args[0], process.environment(wanted, root))
        finally:
            os.close(root)
        process.verify_directory()
        process.Identity(wanted, self._warnings.append)

    def _waits(self) -> bool:
        """Whether the process waits for a Go. A word to and fro costs a change of processes, so it does not where the
        caller has nothing to do meanwhile, and has given itself up for this exec."""
        return not self._request.disposable or self._acts()

    def _acts(self) -> bool:
        """Whether the caller has something to do for the process that it could not do from inside of the container."""
        return bool(self._facts.listener_path or self._facts.intel_rdt or self._gate.late)

    def _hear(self, channel: sync.Channel, pid: int, pidfd: int) -> int:
        """What the process has to say until execve closes its end. The console's master, or -1. One that waited for
        Go says Ready in any case: who has not has died before its command."""
        console = -1
        ready = not self._waits()
        try:
            while True:
                message, fds = channel.receive("Console", "Ready", "Listener")
                if message.kind == "Console":
                    console = self._console(fds[0], message.text[0])
                elif message.kind == "Ready":
                    ready = True
                    self._warnings += message.text
                else:
                    self._pass_on(message, pid, pidfd)
                    channel.send("Go")
        except BaseException as error:
            if ready and isinstance(error, sync.Closed):
                return console
            if console >= 0:
                os.close(console)
            raise

    def _pass_on(self, message: sync.Message, pid: int, pidfd: int) -> None:
        from runtime import seccomp_notify  # few containers have a listener

        agent = seccomp_notify.connect(self._facts.listener_path)
        seccomp_notify.deliver(agent, message, pidfd, self._facts, pid, "running")

    def _clone_between(self, inside: Inside, mine: sync.Channel, its: sync.Channel) -> tuple[int, int]:
        """The process and its pidfd, made by a process between that joins for it."""
        between, between_fd = clone3(0)
        if between == 0:
            mine.close()
            inside.between(its)
        os.close(between_fd)
        its.close()
        try:
            message, fds = mine.receive("Child")
            return message.pid, fds[0]
        finally:
            os.waitpid(between, 0)

    def _console(self, master: int, name: str) -> int:
        if not self._request.console_socket:
            return master
        try:
            send_master(self._request.console_socket, master, name)
        finally:
            os.close(master)
        return -1
