"""The shim's side of commands: which are about to run, which run, and who is to hear how they ended.

A command was handed over (runtime/shim/handover.py) with the connection on which it was asked for. Refuses to block on
that: an answer is shorter than any socket's buffer, and who has filled it does not listen. Invariant: each connection
is answered once, and closed.
"""

from __future__ import annotations

import os
import select
from _socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SOCK_STREAM
from _socket import socket as Socket

from runtime.shim import protocol
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
        said = protocol.frame(protocol.reply({"pid": pid})) if command.says_pid else b""
        if status is not None:
            self._end(connection, said, status)
            return
        if said:
            _tell(connection, said)
        self._commands[pid] = command
        if command.watched:
            self._loop.watch(connection, select.EPOLLRDHUP, lambda _events: self._deserted(command))

    def ended(self, pid: int, status: int) -> bool:
        """A process has ended; True if it was one of these."""
        command = self._commands.pop(pid, None)
        if command is None:
            return False
        if command.watched:
            self._loop.unwatch(command.connection)
        self._end(command.connection, b"", status)
        return True

    def close(self) -> None:
        """Closes what the process's end would close."""
        for command in self._commands.values():
            os.close(command.connection)

    def _deserted(self, command: Command) -> None:
        self._loop.unwatch(command.connection)
        self._kill(command.pid)

    def _end(self, take_connection: int, said: bytes, status: int) -> None:
        _tell(take_connection, said + protocol.frame(protocol.reply({"exit_code": exit_code(status)[0]})))
        os.close(take_connection)


def _tell(connection: int, words: bytes) -> None:
    sock = Socket(AF_UNIX, SOCK_STREAM, 0, connection)
    try:
        sock.send(words, MSG_DONTWAIT | MSG_NOSIGNAL)
    except OSError:  # it is gone, or as good as that
        pass
    finally:
        sock.detach()
