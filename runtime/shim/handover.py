"""The helper's side of a command that outlives it: the shim waits for the command, and answers who asked for it.

    helper, or the command before its execve        shim
      │ ── hand over pid, … + the connection ──────▶ │ remembers both
      │    execve, or the helper's end: EOF ───────▶ │ from now on it answers (runtime/shim/waiting.py)
      │ ── take back ──────────────────────────────▶ │ forgets both: the connection was told of a failure

Refuses to wait for an answer: the process that hands over is about to be another program. Invariant: whoever is at the
connection hears of a failure or of an exit, whatever dies in between; of a failure by write(2) alone.
"""

from __future__ import annotations

import marshal
import os

from runtime.linux import progress
from runtime.shim import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.errors import RuntimeFailure
    from runtime.shim.channel import Channel

_TAKE_BACK = marshal.dumps(("take_back",))


class Handover:
    """A runtime.entering.Caller. `says_pid`: the answer has a first part, with the command's pid; the shim says it once
    the command runs, or we do, before, where this process keeps its phases. `watched`: the command is killed, with what
    it started, when the other end of the connection is closed."""

    def __init__(self, channel: Channel, connection: int, *, says_pid: bool = False, watched: bool = False) -> None:
        self.pid = 0
        self.says_pid = says_pid
        self._channel = channel
        self._connection = connection
        self._watched = watched

    def filenos(self) -> set[int]:
        return {self._channel.fileno(), self._connection}

    def expects(self, warnings: tuple[str, ...], *, always: bool) -> bool:
        if self.says_pid and progress.kept():
            told = {"value": {"pid": self.pid}, "phases": progress.phases()}
            os.write(self._connection, protocol.frame(protocol.reply(told)))
            self.says_pid = False
        self._channel.tell("hand_over", self.pid, self.says_pid, self._watched, fds=[self._connection])
        return True

    def fail(self, failure: RuntimeFailure) -> None:
        for fd, words in (
            (self._connection, protocol.frame(protocol.failure(failure))),
            (self._channel.fileno(), _TAKE_BACK),
        ):
            try:
                os.write(fd, words)
            except OSError:  # whoever was there is gone
                pass
