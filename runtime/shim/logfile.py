"""A container's output as CRI log lines: "TIME stream P|F text", whole lines in every write.

Bytes pass as they are; a line over MAX_LINE is cut into P pieces and an F one, and a last line without its newline is
one F line at the end (threats O22-O24). Refuses anything but regular files, and never fails a container over a log:
what cannot be written is dropped whole line by whole line and counted, and tried again a moment later (O26): whoever
frees a little space on a full disk needs it to free more, and a container that never stops writing would take it.
Of a line whose pieces are written only in part, the rest is dropped, too, and what is there gets its F.
Invariant: the file ends with a newline after every `write`, so a reader, a rotation or a full disk never sees half a
line, and no two lines are ever read as one.

Speed comes from the shape: one time stamp a chunk, one bytes.replace for all newlines of a run of lines that were
probed to be short, one writev.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from runtime.errors import RuntimeFailure

MAX_LINE = 16384  # bytes of text in a log line, as the other CRI runtimes cut
_PAUSE_S = 0.2  # between two tries to write to a disk that is full
_SWITCH_AFTER = 1 << 20  # an endless line may hold on to a rotated file for so many bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Buffer = bytes | memoryview

_second = -1
_second_text = ""


def timestamp() -> str:
    """Now, as RFC3339Nano in UTC."""
    global _second, _second_text
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    if seconds != _second:
        _second, _second_text = seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{_second_text}.{nanoseconds:09d}Z"


class LogFile:
    """An open log. `users` streams write to it; it is closed with the last. `dropped` counts lost bytes of log."""

    __slots__ = ("_again", "dropped", "fd", "path", "reason", "users")

    def __init__(self, path: str, take_fd: int = -1) -> None:
        """Opens `path` for appending, made with mode 0640 where missing, unless that was done already and `take_fd`
        is it. Raises RuntimeFailure."""
        self.path = path
        self.users = 0
        self.dropped = 0
        self.reason = ""
        self._again = 0.0  # when the next write is tried, once there was no space
        self.fd = take_fd if take_fd >= 0 else self._open(path)

    @staticmethod
    def _open(path: str) -> int:
        # O_NOFOLLOW: a link in its place leads into the host. O_NONBLOCK: a FIFO in its place would block the open.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(path, flags, 0o640)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
            return fd
        except OSError as error:
            hint = "the log path must be a regular file in a directory that exists"
            raise RuntimeFailure(
                f"open log {path}: {errno.errorcode.get(error.errno or 0)} {error.strerror}",
                step="log",
                errno=error.errno or 0,
                hint=hint,
            ) from error

    def release(self) -> None:
        """One user less."""
        self.users -= 1
        if self.users <= 0 and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def write(self, buffers: Sequence[Buffer]) -> bytes | None:
        """Appends whole lines. Never raises: what does not fit is dropped and counted. None when all is written, else
        the lines that were."""
        size = sum(map(len, buffers))
        if self._again and time.monotonic() < self._again:
            self.dropped += size
            return b""
        self._again = 0.0
        try:
            written = os.writev(self.fd, buffers)
        except OSError as error:
            self._lost(size, error)
            return b""
        if written == size:
            return None
        whole = b"".join(buffers)
        try:
            while written < size:
                written += os.write(self.fd, memoryview(whole)[written:])
        except OSError as error:
            kept = whole.rfind(b"\n", 0, written) + 1
            self._cut(written - kept)
            self._lost(size - kept, error)
            return whole[:kept]
        return None

    def _cut(self, torn: int) -> None:
        """Takes the torn end of the last write off, so that the file ends with a newline again."""
        try:
            os.ftruncate(self.fd, max(0, os.fstat(self.fd).st_size - torn))
        except OSError as error:
            self.reason = f"cut {self.path}: {error.strerror}"

    def _lost(self, size: int, error: OSError) -> None:
        self.dropped += size
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._again = time.monotonic() + _PAUSE_S
        self.reason = f"{errno.errorcode.get(error.errno or 0)} {error.strerror}"


class Lines:
    """One stream on its way to a log: keeps the unfinished line between chunks."""

    __slots__ = ("_carry", "_held", "_next", "_partial", "_skipping", "_tag", "_torn", "log")

    def __init__(self, log: LogFile, stream: str) -> None:
        self.log = log
        log.users += 1
        self._tag = stream
        self._carry = b""
        self._partial = False  # P pieces of the current line were written
        self._skipping = False  # what comes up to the next newline is of a line that was dropped
        self._torn = False  # the last of ours in the file is a P piece whose line was dropped
        self._next: LogFile | None = None
        self._held = 0

    def feed(self, data: bytes) -> None:
        """Writes the lines that `data` completes; keeps the rest."""
        if self._skipping:
            data = self._skip(data)
        if self._next is not None:
            data = self._finish_line_in_old(data)
        self._put(data)

    def end(self) -> None:
        """The stream has ended: a line without newline is written as it is."""
        if self._carry or self._partial:
            begun, self._partial = self._partial, False
            self._write([f"{timestamp()} {self._tag} F ".encode(), self._carry, b"\n"], begun)
            self._carry = b""
        elif self._torn:
            self._write([], begun=False)
        if self._next is not None:
            self._switch()
        self.log.release()

    def reopen(self, log: LogFile) -> None:
        """Writes to `log` from the next line on: a line of which P pieces are in the old file ends there."""
        if self._next is None:
            self._held = 0
        else:
            self._next.release()  # rotated again before this line ended
        log.users += 1
        self._next = log
        if not self._partial:
            self._switch()

    def _put(self, data: bytes) -> None:
        begun = self._partial
        buffers = self._cut(data)
        if buffers:
            self._write(buffers, begun)

    def _write(self, buffers: list[Buffer], begun: bool) -> None:
        """Appends lines and pieces; `begun`: the first of them goes on with a line of which pieces are in the file."""
        if self._torn:
            buffers.insert(0, f"{timestamp()} {self._tag} F \n".encode())
        kept = self.log.write(buffers)
        if kept is None:
            self._torn = False
            return
        if kept:
            last = kept.rfind(b"\n", 0, len(kept) - 1) + 1
            self._torn = kept[last:].split(b" ", 3)[2] == b"P"
        else:
            self._torn = self._torn or begun
        if self._partial:  # the last piece was lost: what follows would be read as of another line
            self.log.dropped += len(self._carry)
            self._carry, self._partial, self._skipping = b"", False, True
            if self._next is not None:
                self._switch()

    def _skip(self, data: bytes) -> bytes:
        """Drops the rest of a line; what is behind it, if it has come."""
        end = data.find(b"\n") + 1
        self._skipping = not end
        self.log.dropped += end or len(data)
        return data[end:] if end else b""

    def _switch(self) -> None:
        if self._torn:
            self._write([], begun=False)
            self._torn = False  # of the new file nothing is known to be
        old = self.log
        if self._next is not None:
            self.log, self._next = self._next, None
            self.log.dropped += old.dropped
            old.dropped = 0
            old.release()

    def _finish_line_in_old(self, data: bytes) -> bytes:
        """Feeds the old log up to the end of the current line; the rest of `data` is for the new one."""
        end = data.find(b"\n") + 1
        mine, rest = (data[:end], data[end:]) if end else (data, b"")
        self._put(mine)
        self._held += len(mine)
        if end or self._held > _SWITCH_AFTER:
            self._switch()
        return rest

    def _cut(self, data: bytes) -> list[Buffer]:
        """`data` as what goes into the log; the unfinished rest becomes the carry."""
        carry, room = self._carry, MAX_LINE - len(self._carry)
        size = len(data)
        newline = data.rfind(b"\n", 0, room + 1)
        if newline < 0 and size <= room:
            self._carry = carry + data
            return []
        stamp = f"{timestamp()} {self._tag} ".encode()
        full, part = stamp + b"F ", stamp + b"P "
        out: list[Buffer] = []
        run = 0  # where the current run of short lines starts; `position` is always the start of a line or a piece
        if newline >= 0:
            position = newline + 1
            out += (full, carry)
        else:
            out += (part, carry, memoryview(data)[:room], b"\n")
            position = run = room
            self._partial = True
        begun = newline >= 0  # the current run's prefix is out already
        while True:
            # The last newline within reach of `position`: all lines up to it are at most MAX_LINE long.
            newline = data.rfind(b"\n", position, position + MAX_LINE + 1)
            if newline >= 0:
                position = newline + 1
                continue
            if run < position:
                if not begun:
                    out.append(full)
                out.append(_run(data, run, position, full))
                begun = self._partial = False
            if size - position <= MAX_LINE:
                break
            out += (part, memoryview(data)[position : position + MAX_LINE], b"\n")
            position = run = position + MAX_LINE
            self._partial = True
        self._carry = data[position:]
        return out


def _run(data: bytes, start: int, end: int, prefix: bytes) -> Buffer:
    """Lines data[start:end], all short and ended, with `prefix` before each but the first."""
    tail = len(data) - end
    if start or tail > MAX_LINE:
        data, tail = data[start:end], 0
    # else the whole chunk at once, which saves a copy; what follows the last newline is cut off again.
    lines = data.replace(b"\n", b"\n" + prefix)
    return memoryview(lines)[: len(lines) - len(prefix) - tail]
