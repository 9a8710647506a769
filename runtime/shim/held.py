"""One container as the shim holds it, from adopted to forgotten.

    adopted ── started ──▶ ended: reaped, exit.json written ──▶ drained ──▶ told ── forgotten
                                                                   └─ or to be started again: runtime.shim.restarts

The order at the end is the promise: the exit is on disk before anybody hears of it (threats O15), it is told after a
start that was under way, and the log is whole before that, too (O22), except that a process outside of the container
which holds a stream open delays it by DRAIN at most (S52). Refuses to guess: facts only ever gain. Invariant:
`told` is true exactly once all of that has happened.
"""

from __future__ import annotations

import time

from runtime.fields import encode
from runtime.linux.files import write_durable
from runtime.shim.loop import Loop
from runtime.shim.oom import OomWatch
from runtime.shim.protocol import Facts
from runtime.shim.reaper import exit_code
from runtime.shim.restarts import Restarts
from runtime.shim.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DRAIN = 1.0  # seconds that an exit waits for the end of output that somebody else holds open


class Held:
    """A container's facts, streams and watches. `tell(kind, facts)` goes to the subscribers; `kill_rest` ends what
    shares its PID namespace with others and calls back; while `is_starting(id)`, who starts it has yet to say when;
    `start_again` makes the next run of one that has ended. `before` is the run before this one."""

    def __init__(
        self,
        loop: Loop,
        made: dict[str, Any],
        take_fds: dict[str, int],
        tell: Callable[[str, Facts], None],
        kill_rest: Callable[[Held, Callable[[], None]], None],
        is_starting: Callable[[str], bool],
        start_again: Callable[[Held], None],
        before: Held | None = None,
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._kill_rest = kill_rest
        self._is_starting = is_starting
        self._start_again = start_again
        self._waiting: list[Callable[[], None]] = []
        self._drained = False
        self._over = False
        told = made["facts"]
        facts = self.facts = Facts(told["id"])
        facts.pid, facts.started_ticks, facts.created_ns = told["pid"], told["started_ticks"], told["created_ns"]
        self.bundle: str = made["bundle"]
        self.handler: str = made["handler"]
        self.log_path: str = made["log_path"]
        self.shares_pids: bool = made["shares_pids"]
        self.told = False
        self.due = False  # it has ended, and is to be started again
        self._since = time.monotonic()
        self.restarts: Restarts = Restarts(made["restart"], made["message"]) if before is None else before.restarts
        if before is not None:
            facts.restarts = self.restarts.count
            self._waiting, before._waiting = before._waiting, []
        self._oom = OomWatch(loop, take_fds.pop("oom", -1), take_fds.pop("oom_event", -1), made["oom"], self._oom_seen)
        self.stdio = Stdio(loop, take_fds, self.log_path, made["stdin_once"], self._output_ended)

    def visible(self) -> dict[str, object]:
        """The facts as they may be told: an exit whose output is still on its way to the log is none yet (O22)."""
        facts = self.facts.to_json()
        if not self.told:
            facts.update(finished_ns=0, exit_code=-1, signal=0)
        if self.due:
            facts.update(pid=0, started_ticks=0)
        return facts

    def ended(self, status: int) -> None:
        """The process was waited for."""
        facts = self.facts
        facts.exit_code, facts.signal = exit_code(status)
        facts.finished_ns = time.time_ns()
        facts.oom_killed = self._oom.rose() or facts.oom_killed
        self.record()
        if self.shares_pids:
            # Nobody else ends the rest: in a PID namespace of its own the kernel does, when PID 1 ends (threats O35).
            self._kill_rest(self, self._drain)
        else:
            self._drain()

    def _drain(self) -> None:
        if self.stdio.ended:
            self._finish()
        else:
            self._drained = True
            self._loop.after(DRAIN, self._finish)

    def _output_ended(self) -> None:
        if self._drained:
            self._finish()

    def _finish(self) -> None:
        self._over = True
        if self.told or (not self.facts.started_ns and self._is_starting(self.facts.id)):
            return
        if self.facts.started_ns and self.restarts.wanted(self.facts.exit_code):
            self._be_due()
            return
        self.due, self.told = False, True
        dropped = self.stdio.dropped()
        if dropped:
            self.note(dropped)
            self.record()
        self._tell("exit", self.facts)
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def _be_due(self) -> None:
        if self.due:
            return
        self.due = True
        self.tell_visible()
        self.restarts.begin(self._loop, time.monotonic() - self._since, lambda: self._start_again(self))

    def tell_visible(self) -> None:
        """That it is to be started again, or was."""
        self._tell("restart", Facts.from_json(self.visible()))

    def retire(self) -> None:
        """It is not started again: its end, which may have been, is its last."""
        self.restarts.retire()
        if self.due:
            self._finish()

    def go_on(self) -> None:
        """Its start was told, or failed: what has waited for that happens."""
        if self._over:
            self._finish()

    def when_told(self, callback: Callable[[], None]) -> None:
        if self.told:
            callback()
        else:
            self._waiting.append(callback)

    def note(self, message: str) -> None:
        """Adds to the facts' message."""
        facts = self.facts
        facts.message = f"{facts.message}; {message}" if facts.message else message

    def record(self) -> None:
        """exit.json: a rename on a tmpfs, so no fsync; when that is full the facts live on in here (threats O19)."""
        try:
            write_durable(f"{self.bundle}/exit.json", encode(self.facts.to_json()), sync=False)
        except OSError as error:
            note = f"exit.json was not written: {error.strerror}"
            if note not in self.facts.message:
                self.note(note)

    def _oom_seen(self) -> None:
        self.facts.oom_killed = True
        if not self.facts.finished_ns:
            self._tell("oom", self.facts)

    def close(self) -> None:
        """Lets go of streams and watches; idempotent."""
        self._oom.close()
        self.stdio.close()
