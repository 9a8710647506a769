"""The terminal's side of a container: copies its streams, forwards signals and window sizes.

The shim gets pipes, never the caller's own descriptors: those are shared with a shell, and the shim makes what it is
given non-blocking. Refuses to buffer: a slow terminal slows the copy, not the container's log. Invariant: the
terminal's mode is put back however it ends, short of SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import selectors
import signal
import socket
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Mapping

from runtime.linux.files import write_all
from runtime.linux.sockets import send_frame

_CHUNK = 1 << 16
# With a terminal ^C and its like are bytes; these are meant for this process.
_LEAVING = (signal.SIGTERM, signal.SIGHUP)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Streams:
    """Pipes between this process and a shim. `for_shim` are the ends to hand over, in the order that attach wants."""

    def __init__(self, *, stdin: bool, terminal: bool) -> None:
        self._stdin = stdin
        self._terminal = terminal
        self._in = os.pipe2(os.O_CLOEXEC) if stdin else (-1, -1)
        self._out = os.pipe2(os.O_CLOEXEC)
        self._err = (-1, -1) if terminal else os.pipe2(os.O_CLOEXEC)
        self._wake = os.pipe2(os.O_CLOEXEC)
        self.left = 0  # the signal by which this process was to end before the container did; SIGPIPE: nobody reads
        self.trouble = ""  # why not, where that is more to say than a signal is
        self.for_shim = [fd for fd in (self._in[0], self._out[1], self._err[1]) if fd >= 0]

    def attached(self, control: int) -> None:
        """Takes the control fd; the shim's ends are the shim's from now on."""
        for fd in self.for_shim:
            os.close(fd)
        self._control = socket.socket(fileno=control)

    async def copy(self, forward: Callable[[int], None]) -> None:
        """Copies until the container's output ends, or this process is to (`left`). `forward` is called with each
        signal for the container."""
        loop = asyncio.get_running_loop()
        with _raw_terminal(self._stdin) if self._terminal else contextlib.nullcontext():
            act, caught = (self._leave, _LEAVING) if self._terminal and self._stdin else (forward, _FORWARDED)
            actions = {int(number): act for number in caught}
            if self._terminal:
                actions[signal.SIGWINCH] = self._resize
                self._resize()
            if self._stdin:
                threading.Thread(target=self._copy_in, daemon=True).start()
            try:
                with _acting(loop, actions):
                    await loop.run_in_executor(None, self._copy_out)
            finally:
                self._control.close()
                for fd in self._wake:
                    os.close(fd)

    def _leave(self, number: int) -> None:
        self.left = number
        os.write(self._wake[1], b".")

    def _resize(self, _number: int = 0) -> None:
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(0)
            send_frame(self._control, json.dumps({"resize": [rows, columns]}).encode())

    def _copy_in(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, _CHUNK):
                write_all(self._in[1], data)
        with contextlib.suppress(OSError):
            os.close(self._in[1])

    def _copy_out(self) -> None:
        targets = {self._out[0]: 1, self._err[0]: 2}
        with selectors.DefaultSelector() as selector:
            for source in (self._out[0], self._err[0], self._wake[0]):
                if source >= 0:
                    selector.register(source, selectors.EVENT_READ)
            while len(selector.get_map()) > 1 and not self.left:
                for key, _ in selector.select():
                    if key.fd == self._wake[0]:
                        return
                    data = os.read(key.fd, _CHUNK)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        continue
                    try:
                        write_all(targets[key.fd], data)
                    except OSError as error:
                        self._unwritten(targets[key.fd], error)

    def _unwritten(self, fd: int, error: OSError) -> None:
        """Nobody reads, the terminal is gone, or what it is written to is full."""
        self.left = signal.SIGHUP if error.errno == errno.EIO and os.isatty(fd) else signal.SIGPIPE
        if error.errno not in (errno.EIO, errno.EPIPE):
            where = "standard output" if fd == 1 else "standard error"
            self.trouble = f"write to {where}: {errno.errorcode.get(error.errno or 0)} {(error.strerror or '').lower()}"


@contextlib.contextmanager
def _acting(loop: asyncio.AbstractEventLoop, actions: Mapping[int, Callable[[int], None]]) -> Iterator[None]:
    """Each of those signals calls its action in the loop. Not the loop's own add_signal_handler: for each call of that
    and of its inverse the standard library makes enums of all signals there are, most of a millisecond."""

    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def came() -> None:
        for number in os.read(reader, 4096):
            if number in actions:
                actions[number](number)

    loop.add_reader(reader, came)
    # Written to by the interpreter as a signal arrives, in whatever thread: a handler alone would wait for the loop.
    before_fd, before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), {}
    try:
        for number in actions:
            before[number] = signal.signal(number, lambda _number, _frame: None)
            signal.siginterrupt(number, False)  # libraries' calls go on
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def _raw_terminal(both_ways: bool) -> Iterator[None]:
    """Ours out of the way of the container's own, which made "\\r\\n" of each "\\n" already. Without `both_ways` what
    is typed, and ^C with it, stays ours."""
    fd = 0 if both_ways else 1
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        if both_ways:
            tty.setraw(fd)
        else:
            termios.tcsetattr(fd, termios.TCSADRAIN, [before[0], before[1] & ~termios.OPOST, *before[2:]])
        yield
    finally:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
