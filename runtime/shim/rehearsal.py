"""A dress rehearsal in the zygote: one pod with one container that does nothing, from start to stop.

Why: a forked process pays for every page it writes to, and the first use of almost anything in the interpreter writes
to many: method caches, inline caches of byte code, types that are made on demand. Done once before the fork, these
pages stay shared. Refuses to be missed: whatever fails here is reported and costs memory, no function. Invariant:
nothing of it is left in the process, on disk or in the mount table.
"""

from __future__ import annotations

import os
import socket

from runtime.linux import signals
from runtime.linux.files import remove_tree
from runtime.linux.process import set_child_subreaper
from runtime.linux.sockets import connect_unix, send_frame
from runtime.shim import protocol
from runtime.shim.engine import Made
from runtime.shim.loop import Task
from runtime.shim.protocol import ContainerMessage, ExecMessage, IdMessage, PodMessage
from runtime.shim.sandbox import tear_down
from runtime.shim.server import Shim
from runtime.shim.worker import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HANDLER = "/rehearsal"
_ROUNDS = 3


class _Idle:
    """An engine whose processes end at once."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def create(self, message: ContainerMessage, stdio: tuple[int, ...]) -> Task[Made]:
        return (yield from self._make(stdio))

    def execute(self, _container_id: str, _process: dict[str, Any], stdio: tuple[int, ...]) -> Task[Made]:
        return (yield from self._make(stdio))

    def _make(self, stdio: tuple[int, ...]) -> Task[Made]:
        def job() -> tuple[object, int]:
            pid = os.fork()
            if pid == 0:
                os.write(stdio[1], b"line\nline")
                os._exit(0)
            return {"pid": pid, "started_ticks": 1, "memory": [], "shares_pids": False}, -1

        reaper = self._workers.reaper
        reaper.hold()
        answer = yield from self._workers.run("rehearse", job, stdio)
        value: Any = answer.value
        made = Made(value["pid"], answer.fd, reaper.expect(value["pid"]), value)
        reaper.release()
        return made

    def start(self, _container_id: str) -> Task[None]:
        yield from self._workers.run("rehearse", lambda: ({}, -1))

    def kill(self, container_id: str, _number: int, _everyone: bool) -> Task[None]:
        yield from self.start(container_id)

    def delete(self, container_id: str) -> Task[None]:
        yield from self.start(container_id)

    def update(self, container_id: str, _resources: dict[str, Any]) -> Task[None]:
        yield from self.start(container_id)


def rehearse(state: str) -> None:
    """Runs it a few times in a directory of its own below `state`. Raises OSError and RuntimeFailure."""
    directory = f"{state}/.rehearsal"
    set_child_subreaper(True)  # as a shim is: the parent of what its workers leave
    try:
        for _ in range(_ROUNDS):
            os.makedirs(directory, mode=0o700, exist_ok=True)
            _one_pod(directory)
            remove_tree(directory)
    finally:
        tear_down(directory)
        remove_tree(directory)
        set_child_subreaper(False)
        for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
            signals.handle(number, None)


def _one_pod(directory: str) -> None:
    pod = PodMessage("rehearsal", directory, directory, "rehearsal", "", True, True, False, 1 << 16, {}, "")
    shim = Shim(pod)
    try:
        shim.bring_up()
        shim.use_engine(_HANDLER, _Idle(shim.workers))
        container = ContainerMessage("c", directory, "", "", [], 0, f"{directory}/log", False, False, False, _HANDLER)
        events = _ask(shim, directory, "events", None)
        for name, message in (
            ("create", container),
            ("list", None),
            ("start", IdMessage("c")),
            ("exec", ExecMessage("c", {}, 1.0, 1 << 16)),
            ("delete", IdMessage("c")),
            ("stop", None),
        ):
            _ask(shim, directory, name, message).close()
        events.close()
    finally:
        shim.close()


def _ask(shim: Shim, directory: str, name: str, message: Any) -> socket.socket:
    """Sends a request to the shim in this very process and lets it work until the answer is there."""
    connection = connect_unix(f"{directory}/shim.sock")
    send_frame(connection, protocol.request(name, message))
    connection.setblocking(False)
    while True:
        shim.turn()
        try:
            if connection.recv(4, socket.MSG_PEEK):
                connection.setblocking(True)
                return connection
        except BlockingIOError:
            continue
