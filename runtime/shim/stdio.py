"""The streams of one container as the shim holds them: its output into log and to those attached, its input.

Output is read as soon as it is there and goes to the log first. Only without a log do attached readers slow the
container down, as there is nothing else that would keep its output. Refuses to decide what a stream is: the fds come
from runtime.shim.pipes. Invariant: what was written before the last process closed the streams is in the log before
`on_end` is called.
"""

from __future__ import annotations

import errno
import os

from runtime.shim.attach import Attachment
from runtime.shim.logfile import Lines, LogFile
from runtime.shim.loop import READ, Loop
from runtime.shim.pipes import PIPE_SIZE
from runtime.shim.sink import Sink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PTY_CHUNK = 65536


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
    """All streams of one container. `fds` are ours, by name: stdout, stderr, stdin, log, console; `on_end` is called
    once, when all output has ended."""

    def __init__(
        self, loop: Loop, take_fds: dict[str, int], log_path: str, stdin_once: bool, on_end: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._on_end = on_end
        self._input: Sink | None = None
        self._attached: list[Attachment] = []
        self.console = take_fds.pop("console", -1)
        self._stdin_once = stdin_once and self.console < 0
        self.ended = False
        self.log: LogFile | None = None
        if "log" in take_fds:
            self.log = LogFile(log_path, take_fds.pop("log"))
            self.log.users += 1  # ours: a container without output keeps its log open, too
        if "stdin" in take_fds:
            # No limit: it is filled no faster than it drains.
            self._input = Sink(loop, take_fds.pop("stdin"), 1 << 30, lambda: None)
        chunk = PIPE_SIZE if self.console < 0 else _PTY_CHUNK
        self.outputs: dict[str, Output] = {}
        for name, fd in take_fds.items():
            lines = Lines(self.log, name) if self.log is not None else None
            self.outputs[name] = Output(loop, fd, chunk, lines, self._output_ended)

    def _output_ended(self) -> None:
        if self.ended or any(output.open for output in self.outputs.values()):
            return
        self.ended = True
        for attachment in list(self._attached):
            attachment.output_ended()
        self._on_end()

    def reopen(self, new: LogFile) -> None:
        """Each stream goes on in `new` with its next line."""
        if self.log is None:
            new.users += 1
            new.release()
            return
        new.users += 1
        for output in self.outputs.values():
            output.reopen(new)
        new.dropped += self.log.dropped
        new.reason = new.reason or self.log.reason
        self.log.dropped = 0
        self.log.release()
        self.log = new

    def attach(self, take_fds: Sequence[int], *, stdin: bool, on_end: Callable[[bool], None]) -> Attachment:
        """Copies the streams to and from the fds until the output ends, the reader is gone or too far behind, or
        `Attachment.close`; then `on_end`, with whether a reader was let go."""
        attachment = Attachment(self._loop, self, take_fds, stdin=stdin, on_end=on_end)
        self._attached.append(attachment)
        if self.ended:
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
        for output in self.outputs.values():
            output.close()
        for attachment in list(self._attached):
            attachment.close()
        if self._input is not None:
            self._input.close()
        if self.console >= 0:
            os.close(self.console)
            self.console = -1
        if self.log is not None:
            self.log.release()
            self.log = None
