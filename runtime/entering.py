"""The inside of an exec: who joins a container's namespaces, and the process that is cloned there, up to its execve.

Refuses to ask the container's own /proc, and to return into the caller's code once it is the new process. Invariant:
what fails is said on the channel, with its step, before the process ends.
"""

from __future__ import annotations

import os

from runtime import ids, labels, namespaces, process, sync
from runtime.errors import RuntimeFailure
from runtime.linux.process import (
    CLONE_CLEAR_SIGHAND,
    CLONE_NEWCGROUP,
    CLONE_NEWUSER,
    CLONE_PARENT,
    clone3,
    personality,
    set_dumpable,
    set_no_new_privs,
    setns,
)
from runtime.linux.progress import phase
from runtime.linux.successor import succeed
from runtime.seccomp_load import load
from runtime.terminal import make_controlling, name_of, open_pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, Protocol

    from runtime.cgroups.manager import Gate
    from runtime.exec import ExecRequest
    from runtime.linux.progress import Progress
    from runtime.state import State

    class Caller(Protocol):
        """Who hears of the process until its execve."""

        pid: int  # the process's, outside of the container

        def filenos(self) -> set[int]:
            """What it is heard through."""
            ...

        def expects(self, warnings: tuple[str, ...], *, always: bool) -> bool:
            """Told that execve is next; False if nobody would know of the command. Not `always`: only if it has to."""
            ...

        def fail(self, failure: RuntimeFailure) -> None:
            """Told by write(2) alone, which a seccomp filter forbids last."""
            ...


# What a process goes through up to its execve, in this order; each begins where the one before it ends.
STEPS = (
    "session",
    "console",
    "limits",
    "terminal",
    "labels",
    "cgroup",
    "scheduler",
    "cgroup namespace",
    "cwd",
    "files",
    "identity",
    "command",
    "wait",
    "seccomp",
    "exec",
)


