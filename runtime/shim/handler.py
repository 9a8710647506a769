"""What a helper does: one request of one connection, from the first byte to the answer, then it ends.

A helper is a fork of the shim, so it sees all that the shim knew at that moment, for nothing; what may have changed
since it asks over its channel, under the container's lock. It may block on whatever it likes. Refuses peers other than
root (SO_PEERCRED, threats S50). Invariant: the shim has adopted a new container before anybody hears of it, and
containers/ID.json tells a cleaner about it from before its process exists until it is deleted.
"""

from __future__ import annotations

import os
import select
import socket
import time

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux import signals
from runtime.linux.files import write_durable
from runtime.linux.process import close_range, pidfd_open, start_time
from runtime.linux.sockets import FrameError, peer_uid, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.channel import Channel
from runtime.shim.commands import run_on_fds, run_to_end
from runtime.shim.engine import NativeEngine, shares_pids
from runtime.shim.external import ExternalEngine
from runtime.shim.logfile import LogFile
from runtime.shim.oom import OomSource
from runtime.shim.pipes import Pipes
from runtime.shim.protocol import Facts, PodMessage, SweepMessage
from runtime.shim.reaper import exit_code
from runtime.shim.resident import report
from runtime.shim.sandbox import set_up, tear_down, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable
    from typing import Any, NoReturn

    from runtime.shim.engine import Engine
    from runtime.shim.held import Held
    from runtime.shim.resident import Resident, Work

_PATIENCE = 10.0  # seconds for a connected peer to say what it wants
_KILL_DEADLINE = 30.0  # seconds for a killed container to die: longer is stuck in the kernel
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
_MAX_ID = 1024
_ANSWERED = object()


def serve(resident: Resident, connection_fd: int, end: Socket) -> NoReturn:
    """In a fork of the shim: never returns."""
    try:
        become_helper(connection_fd, end.fileno(), *(held.stdio.console for held in resident.containers.values()))
        with socket.socket(fileno=connection_fd) as connection:
            Handler(resident, Channel(end), connection).run()
    except BaseException as error:
        report("serve a request", error)
    finally:
        os._exit(0)


def first_helper(state: str, zygote: int) -> Work:
    """The first helper of a new shim: reads the request that the shim was forked for, and brings its pod up. The
    zygote looks at nothing itself, so questions about it come here, too, and work on pods whose shim is gone."""

    def work(resident: Resident, connection_fd: int, end: Socket) -> NoReturn:
        try:
            become_helper(connection_fd, end.fileno())
            with socket.socket(fileno=connection_fd) as connection:
                connection.settimeout(_PATIENCE)
                received = recv_frame(connection) if peer_uid(connection) == 0 else None
                if received is not None:
                    send_frame(connection, _first_answer(received[0], Channel(end), state, zygote))
        except (OSError, FrameError):  # who asked has gone: it finds the shim, or its directory, when it is back
            pass
        except BaseException as error:
            report("start the pod", error)
        finally:
            os._exit(0)

    return work


def _first_answer(request: bytes, channel: Channel, state: str, zygote: int) -> bytes:
    try:
        name, body = protocol.parse_request(request)
        if name == "start":
            return protocol.reply(_set_up(protocol.parse(PodMessage, body), channel, request))
        if name == "sweep":
            from runtime.shim.sweep import Sweeper

            return protocol.reply(Sweeper(protocol.parse(SweepMessage, body)).run())
        if name == "quit" and zygote:
            os.unlink(f"{state}/zygote.sock")
            os.kill(zygote, signals.SIGKILL)  # our shim's maker: it has nothing to lose
        elif name != "hello":
            raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
        return protocol.reply({"pid": zygote, "version": os.environ.get("OCID_VERSION", "")})
    except (OSError, RuntimeFailure) as error:
        return protocol.failure(error)


