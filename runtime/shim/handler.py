"""Requests about containers' lives, each served in a helper: create, start, signal, update, delete, and the pod's end.

A helper is a fork of the shim, so it sees all that the shim knew at that moment, for nothing; what may have changed
since it asks over its channel, under the container's lock. Refuses to wait for a lock for ever. Invariant: the shim has
adopted a new container before anybody hears of it, and containers/ID.json tells a cleaner about it from before its
process exists until it is deleted.
"""

from __future__ import annotations

import os
import time

from runtime.errors import RuntimeFailure
from runtime.linux import progress, signals
from runtime.linux.sockets import send_frame
from runtime.shim import protocol
from runtime.shim.engine import config_of, shares_pids
from runtime.shim.lingering import IDLE
from runtime.shim.logfile import LogFile
from runtime.shim.oom import OomSource
from runtime.shim.pipes import Pipes
from runtime.shim.protocol import Facts, PodMessage
from runtime.shim.records import (
    be_as_expendable_as,
    check_id,
    engine_for,
    read_record,
    runtime_root,
    save_record,
    ticks,
)
from runtime.shim.report import report
from runtime.shim.restarts import policy_of
from runtime.shim.sandbox import end_process, tear_down, unmount
from runtime.tree import children, kill_children

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from typing import Any

    from runtime.shim.channel import Channel
    from runtime.shim.engine import Engine, Made
    from runtime.shim.held import Held
    from runtime.shim.resident import Resident

_LOCK_DEADLINE = 60.0  # seconds for another call about the same container to end
_KILL_DEADLINE = 30.0  # seconds for a killed container to die: longer is stuck in the kernel
ANSWERED = object()


