"""The shim of one pod: what has to be there all the time, and nothing else.

It reads and logs output, waits for processes, keeps the facts, tells subscribers, and forks a helper (runtime.shim.
handler) for every connection; that is all. A helper may block, use memory or crash: the pod's logs go on, and what its
work has dirtied is gone with it. That keeps a shim at a few hundred KiB of its own. Processes that a helper makes are
orphans when it ends, and the shim, a subreaper, adopts them.

Refuses to end by a signal: SIGTERM and SIGHUP are handled and ignored, only `stop` ends a shim, and SIGKILL, after
which the containers run on without it. Invariant: after each wake-up this process has no zombies, and it has a status
for every pid it was told of (threats O16, O31).
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket

from runtime.linux import signals
from runtime.shim import channel, protocol
from runtime.shim.held import Held
from runtime.shim.locks import Helper, Locks
from runtime.shim.logfile import LogFile
from runtime.shim.loop import READ, Loop
from runtime.shim.reaper import is_child
from runtime.shim.report import report
from runtime.shim.rest import Rest
from runtime.shim.subscribers import EVENT_LIMIT, Subscribers
from runtime.shim.waiting import Command, Waiting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    Work = Callable[["Resident", int, Socket], NoReturn]  # what a helper does; it never returns

_BACKLOG = 128  # calls that were not come to yet
_MAX_EARLY = 4096  # statuses of unknown children that are kept for helpers
_LATER = object()  # an answer that comes when it is due


class Resident:
    """The pod's supervisor. `serve` is what a helper does for a connection; `rest_killer(id, handler)` gives one that
    kills what a container with a shared PID namespace has left, `tree_killer(pid)` one that kills a command and what it
    has started, `starter(id)` one that starts a container again."""

    def __init__(
        self,
        serve: Work,
        rest_killer: Callable[[str, str], Work],
        tree_killer: Callable[[int], Work],
        starter: Callable[[str], Work],
    ) -> None:
        self.request = b""
        self.containers: dict[str, Held] = {}
        self.pause_pid = 0
        self.stopping = False
        self._serve = serve
        self._rest_killer = rest_killer
        self._starter = starter
        self._loop = Loop(report)
        self.make_ready: Callable[[], object] | None = None  # what a helper does that waits, if anything
        self.rest = Rest(self._loop, lambda: bool(self._helpers))
        self._listener: Socket | None = None
        self._helpers: dict[int, Helper] = {}
        self._idle: Helper | None = None  # see runtime.shim.lingering
        self._locks = Locks(self._granted, self._freed)
        self._early: dict[int, int] = {}
        self._waiting = Waiting(self._loop, lambda pid: self._fork_for(tree_killer(pid)))
        self._subscribers = Subscribers(self._loop)
        self._wake = self._wake_writer = -1
        self._actions: dict[str, Callable[..., object]] = {
            "adopt": self._adopt,
            "again": self._again,
            "attach": self._attach,
            "decline": self._decline,
            "end": self._end,
            "facts": self._facts,
            "forget": self._forget,
            "hand_over": self._hand_over,
            "idle": self._be_idle,
            "leave": self._leave,
            "listen": self._listen,
            "lock": self._lock,
            "note": self._note,
            "pause": self._pause,
            "rejoin": self._rejoin,
            "reopen": self._reopen,
            "retire": self._retire,
            "started": self._started,
            "stop": self._stop,
            "subscribe": self._subscribe,
            "take_back": self._take_back,
            "told": self._told,
        }

    def run(self, first: Work, take: int, *take_more: int, only_first: bool = False) -> None:
        """Serves until a helper says that the pod has been stopped. The first helper brings the pod up for who is at
        the connection `take`, or comes to that listener; if it does not, that is the end. So is its own end with
        `only_first`. It inherits all that is taken, which are closed here."""
        self._wake, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._loop.open()
        # Handlers, not SIG_IGN: only these wake the loop, and execve(2) resets them in containers.
        signals.wake_up(self._wake_writer)
        for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
            signals.handle(number, _nothing)
        self._loop.watch(self._wake, READ, self._woken)
        self.fork(first, take, on_gone=self._loop.stop if only_first else self._brought_up)
        for fd in (take, *take_more):
            os.close(fd)
        self._loop.run()

    def _brought_up(self) -> None:
        if self._listener is None:
            self._loop.stop()

    def close(self) -> None:
        """Closes what the process's end would close."""
        signals.wake_up(-1)
        for fd in (self._wake, self._wake_writer):
            os.close(fd)
        if self._listener is not None:
            self._listener.close()
        self._subscribers.close()
        self._waiting.close()
        self._loop.close()

    # ------------------------------------------------------------------------------------------------ processes

    def _woken(self, _events: int) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        """Waits for all that have ended: one SIGCHLD may stand for many."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        if pid == self.pause_pid:
            self.pause_pid = 0
        for held in self.containers.values():
            if held.facts.pid == pid and not held.facts.finished_ns:
                held.ended(status)
                break
        else:
            self._ended_unknown(pid, status)

    def _ended_unknown(self, pid: int, status: int) -> None:
        """A helper, a command of one, or somebody's orphan."""
        for helper in self._helpers.values():
            if helper.pid == pid:
                helper.pid = 0  # from here on the number may be another's
                return
        if not self._waiting.ended(pid, status) and self._helpers:  # one of them may be about to tell of it
            self._early[pid] = status
            if len(self._early) > _MAX_EARLY:
                del self._early[next(iter(self._early))]

    # -------------------------------------------------------------------------------------------------- helpers

    def _accept(self, _events: int) -> None:
        listener = self._listener
        assert listener is not None
        try:
            connection, _ = listener._accept()  # type: ignore[attr-defined]  # accept(2), fd and address
        except (BlockingIOError, ConnectionAbortedError):
            return
        try:
            if not self._hand_to_idle(connection):
                self.fork(self._serve, connection)
        finally:
            os.close(connection)

    def _hand_to_idle(self, connection: int) -> bool:
        idle, self._idle = self._idle, None
        if idle is None:
            return False
        try:
            channel.send(idle.end, "serve", [connection])
        except OSError:  # it was killed
            return False
        return True

    def _be_idle(self, helper: Helper, _fds: list[int]) -> object:
        self._locks.free(helper)
        helper.starts = False
        if self._idle is not None:
            return "left"
        self._idle = helper
        return _LATER

    def _leave(self, helper: Helper, _fds: list[int]) -> object:
        if self._idle is not helper:
            return _LATER  # it has been handed a connection meanwhile
        self._idle = None
        return "left"

    def _decline(self, _helper: Helper, fds: list[int]) -> object:
        try:
            self.fork(self._serve, fds[0])
        finally:
            os.close(fds[0])
        return _LATER

    def fork(
        self,
        work: Work,
        connection: int = -1,
        on_gone: Callable[[], None] | None = None,
    ) -> None:
        """A helper that does `work`; `on_gone` is called when it has ended."""
        ours, theirs = channel.pair()
        pid = os.fork()
        if pid == 0:
            work(self, connection, theirs)
        theirs.close()
        helper = Helper(pid, ours, on_gone)
        fd = ours.fileno()
        self._helpers[fd] = helper
        self._loop.watch(fd, READ, lambda _events: self._heard(fd, helper))

    def _heard(self, fd: int, helper: Helper) -> None:
        try:
            received = channel.receive(helper.end)
        except OSError:
            received = None
        if received is None:
            self._gone(fd, helper)
            return
        (name, *arguments), fds = received
        try:
            answer = self._actions[name](helper, fds, *arguments)
        except Exception as error:  # the helper hears an end, and says that to its client
            report(name, error)
            self._gone(fd, helper)
            return
        if answer is not _LATER:
            self._reply(helper, answer)

    def _reply(self, helper: Helper, answer: object) -> None:
        try:
            channel.send(helper.end, answer)
        except OSError:  # it was killed; its end is about to be heard
            pass

    def _gone(self, fd: int, helper: Helper) -> None:
        del self._helpers[fd]
        self._loop.unwatch(fd)
        helper.end.close()
        if helper.attachment is not None:
            helper.attachment.close()
        if self._idle is helper:
            self._idle = None
        self._locks.free(helper)
        if helper.command is not None:
            self._waiting.runs(helper.command, self._early_status(helper.command.pid))
        if not self._helpers:
            self._early.clear()
            self.rest.is_due()
        if helper.on_gone is not None:
            helper.on_gone()

    def _granted(self, helper: Helper, container_id: str) -> None:
        self._reply(helper, self._facts(helper, [], container_id))

    def _freed(self, container_id: str) -> None:
        held = self.containers.get(container_id)
        if held is not None:
            held.go_on()

    # ------------------------------------------------------------------------------------- what helpers may ask for

    def _lock(self, helper: Helper, _fds: list[int], container_id: str, starts: bool = False) -> object:
        """Facts of the container or None, once nobody else creates, starts or deletes it. With `starts` its exit is
        not told before its start was."""
        helper.starts = starts
        return self._facts(helper, [], container_id) if self._locks.ask(helper, container_id) else _LATER

    def _facts(self, _helper: Helper, _fds: list[int], container_id: str) -> object:
        held = self.containers.get(container_id)
        return None if held is None else held.facts.to_json()

    def _adopt(self, _helper: Helper, fds: list[int], made: dict[str, Any]) -> bool:
        before = self.containers.get(made["facts"]["id"])
        held = Held(
            self._loop,
            made,
            dict(zip(made["fds"], fds, strict=True)),
            self._subscribers.tell,
            self._kill_rest,
            self._is_starting,
            self._start_again,
            before,
        )
        if before is not None:
            before.close()
        facts = held.facts
        self.containers[facts.id] = held
        status = self._early_status(facts.pid)
        if status is not None:
            held.ended(status)
        return True

    def _early_status(self, pid: int) -> int | None:
        """The status of a child that had ended before it was heard of."""
        status = self._early.pop(pid, None)
        return None if status is None or is_child(pid) else status

    def _started(self, _helper: Helper, _fds: list[int], container_id: str, when_ns: int) -> object:
        held = self.containers[container_id]
        held.facts.started_ns = when_ns
        if held.facts.finished_ns:  # it was over before its start could be told: exit.json knows no start yet
            held.record()
        answer = held.visible()
        if held.facts.restarts:
            held.tell_visible()
        held.go_on()
        return answer

    def _is_starting(self, container_id: str) -> bool:
        holder = self._locks.holder(container_id)
        return holder is not None and holder.starts

    def _start_again(self, held: Held) -> None:
        """A helper makes the next run; where none can, or it fails without a word, this was the last."""

        def gone() -> None:
            if self.containers.get(held.facts.id) is held:
                held.retire()

        if self.stopping or not self._fork_for(self._starter(held.facts.id), gone):
            gone()

    def _again(self, _helper: Helper, _fds: list[int], container_id: str) -> object:
        """What a container that is due was created with, which from now on counts as started again; else None."""
        held = self.containers.get(container_id)
        if held is None or not held.due or self.stopping:
            return None
        held.restarts.count += 1
        return held.restarts.message

    def _retire(self, _helper: Helper, _fds: list[int], container_id: str) -> bool:
        held = self.containers.get(container_id)
        if held is not None:
            held.retire()
        return True

    def _hand_over(self, helper: Helper, fds: list[int], pid: int, says_pid: bool, watched: bool) -> object:
        """A command that this helper leaves to us, or is about to become, and the connection of who waits for it. It
        runs once the helper is gone. Nobody is there to hear an answer."""
        helper.command = Command(pid, fds[0], says_pid, watched)
        if self.stopping and pid not in self._early:
            os.kill(pid, signals.SIGKILL)  # ours and not waited for
        return _LATER

    def _take_back(self, helper: Helper, _fds: list[int]) -> object:
        if helper.command is not None:
            os.close(helper.command.connection)
            helper.command = None
        return _LATER

    def _note(self, _helper: Helper, _fds: list[int], container_id: str, message: str) -> bool:
        held = self.containers[container_id]
        held.note(message)
        if held.facts.finished_ns:
            held.record()
        return True

    def _reopen(self, _helper: Helper, fds: list[int], container_id: str) -> bool:
        held = self.containers[container_id]
        held.stdio.reopen(LogFile(held.log_path, fds[0]))
        return True

    def _attach(self, helper: Helper, fds: list[int], container_id: str, stdin: bool) -> object:
        """Streams are copied until the helper ends; once the output is over it hears whether a reader was let go."""
        stdio = self.containers[container_id].stdio
        self._reply(helper, True)
        helper.attachment = stdio.attach(fds, stdin=stdin, on_end=lambda let_go: self._reply(helper, let_go))
        return _LATER

    def _told(self, helper: Helper, _fds: list[int], container_id: str) -> object:
        """Answers when the container's exit is known to everybody."""
        held = self.containers.get(container_id)
        if held is None:
            return True
        held.when_told(lambda: self._reply(helper, True))
        return _LATER

    def _forget(self, _helper: Helper, _fds: list[int], container_id: str) -> bool:
        held = self.containers.pop(container_id, None)
        if held is not None:
            held.close()
        return True

    def _listen(self, _helper: Helper, fds: list[int], name: bytes, request: bytes) -> bool:
        """The pod is up: takes over its socket, the first of `fds`, and its log, the second, as stderr; takes its name
        as ours (proc_pid_comm(5)), and keeps the request for later helpers."""
        self.request = request
        listener, *logs = fds
        for fd in logs:
            os.dup2(fd, 2, inheritable=False)
            os.close(fd)
        comm = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
        os.write(comm, name)
        os.close(comm)
        self._listener = Socket(AF_UNIX, SOCK_STREAM, 0, listener)
        self._listener.listen(_BACKLOG)  # once more: whoever listens last is who SO_PEERCRED tells clients of
        self._loop.watch(listener, READ, self._accept)
        return True

    def _pause(self, _helper: Helper, _fds: list[int], pid: int) -> bool:
        self.pause_pid = pid
        return True

    def _stop(self, helper: Helper, _fds: list[int], on: bool) -> tuple[int, list[str]]:
        """No more is created; other helpers, stuck ones too, are killed. Pid of pause and ids of containers."""
        self.stopping = on
        if on:
            self._idle = None
            for other in self._helpers.values():
                if other is not helper and other.pid:
                    os.kill(other.pid, signals.SIGKILL)  # ours and not waited for: it is no other's pid
                if other.command is not None and other.command.pid not in self._early:
                    os.kill(other.command.pid, signals.SIGKILL)
        return self.pause_pid, list(self.containers)

    def _end(self, _helper: Helper, _fds: list[int]) -> bool:
        self._loop.stop()
        return True

    def _kill_rest(self, held: Held, then: Callable[[], None]) -> None:
        # Without one, delete kills them later, and the exit is told all the same.
        if not self._fork_for(self._rest_killer(held.facts.id, held.handler), then):
            then()

    def _fork_for(self, work: Work, then: Callable[[], None] | None = None) -> bool:
        """A helper that nobody has asked for; False without the memory or pids for one."""
        try:
            self.fork(work, on_gone=then)
        except OSError as error:
            report("fork", error)
            return False
        return True

    def _rejoin(self, helper: Helper, fds: list[int]) -> object:
        facts = [held.visible() for held in self.containers.values()]
        answer = protocol.frame(protocol.reply(facts))
        if len(answer) > EVENT_LIMIT:  # who lags that far behind is let go
            answer = protocol.frame(protocol.reply(None))
        return self._subscribe(helper, fds, answer)

    def _subscribe(self, _helper: Helper, fds: list[int], answer: bytes) -> object:
        self._subscribers.add(fds[0], answer)
        return _LATER


def _nothing(_number: int, _frame: object) -> None:
    """The handler of signals that are only to wake the loop, or to do nothing."""
