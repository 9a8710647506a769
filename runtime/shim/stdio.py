"""The streams of a container: pipes or a pty to its processes, its log, and whoever is attached.

Output is read as soon as it is there and goes to the log first; nobody attached can hold that up, one who lags more
than MAX_LAG behind is let go. Only without a log do attached readers slow the container down, as there is nothing else
that would keep its output. Refuses to change flags of fds that others share (a user's terminal): pipes and terminals
are reopened for themselves. Invariant: what was written before the last process closed the stream is in the log before
`ended` resolves.

If the shim is killed: write ends of pipes are handed out O_RDWR, so that the containers themselves keep the pipes
readable: they get no SIGPIPE, but block once PIPE_SIZE bytes have nobody to read them. A terminal hangs up (SIGHUP),
as a lost terminal does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import termios
from collections import deque

from runtime.shim.logfile import Lines, LogFile
from runtime.shim.loop import READ, WRITE, Loop, Promise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PIPE_SIZE = 1 << 20
MAX_LAG = 4 << 20  # bytes an attached reader may lag behind
_PTY_CHUNK, _INPUT_CHUNK = 65536, 65536


class Sink:
    """Writes to an fd without ever blocking on it; what does not go yet waits, up to `limit` bytes."""

    def __init__(self, loop: Loop, take_fd: int, limit: int, on_broken: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = take_fd
        self._limit = limit
        self._on_broken = on_broken
        self._waiting: deque[memoryview] = deque()
        self._closing = False
        self._socket = stat.S_ISSOCK(os.fstat(take_fd).st_mode)
        self.pending = 0
        self.on_drained: Callable[[], None] | None = None

    @property
    def open(self) -> bool:
        return self._fd >= 0 and not self._closing

    def write(self, data: bytes) -> None:
        """Takes all of `data`, or breaks off: when the reader is gone, or further behind than the limit."""
        if not self.open:
            return
        self._waiting.append(memoryview(data))
        self.pending += len(data)
        if self.pending == len(data):
            self._flush(0)
        if self.pending > self._limit and self._fd >= 0:
            self._break()

    def _put(self, data: memoryview) -> int:
        if self._socket:
            peer = socket.socket(fileno=self._fd)
            try:
                return peer.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            finally:
                peer.detach()
        return os.write(self._fd, data)

    def _flush(self, _events: int) -> None:
        try:
            while self._waiting:
                count = self._put(self._waiting[0])
                self.pending -= count
                if count == len(self._waiting[0]):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = self._waiting[0][count:]
        except BlockingIOError:
            self._loop.watch(self._fd, WRITE, self._flush)
            return
        except OSError:
            self._break()
            return
        self._loop.unwatch(self._fd)
        if self._closing:
            self.close()
        if self.on_drained is not None:
            self.on_drained()

    def _break(self) -> None:
        self.close()
        self._on_broken()

    def finish(self) -> None:
        """Closes once what waits is written."""
        self._closing = True
        if not self._waiting:
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        self._waiting.clear()
        self.pending = 0
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)


class Output:
    """One output stream: read, logged, copied to those attached, until its end."""

    def __init__(self, loop: Loop, take_fd: int, chunk: int, lines: Lines | None, on_end: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = take_fd
        self._chunk = chunk
        self._lines = lines
        self._on_end = on_end
        self.taps: list[Sink] = []
        os.set_blocking(take_fd, False)
        loop.watch(take_fd, READ, self._ready)

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def _ready(self, _events: int) -> None:
        try:
            data = os.read(self._fd, self._chunk)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a pty whose last slave is closed reads as EIO, not as an end
                raise
            data = b""
        if not data:
            self.close()
            return
        if self._lines is not None:
            self._lines.feed(data)
        for tap in list(self.taps):
            tap.write(data)
        if self._lines is None and any(tap.pending for tap in self.taps):
            self._loop.unwatch(self._fd)

    def resume(self) -> None:
        """Reads on, once those who are attached have caught up (only without a log does reading ever stop)."""
        if self._fd >= 0 and not any(tap.pending for tap in self.taps):
            self._loop.watch(self._fd, READ, self._ready)

    def reopen(self, log: LogFile) -> None:
        if self._lines is not None and self._fd >= 0:
            self._lines.reopen(log)

    def close(self) -> None:
        """The end of the stream, or of our interest in it."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        self._loop.unwatch(fd)
        os.close(fd)
        if self._lines is not None:
            self._lines.end()
        for tap in self.taps:
            tap.finish()
        self.taps.clear()
        self._on_end()


