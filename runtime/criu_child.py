"""The process that is criu: started with a socket, waited for as long as it may take, killed when it takes longer.

Refuses to ask a late criu by a signal: SIGTERM ends it as SIGKILL does, with nothing cleaned up, where it does not
ignore it. What it heeds is that its caller hangs up, and for that it is given a moment. Invariant: after `close` it
does not run, nor, where it was late, what it has started.
"""

from __future__ import annotations

import array
import os
import socket
import time

from runtime.errors import RuntimeFailure
from runtime.linux.process import clone3, close_range, has_ended, pidfd_open, signal_running
from runtime.linux.signals import SIGKILL
from runtime.tree import kill_tree, members

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_MAX_MESSAGE = 1 << 16
_PATIENCE_S = 2.0  # after hanging up
# swrk's socket is this number in criu; fds that a request names come after it.
_SOCKET, FIRST_FD = 3, 4


class Gone(Exception):
    """criu ended without an answer."""


class Late(Exception):
    """criu did not do its work in its time."""


class Child:
    """A running `criu swrk`, until `deadline` by the monotonic clock (None: for ever). `close` ends it."""

    def __init__(
        self,
        program: str,
        deadline: float | None,
        pass_fds: Sequence[int] = (),
        prepare: Callable[[], None] = lambda: None,
        adopt: Callable[[int], None] = lambda _pid: None,
        cgroup_fd: int = -1,
        doomed: Callable[[], object] = lambda: None,
    ) -> None:
        self.pid = self._pidfd = -1
        self._doomed = doomed
        self._deadline = deadline
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        go, ready = os.pipe2(os.O_CLOEXEC)
        said, say = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid, self._pidfd = clone3(0, cgroup_fd=cgroup_fd)
            if self.pid == 0:
                os.close(ready)
                _become(program, [its.fileno(), *pass_fds], prepare, go, say)
            its.close()
            os.close(say)
            say = -1
            adopt(self.pid)
            os.write(ready, b"1")
            if reason := os.read(said, 4096):
                raise RuntimeFailure(f"start criu: {os.fsdecode(reason)}")
        except BaseException:
            os.close(ready)  # whoever waits for it ends
            ready = -1
            self.close()
            raise
        finally:
            its.close()
            for fd in (go, ready, said, say):
                if fd >= 0:
                    os.close(fd)

    def send(self, data: bytes) -> None:
        """Raises Gone, Late."""
        try:
            self._socket.settimeout(self._left())
            self._socket.send(data)
        except TimeoutError:
            raise Late from None
        except OSError as error:
            raise Gone(f"it hangs up: {error.strerror}") from None

    def receive(self) -> tuple[bytes, int]:
        """A message, and the fd that came with it or -1. Raises Gone, Late."""
        try:
            self._socket.settimeout(self._left())
            data, ancillary, _, _ = self._socket.recvmsg(_MAX_MESSAGE, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise Late from None
        except OSError as error:
            raise Gone(f"it hangs up: {error.strerror}") from None
        if not data:
            raise Gone("it ended without an answer; its own words are on stderr")
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        for fd in fds[1:]:
            os.close(fd)
        return data, fds[0] if fds else -1

    def _left(self) -> float | None:
        """Never 0, which would mean not to wait at all and to say something else."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def end(self, *, may_fail: bool) -> None:
        """Hangs up and waits for its end. Raises Gone when that is a failure, Late."""
        self._socket.close()
        left = self._left()
        if left is not None and not has_ended(self._pidfd, left):
            raise Late
        code = self._reaped()
        if code and not may_fail:
            raise Gone(f"it ends with {code}")

    def close(self) -> None:
        """criu cleans up after itself when its caller hangs up; what it is killed in the middle of, it cannot. So it is
        killed only when it is late, and does not end then either."""
        if self._pidfd < 0:
            self._socket.close()
            return
        left = self._left()
        late = self._deadline is not None and time.monotonic() >= self._deadline
        started = list(_held(members(self.pid) - {self.pid})) if late else []
        self._socket.close()
        if left is not None and not has_ended(self._pidfd, left + _PATIENCE_S):
            self._doomed()
            kill_tree(self.pid)
        self._reaped()
        for pidfd in started:
            signal_running(pidfd, SIGKILL)
        for pidfd in started:
            has_ended(pidfd, _PATIENCE_S)
            os.close(pidfd)

    def _reaped(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._pidfd)
        self._pidfd = -1
        return code


def _held(pids: Iterable[int]) -> Iterator[int]:
    """A pidfd for each that is still there."""
    for pid in pids:
        try:
            yield pidfd_open(pid)
        except ProcessLookupError:
            pass


def _become(program: str, fds: Sequence[int], prepare: Callable[[], None], go: int, say: int) -> None:
    """The child, from clone to execve. Never returns."""
    import fcntl

    try:
        if not os.read(go, 1):  # until the parent has put it where it belongs
            os._exit(1)
        prepare()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
        say = fcntl.fcntl(say, fcntl.F_DUPFD_CLOEXEC, 100)
        for number, fd in enumerate(high, _SOCKET):
            os.dup2(fd, number)
        close_range(_SOCKET + len(high), 0xFFFFFFFF, 1 << 2)  # CLOSE_RANGE_CLOEXEC
        os.execv(program, ["criu", "swrk", str(_SOCKET)])
    except BaseException as error:
        os.write(say, os.fsencode(str(RuntimeFailure.of(error)))[:4096])
    os._exit(1)
