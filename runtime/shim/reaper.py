"""Every child that ends is waited for here: the containers, execs and helpers we know, and orphans we do not.

The shim is a subreaper, so what its containers leave behind becomes its child and must not stay a zombie (threats
O31). One SIGCHLD may stand for many deaths (O16): each wake-up waits until nobody is left. Refuses to guess: a status
is handed to whoever expects that pid, and pids cannot be mixed up since the kernel reuses none before it is waited for.
Invariant: after `collect` this process has no zombies.
"""

from __future__ import annotations

import os

from runtime.linux import signals
from runtime.shim.loop import READ, Loop, Promise


def exit_code(status: int) -> tuple[int, int]:
    """(code, signal) of a wait status; the code of a signalled death is 128 + signal, as shells have it."""
    code = os.waitstatus_to_exitcode(status)
    return (code, 0) if code >= 0 else (128 - code, -code)


class Reaper:
    """Waits for children on SIGCHLD and resolves the promises of those that are expected."""

    def __init__(self, loop: Loop) -> None:
        self._expected: dict[int, Promise[int]] = {}
        self._early: dict[int, int] = {}
        self._holds = 0
        self._wake, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signals.wake_up(self._wake_writer)
        # A handler, not SIG_DFL or SIG_IGN: only a handler wakes the loop, and execve(2) resets it in containers.
        signals.handle(signals.SIGCHLD, lambda _number, _frame: None)
        loop.watch(self._wake, READ, self._woken)

    def _woken(self, _events: int) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        self.collect()

    def close(self) -> None:
        """Stops listening for signals."""
        signals.wake_up(-1)
        os.close(self._wake)
        os.close(self._wake_writer)

    def expect(self, pid: int) -> Promise[int]:
        """The wait status of child `pid`, when it has one."""
        promise = self._expected.get(pid)
        if promise is None:
            promise = self._expected[pid] = Promise()
            status = self._early.pop(pid, None)
            if status is not None and not _is_child(pid):
                self._ended(pid, status)
        return promise

    def hold(self) -> None:
        """Until `release`, statuses of unknown children are kept: a runtime binary will tell us a pid that may be
        dead by then."""
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._early.clear()

    def collect(self) -> None:
        """Waits for all children that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        promise = self._expected.pop(pid, None)
        if promise is not None:
            promise.resolve(status)
        elif self._holds:
            self._early[pid] = status


def _is_child(pid: int) -> bool:
    """True when `pid` is now a child of ours, running or zombie: then an earlier death under that pid was another's."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
