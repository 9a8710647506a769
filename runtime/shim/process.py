"""One container in the shim: its streams, its life from created to deleted, and the facts about it.

    create ──▶ created ── start ──▶ running ──▶ ended (reaped, exit.json written) ──▶ told (streams drained) ── delete

The order at the end is the promise: the exit is on disk before anybody hears of it (threats O15), and the log is
complete before that, too (O22), except that a process outside of the container that holds a stream open delays it by
DRAIN at most (S52). Refuses to forget an exit before `delete`. Invariant: facts only ever gain; none is guessed.
"""

from __future__ import annotations

import os
import time

from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux import signals
from runtime.linux.files import write_durable
from runtime.shim.loop import Loop, Promise, Task
from runtime.shim.oom import OomWatch
from runtime.shim.protocol import ContainerMessage, Facts
from runtime.shim.reaper import exit_code
from runtime.shim.sandbox import unmount
from runtime.shim.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.engine import Engine

DRAIN = 1.0  # seconds that an exit waits for the end of output that somebody else holds open
_KILL_DEADLINE = 30.0  # seconds for a killed container to die: longer is stuck in the kernel


class Container:
    """A container and what is known of it. `tell(kind, facts)` goes to the subscribers; `record` is the file that
    tells a cleaner about it, from before its process exists until it is deleted."""

    def __init__(
        self,
        loop: Loop,
        engine: Engine,
        message: ContainerMessage,
        record: str,
        tell: Callable[[str, Facts], None],
    ) -> None:
        self._loop = loop
        self._message = message
        self._tell = tell
        self._file = record
        self._oom: OomWatch | None = None
        self._starting = False
        self.engine = engine
        self.facts = Facts(message.id)
        self.told: Promise[None] = Promise()
        self.shares_pids = True
        self._save()
        try:
            self.stdio = Stdio(
                loop,
                log_path=message.log_path,
                terminal=message.terminal,
                stdin=message.stdin,
                stdin_once=message.stdin_once,
            )
        except BaseException:
            os.unlink(record)
            raise

    @property
    def ended(self) -> bool:
        return self.facts.finished_ns > 0

    def create(self) -> Task[None]:
        """Sets the process up. Raises RuntimeFailure and leaves nothing."""
        try:
            made = yield from self.engine.create(self._message, self.stdio.child)
        except BaseException:
            self.close()
            os.unlink(self._file)
            raise
        self.stdio.close_child()
        if made.console >= 0:
            self.stdio.take_console(made.console)
        facts = self.facts
        facts.pid = made.pid
        facts.started_ticks = made.facts["started_ticks"]
        self.shares_pids = made.facts["shares_pids"]
        facts.created_ns = time.time_ns()
        self._save()
        self._oom = OomWatch(self._loop, made.facts["memory"], self._oom_seen)
        made.ended.when_done(lambda: self._ended(made.ended.value or 0))

    def start(self) -> Task[None]:
        """Releases execve. Raises RuntimeFailure: its failure, or that it was started before."""
        facts = self.facts
        if facts.started_ns or self.ended or self._starting:
            what = "has ended" if self.ended else "was started already"
            raise RuntimeFailure(f"start container {facts.id}: it {what}", code="failed_precondition")
        self._starting = True
        before = time.time_ns()
        try:
            yield from self.engine.start(facts.id)
        except RuntimeFailure as error:
            facts.message = str(error)
            if self.ended:
                self._record()
            raise
        finally:
            self._starting = False
        facts.started_ns = before
        self._save()

    def signal(self, number: int, everyone: bool) -> Task[None]:
        """Signals it; when it has ended there is nobody to signal."""
        if not self.ended or (everyone and self.shares_pids):
            yield from self.engine.kill(self.facts.id, number, everyone)

    def reopen_log(self) -> None:
        self.stdio.reopen_log()

    def delete(self) -> Task[None]:
        """Kills it if need be, waits until its exit is told, removes what the runtime has of it."""
        if not self.ended:
            try:
                yield from self.engine.kill(self.facts.id, signals.SIGKILL, True)
            except RuntimeFailure:  # the delete below kills by the cgroup, and says so when it cannot
                pass
        elif not self.told.done:
            yield self.told
        yield from self.engine.delete(self.facts.id)
        if not self.told.done:
            timer = self._loop.after(
                _KILL_DEADLINE,
                lambda: self.told.fail(
                    RuntimeFailure(
                        f"delete container {self.facts.id}: process {self.facts.pid} did not die within "
                        f"{_KILL_DEADLINE:.0f} s of SIGKILL",
                        code="unavailable",
                        hint="it is stuck in the kernel: see /proc/PID/stack",
                    )
                ),
            )
            yield self.told
            timer.cancel()
        if self._message.handler and self._message.fstype:
            unmount(f"{self._message.bundle}/rootfs")
        self.close()
        os.unlink(self._file)

    def visible(self) -> dict[str, object]:
        """The facts as they may be told: an exit whose output is still on its way to the log is none yet (O22)."""
        facts = self.facts.to_json()
        if self.ended and not self.told.done:
            facts.update(finished_ns=0, exit_code=-1, signal=0)
        return facts

    def close(self) -> None:
        """Lets go of streams and watches; idempotent."""
        if self._oom is not None:
            self._oom.close()
        self.stdio.close()

    def _ended(self, status: int) -> None:
        facts = self.facts
        facts.exit_code, facts.signal = exit_code(status)
        facts.finished_ns = time.time_ns()
        if self._oom is not None:
            facts.oom_killed = self._oom.rose() or facts.oom_killed
        self._record()
        self._loop.spawn(self._finish())

    def _finish(self) -> Task[None]:
        if self.shares_pids:
            # Nobody else ends the rest: in a PID namespace of its own the kernel does when PID 1 ends (threats O35).
            try:
                yield from self.engine.kill(self.facts.id, signals.SIGKILL, True)
            except RuntimeFailure:
                pass
        timer = self._loop.after(DRAIN, self.stdio.ended.resolve)
        yield self.stdio.ended
        timer.cancel()
        dropped = self.stdio.dropped()
        if dropped:
            self.facts.message = f"{self.facts.message}; {dropped}" if self.facts.message else dropped
            self._record()
        self._tell("exit", self.facts)
        self.told.resolve()

    def _oom_seen(self) -> None:
        self.facts.oom_killed = True
        if not self.ended:
            self._tell("oom", self.facts)

    def _record(self) -> None:
        """exit.json: a rename on a tmpfs, so no fsync; when that is full the facts live on in here (threats O19)."""
        data = encode(self.facts.to_json())
        try:
            write_durable(f"{self._message.bundle}/exit.json", data, sync=False)
        except OSError as error:
            note = f"exit.json was not written: {error.strerror}"
            if note not in self.facts.message:
                self.facts.message = f"{self.facts.message}; {note}" if self.facts.message else note

    def _save(self) -> None:
        """What a cleaner needs once this process is gone. Raises OSError: without it nothing is begun."""
        message = self._message
        value = {"bundle": message.bundle, "handler": message.handler, "facts": self.facts.to_json()}
        write_durable(self._file, encode(value), sync=False)
