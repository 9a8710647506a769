"""What the shim asks of a runtime, and the native answer: runtime.create, lifecycle and exec, each call in a worker.

Each method is a task (runtime.shim.loop), so nothing that a runtime does holds up the shim. Refuses to keep state of
its own: that is in state.json under the runtime's root, where `ocirun --root` and a cleaner find it after the shim is
gone. Invariant: what `create` fails at, it has undone.
"""

from __future__ import annotations

from runtime import create as _create
from runtime import exec as _exec
from runtime import lifecycle, spec
from runtime.errors import RuntimeFailure
from runtime.fields import decode
from runtime.linux.mount import FsMount
from runtime.linux.process import start_time
from runtime.shim.loop import Promise, Task
from runtime.shim.oom import memory_cgroup
from runtime.shim.protocol import ContainerMessage
from runtime.shim.worker import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Engine(Protocol):
        """A runtime. All of it may raise RuntimeFailure."""

        def create(self, message: ContainerMessage, stdio: tuple[int, ...]) -> Task[Made]:
            """The process, set up and waiting before execve. `stdio` stays the caller's."""
            ...

        def start(self, container_id: str) -> Task[None]:
            """Releases execve; its failure is raised."""
            ...

        def kill(self, container_id: str, number: int, everyone: bool) -> Task[None]:
            """Signals the init or everybody in the container. Nobody there: nothing happens."""
            ...

        def delete(self, container_id: str) -> Task[None]:
            """Kills what is left and removes cgroup and state. Unknown: nothing happens."""
            ...

        def execute(self, container_id: str, process: dict[str, Any], stdio: tuple[int, ...]) -> Task[Made]:
            """A further process in the container, after its execve. `stdio` stays the caller's."""
            ...

        def update(self, container_id: str, resources: dict[str, Any]) -> Task[None]:
            """New limits."""
            ...


class Made:
    """A process that an engine made: a child of the shim, whose wait status `ended` brings. `console` is its pty's
    master, or -1; the taker owns it."""

    __slots__ = ("console", "ended", "facts", "pid")

    def __init__(self, pid: int, console: int, ended: Promise[int], facts: dict[str, Any]) -> None:
        self.pid = pid
        self.console = console
        self.ended = ended
        self.facts = facts


class NativeEngine:
    """The runtime of this package, in workers of the shim."""

    def __init__(self, workers: Workers, root: str) -> None:
        self._workers = workers
        self._root = root

    def create(self, message: ContainerMessage, stdio: tuple[int, ...]) -> Task[Made]:
        def job() -> tuple[object, int]:
            with open(f"{message.bundle}/config.json", "rb") as file:
                config = spec.parse(file.read())
            created = _create.create(
                _create.CreateRequest(
                    root=self._root,
                    id=message.id,
                    bundle=message.bundle,
                    spec=config,
                    stdio=(stdio[0], stdio[1], stdio[2]),
                    rootfs=root_mount(message),
                )
            )
            return {"pid": created.state.pid, **facts_of(created.state.pid, message.bundle)}, created.console

        try:
            return (yield from self._make("create", job, stdio))
        except RuntimeFailure as error:
            if error.code == "unavailable":  # the worker died half-way and undid nothing
                yield from self.delete(message.id)
            raise

    def start(self, container_id: str) -> Task[None]:
        yield from self._do("start", lambda: lifecycle.start(self._root, container_id))

    def kill(self, container_id: str, number: int, everyone: bool) -> Task[None]:
        yield from self._do("kill", lambda: lifecycle.kill(self._root, container_id, number, everyone=everyone))

    def delete(self, container_id: str) -> Task[None]:
        yield from self._do("delete", lambda: lifecycle.delete(self._root, container_id, force=True))

    def update(self, container_id: str, resources: dict[str, Any]) -> Task[None]:
        yield from self._do("update", lambda: lifecycle.update(self._root, container_id, resources))

    def execute(self, container_id: str, process: dict[str, Any], stdio: tuple[int, ...]) -> Task[Made]:
        def job() -> tuple[object, int]:
            wanted = spec.parse_process(process, "process")
            executed = _exec.execute(
                _exec.ExecRequest(root=self._root, id=container_id, process=wanted, stdio=stdio, disposable=True)
            )
            return {"pid": executed.pid}, executed.console

        return (yield from self._make("exec", job, stdio))

    def _make(self, what: str, job: Callable[[], tuple[object, int]], stdio: tuple[int, ...]) -> Task[Made]:
        reaper = self._workers.reaper
        reaper.hold()  # the new process may end before we hear of it
        try:
            answer = yield from self._workers.run(what, job, stdio)
            value: Any = answer.value
            return Made(value["pid"], answer.fd, reaper.expect(value["pid"]), value)
        finally:
            reaper.release()

    def _do(self, what: str, action: Callable[[], object]) -> Task[None]:
        def job() -> tuple[object, int]:
            action()
            return {}, -1

        yield from self._workers.run(what, job)


def root_mount(message: ContainerMessage) -> FsMount | None:
    """The container's root filesystem as data; None where config.json's root.path is there already."""
    if not message.fstype:
        return None
    options = tuple((str(key), value) for key, value in message.options)
    return FsMount(message.fstype, message.source, options, message.attributes)


def facts_of(pid: int, bundle: str) -> dict[str, object]:
    """What the shim wants to know of a new container: its start time, its memory cgroup, and whether it shares a PID
    namespace. Found out in a worker, as reading all that is not what a small process should do."""
    memory = memory_cgroup(pid)
    return {
        "started_ticks": _ticks(pid),
        "memory": [] if memory is None else list(memory),
        "shares_pids": _shares_pids(bundle),
    }


def _ticks(pid: int) -> int:
    try:
        return start_time(pid)
    except ProcessLookupError:  # it has ended and been waited for
        return 0


def _shares_pids(bundle: str) -> bool:
    """True unless config.json asks for a new PID namespace."""
    try:
        with open(f"{bundle}/config.json", "rb") as file:
            config: Any = decode(file.read())
        namespaces = config["linux"]["namespaces"]
        return not any(item["type"] == "pid" and not item.get("path") for item in namespaces)
    except (OSError, RuntimeFailure, KeyError, TypeError, AttributeError):
        return True  # the runtime itself will say what is wrong with it