class Handler:
    """One request; `fds` came with it."""

    def __init__(
        self,
        pod: PodMessage,
        resident: Resident,
        channel: Channel,
        connection: socket.socket,
        fds: list[int],
        *,
        waited: bool = False,
    ) -> None:
        self._pod = pod
        self._resident = resident
        self._channel = channel
        self._connection = connection
        self._fds = fds
        self._waited = waited  # for this request: what this process has of the shim's memory is from before
        self.expects: tuple[str, ...] = ()  # what is likely to follow: the shim was told then that this helper is idle

    def run(self, request: bytes) -> None:
        """Does what is asked for, and answers."""
        name = protocol.operation(request)
        try:
            name, body = protocol.parse_request(request)
            operation: Callable[[object], object] | None = getattr(self, f"_do_{name}", None)
            if operation is None or not name.isidentifier():
                raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
            value = operation(body)
        except Exception as error:
            if not isinstance(error, RuntimeFailure | OSError):
                report(name, error)
            self._send(protocol.failure(error))
            return
        if value is not ANSWERED:
            self._send(protocol.reply(value))

    def _send(self, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            send_frame(self._connection, payload, fds)
        except OSError:  # the daemon has gone: it will ask again when it is back
            pass

    def _do_timed(self, body: object) -> object:
        """One of these, and where its time went: this helper is made for one request, and begins to keep that."""
        name, body = protocol.untimed(body, "create", "exec", "stream")
        progress.begin()
        value = getattr(self, f"_do_{name}")(body)
        return value if value is ANSWERED else self._timed(value)

    def _timed(self, value: object) -> object:
        """What is answered to a request that came as a timed one."""
        return {"value": value, "phases": progress.phases()} if progress.kept() else value

    # -------------------------------------------------------------------------------------------------- containers

    def _held(self, container_id: str) -> Held:
        held = self._resident.containers.get(container_id)
        if held is None:
            raise self._unknown(container_id)
        return held

    def _unknown(self, container_id: str) -> RuntimeFailure:
        return RuntimeFailure(
            f"container {container_id} is unknown to the shim of pod {self._pod.id}", code="not_found"
        )

    def _engine(self, handler: str) -> Engine:
        if self._pod.uids and not handler:
            from runtime.shim.userns_engine import MappedEngine  # few pods have a user namespace

            return MappedEngine(runtime_root(self._pod.state, handler), self._pod)
        return engine_for(self._pod.state, self._pod.directory, handler)

    def _lock(self, container_id: str, *, starts: bool = False) -> dict[str, Any] | None:
        """The container is ours alone until this helper ends; its facts, or None. Raises RuntimeFailure."""
        self._channel.set_timeout(_LOCK_DEADLINE)
        try:
            facts: dict[str, Any] | None = self._channel.ask("lock", container_id, starts)
        except TimeoutError:
            raise RuntimeFailure(
                f"container {container_id}: another call has been at work on it for {_LOCK_DEADLINE:.0f} s",
                code="unavailable",
                hint="stopping the pod ends that call, too",
            ) from None
        self._channel.set_timeout(None)
        return facts

    def _record(self, container_id: str) -> str:
        return f"{self._pod.directory}/containers/{container_id}.json"

    def _do_create(self, body: object) -> object:
        message = protocol.parse(protocol.ContainerMessage, body)
        words = f"create container {message.id}: its init was killed while it was set up"
        killed = RuntimeFailure(
            words, hint="the kernel's log says if memory was short; the same call may be made again"
        )
        last_words = (self._connection.fileno(), protocol.frame(protocol.failure(killed)))
        made = self._create(message, lambda engine, stdio: engine.create(message, stdio, last_words))
        # A create by these leaves a helper as it was before: in no namespace and with no right less.
        if not message.handler and not self._pod.uids:
            self._expect("start")
        return made

    def _expect(self, *operations: str) -> None:
        """Before the answer, if that may follow faster than this process would come to say it."""
        self.expects = operations
        self._channel.tell(IDLE)

    def _do_restore(self, body: object) -> object:
        images = protocol.parse(protocol.RestoreMessage, body)
        message = protocol.parse(protocol.ContainerMessage, images.container)
        return self._create(message, lambda engine, stdio: engine.restore(message, images, stdio))

    def _create(self, message: protocol.ContainerMessage, make: Callable[[Engine, Sequence[int]], Made]) -> object:
        check_id(message.id)
        if self._resident.stopping:
            raise RuntimeFailure(f"pod {self._pod.id} is being stopped", code="failed_precondition")
        if self._lock(message.id) is not None:
            raise RuntimeFailure(f"container {message.id} exists", code="already_exists")
        engine, record = self._engine(message.handler), self._record(message.id)
        if os.path.exists(record):  # of a create that was killed half-way
            engine.delete(message.id)
        facts = Facts(message.id)
        try:
            self._make_recorded(message, engine, lambda stdio: make(engine, stdio), facts)
        except BaseException:
            os.unlink(record)
            raise
        return facts.to_json()

    def _make_recorded(
        self,
        message: protocol.ContainerMessage,
        engine: Engine,
        make: Callable[[Sequence[int]], Made],
        facts: Facts,
    ) -> None:
        """The process, the shim's adoption of it, and the record of both."""
        record = self._record(message.id)
        save_record(record, message.bundle, message.handler, facts)
        pipes = Pipes(message)
        try:
            self._make(make, engine, message, pipes, facts)
        finally:
            pipes.close()
        save_record(record, message.bundle, message.handler, facts)

    def _make(
        self,
        make: Callable[[Sequence[int]], Made],
        engine: Engine,
        message: protocol.ContainerMessage,
        pipes: Pipes,
        facts: Facts,
    ) -> None:
        """The process, and the shim's adoption of it."""
        be_as_expendable_as("self", least=0)
        progress.phase("parse")
        made = make(pipes.child)
        try:
            if made.console >= 0:
                pipes.take_console(made.console)
            progress.phase("adopt")
            facts.pid = made.pid
            facts.started_ticks = ticks(made.pid)
            facts.created_ns = time.time_ns()
            oom = OomSource(made.pid)
            fds = {**pipes.ours, **oom.fds}
            config = config_of(message.bundle)
            policy = policy_of(config)
            told = {
                "facts": facts.to_json(),
                "bundle": message.bundle,
                "handler": message.handler,
                "log_path": message.log_path,
                "shares_pids": shares_pids(config),
                "restart": policy,
                "message": {name: getattr(message, name) for name in message._fields} if policy else {},
                "stdin_once": message.stdin_once,
                "oom": oom.before,
                "fds": list(fds),
            }
            self._channel.ask("adopt", told, fds=fds.values())
            for fd in oom.fds.values():
                os.close(fd)
        except BaseException:
            engine.delete(message.id)
            raise

    def _do_start(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        check_id(container_id)
        facts = self._lock(container_id, starts=True)
        # From the record: a helper that has been waiting for this (runtime.shim.lingering) knows what was, not what is.
        left = read_record(self._record(container_id))
        if facts is None or left is None:
            raise self._unknown(container_id)
        if facts["started_ns"] or facts["finished_ns"]:
            what = "has ended" if facts["finished_ns"] else "was started already"
            raise RuntimeFailure(f"start container {container_id}: it {what}", code="failed_precondition")
        when_ns = time.time_ns()
        try:
            self._engine(left[1]).start(container_id)
        except RuntimeFailure as error:
            self._channel.ask("note", container_id, str(error))
            raise
        self._send(protocol.reply(self._started(container_id, *left, when_ns)))
        # A hook after the start, a first probe: these are commands. Who has children must end, for them to be the
        # shim's; who may be more than it should ends as well.
        if not left[1] and not self._pod.uids and not children(os.getpid()):
            self._expect("exec", "rejoin")
        return ANSWERED

    def _started(self, container_id: str, bundle: str, handler: str, when_ns: int) -> object:
        value = self._channel.ask("started", container_id, when_ns)
        save_record(self._record(container_id), bundle, handler, Facts.from_json(value))
        return value

    def _do_signal(self, body: object) -> object:
        message = protocol.parse(protocol.SignalMessage, body)
        if not 0 < message.number < signals.NSIG:
            raise RuntimeFailure(f"signal {message.number} does not exist", code="invalid_argument")
        held = self._resident.containers.get(message.id)
        if held is not None and (not held.facts.finished_ns or (message.everyone and held.shares_pids)):
            self._engine(held.handler).kill(message.id, message.number, message.everyone)
        return {}

    def _do_delete(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        check_id(container_id)
        self._lock(container_id)
        self._delete(container_id)
        return {}

    def _delete(self, container_id: str) -> None:
        """Kills it if need be, waits until its exit is told, removes what the runtime has of it. The lock is ours."""
        record = self._record(container_id)
        facts = self._channel.ask("facts", container_id)
        left = read_record(record)
        if left is None and facts is None:
            return
        bundle, handler = ("", "") if left is None else left
        engine = self._engine(handler)
        self._channel.ask("retire", container_id)
        engine.delete(container_id)
        if facts is not None:
            self._await_exit(container_id, facts["pid"])
        if handler:
            unmount(f"{bundle}/rootfs")
        self._channel.ask("forget", container_id)
        if left is not None:
            os.unlink(record)

    def _await_exit(self, container_id: str, pid: int) -> None:
        self._channel.set_timeout(_KILL_DEADLINE)
        try:
            self._channel.ask("told", container_id)
        except TimeoutError:
            raise RuntimeFailure(
                f"delete container {container_id}: process {pid} did not die within {_KILL_DEADLINE:.0f} s of SIGKILL",
                code="unavailable",
                hint="it is stuck in the kernel: see /proc/PID/stack",
            ) from None
        self._channel.set_timeout(None)

    def _do_retire(self, body: object) -> object:
        """What is being started again runs when this is answered, so that a signal finds it."""
        container_id = protocol.parse(protocol.IdMessage, body).id
        self._lock(container_id)
        self._channel.ask("retire", container_id)
        return {}

    def _do_update(self, body: object) -> object:
        message = protocol.parse(protocol.UpdateMessage, body)
        held = self._held(message.id)
        if held.facts.finished_ns:
            raise RuntimeFailure(f"update container {message.id}: it has ended", code="failed_precondition")
        self._engine(held.handler).update(message.id, message.resources)
        return {}

    def _running(self, container_id: str, what: str) -> Held:
        held = self._held(container_id)
        check_runs(held.facts, what)
        return held

    def _do_pause(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        self._engine(self._running(container_id, "pause").handler).pause(container_id)
        return {}

    def _do_resume(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        held = self._resident.containers.get(container_id)
        if held is not None and not held.facts.finished_ns:
            self._engine(held.handler).resume(container_id)
        return {}

    def _do_checkpoint(self, body: object) -> object:
        message = protocol.parse(protocol.CheckpointMessage, body)
        self._engine(self._running(message.id, "checkpoint").handler).checkpoint(message)
        return {}

    def _do_reopen_log(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        held = self._held(container_id)
        if held.log_path:
            self._channel.ask("reopen", container_id, fds=[LogFile(held.log_path).fd])
        return {}

    def _do_list(self, _body: object) -> object:
        return [held.visible() for held in self._resident.containers.values()]

    # ------------------------------------------------------------------------------------------------- the end

    def _do_stop(self, _body: object) -> object:
        """Deletes every container, ends pause, unpins and unmounts, ends the shim. What cannot be deleted is said, and
        the shim stays for the next try."""
        pause_pid, names = self._channel.ask("stop", True)
        directory = f"{self._pod.directory}/containers"
        if os.path.isdir(directory):  # with what creates that were killed have left
            names += [name.removesuffix(".json") for name in os.listdir(directory) if name[0] != "."]
        failures: list[Exception] = []
        for container_id in dict.fromkeys(names):
            try:
                self._lock(container_id)
                self._delete(container_id)
            except (RuntimeFailure, OSError) as error:
                failures.append(error)
        if failures:
            self._channel.ask("stop", False)
            raise failures[0]
        if pause_pid:
            end_process(pause_pid)
        self._kill_left_over()
        tear_down(self._pod.directory)
        self._send(protocol.reply({}))
        self._channel.ask("end")
        return ANSWERED

    def _kill_left_over(self) -> None:
        """What helpers that were killed have left, a criu that hangs and whom it has started, is the shim's by now."""
        if children(os.getppid()) - {os.getpid()}:
            self._channel.ask("stop", True)  # who answers has been our parent all the time: these are nobody else's
            kill_children(os.getppid(), os.getpid(), _KILL_DEADLINE)


def check_runs(facts: Facts, what: str) -> None:
    """Raises RuntimeFailure for a container that is not running."""
    if facts.finished_ns or not facts.started_ns:
        why = "has ended" if facts.finished_ns else "was not started"
        raise RuntimeFailure(f"{what} container {facts.id}: it {why}", code="failed_precondition")
