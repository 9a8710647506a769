"""The shim's side of commands: which are about to run, which run, and who is to hear how they ended.

A command was handed over (runtime/shim/handover.py) with the connection on which it was asked for. Refuses to wait for
who is there: both parts of an answer fit into the buffer of a socket on which nothing was said before. Plain bytes and
calls of the kernel only, since a shim pays for each page that it writes to. Invariant: each connection is answered
once, and closed.
"""

from __future__ import annotations

import os

from runtime.shim import protocol
from runtime.shim.loop import DESERTED
from runtime.shim.reaper import exit_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.loop import Loop


class Command:
    """One that was handed over and may still fail to execute."""

    __slots__ = ("connection", "pid", "says_pid", "watched")

    def __init__(self, pid: int, take_connection: int, says_pid: bool, watched: bool) -> None:
        self.pid = pid
        self.connection = take_connection
        self.says_pid = says_pid
        self.watched = watched


class Waiting:
    """Commands that run. `kill` is told the pid of one whose caller has gone."""

    def __init__(self, loop: Loop, kill: Callable[[int], object]) -> None:
        self._loop = loop
        self._kill = kill
        self._commands: dict[int, Command] = {}

    def runs(self, command: Command, status: int | None) -> None:
        """It executed; `status` where it has ended already."""
        pid, connection = command.pid, command.connection
        if command.says_pid:
            _tell(connection, b'{"ok":{"pid":%d}}' % pid)
        if status is not None:
            _end(connection, status)
            return
        self._commands[pid] = command
        if command.watched:
            self._loop.watch(connection, DESERTED, lambda _events: self._deserted(command))

    def ended(self, pid: int, status: int) -> bool:
        """A process has ended; True if it was one of these."""
        command = self._commands.pop(pid, None)
        if command is None:
            return False
        if command.watched:
            self._loop.unwatch(command.connection)
        _end(command.connection, status)
        return True

    def close(self) -> None:
        """Closes what the process's end would close."""
        for command in self._commands.values():
            os.close(command.connection)

    def _deserted(self, command: Command) -> None:
        self._loop.unwatch(command.connection)
        self._kill(command.pid)


def _end(take_connection: int, status: int) -> None:
    _tell(take_connection, b'{"ok":{"exit_code":%d}}' % exit_code(status)[0])
    os.close(take_connection)


def _tell(connection: int, body: bytes) -> None:
    """`body` as protocol.reply(…) has it."""
    try:
        os.write(connection, protocol.frame(body))
    except OSError:  # it is gone; SIGPIPE is ignored
        pass