class Stdio:
    """All streams of one container. `child` are the fds for its process: hand them over, then `close_child`.

    With `terminal` the pty is made by the runtime, in the container's own devpts: `take_console` brings its master.
    """

    def __init__(self, loop: Loop, *, log_path: str, terminal: bool, stdin: bool, stdin_once: bool) -> None:
        self._loop = loop
        self._log_path = log_path
        self._stdin_once = stdin_once and not terminal
        self._stdin = stdin
        self._console = -1
        self._input: Sink | None = None
        self._attached: list[Attachment] = []
        self.terminal = terminal
        self.outputs: dict[str, Output] = {}
        self.ended: Promise[None] = Promise()
        self.log = LogFile(log_path) if log_path else None
        if self.log is not None:
            self.log.users += 1  # ours: a container without output keeps its log open, too
        self.child: tuple[int, ...] = ()
        try:
            self._open_pipes()
        except BaseException:
            self.close()
            raise

    def _open_pipes(self) -> None:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.child = (null, null, null)
        if self.terminal:
            return
        if self._stdin:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self.child = (reader, null, null)
            os.set_blocking(writer, False)
            self._input = Sink(self._loop, writer, 1 << 30, lambda: None)
        for position, name in ((1, "stdout"), (2, "stderr")):
            reader, writer = output_pipe()
            self._add_output(name, reader)
            self.child = (*self.child[:position], writer, *self.child[position + 1 :])
        if null not in self.child:
            os.close(null)

    def _add_output(self, name: str, take_fd: int) -> None:
        lines = Lines(self.log, name) if self.log is not None else None
        chunk = _PTY_CHUNK if self.terminal else PIPE_SIZE
        self.outputs[name] = Output(self._loop, take_fd, chunk, lines, self._output_ended)

    def take_console(self, take_fd: int) -> None:
        """The master of the container's pty."""
        self._console = take_fd
        self._add_output("stdout", os.dup(take_fd))
        if self._stdin:
            self._input = Sink(self._loop, os.dup(take_fd), 1 << 30, lambda: None)

    def close_child(self) -> None:
        """Closes our copies of the child's ends: only then does the last writer's close end a stream."""
        for fd in set(self.child):
            os.close(fd)
        self.child = ()

    def _output_ended(self) -> None:
        if not any(output.open for output in self.outputs.values()):
            for attachment in list(self._attached):
                attachment.output_ended()
            self.ended.resolve()

    def reopen_log(self) -> None:
        """Opens the log's path anew; each stream moves there with its next line. Raises RuntimeFailure and keeps
        the old file when that cannot be."""
        if self.log is None:
            return
        new = LogFile(self._log_path)
        new.users += 1
        for output in self.outputs.values():
            output.reopen(new)
        new.dropped += self.log.dropped
        new.reason = new.reason or self.log.reason
        self.log.dropped = 0
        self.log.release()
        self.log = new

    def resize(self, rows: int, columns: int) -> None:
        """TIOCSWINSZ; without a terminal nothing."""
        if self._console >= 0 and 0 <= rows < 65536 and 0 <= columns < 65536:
            termios.tcsetwinsize(self._console, (rows, columns))

    def attach(self, take_fds: Sequence[int], *, stdin: bool, on_end: Callable[[], None]) -> Attachment:
        """Copies the streams to and from the fds until the output ends, the reader is gone or too far behind, or
        `Attachment.close`; then `on_end`."""
        attachment = Attachment(self._loop, self, take_fds, stdin=stdin, on_end=on_end)
        self._attached.append(attachment)
        if self.ended.done:
            attachment.output_ended()
        return attachment

    def detached(self, attachment: Attachment) -> None:
        if attachment in self._attached:
            self._attached.remove(attachment)
            if attachment.had_input and self._stdin_once and self._input is not None:
                self._input.finish()
        for output in self.outputs.values():
            output.taps = [tap for tap in output.taps if tap.open]
            output.resume()

    @property
    def input(self) -> Sink | None:
        """Where bytes for the container go; None without stdin or once it was closed."""
        return self._input if self._input is not None and self._input.open else None

    def input_ended(self) -> None:
        """An attached stdin reached its end: the container's does, too, if it was to be attached once."""
        if self._stdin_once and self._input is not None:
            self._input.finish()

    def dropped(self) -> str:
        """What the log has lost, in a sentence, or ""."""
        if self.log is None or not self.log.dropped:
            return ""
        return f"{self.log.dropped} bytes of log were dropped: {self.log.reason}"

    def close(self) -> None:
        """Ends everything; idempotent."""
        self.close_child()
        for output in self.outputs.values():
            output.close()
        for attachment in list(self._attached):
            attachment.close()
        if self._input is not None:
            self._input.close()
        if self._console >= 0:
            os.close(self._console)
            self._console = -1
        if self.log is not None:
            self.log.release()
            self.log = None
        self.ended.resolve()


