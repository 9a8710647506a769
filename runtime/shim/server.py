"""The shim of one pod: serves the daemon's requests over shim.sock and outlives it.

Every request is a task of the loop, so a slow one (a runtime binary, an exec) holds up neither the logs nor other
requests; for the native runtime the few milliseconds of a set-up are taken at once. Refuses to end by a signal:
SIGTERM and SIGHUP are handled and ignored, only `stop` ends a shim, and SIGKILL, after which the containers run on
without it. Invariant: a container is in `_containers` from before its process exists until it is deleted, and
containers/ID.json tells a cleaner about it for as long.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux import signals
from runtime.linux.files import write_durable
from runtime.linux.process import start_time
from runtime.linux.sockets import listen_unix
from runtime.shim import protocol
from runtime.shim.commands import run_to_end
from runtime.shim.connection import EVENT_LIMIT, Connection, accept
from runtime.shim.engine import NativeEngine
from runtime.shim.external import ExternalEngine
from runtime.shim.loop import READ, Loop, Promise, Task
from runtime.shim.process import Container
from runtime.shim.protocol import Facts, PodMessage
from runtime.shim.reaper import Reaper, exit_code
from runtime.shim.sandbox import set_up, tear_down
from runtime.shim.worker import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from runtime.shim.engine import Engine

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
_MAX_ID = 1024
_LOG_LIMIT = 1 << 20


class Shim:
    """The pod's supervisor: containers, subscribers, and what to do with a request."""

    def __init__(self, pod: PodMessage) -> None:
        self._pod = pod
        self._pause_pid = 0
        self._loop = Loop(report)
        self._reaper = Reaper(self._loop)
        self.workers = Workers(self._loop, self._reaper)
        self._containers: dict[str, Container] = {}
        self._busy: dict[str, Promise[Any]] = {}  # containers in creation or deletion
        self._listener: socket.socket | None = None
        self._subscribers: list[Connection] = []
        self._engines: dict[str, Engine] = {"": NativeEngine(self.workers, runtime_root(pod.state, ""))}
        self._stopping: Promise[None] | None = None
        self._operations: dict[str, Callable[[Connection, object], Task[object]]] = {
            "attach": self._attach,
            "create": self._create,
            "delete": self._delete,
            "events": self._events,
            "exec": self._exec,
            "list": self._list,
            "reopen_log": self._reopen_log,
            "signal": self._signal,
            "start": self._start,
            "stop": self._stop,
            "stream": self._stream,
            "update": self._update,
        }
        for number in (signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
            signals.handle(number, lambda _number, _frame: None)

    def bring_up(self) -> dict[str, object]:
        """Namespaces, pins, /dev/shm, pause, the socket: what the daemon is told of it. Raises RuntimeFailure; then
        nothing is left."""
        done = self._loop.spawn(self._bring_up())
        while not done.done:
            self._loop.turn()
        if done.error is not None:
            raise done.error
        return done.value or {}

    def _bring_up(self) -> Task[dict[str, object]]:
        pod = self._pod
        answer = yield from self.workers.run("set up the pod", lambda: (set_up(pod), -1))
        try:
            self._pause_pid = int(answer.value)  # type: ignore[call-overload]  # set_up gave an int
            if self._pause_pid:
                self._reaper.expect(self._pause_pid)
            record = shim_record(self._pause_pid)
            write_durable(f"{pod.directory}/shim.json", encode(record), sync=False)
            listener = self._listener = listen_unix(f"{pod.directory}/shim.sock")
        except BaseException:
            yield from self._tear_down()
            raise
        listener.setblocking(False)
        self._loop.watch(listener.fileno(), READ, lambda _events: self._accept(listener))
        return record

    def run(self) -> None:
        """Serves until `stop`."""
        self._loop.run()

    def turn(self) -> None:
        """One turn of the loop; `run` is this until the end."""
        self._loop.turn()

    def use_engine(self, handler: str, engine: Engine) -> None:
        """Containers with this handler are run by `engine`."""
        self._engines[handler] = engine

    def close(self) -> None:
        """Closes what the process's end would close."""
        if self._listener is not None:
            self._listener.close()
        self.workers.reaper.close()
        self._loop.close()

    def _accept(self, listener: socket.socket) -> None:
        peer = accept(listener)
        if peer is not None:
            Connection(self._loop, peer, self._requested)

    def _requested(self, connection: Connection, payload: bytes) -> None:
        """A connection's first frame names the operation; what follows, if anything, is that operation's."""
        try:
            name, body = protocol.parse_request(payload)
            operation = self._operations.get(name)
            if operation is None:
                raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
        except RuntimeFailure as error:
            connection.send(protocol.failure(error))
            return
        done = self._loop.spawn(operation(connection, body))
        done.when_done(lambda: self._answer(connection, name, done))

    def _answer(self, connection: Connection, name: str, done: Promise[object]) -> None:
        if done.error is not None:
            if not isinstance(done.error, RuntimeFailure):
                report(name, done.error)
            connection.send(protocol.failure(done.error))
        elif done.value is not _ANSWERED:
            connection.send(protocol.reply(done.value))
        if name == "stop" and done.error is None:
            connection.gone.when_done(self._loop.stop)
            connection.finish()

    # ------------------------------------------------------------------------------------------------- containers

    def _find(self, container_id: str) -> Container:
        container = self._containers.get(container_id)
        if container is None:
            raise RuntimeFailure(
                f"container {container_id} is unknown to the shim of pod {self._pod.id}", code="not_found"
            )
        if not container.facts.created_ns:
            raise RuntimeFailure(f"container {container_id} is still being created", code="failed_precondition")
        return container

    def _create(self, _connection: Connection, body: object) -> Task[object]:
        message = protocol.parse(protocol.ContainerMessage, body)
        check_id(message.id)
        if self._stopping is not None:
            raise RuntimeFailure(f"pod {self._pod.id} is being stopped", code="failed_precondition")
        if message.id in self._containers:
            raise RuntimeFailure(f"container {message.id} exists", code="already_exists")
        record = f"{self._pod.directory}/containers/{message.id}.json"
        finished = self._busy[message.id] = Promise()
        try:
            container = Container(self._loop, self._engine(message.handler), message, record, self._tell)
            self._containers[message.id] = container
            yield from container.create()
        except BaseException:
            self._containers.pop(message.id, None)
            raise
        finally:
            self._busy.pop(message.id, None)
            finished.resolve()
        return container.facts.to_json()

    def _engine(self, handler: str) -> Engine:
        engine = self._engines.get(handler)
        if engine is None:
            root = runtime_root(self._pod.state, handler)
            scratch = f"{self._pod.directory}/scratch"
            engine = self._engines[handler] = ExternalEngine(self.workers, handler, root, scratch)
        return engine

    def _start(self, _connection: Connection, body: object) -> Task[object]:
        container = self._find(protocol.parse(protocol.IdMessage, body).id)
        yield from container.start()
        return container.facts.to_json()

    def _signal(self, _connection: Connection, body: object) -> Task[object]:
        message = protocol.parse(protocol.SignalMessage, body)
        if not 0 < message.number < signals.NSIG:
            raise RuntimeFailure(f"signal {message.number} does not exist", code="invalid_argument")
        container = self._containers.get(message.id)
        if container is not None and container.facts.created_ns:
            yield from container.signal(message.number, message.everyone)
        return {}

    def _delete(self, _connection: Connection, body: object) -> Task[object]:
        yield from self._remove(protocol.parse(protocol.IdMessage, body).id)
        return {}

    def _remove(self, container_id: str) -> Task[None]:
        while container_id in self._busy:
            yield self._busy[container_id]
        container = self._containers.get(container_id)
        if container is None:
            return
        finished = self._busy[container_id] = Promise()
        try:
            yield from container.delete()
            self._containers.pop(container_id, None)
        finally:
            self._busy.pop(container_id, None)
            finished.resolve()

    def _update(self, _connection: Connection, body: object) -> Task[object]:
        message = protocol.parse(protocol.UpdateMessage, body)
        container = self._find(message.id)
        if container.ended:
            raise RuntimeFailure(f"update container {message.id}: it has ended", code="failed_precondition")
        yield from container.engine.update(message.id, message.resources)
        return {}

    def _reopen_log(self, _connection: Connection, body: object) -> Task[object]:
        yield from ()
        self._find(protocol.parse(protocol.IdMessage, body).id).reopen_log()
        return {}

    def _list(self, _connection: Connection, _body: object) -> Task[object]:
        """Exits that are not told yet are not listed as such either: their logs are not whole."""
        yield from ()
        return [container.visible() for container in self._containers.values() if container.facts.created_ns]

    # ------------------------------------------------------------------------------------------ streams and events

    def _exec(self, connection: Connection, body: object) -> Task[object]:
        message = protocol.parse(protocol.ExecMessage, body)
        container = self._running(message.id)
        finished = yield from run_to_end(self._loop, container.engine, message, connection.gone)
        connection.send(
            protocol.reply(
                {"exit_code": finished.code, "timed_out": finished.timed_out, "truncated": finished.truncated}
            )
        )
        connection.send(finished.stdout)
        connection.send(finished.stderr)
        return _ANSWERED

    def _running(self, container_id: str) -> Container:
        container = self._find(container_id)
        if container.ended or not container.facts.started_ns:
            what = "has ended" if container.ended else "was not started"
            raise RuntimeFailure(f"exec in container {container_id}: it {what}", code="failed_precondition")
        return container

    def _stream(self, connection: Connection, body: object) -> Task[object]:
        fds = connection.reader.take_fds()
        try:
            message = protocol.parse(protocol.StreamMessage, body)
            container = self._running(message.id)
            if not message.terminal and len(fds) != 3:
                raise RuntimeFailure(
                    f"exec in container {message.id}: expected stdin, stdout and stderr, got {len(fds)} fds",
                    code="invalid_argument",
                )
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            try:
                stdio = (null, null, null) if message.terminal else tuple(fds)
                made = yield from container.engine.execute(message.id, message.process, stdio)
            finally:
                os.close(null)
        finally:
            for fd in fds:
                os.close(fd)
        if made.console >= 0:
            connection.send_fd(protocol.reply({"pid": made.pid}), made.console)
            os.close(made.console)
        else:
            connection.send(protocol.reply({"pid": made.pid}))
        status = yield made.ended
        connection.send(protocol.reply({"exit_code": exit_code(status)[0]}))
        connection.finish()
        return _ANSWERED

    def _attach(self, connection: Connection, body: object) -> Task[object]:
        """From here on the connection is the control fd: resize frames come in, its end is the end of the output."""
        yield from ()
        fds = connection.reader.take_fds()
        try:
            message = protocol.parse(protocol.AttachMessage, body)
            container = self._find(message.id)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        connection.send(protocol.reply({}))
        connection.on_frame = lambda _connection, payload: self._resize(container, payload)
        attachment = container.stdio.attach(fds, stdin=message.stdin, on_end=connection.finish)
        connection.gone.when_done(attachment.close)
        return _ANSWERED

    def _resize(self, container: Container, payload: bytes) -> None:
        rows, columns = protocol.parse_resize(payload)
        container.stdio.resize(rows, columns)

    def _events(self, connection: Connection, _body: object) -> Task[object]:
        yield from ()
        connection.limit = EVENT_LIMIT
        connection.send(protocol.reply({}))
        self._subscribers.append(connection)
        connection.gone.when_done(lambda: self._subscribers.remove(connection))
        return _ANSWERED

    def _tell(self, kind: str, facts: Facts) -> None:
        payload = protocol.event(kind, facts)
        for subscriber in list(self._subscribers):
            subscriber.send(payload)

    # ------------------------------------------------------------------------------------------------- the end

    def _stop(self, _connection: Connection, _body: object) -> Task[object]:
        """Deletes every container, ends pause, unpins and unmounts. What cannot be deleted is said, and the shim
        stays for the next try."""
        while self._stopping is not None and not self._stopping.done:
            yield self._stopping
        stopping = self._stopping = Promise()
        failures: list[RuntimeFailure] = []
        try:
            for container_id in list({**self._containers, **self._busy}):
                try:
                    yield from self._remove(container_id)
                except RuntimeFailure as error:
                    failures.append(error)
            if failures:
                self._stopping = None
                raise failures[0]
            yield from self._tear_down()
        finally:
            stopping.resolve()
        return {}

    def _tear_down(self) -> Task[None]:
        if self._pause_pid:
            ended = self._reaper.expect(self._pause_pid)
            os.kill(self._pause_pid, signals.SIGKILL)
            yield ended
            self._pause_pid = 0
        directory = self._pod.directory
        yield from self.workers.run("clean up the pod", lambda: _cleaned(directory))


_ANSWERED = object()


def _cleaned(directory: str) -> tuple[object, int]:
    tear_down(directory)
    return {}, -1


def check_id(container_id: str) -> None:
    """Ids become parts of paths (threats S19). Raises RuntimeFailure."""
    good = container_id and len(container_id) <= _MAX_ID and _ID_CHARACTERS.issuperset(container_id)
    if not good or container_id[0] in ".-+":
        raise RuntimeFailure(
            f"{container_id[:80]!r} is no container id: letters, digits, _ . + - only", code="invalid_argument"
        )


def runtime_root(state: str, handler: str) -> str:
    """Where the runtime keeps its state: for the native one what `ocirun --root` is given."""
    return f"{state}/runtime" if not handler else f"{state}/handlers/{handler.strip('/').replace('/', '-')}"


def shim_record(pause_pid: int) -> dict[str, object]:
    """shim.json: who this shim and its pause process are, for a cleaner that must not hit others."""
    pid = os.getpid()
    pause_ticks = start_time(pause_pid) if pause_pid else 0
    return {"pid": pid, "started_ticks": start_time(pid), "pause_pid": pause_pid, "pause_ticks": pause_ticks}


def report(what: str, error: BaseException) -> None:
    """One entry in shim.log (our stderr): what went wrong and where, as far as there is room."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    text = f"{what}: {type(error).__name__}: {error} ({' '.join(places)})\n"
    try:
        if os.fstat(2).st_size < _LOG_LIMIT:
            os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass
