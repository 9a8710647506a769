"""The birth of a container: its init from the clone to its last Go, as the caller sees it (runtime/sync.py draws it).

Refuses to undo anything but the init: what was made before is the caller's, whose stack has `kill`. Invariant: an init
that ends on its way is waited for, and told of with the step that it had come to.
"""

from __future__ import annotations

import errno
import os
import select
import time

from runtime import init, process, rootfs, rootless, shared_birth, state, sync
from runtime.cloning import clone_init
from runtime.errors import RuntimeFailure
from runtime.init_state import Setup
from runtime.linux.failpoint import failpoint
from runtime.linux.libc import KernelError
from runtime.linux.process import end_child, wait_or_look
from runtime.linux.progress import Progress, phase
from runtime.namespaces import Joins
from runtime.newborn import adjust_oom_score, check_mappings, write_mappings
from runtime.spec import hosts_sysctl, namespace_of
from runtime.terminal import send_master

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.cgroups.manager import Manager
    from runtime.create import CreateRequest
    from runtime.intel_rdt import Membership
    from runtime.state import State


class Created:
    """The container's init: a child of the caller. `pidfd` and `console` (or -1) are the caller's to close."""

    __slots__ = ("_channel", "console", "pidfd", "state", "warnings")

    def __init__(self, made: State, pidfd: int, console: int, warnings: tuple[str, ...]) -> None:
        self.state = made
        self.pidfd = pidfd
        self.console = console
        self.warnings = warnings
        self._channel: sync.Channel | None = None

    def hold(self, take_channel: sync.Channel) -> None:
        """Keeps the channel to the init, which waits for `start` on it."""
        self._channel = take_channel

    def start(self, root: str) -> None:
        """What lifecycle.start does, for a container that was created with `hold`. Raises RuntimeFailure."""
        channel, self._channel = self._channel, None
        assert channel is not None
        try:
            channel.send("Start")
            failpoint("start.accepted")
            sync.until_executed(channel)
        finally:
            channel.close()
        try:
            os.unlink(f"{state.directory(root, self.state.id)}/{state.START_SOCKET}")
        except FileNotFoundError:  # it has ended, and somebody has deleted it
            pass


