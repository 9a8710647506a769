"""The shim that is forked before it is needed: it and its first helper wait for the next request to the zygote.

    zygote                               spare shim and its helper
      │ ── fork ────────────────────────▶ │ the helper copies its pages, and waits at the zygote's listener
      │                                   │ ◀── a request
      │ ◀─ taken ──────────────────────── │ accepts it, and brings the pod up
      │ ◀─ end of file ────────────────── │ is done, after one container's start and a command in it, as a rule
      │ ── fork ────────────────────────▶   the next one, a moment later; at once where somebody waits for it

So a pod's start waits neither for two forks nor for the first write to each page, nor do they take its processor from
it. Where nobody comes soon the helper gives the copies back, and what waits weighs little. Refuses to outlive the
zygote, but for who has come to it before: a pipe that only the zygote could write to tells of its end. Invariant: one
spare waits at a time, and who has told that it is taken serves a request.
"""

from __future__ import annotations

import os
import select
from _socket import AF_UNIX, SHUT_RDWR, SOCK_STREAM
from _socket import socket as Socket

from runtime.linux.process import close_all_but, set_comm
from runtime.shim.cgroup import SPARE, ZYGOTE
from runtime.shim.report import report
from runtime.shim.rest import QUIET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.resident import Resident

_MOMENT = 0.1  # seconds
_CALM = 0.1  # seconds: a pod and its first container are up, most likely
_BREATH = 0.02  # seconds


class Spare:
    """In the zygote, and in all that it forks."""

    def __init__(self, take_listener: int) -> None:
        self._listener = take_listener
        os.set_blocking(take_listener, False)
        self._alive, self._ours = os.pipe2(os.O_CLOEXEC)
        self._taken = -1
        self.zygote_lives = True  # as far as a helper knows

    def filenos(self) -> tuple[int, int, int]:
        """What a spare shim has, and its helper."""
        return self._listener, self._alive, self._taken

    def fork(self) -> bool:
        """In the zygote: forks the next, and waits until it is taken. True in the new shim, an orphan, alone."""
        waiting, taken = os.pipe2(os.O_CLOEXEC)
        try:
            middle = os.fork()
        except OSError as error:  # no memory or no pids
            report("fork", error)
            os.close(waiting)
            os.close(taken)
            self._turn_away()
            return False
        if middle == 0:
            set_comm(SPARE)  # before it is an orphan: whoever looks for what a pod has left knows it
            if os.fork():
                os._exit(0)  # so the other is init's child at once
            self._taken = taken
            close_all_but(*self.filenos())
            return True
        os.close(taken)
        os.waitpid(middle, 0)
        if os.read(waiting, 1):
            # Who came has a pod to bring up, and containers and a command then, and needs the processors that a fork
            # and its copies would take; until its helper has ended and the command's answer is on its way, or somebody
            # else waits.
            if self._listener not in select.select((self._listener, waiting), (), (), _CALM)[0]:
                select.select((self._listener,), (), (), _BREATH)
        else:  # it was killed, or could not even begin: not that again at once
            select.select((), (), (), _MOMENT)
        os.close(waiting)
        return False

    def _turn_away(self) -> None:
        """Who comes hears an end, and may do better later."""
        if select.select((self._listener,), (), (), _MOMENT)[0]:
            try:
                os.close(_accept(self._listener))
            except OSError:
                pass

    def await_request(self, resident: Resident, shim: int) -> int:
        """In a spare's helper: the connection of the next request. Ends the process with its shim, at the other end of
        the fd `shim`, and with the zygote, but for a request that came before that."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._alive, 0)
        poll.register(shim, 0)
        if not poll.poll(0):  # who is there already waits for nothing
            _try(resident.make_ready)
        milliseconds: float | None = QUIET * 1000
        while True:
            ready = poll.poll(milliseconds)
            fds = [fd for fd, _ in ready]
            if shim in fds:
                os._exit(0)
            if self._alive in fds:
                self._refuse_more()
            elif not ready:
                milliseconds = None
                _try(resident.rest.act)
                continue
            try:
                connection = _accept(self._listener)
            except OSError:  # the peer has gone again
                if self.zygote_lives:
                    continue
                os._exit(0)
            try:
                os.write(self._taken, b"t")
            except OSError:  # SIGPIPE is ignored
                self.zygote_lives = False
            for fd in (self._listener, self._alive):  # the last tells of our end
                os.close(fd)
            set_comm(ZYGOTE)
            return connection

    def _refuse_more(self) -> None:
        """Without a zygote nobody else listens: from here on connect(2) is refused. Who came before may be served."""
        listener = Socket(AF_UNIX, SOCK_STREAM, 0, self._listener)
        listener.shutdown(SHUT_RDWR)
        listener.detach()
        self.zygote_lives = False


def _try(act: Callable[[], object] | None) -> None:
    """What only spares time or memory: a spare that ended over it would be forked again at once, to end again."""
    if act is None:
        return
    try:
        act()
    except OSError as error:
        report("copy pages, or give them back", error)


def _accept(listening: int) -> int:
    listener = Socket(AF_UNIX, SOCK_STREAM, 0, listening)
    try:
        connection: int = listener._accept()[0]  # type: ignore[attr-defined]  # accept(2): fd and address
    finally:
        listener.detach()
    return connection
