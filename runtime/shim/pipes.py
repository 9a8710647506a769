"""The fds of a new container: what its process gets, and what the shim keeps of them.

Pipes hold PIPE_SIZE bytes, so that a busy writer is seldom woken. With a terminal the pty is made by the runtime, in
the container's own devpts, and its master comes later. Refuses to leave anything open on failure.

If the shim is killed: write ends are handed out O_RDWR, so that the containers themselves keep the pipes readable:
they get no SIGPIPE, but block once PIPE_SIZE bytes have nobody to read them. A terminal hangs up (SIGHUP), as a lost
terminal does.
"""

from __future__ import annotations

import fcntl
import os

from runtime.shim.logfile import LogFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.shim.protocol import ContainerMessage

PIPE_SIZE = 1 << 20


class Pipes:
    """`child` are stdin, stdout and stderr of the new process; `ours` the other ends and the log, by name."""

    def __init__(self, message: ContainerMessage) -> None:
        """Raises RuntimeFailure when the log cannot be opened."""
        self.ours: dict[str, int] = {}
        self._wants_input = message.stdin
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.child = [null, null, null]
        try:
            if message.log_path:
                self.ours["log"] = LogFile(message.log_path).fd
            if not message.terminal:
                self._open(message.stdin)
        except BaseException:
            self.close()
            raise

    def _open(self, stdin: bool) -> None:
        null = self.child[0]
        if stdin:
            self.child[0], self.ours["stdin"] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.ours["stdin"], False)
        self.ours["stdout"], self.child[1] = output_pipe()
        self.ours["stderr"], self.child[2] = output_pipe()
        if stdin:
            os.close(null)

    def take_console(self, take_fd: int) -> None:
        """The master of the container's pty."""
        self.ours["console"] = take_fd
        self.ours["stdout"] = os.dup(take_fd)
        if self._wants_input:
            self.ours["stdin"] = os.dup(take_fd)

    def close(self) -> None:
        for fd in {*self.child, *self.ours.values()}:
            os.close(fd)
        self.child, self.ours = [], {}


def output_pipe() -> tuple[int, int]:
    """A pipe for output as (read end, write end); the write end is O_RDWR, see above for why."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:  # over the user's quota, pipe(7): smaller is slower, not wrong
        pass
    try:
        both = os.open(f"/proc/self/fd/{writer}", os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader, both