def _set_up(pod: PodMessage, channel: Channel, request: bytes) -> dict[str, object]:
    """Namespaces, pins, /dev/shm, pause; then the shim listens. Its and pause's pids. Raises OSError, RuntimeFailure;
    then nothing is left."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(f"{pod.directory}/shim.log", flags, 0o600)
    os.dup2(log, 2, inheritable=False)
    pause_pid = set_up(pod)
    try:
        record = shim_record(os.getppid(), pause_pid)
        write_durable(f"{pod.directory}/shim.json", encode(record), sync=False)
        if pause_pid:
            channel.ask("pause", pause_pid)
        channel.ask("listen", f"{pod.directory}/shim.sock", f"shim {pod.id}"[:15].encode(), request, fds=[log])
    except BaseException:
        if pause_pid:
            end_process(pause_pid)
        tear_down(pod.directory)
        raise
    return record


def pod_of(resident: Resident) -> PodMessage:
    """The pod that the shim was started for."""
    return protocol.parse(protocol.PodMessage, protocol.parse_request(resident.request)[1])


def shim_record(pid: int, pause_pid: int) -> dict[str, object]:
    """shim.json: who the shim and its pause process are, for a cleaner that must not hit others."""
    pause_ticks = start_time(pause_pid) if pause_pid else 0
    return {"pid": pid, "started_ticks": start_time(pid), "pause_pid": pause_pid, "pause_ticks": pause_ticks}


def kill_rest(container_id: str, handler: str) -> Work:
    """Work for a helper: everybody left in a container is killed."""

    def work(resident: Resident, _connection: int, end: Socket) -> NoReturn:
        try:
            become_helper(end.fileno())
            pod = pod_of(resident)
            engine_for(pod.state, pod.directory, handler).kill(container_id, signals.SIGKILL, True)
        except BaseException as error:
            report("kill the rest", error)
        finally:
            os._exit(0)

    return work


def become_helper(*keep: int) -> None:
    """A fork of the shim as a process of its own: no handlers, and no fds but `keep`."""
    signals.wake_up(-1)
    for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
        signals.handle(number, None)
    first = 3
    for fd in sorted(fd for fd in keep if fd >= 3):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1
    close_range(first)


class Handler:
    """One request."""

    def __init__(self, resident: Resident, channel: Channel, connection: socket.socket) -> None:
        self._resident = resident
        self._pod = pod_of(resident)
        self._channel = channel
        self._connection = connection
        self._fds: list[int] = []

    def run(self) -> None:
        connection = self._connection
        if peer_uid(connection) != 0:
            return
        connection.settimeout(_PATIENCE)
        try:
            received = recv_frame(connection, want_fds=True)
        except (OSError, FrameError):
            return
        if received is None:
            return
        self._fds = received[1]
        try:
            connection.settimeout(None)
            name, body = protocol.parse_request(received[0])
            operation: Callable[[object], object] | None = getattr(self, f"_do_{name}", None)
            if operation is None or not name.isidentifier():
                raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
            value = operation(body)
        except Exception as error:
            if not isinstance(error, RuntimeFailure | OSError):
                report(name, error)
            self._send(protocol.failure(error))
            return
        if value is not _ANSWERED:
            self._send(protocol.reply(value))

    def _send(self, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            send_frame(self._connection, payload, fds)
        except OSError:  # the daemon has gone: it will ask again when it is back
            pass

    # -------------------------------------------------------------------------------------------------- containers

    def _held(self, container_id: str) -> Held:
        held = self._resident.containers.get(container_id)
        if held is None:
            raise RuntimeFailure(
                f"container {container_id} is unknown to the shim of pod {self._pod.id}", code="not_found"
            )
        return held

    def _engine(self, handler: str) -> Engine:
        return engine_for(self._pod.state, self._pod.directory, handler)

    def _record(self, container_id: str) -> str:
        return f"{self._pod.directory}/containers/{container_id}.json"

    def _do_create(self, body: object) -> object:
        message = protocol.parse(protocol.ContainerMessage, body)
        check_id(message.id)
        if self._resident.stopping:
            raise RuntimeFailure(f"pod {self._pod.id} is being stopped", code="failed_precondition")
        if self._channel.ask("lock", message.id) is not None:
            raise RuntimeFailure(f"container {message.id} exists", code="already_exists")
        engine, record = self._engine(message.handler), self._record(message.id)
        if os.path.exists(record):  # of a create that was killed half-way
            engine.delete(message.id)
        facts = Facts(message.id)
        save_record(record, message.bundle, message.handler, facts)
        try:
            pipes = Pipes(message)
            try:
                self._make(engine, message, pipes, facts)
            finally:
                pipes.close()
        except BaseException:
            os.unlink(record)
            raise
        save_record(record, message.bundle, message.handler, facts)
        return facts.to_json()

    def _make(self, engine: Engine, message: protocol.ContainerMessage, pipes: Pipes, facts: Facts) -> None:
        """The process, and the shim's adoption of it."""
        made = engine.create(message, pipes.child)
        try:
            if made.console >= 0:
                pipes.take_console(made.console)
            facts.pid = made.pid
            facts.started_ticks = ticks(made.pid)
            facts.created_ns = time.time_ns()
            oom = OomSource(made.pid)
            fds = {**pipes.ours, **oom.fds}
            told = {
                "facts": facts.to_json(),
                "bundle": message.bundle,
                "handler": message.handler,
                "log_path": message.log_path,
                "shares_pids": shares_pids(message.bundle),
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
        facts = self._channel.ask("lock", container_id)
        held = self._held(container_id)
        if facts is None:
            raise RuntimeFailure(f"container {container_id} was deleted", code="not_found")
        if facts["started_ns"] or facts["finished_ns"]:
            what = "has ended" if facts["finished_ns"] else "was started already"
            raise RuntimeFailure(f"start container {container_id}: it {what}", code="failed_precondition")
        when_ns = time.time_ns()
        try:
            self._engine(held.handler).start(container_id)
        except RuntimeFailure as error:
            self._channel.ask("note", container_id, str(error))
            raise
        value = self._channel.ask("started", container_id, when_ns)
        save_record(self._record(container_id), held.bundle, held.handler, Facts.from_json(value))
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
        self._channel.ask("lock", container_id)
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

    def _do_update(self, body: object) -> object:
        message = protocol.parse(protocol.UpdateMessage, body)
        held = self._held(message.id)
        if held.facts.finished_ns:
            raise RuntimeFailure(f"update container {message.id}: it has ended", code="failed_precondition")
        self._engine(held.handler).update(message.id, message.resources)
        return {}

    def _do_reopen_log(self, body: object) -> object:
        container_id = protocol.parse(protocol.IdMessage, body).id
        held = self._held(container_id)
        if held.log_path:
            self._channel.ask("reopen", container_id, fds=[LogFile(held.log_path).fd])
        return {}

    def _do_list(self, _body: object) -> object:
        return [held.visible() for held in self._resident.containers.values()]

    # -------------------------------------------------------------------------------------------- streams and events

    def _running(self, container_id: str) -> Held:
        held = self._held(container_id)
        if held.facts.finished_ns or not held.facts.started_ns:
            what = "has ended" if held.facts.finished_ns else "was not started"
            raise RuntimeFailure(f"exec in container {container_id}: it {what}", code="failed_precondition")
        return held

    def _do_exec(self, body: object) -> object:
        message = protocol.parse(protocol.ExecMessage, body)
        engine = self._engine(self._running(message.id).handler)
        finished = run_to_end(engine, message, self._connection.fileno(), self._status)
        header = {"exit_code": finished.code, "timed_out": finished.timed_out, "truncated": finished.truncated}
        for payload in (protocol.reply(header), finished.stdout, finished.stderr):
            self._send(payload)
        return _ANSWERED

    def _status(self, pid: int) -> int:
        """The wait status of a command: our child, or, as the native runtime makes it, the shim's."""
        try:
            return os.waitpid(pid, 0)[1]
        except ChildProcessError:
            return int(self._channel.ask("status", pid))

    def _do_stream(self, body: object) -> object:
        message = protocol.parse(protocol.StreamMessage, body)
        held = self._running(message.id)
        if not message.terminal and len(self._fds) != 3:
            raise RuntimeFailure(
                f"exec in container {message.id}: expected stdin, stdout and stderr, got {len(self._fds)} fds",
                code="invalid_argument",
            )
        started = run_on_fds(self._engine(held.handler), message, self._fds)
        self._send(protocol.reply({"pid": started.pid}), (started.console,) if started.console >= 0 else ())
        self._send(protocol.reply({"exit_code": exit_code(self._status(started.pid))[0]}))
        return _ANSWERED

    def _do_attach(self, body: object) -> object:
        """From here on the connection is the control fd: resize frames come in, its end is the end of the output. The
        shim copies the streams for as long as this process is there."""
        message = protocol.parse(protocol.AttachMessage, body)
        console = self._held(message.id).stdio.console
        self._channel.ask("attach", message.id, message.stdin, fds=self._fds)
        for fd in self._fds:
            os.close(fd)
        self._send(protocol.reply({}))
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        while all(fd == self._connection.fileno() for fd, _ in poll.poll()):
            try:
                received = recv_frame(self._connection)
            except (OSError, FrameError):
                break
            if received is None:
                break
            if console >= 0:
                protocol.resize(console, received[0])
        return _ANSWERED

    def _do_events(self, _body: object) -> object:
        # The shim sends the answer, too: what happens after it is told, and nothing before it.
        self._channel.ask("subscribe", protocol.frame(protocol.reply({})), fds=[self._connection.fileno()])
        return _ANSWERED

    # ------------------------------------------------------------------------------------------------- the end

    def _do_stop(self, _body: object) -> object:
        """Deletes every container, ends pause, unpins and unmounts, ends the shim. What cannot be deleted is said, and
        the shim stays for the next try."""
        names = self._channel.ask("stop", True)
        directory = f"{self._pod.directory}/containers"
        if os.path.isdir(directory):  # with what creates that were killed have left
            names += [name.removesuffix(".json") for name in os.listdir(directory) if name[0] != "."]
        failures: list[Exception] = []
        for container_id in dict.fromkeys(names):
            try:
                self._channel.ask("lock", container_id)
                self._delete(container_id)
            except (RuntimeFailure, OSError) as error:
                failures.append(error)
        if failures:
            self._channel.ask("stop", False)
            raise failures[0]
        if self._resident.pause_pid:
            end_process(self._resident.pause_pid)
        tear_down(self._pod.directory)
        self._send(protocol.reply({}))
        self._channel.ask("end")
        return _ANSWERED


def engine_for(state: str, directory: str, handler: str) -> Engine:
    """The engine of a handler, with its state under `state` and its scratch files in the pod's directory."""
    root = runtime_root(state, handler)
    return ExternalEngine(handler, root, f"{directory}/scratch") if handler else NativeEngine(root)


def runtime_root(state: str, handler: str) -> str:
    """Where the runtime keeps its state: for the native one what `ocirun --root` is given."""
    return f"{state}/runtime" if not handler else f"{state}/handlers/{handler.strip('/').replace('/', '-')}"


def check_id(container_id: str) -> None:
    """Ids become parts of paths (threats S19). Raises RuntimeFailure."""
    good = container_id and len(container_id) <= _MAX_ID and _ID_CHARACTERS.issuperset(container_id)
    if not good or container_id[0] in ".-+":
        raise RuntimeFailure(
            f"{container_id[:80]!r} is no container id: letters, digits, _ . + - only", code="invalid_argument"
        )


def save_record(path: str, bundle: str, handler: str, facts: Facts) -> None:
    """containers/ID.json: what a cleaner needs once the shim is gone. Raises OSError: without it nothing is begun."""
    value = {"bundle": bundle, "handler": handler, "facts": facts.to_json()}
    write_durable(path, encode(value), sync=False)


def read_record(path: str) -> tuple[str, str] | None:
    """Bundle and handler of a record; None when there is none, ("", "") when it cannot be read."""
    try:
        with open(path, "rb") as file:
            value: Any = decode(file.read())
        return str(value["bundle"]), str(value["handler"])
    except FileNotFoundError:
        return None
    except (RuntimeFailure, KeyError, TypeError):
        return "", ""


def ticks(pid: int) -> int:
    """The start time of a process, 0 when it has ended and been waited for."""
    try:
        return start_time(pid)
    except ProcessLookupError:
        return 0


def end_process(pid: int) -> None:
    """SIGKILL for a child of the shim's, and its end: the shim waits for it as for every child."""
    pidfd = pidfd_open(pid)
    os.kill(pid, signals.SIGKILL)
    select.select([pidfd], [], [], _KILL_DEADLINE)
    os.close(pidfd)
