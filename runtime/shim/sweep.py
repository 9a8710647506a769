"""What is left of a pod whose shim is gone: signalled, killed, cleaned up, from the records that the shim left.

Runs in a process that the zygote forks for it, since the daemon has threads and must not. Refuses to touch a pod
whose shim lives, and to signal a pid without its start time. Invariant: an exit that the shim has recorded is reported
as recorded; any other is UNKNOWN (255) with a message that says so, never a guess (threats O13, O15, O17).
"""

from __future__ import annotations

import os
import select
import time

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux import signals
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable
from runtime.linux.libc import KernelError
from runtime.linux.process import is_running, pidfd_open, signal_running
from runtime.shim.protocol import Facts, SweepMessage
from runtime.shim.records import engine_for
from runtime.shim.sandbox import tear_down, unmount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.shim.engine import Engine

UNKNOWN = 255
_LIMIT = 1 << 20
_DEATH = 10.0


class _Left:
    """A container as its record describes it."""

    def __init__(self, path: str) -> None:
        record: Any = _read(path) or {}
        self.record = path
        self.id = os.path.basename(path).removesuffix(".json")
        self.bundle = str(record.get("bundle", ""))
        self.handler = str(record.get("handler", ""))
        self.facts = Facts.from_json(record.get("facts"))
        self.facts.id = self.id


class Sweeper:
    """Does one SweepMessage."""

    def __init__(self, message: SweepMessage) -> None:
        self._message = message

    def run(self) -> object:
        """The reply: facts for "lost", nothing to say otherwise. Raises RuntimeFailure."""
        message = self._message
        shim: Any = _read(f"{message.directory}/shim.json") or {}
        if is_running(int(shim.get("pid", 0)), int(shim.get("started_ticks", -1))):
            raise RuntimeFailure(
                f"clean up {message.directory}: its shim, process {shim['pid']}, is running", code="unavailable"
            )
        left = self._left()
        if message.action == "lost":
            return [self._bury(container).to_json() for container in left]
        for container in left:
            if message.action == "signal" and container.id == message.id:
                self._engine(container).kill(container.id, message.number, message.everyone)
            elif message.action == "stop" or (message.action == "delete" and container.id == message.id):
                self._delete(container)
        if message.action == "stop":
            _end(int(shim.get("pause_pid", 0)), int(shim.get("pause_ticks", -1)))
            tear_down(message.directory)
        return {}

    def _left(self) -> list[_Left]:
        directory = f"{self._message.directory}/containers"
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return []
        return [_Left(f"{directory}/{name}") for name in names if name.endswith(".json") and name[0] != "."]

    def _engine(self, container: _Left) -> Engine:
        return engine_for(self._message.state, self._message.directory, container.handler)

    def _bury(self, container: _Left) -> Facts:
        """Kills what is left of a container. Its facts, with the recorded exit or the unknown one."""
        recorded = _read(f"{container.bundle}/exit.json")
        if isinstance(recorded, dict):
            facts = Facts.from_json(recorded)
        else:
            facts = container.facts
            facts.exit_code = UNKNOWN
            facts.message = "the shim died before the container: how it ended is not known"
        self._engine(container).kill(container.id, signals.SIGKILL, True)
        _end(facts.pid, facts.started_ticks)
        if not facts.finished_ns:
            facts.finished_ns = time.time_ns()
            try:
                write_durable(f"{container.bundle}/exit.json", encode(facts.to_json()), sync=False)
            except OSError:  # the caller has the facts
                pass
        return facts

    def _delete(self, container: _Left) -> None:
        self._bury(container)
        self._engine(container).delete(container.id)
        if container.handler:
            unmount(f"{container.bundle}/rootfs")
        os.unlink(container.record)


def _end(pid: int, ticks: int) -> None:
    """Kills process `pid` with that start time and waits until it is dead; somebody else's is left alone."""
    try:
        pidfd = pidfd_open(pid) if pid > 0 else -1
    except KernelError:
        return
    if pidfd < 0:
        return
    try:
        if not is_running(pid, ticks):  # after pidfd_open: the pid cannot change hands in between
            return
        signal_running(pidfd, signals.SIGKILL)
        if not select.select([pidfd], [], [], _DEATH)[0]:
            raise RuntimeFailure(f"kill process {pid}: still there {_DEATH:.0f} s after SIGKILL", code="unavailable")
    finally:
        os.close(pidfd)


def _read(path: str) -> object:
    try:
        return decode(read_bounded(AT_FDCWD, path, _LIMIT), path)
    except (OSError, RuntimeFailure):  # half-written or never written: what it would say is not known
        return None