class Attachment:
    """Somebody's fds, connected to a container's streams."""

    def __init__(
        self, loop: Loop, stdio: Stdio, take_fds: Sequence[int], *, stdin: bool, on_end: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._stdio = stdio
        self._on_end = on_end
        self._in = -1
        self._sinks: list[Sink] = []
        self.had_input = stdin
        self._closed = False
        fds = list(take_fds)
        if stdin and fds:
            self._in = _own(fds.pop(0), os.O_RDONLY)
            self._read_on()
        for name, fd in zip(("stdout", "stderr"), fds, strict=False):
            output = stdio.outputs.get(name)
            if output is None or not output.open:
                os.close(fd)
                continue
            sink = Sink(loop, _own(fd, os.O_WRONLY), MAX_LAG, self._sink_broken)
            sink.on_drained = output.resume
            output.taps.append(sink)
            self._sinks.append(sink)
        for fd in fds[2:]:
            os.close(fd)

    def _read_on(self) -> None:
        if self._in < 0:
            return
        try:
            self._loop.watch(self._in, READ, self._input_ready)
        except PermissionError:  # epoll refuses regular files: they are always ready
            self._loop.after(0, lambda: self._input_ready(READ))

    def _input_ready(self, _events: int) -> None:
        if self._in < 0:
            return
        target = self._stdio.input
        try:
            data = os.read(self._in, _INPUT_CHUNK)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up
            data = b""
        self._loop.unwatch(self._in)
        if not data or target is None:
            self._close_input()
            if not data:
                self._stdio.input_ended()
            return
        target.on_drained = self._read_on
        target.write(data)  # calls _read_on once it is all written: a container that does not read is waited for

    def _close_input(self) -> None:
        fd, self._in = self._in, -1
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)

    def _sink_broken(self) -> None:
        if not any(sink.open for sink in self._sinks):
            self.close()

    def output_ended(self) -> None:
        """The container's output is over: closes once what waits has been written."""
        if not any(sink.pending for sink in self._sinks):
            self.close()
            return
        for sink in self._sinks:
            sink.on_drained = self.output_ended

    def close(self) -> None:
        """Detaches and tells so; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._close_input()
        for sink in self._sinks:
            sink.on_drained = None
            sink.close()
        self._stdio.detached(self)
        self._on_end()


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


def _own(take_fd: int, flags: int) -> int:
    """An fd with an open file description of our own, nonblocking, for what `take_fd` refers to. Sockets and regular
    files stay as they are: the one are sent to with MSG_DONTWAIT, the other do not block."""
    mode = os.fstat(take_fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return take_fd
    try:
        return os.open(f"/proc/self/fd/{take_fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(take_fd)
