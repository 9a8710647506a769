"""Requests about streams: commands in containers, attaching to containers, events.

Refuses what needs a running container for any other. Invariant: bytes of a command on somebody's fds, and those of an
attached container, never pass through a helper.
"""

from __future__ import annotations

import os
import select

from runtime.errors import RuntimeFailure
from runtime.linux.progress import phase
from runtime.linux.sockets import FrameError, recv_frame
from runtime.shim import protocol
from runtime.shim.attach import MAX_LAG
from runtime.shim.commands import run_on_fds, run_to_end
from runtime.shim.handler import ANSWERED, Handler
from runtime.shim.netns import connected, enter
from runtime.shim.reaper import exit_code
from runtime.shim.records import be_as_expendable_as


class StreamHandler(Handler):
    """All requests: those of Handler, and these."""

    def _do_exec(self, body: object) -> object:
        phase("parse")
        message = protocol.parse(protocol.ExecMessage, body)
        held = self._running(message.id, "exec in")
        be_as_expendable_as(held.facts.pid)
        finished = run_to_end(self._engine(held.handler), message, self._connection.fileno(), self._status)
        header = {"exit_code": finished.code, "timed_out": finished.timed_out, "truncated": finished.truncated}
        self._send(protocol.reply(self._timed(header)), more=(finished.stdout, finished.stderr))
        return ANSWERED

    def _status(self, pid: int) -> int:
        """The wait status of a command: our child, or, as the native runtime makes it, the shim's."""
        try:
            return os.waitpid(pid, 0)[1]
        except ChildProcessError:
            return int(self._channel.ask("status", pid))

    def _do_stream(self, body: object) -> object:
        phase("parse")
        message = protocol.parse(protocol.StreamMessage, body)
        held = self._running(message.id, "exec in")
        if not message.terminal and len(self._fds) != 3:
            raise RuntimeFailure(
                f"exec in container {message.id}: expected stdin, stdout and stderr, got {len(self._fds)} fds",
                code="invalid_argument",
            )
        be_as_expendable_as(held.facts.pid)
        started = run_on_fds(self._engine(held.handler), message, self._fds)
        told = self._timed({"pid": started.pid})
        self._send(protocol.reply(told), (started.console,) if started.console >= 0 else ())
        if started.console >= 0:
            os.close(started.console)  # the caller's copy is the last: closing that hangs up the terminal
        self._send(protocol.reply({"exit_code": exit_code(self._status(started.pid))[0]}))
        return ANSWERED

    def _do_connect(self, body: object) -> object:
        message = protocol.parse(protocol.ConnectMessage, body)
        if not 0 < message.port < 65536:
            raise RuntimeFailure(f"port {message.port} does not exist", code="invalid_argument")
        if self._pod.netns or self._pod.new_netns:
            enter(self._pod.netns or f"{self._pod.directory}/ns/net")
        with connected(message.port) as inside:
            self._send(protocol.reply({}), (inside.fileno(),))
        return ANSWERED

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
        if any(fd == self._channel.fileno() for fd, _ in poll.poll(0)) and self._channel.hear():
            words = f"attach to container {message.id}: the reader was more than {MAX_LAG} bytes behind and was let go"
            self._send(protocol.failure(RuntimeFailure(words, code="unavailable", hint="the log has all of it")))
        return ANSWERED

    def _do_events(self, _body: object) -> object:
        # The shim sends the answer, too: what happens after it is told, and nothing before it.
        self._channel.ask("subscribe", protocol.frame(protocol.reply({})), fds=[self._connection.fileno()])
        return ANSWERED