class Inside:
    """One exec from its caller's fork to execve. `proc` is the host's /proc, `waits` as in `runtime.exec`. `progress`
    is told the STEPS by their numbers, where somebody wants to know when they were."""

    def __init__(
        self,
        request: ExecRequest,
        facts: State,
        init_fd: int,
        gate: Gate,
        program: bytes,
        proc: int,
        waits: bool,
        progress: Progress | None = None,
    ) -> None:
        self.warnings: list[str] = []
        self._request = request
        self._facts = facts
        self._process = request.process
        self._init_fd = init_fd
        self._gate = gate
        self._program = program
        self._proc = proc
        self._waits = waits
        self._progress = progress
        self._policy = _memory_policy(facts)
        self._step = "namespaces"

    def _at(self, step: str) -> None:
        self._step = step
        if self._progress is not None:
            self._progress.at(STEPS.index(step))

    def between(self, channel: sync.Channel) -> NoReturn:
        """Joins, clones the process as the caller's child, and ends."""
        try:
            pid, pidfd = self.join_and_clone(channel)
            channel.send("Child", pid=pid, fds=(pidfd,))
        except BaseException as error:
            channel.fail(RuntimeFailure.of(error, step=self._step, what="join the container"))
            os._exit(1)
        os._exit(0)

    def join_and_clone(self, channel: sync.Channel, *close: sync.Channel) -> tuple[int, int]:
        """Joins all namespaces and clones the process, a child of this one's parent, which talks on `channel`."""
        others = self._join()
        pid, pidfd = clone3(CLONE_PARENT | CLONE_CLEAR_SIGHAND, cgroup_fd=self._gate.cgroup_fd)
        if pid == 0:
            for other in close:
                other.close()
            self._main(channel, others, channel)
        return pid, pidfd

    def join_and_succeed(self, caller: Caller) -> NoReturn:
        """Joins all namespaces and makes the process, in the memory of this one and as a child of its parent. This one
        ends with the other's execve, or with the other. Raises RuntimeFailure and KernelError, from before that."""
        others = self._join()
        caller.pid = succeed(CLONE_CLEAR_SIGHAND, cgroup_fd=self._gate.cgroup_fd)
        phase("process")
        self._main(caller, others)

    def _join(self) -> int:
        """The namespaces that are the container's own, CLONE_NEWCGROUP iff the process is to join that itself."""
        self._oom_score()  # which is inherited; in a user namespace the process has no right to set its own
        set_dumpable(False)  # from here on the container could look (CVE-2016-9962)
        others = namespaces.others(self._facts.pid)
        last = others & CLONE_NEWCGROUP
        if last and others & CLONE_NEWUSER and namespaces.belongs_elsewhere(self._facts.pid, "cgroup"):
            last = 0  # from inside the user namespace it would be out of reach
        if together := others & ~last:
            # In one call: what is joined is judged by the rights from before it, which a namespace of the host's in a
            # container with a user namespace needs.
            setns(self._init_fd, together)
        return others & ~CLONE_NEWCGROUP | last

    def _main(self, caller: Caller, others: int, channel: sync.Channel | None = None) -> NoReturn:
        """The process. `channel` is the caller as one that may be asked: for a terminal, a listener, or a Go."""
        try:
            if self._waits and channel is not None:
                channel.receive("Go")
            identity, command, env = self._set_up(caller, others, channel)
            self._at("wait")
            if channel is None and self._progress is not None:
                self._progress.at(len(STEPS))
                self._progress.keep_as_parts("process", STEPS)  # what is left of it nobody will be there to tell
            if not caller.expects(tuple(self.warnings), always=self._waits):
                os._exit(1)  # nobody would know of the command
            self._step = "exec"
            process.reset_signals(handled=False)
            if self._program:
                self._at("seccomp")
                listener = load(self._program, self._facts.filter_flags)
                if listener >= 0 and channel is not None:
                    channel.offer(listener)
            identity.finish()
            self._at("exec")
            process.execute(command, self._process.args, env)
        except sync.Closed:
            pass
        except BaseException as error:
            caller.fail(RuntimeFailure.of(error, step=self._step))
        os._exit(1)

    def _set_up(
        self, caller: Caller, others: int, channel: sync.Channel | None
    ) -> tuple[process.Identity, str, list[bytes]]:
        """The steps of runtime.init.STEPS that a process without a root to make goes through, in their order."""
        import sys

        wanted = self._process
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sys.path[:] = []
        sys.meta_path[:] = []
        self._at("session")
        os.setsid()
        set_dumpable(False)
        if others & CLONE_NEWUSER:
            ids.be_root()
            set_dumpable(False)
        if not self._facts.no_new_keyring:
            process.new_keyring(f"_ses.{self._request.id}", self.warnings.append)
        slave = -1
        if wanted.terminal and channel is not None:
            self._at("console")
            master, slave = open_pair(root, wanted.console_size)
            channel.send("Console", text=(name_of(master),), fds=(master,))
            os.close(master)
        self._limits()
        self._at("terminal")
        self._stdio(slave)
        process.own_stdio(wanted.user)
        if wanted.apparmor_profile or wanted.selinux_label:
            self._at("labels")
            self._labels()
        self._enter_cgroups(others)
        return self._become(caller, root)

    def _limits(self) -> None:
        wanted = self._process
        self._at("limits")
        process.set_cpus(wanted.exec_affinity.initial if wanted.exec_affinity is not None else ())
        process.set_rlimits(wanted.rlimits, self.warnings.append)
        if wanted.io_priority is not None:
            process.set_io_priority(wanted.io_priority)
        if self._policy is not None:
            self._policy()
        if self._facts.personality is not None:
            personality(self._facts.personality)

    def _enter_cgroups(self, others: int) -> None:
        """And what counts from there on: processors of its cpuset, a share of its real-time budget."""
        wanted = self._process
        self._at("cgroup")
        self._gate.enter()
        if wanted.exec_affinity is not None and wanted.exec_affinity.final:
            process.set_cpus(wanted.exec_affinity.final)
        if wanted.scheduler is not None:
            self._at("scheduler")
            process.set_scheduler(wanted.scheduler)
        if others & CLONE_NEWCGROUP:
            self._at("cgroup namespace")
            setns(self._init_fd, CLONE_NEWCGROUP)

    def _become(self, caller: Caller, root: int) -> tuple[process.Identity, str, list[bytes]]:
        """Directory, fds and user of the command, and where it is found. Closes `root`."""
        wanted = self._process
        self._at("cwd")
        try:
            process.enter_directory(root, wanted.cwd)
        except OSError as error:
            what = f'chdir to cwd ("{wanted.cwd}") set in config.json failed'
            raise RuntimeFailure.of(error, what=what, code="invalid_argument") from None
        self._at("files")
        env = process.environment(wanted, root)
        os.close(root)
        process.close_all_but(caller.filenos(), self._request.preserve_fds)
        process.set_few_files(wanted.rlimits)
        if wanted.no_new_privileges:
            set_no_new_privs()
        self._at("identity")
        identity = process.Identity(wanted, self.warnings.append)
        identity.drop()
        set_dumpable(False)
        self._at("command")
        process.verify_directory()
        return identity, process.find_command(wanted.args[0], env), env

    def _oom_score(self) -> None:
        wanted = self._process.oom_score_adj
        if wanted is None:
            return
        try:
            fd = os.open("self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC, dir_fd=self._proc)
            try:
                if int(os.read(fd, 16)) != wanted:
                    os.write(fd, str(wanted).encode())
            finally:
                os.close(fd)
        except PermissionError:
            self.warnings.append(f"oom_score_adj {wanted} is lower than this process may set: it stays as it was")

    def _stdio(self, slave: int) -> None:
        if slave >= 0:
            for fd in (0, 1, 2):
                os.dup2(slave, fd)
            make_controlling(0)
            return
        copies = [os.dup(fd) for fd in self._request.stdio]
        for number, fd in enumerate(copies):
            os.dup2(fd, number)
            os.close(fd)

    def _labels(self) -> None:
        labels.write(self._proc, f"{os.readlink('self', dir_fd=self._proc)}/attr", self._process)


def _memory_policy(facts: State) -> Callable[[], None] | None:
    policy = facts.memory_policy
    if policy is None:
        return None
    from runtime import memory_policy  # imported here: a process in the container imports nothing

    return lambda: memory_policy.apply(policy)
