"""Being the front of one process: its signals, its terminal, its end, and the reaping of what it leaves.

Refuses to interpret a byte. Invariant: the caller's terminal is as it was before, whatever happens; the exit code is
the process's, 128 + n for a signal n, as a shell says it.
"""

from __future__ import annotations

import errno
import os
import select

from runtime.errors import RuntimeFailure
from runtime.linux.process import set_child_subreaper
from runtime.linux.signals import NSIG, SIGCHLD, SIGKILL, SIGSTOP, handle, wake_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.notify import Notify
    from runtime.spec_process import Process

_CHUNK = 65536
_SIGURG, _SIGWINCH, _SIGTTIN, _SIGTTOU = 23, 28, 21, 22
# The front's own: its end, its terminal's job control, and those that cannot be caught.
_OURS = frozenset({SIGKILL, SIGSTOP, _SIGTTIN, _SIGTTOU, _SIGURG, 32, 33})


def check_terminal(terminal: bool, detached: bool, console_socket: str) -> None:
    """Raises RuntimeFailure unless somebody will hold the terminal's other end, and holds no more than that."""
    if terminal and detached and not console_socket:
        raise RuntimeFailure(
            "cannot allocate tty if runc will detach without setting console socket", code="invalid_argument"
        )
    if console_socket and not (terminal and detached):
        raise RuntimeFailure(
            "cannot use console socket if runc will not detach or allocate tty", code="invalid_argument"
        )


def sized(process: Process) -> Process:
    """`process` with the caller's terminal size where it names none: set before the command can ask for it."""
    if process.console_size != (0, 0) or not os.isatty(0):
        return process
    from runtime.terminal import size_of

    return process.changed(console_size=size_of(0))


class Foreground:
    """Entered before the process is made, so that no signal is lost; `follow` then waits for its end."""

    def __init__(self, *, subreaper: bool) -> None:
        self._subreaper = subreaper
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> Foreground:
        if self._subreaper:
            set_child_subreaper(True)
        wake_up(self._write)
        for number in range(1, NSIG):
            if number not in _OURS:
                try:
                    handle(number, _nothing)
                except (OSError, ValueError):
                    continue  # one that this machine does not have
        return self

    def __exit__(self, *_: object) -> None:
        if self._restore is not None:
            self._restore()
        wake_up(-1)
        os.close(self._read)
        os.close(self._write)

    def follow(self, pid: int, take_console: int, notify: Notify | None = None) -> int:
        """Waits for `pid`, a child, and passes on signals; with a console copies between it and stdin and stdout. What
        says on `notify` that it is ready is told with this process's id: this is the one that ends when it does."""
        console = take_console
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        if console >= 0:
            self._raw()
            self._resize(console)
            poll.register(console, select.POLLIN)
            poll.register(0, select.POLLIN)
        told = -1 if notify is None else notify.fileno()
        if notify is not None:
            poll.register(told, select.POLLIN)
        code: int | None = self._reap(pid)
        try:
            while code is None:
                for fd, _ in poll.poll():
                    if fd == self._read:
                        code = self._signals(pid, console)
                    elif fd == told:
                        if notify is not None and notify.receive(os.getpid()):
                            poll.unregister(told)
                    elif fd == 0:
                        if not _copy(0, console):
                            poll.unregister(0)
                    elif not _copy(console, 1):
                        poll.unregister(console)
            if console >= 0:
                self._rest(console)
            return code
        finally:
            if console >= 0:
                os.close(console)

    def _signals(self, pid: int, console: int) -> int | None:
        code = None
        try:
            numbers = os.read(self._read, 4096)
        except BlockingIOError:
            return None
        for number in numbers:
            if number == SIGCHLD:
                ended = self._reap(pid)
                code = ended if ended is not None else code
            elif number == _SIGWINCH and console >= 0:
                self._resize(console)
            else:
                try:
                    os.kill(pid, number)  # a child that nobody has waited for: the number is still its
                except ProcessLookupError:
                    pass
        return code

    def _reap(self, pid: int) -> int | None:
        code = None
        while True:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if ended == 0:
                return code
            if ended == pid:
                code = os.waitstatus_to_exitcode(status)
                code = 128 - code if code < 0 else code

    def _raw(self) -> None:
        fd = 0 if os.isatty(0) else 1
        if not os.isatty(fd):
            return
        import termios
        import tty

        before = termios.tcgetattr(fd)
        self._restore = lambda: termios.tcsetattr(fd, termios.TCSADRAIN, before)
        if fd == 0:
            tty.setraw(fd)
        else:  # what comes has its "\r\n" already; what is typed is not ours to read
            termios.tcsetattr(fd, termios.TCSADRAIN, [before[0], before[1] & ~termios.OPOST, *before[2:]])

    def _resize(self, console: int) -> None:
        from runtime.terminal import resize, size_of

        try:
            resize(console, *size_of(0))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EIO):
                raise

    def _rest(self, console: int) -> None:
        """What the process wrote before it ended."""
        os.set_blocking(console, False)
        while _copy(console, 1):
            pass


def _copy(source: int, target: int) -> bool:
    """One chunk; False at the end. A pty whose other end is closed answers EIO."""
    try:
        data = os.read(source, _CHUNK)
        while data:
            data, more = data[os.write(target, data) :], True
            if not data:
                return more
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
    return False


def _nothing(_number: int, _frame: object) -> None:
    """The wake-up fd has told."""
