"""Requests about streams: commands in containers, attaching to containers, events.

Refuses what needs a running container for any other. Invariant: bytes of a command on somebody's fds, and those of an
attached container, never pass through a helper.
"""

from __future__ import annotations

import os
import select

from runtime.errors import RuntimeFailure
from runtime.linux import progress
from runtime.linux.sockets import FrameError, recv_frame
from runtime.shim import protocol
from runtime.shim.attach import MAX_LAG
from runtime.shim.handler import ANSWERED, Handler, check_runs
from runtime.shim.handover import Handover
from runtime.shim.netns import connected, enter
from runtime.shim.protocol import Facts
from runtime.shim.records import be_as_expendable_as, check_id, read_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class StreamHandler(Handler):
    """All requests: those of Handler, and these."""

    def _do_exec(self, body: object) -> object:
        progress.phase("parse")
        message = protocol.parse(protocol.ExecMessage, body)
        return self._execute(message.id, message.process, terminal=False, watched=True)

    def _do_stream(self, body: object) -> object:
        progress.phase("parse")
        message = protocol.parse(protocol.StreamMessage, body)
        return self._execute(message.id, message.process, terminal=message.terminal, watched=False)

    def _execute(self, container_id: str, process: dict[str, Any], *, terminal: bool, watched: bool) -> object:
        """A command on the caller's fds, or on a terminal whose master goes to the caller. The shim answers for it:
        with its exit, and without `watched` with its pid before that."""
        facts, handler = self._facts_now(container_id)
        check_runs(facts, "exec in")
        if not terminal and len(self._fds) != 3:
            raise RuntimeFailure(
                f"exec in container {container_id}: expected stdin, stdout and stderr, got {len(self._fds)} fds",
                code="invalid_argument",
            )
        be_as_expendable_as(facts.pid)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        stdio = (null, null, null) if terminal else tuple(self._fds)
        says_pid = not watched or progress.kept()
        caller = Handover(self._channel, self._connection.fileno(), says_pid=says_pid, watched=watched)
        made = self._engine(handler).execute(container_id, process, stdio, caller)
        if terminal:
            # This process's copy ends with it, so the caller's is the last: closing that hangs up the terminal.
            told = protocol.reply(self._timed({"pid": made.pid}))
            self._send(told, (made.console,) if made.console >= 0 else ())
            caller.says_pid = False
        caller.pid = made.pid
        caller.expects((), always=True)
        return ANSWERED

    def _facts_now(self, container_id: str) -> tuple[Facts, str]:
        """And the handler. A helper that has been waiting for this (runtime.shim.lingering) knows what was."""
        if not self._waited:
            held = self._held(container_id)
            return held.facts, held.handler
        check_id(container_id)
        facts = self._channel.ask("facts", container_id)
        left = read_record(self._record(container_id))
        if facts is None or left is None:
            raise self._unknown(container_id)
        return Facts.from_json(facts), left[1]

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

    def _do_rejoin(self, _body: object) -> object:
        if self._waited:  # for what a short run without a daemon comes back for
            self._expect("stop")
        # The shim knows what was, and what happens after the answer is told: nothing is missed in between.
        self._channel.tell("rejoin", fds=[self._connection.fileno()])
        return ANSWERED

    def _do_events(self, _body: object) -> object:
        if not self._resident.containers:  # a new pod, as a rule
            self._expect("create")
        # The shim sends the answer, too: what happens after it is told, and nothing before it.
        self._channel.tell("subscribe", protocol.frame(protocol.reply({})), fds=[self._connection.fileno()])
        return ANSWERED
