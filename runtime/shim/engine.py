"""What the shim asks of a runtime, and the native answer: runtime.create, lifecycle and exec in this very process.

Each method is a task (runtime.shim.loop): the native ones do their few milliseconds of work and return, those of an
external binary wait for it. Refuses to keep state of its own: that is in state.json under the runtime's root, where
`ocirun --root` and a cleaner find it after the shim is gone. Invariant: what `create` fails at, it has undone.
"""

from __future__ import annotations

import os

from runtime import create as _create
from runtime import exec as _exec
from runtime import lifecycle, spec
from runtime.linux.mount import FsMount
from runtime.shim.loop import Task
from runtime.shim.protocol import ContainerMessage

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    """A process that an engine made: a child of the shim. `console` is its pty's master, or -1; owned by the taker."""

    __slots__ = ("console", "pid")

    def __init__(self, pid: int, console: int) -> None:
        self.pid = pid
        self.console = console


class NativeEngine:
    """The runtime of this package, forked from this process."""

    def __init__(self, root: str) -> None:
        self._root = root

    def create(self, message: ContainerMessage, stdio: tuple[int, ...]) -> Task[Made]:
        yield from ()
        with open(f"{message.bundle}/config.json", "rb") as file:
            config = spec.parse(file.read())
        rootfs = None
        if message.fstype:
            options = tuple((str(key), value) for key, value in message.options)
            rootfs = FsMount(message.fstype, message.source, options, message.attributes)
        created = _create.create(
            _create.CreateRequest(
                root=self._root, id=message.id, bundle=message.bundle, spec=config, stdio=stdio, rootfs=rootfs
            )
        )
        os.close(created.pidfd)
        return Made(created.state.pid, created.console)

    def start(self, container_id: str) -> Task[None]:
        yield from ()
        lifecycle.start(self._root, container_id)

    def kill(self, container_id: str, number: int, everyone: bool) -> Task[None]:
        yield from ()
        lifecycle.kill(self._root, container_id, number, everyone=everyone)

    def delete(self, container_id: str) -> Task[None]:
        yield from ()
        lifecycle.delete(self._root, container_id, force=True)

    def execute(self, container_id: str, process: dict[str, Any], stdio: tuple[int, ...]) -> Task[Made]:
        yield from ()
        executed = _exec.execute(
            _exec.ExecRequest(
                root=self._root, id=container_id, process=spec.parse_process(process, "process"), stdio=stdio
            )
        )
        os.close(executed.pidfd)
        return Made(executed.pid, executed.console)

    def update(self, container_id: str, resources: dict[str, Any]) -> Task[None]:
        yield from ()
        lifecycle.update(self._root, container_id, resources)