class Birth:
    """One init. `run` leads it to Ready, `release` lets it wait for start, `kill` ends it."""

    def __init__(
        self,
        request: CreateRequest,
        bundle: str,
        root_path: str,
        directory: str,
        manager: Manager,
        program: bytes,
        rdt: Membership | None,
    ) -> None:
        self._request = request
        self._spec = request.spec
        self._bundle = bundle
        self._root_path = root_path
        self._directory = directory
        self._manager = manager
        self._program = program
        self._rdt = rdt
        self._channel: sync.Channel | None = None
        self._pid = self._pidfd = self._console = -1
        self._open: list[int] = []
        self._created = now()

    def __enter__(self) -> Birth:
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def run(self) -> Created:
        """Clones the init and leads it to Ready."""
        spec = self._spec
        listener = sync.listen(self._directory, state.START_SOCKET)
        progress = Progress()
        joins = Joins(spec.namespaces)
        gate = self._manager.gate()
        try:
            for name, _ in spec.sysctl:
                if (kind := namespace_of(name)) in joins.callers:
                    raise RuntimeFailure(f"linux.sysctl: {hosts_sysctl(name, kind)}", code="invalid_argument")
            root_tree = self._early_root() if spec.has("user") else -1
            rootfs.load_for(spec, no_pivot=self._request.no_pivot)
            if spec.hooks.create_container or spec.hooks.start_container:
                import runtime.hooks  # noqa: F401  the init imports nothing
            sources = self._sources() if root_tree >= 0 or any(mount.idmap for mount in spec.mounts) else {}
            mine, its = sync.Channel.pair()
            self._channel = mine
            stays_behind = self._stays_behind()
            shares = self._request.sibling and not stays_behind
            shares = shares and shared_birth.may_share(spec, joins, self._manager, gate)
            process_ = spec.process
            assert process_ is not None  # create looked
            setup = Setup(
                id=self._request.id,
                spec=spec,
                process=process_,
                bundle=self._bundle,
                root_path=self._root_path,
                root_tree=root_tree,
                sources=sources,
                make_root=self._make_root,
                joins=joins.inside,
                gate=gate,
                cgroups=self._cgroups(),
                stdio=self._request.stdio,
                preserve_fds=self._request.preserve_fds,
                no_pivot=self._request.no_pivot,
                no_new_keyring=self._request.no_new_keyring,
                in_user_namespace=spec.has("user") or rootless.in_user_namespace(),
                dumpable=rootless.must_be_dumpable(spec),
                listener=listener,
                filter=self._filter(),
                memory_policy=self._memory_policy(),
                state=self._hook_state,
                progress=progress,
                stays_behind=stays_behind,
                end_by_signals=shared_birth.end_by_signals if shares else process.end_by_signals,
            )
            if shares:
                phase("init")
                self._pid, self._pidfd = shared_birth.clone_init(
                    setup, gate, mine, its, self._program, self._request.last_words
                )
            else:
                self._pid, self._pidfd = clone_init(
                    spec, joins, gate, mine, its, lambda: init.main(setup, its), sibling=self._request.sibling
                )
            its.close()
            return self._lead(progress, goes=not shares)
        finally:
            listener.close()
            progress.close()
            joins.close()
            gate.close()
            for fd in self._open:
                os.close(fd)
            self._open = []

    def _stays_behind(self) -> bool:
        if not any(key == "ocid.init" for key, _ in self._spec.annotations):
            return False
        from runtime import reaper  # for the few that ask for it; the init imports nothing

        return reaper.is_wanted(self._spec)

    def _filter(self) -> Callable[[], int] | None:
        profile, program = self._spec.seccomp, self._program
        if profile is None:
            return None
        from runtime import seccomp_load  # imported here: the init imports nothing

        return lambda: seccomp_load.load(program, profile.flags)

    def _memory_policy(self) -> Callable[[], None] | None:
        policy = self._spec.memory_policy
        if policy is None:
            return None
        from runtime import memory_policy  # imported here: the init imports nothing

        return lambda: memory_policy.apply(policy)

    def _make_root(self) -> int:
        spec, mounted = self._spec, self._request.rootfs
        if mounted is None or not spec.has("user"):
            return rootfs.open_root(mounted, self._root_path, spec.rootfs_propagation)
        from runtime.rootfs_sources import IdSpaces

        spaces = IdSpaces(spec)
        try:
            return rootfs.open_root(mounted, self._root_path, spec.rootfs_propagation, spaces.own())
        finally:
            spaces.close()

    def _sources(self) -> dict[int, int]:
        from runtime.rootfs_sources import open_sources

        found = open_sources(self._spec, self._bundle, self._root_path)
        self._open += found.values()
        return found

    def _cgroups(self) -> dict[str, str]:
        """What a cgroup mount shows: the container's cgroups, and where it could have none of its own, the caller's."""
        paths = self._manager.paths()
        if rootless.is_rootless(self._request.rootless) and any(mount.kind == "cgroup" for mount in self._spec.mounts):
            from runtime.cgroups.hierarchy import own_directories

            return own_directories() | paths
        return paths

    def _early_root(self) -> int:
        """The root for an init in a user namespace, which has not its caller's rights to reach it, and may not copy
        mounts of the host's. -1 where the caller may make no mounts either: then the init has the rights that he has.
        """
        try:
            self._open.append(self._make_root())
        except KernelError as error:
            if error.errno == errno.EPERM and rootless.is_rootless(None):
                return -1
            raise RuntimeFailure.of(error, step="rootfs", what="root.path") from None
        return self._open[-1]

    def _lead(self, progress: Progress, *, goes: bool) -> Created:
        """Hears the init until it is Ready; one that `goes` on its way only once it was told to, is told."""
        channel = self._channel
        assert channel is not None
        try:
            self._manager.adopt(self._pid)
            if self._spec.has_new("user"):
                write_mappings(self._pid, self._spec.uid_mappings, self._spec.gid_mappings)
            elif self._spec.uid_mappings:
                check_mappings(self._pid, self._spec.uid_mappings, self._spec.gid_mappings)
            # One that has gone ahead may have failed, said so and ended: it is heard first.
            warnings = list(adjust_oom_score(self._pid, self._spec)) if goes else []
            if self._rdt is not None:
                self._rdt.enter(self._pid)
            if self._spec.net_devices:
                from runtime import net_devices

                net_devices.move_to(self._spec.net_devices, self._spec.namespaces, self._pid)
            failpoint("create.cloned")
            if goes:
                phase("init")
                channel.send("Go")
            while True:
                message, fds = channel.receive("Console", "Hooks", "Listener", "Ready")
                if message.kind == "Ready":
                    break
                if message.kind == "Console":
                    self._take_console(fds[0], message.text[0])
                    continue
                if message.kind == "Hooks":
                    self._run_hooks()
                else:
                    self._pass_on(message)
                channel.send("Go")
        except (sync.Closed, BrokenPipeError):
            raise self._died(progress) from None
        progress.keep_as_parts("init", [step.name for step in init.STEPS])
        warnings += message.text
        if not goes:
            warnings += adjust_oom_score(self._pid, self._spec)
        if self._request.pidfd_socket:
            from runtime.inherited import send_fd

            send_fd(self._request.pidfd_socket, self._pidfd, "standard", "send the pidfd to pidfd socket")
        console, self._console = self._console, -1
        return Created(self._state(), self._pidfd, console, tuple(warnings))

    def _pass_on(self, message: sync.Message) -> None:
        from runtime import seccomp_notify  # few containers have a listener

        facts = self._state()
        agent = seccomp_notify.connect(facts.listener_path)
        seccomp_notify.deliver(agent, message, self._pidfd, facts, self._pid, "creating")

    def _take_console(self, master: int, name: str) -> None:
        self._console = master
        if self._request.console_socket:
            try:
                send_master(self._request.console_socket, master, name)
            finally:
                self._console = -1
                os.close(master)

    def _run_hooks(self) -> None:
        from runtime import hooks

        wanted = self._spec.hooks
        known = self._hook_state(self._pid, "creating")
        hooks.run(wanted.prestart, known, "prestart hooks", self._bundle)
        hooks.run(wanted.create_runtime, known, "createRuntime hooks", self._bundle)

    def _died(self, progress: Progress) -> RuntimeFailure:
        """The init ended without a word: by a signal, as a rule. Names the step it had come to."""
        reached = progress.reached()
        step = init.STEPS[reached].name if reached < len(init.STEPS) else "wait"
        how = "somebody else has waited for it"
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(1000)  # it closes its end before it is a zombie with a status
        try:
            ended, status = wait_or_look(self._pid, self._pidfd)
            if not ended:
                how = "it closed its end and lives"
            elif os.WIFEXITED(status):
                how = f"it exited with status {os.WEXITSTATUS(status)}"
            elif os.WIFSIGNALED(status):
                how = f"it was killed by signal {os.WTERMSIG(status)}"
        except ChildProcessError:
            pass
        hint, code = "", "internal"
        if self._manager.oom_kills():
            how, code = "it ran out of memory", "invalid_argument"
            hint = "linux.resources.memory.limit is too low for a process to start"
        return RuntimeFailure(f"the container's init ended in step {step}: {how}", step=step, hint=hint, code=code)

    def release(self, held: Created | None) -> None:
        """Create is over, and the init waits for start: on the channel if it is held, else, after the last Go, on
        start.sock."""
        channel, self._channel = self._channel, None
        assert channel is not None
        if held is not None:
            held.hold(channel)
            return
        channel.send("Go")
        channel.close()

    def kill(self) -> None:
        """Ends the init, if there is one, and waits for it."""
        close_console(self._console)
        self._console = -1
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd < 0:
            return
        end_child(self._pid, pidfd)

    def _state(self) -> State:
        facts = state.of_spec(
            self._spec,
            self._manager,
            container_id=self._request.id,
            pid=self._pid,
            created=self._created,
            bundle=self._bundle,
            rootfs=self._root_path,
            stdio=self._request.stdio,
        )
        return facts.changed(
            intel_rdt=None if self._rdt is None else self._rdt.group,
            poststart=self._spec.hooks.poststart,
            no_new_keyring=self._request.no_new_keyring,
        )

    def _hook_state(self, pid: int, status: str) -> bytes:
        return state.for_hooks(self._request.id, self._bundle, self._spec.annotations, status, pid)


def now() -> str:
    nanoseconds = time.time_ns()
    seconds, rest = divmod(nanoseconds, 10**9)
    moment = time.gmtime(seconds)
    date = f"{moment.tm_year:04}-{moment.tm_mon:02}-{moment.tm_mday:02}"
    return f"{date}T{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02}.{rest:09}Z"


def close_console(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
