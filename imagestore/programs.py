"""Programs that have credentials or keys: a question on stdin, an answer on stdout, bounded in bytes and in time.

Blocking, for worker threads. Refuses names that are paths, and answers beyond the limit. Invariant: the process is
never forked (posix_spawn(3) shares its memory until execve), the program's whole group has ended when `ask` returns or
raises, and no text of the program's is repeated in an error: it may hold what it was asked for. It raises soon after
its errand (imagestore.errands) has ended.
"""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagestore.content import errno_text
from imagestore.errands import Errand
from imagestore.model import ImageError
from runtime.linux.process import CLOSE_RANGE_CLOEXEC, close_range, pidfd_open

_ANSWER = 256 << 10
# A program that has closed its output gets this long to tell its exit code.
_GOODBYE_S = 2.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def find(name: str, directories: Sequence[str]) -> Path:
    """The program called `name` in the first of `directories` that has it. Raises ImageError."""
    if not _NAME.fullmatch(name):
        raise ImageError(f"credential program {name[:60]!r}: expected letters, digits, dots and dashes")
    for directory in directories:
        path = Path(directory) / name
        if directory.startswith("/") and os.access(path, os.X_OK) and path.is_file():
            return path
    raise ImageError(f"credential program {name}: not found in {':'.join(directories)[:200]}")


def ask(
    program: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    data: bytes,
    limit_s: float,
    errand: Errand,
    *,
    called: str = "credential program",
) -> bytes:
    """What `program` printed, after exit code 0, within `limit_s` and what `errand` has left. Raises ProgramRefused for
    any other, ImageError; there it is what `called` says."""
    what = f"{called} {program.name}"
    try:
        limit_s = errand.share(limit_s)
    except ImageError as error:
        raise ImageError(f"{what}: not asked: {error}") from None
    close_range(3, flags=CLOSE_RANGE_CLOEXEC)  # what whoever started us left open goes to nobody
    questions, give = os.pipe2(os.O_CLOEXEC)
    take, answers = os.pipe2(os.O_CLOEXEC)
    # Read and write without blocking; a question longer than a pipe's buffer is written as it is read.
    os.set_blocking(give, False)
    os.set_blocking(take, False)
    actions = [
        (os.POSIX_SPAWN_DUP2, questions, 0),
        (os.POSIX_SPAWN_DUP2, answers, 1),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    try:
        pid = os.posix_spawn(
            program,
            [os.fspath(program), *arguments],
            dict(environment),
            file_actions=actions,
            setpgroup=0,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )
    except OSError as error:
        for fd in (give, take):
            os.close(fd)
        raise ImageError(f"{what}: start: {errno_text(error)}") from error
    finally:
        for fd in (questions, answers):
            os.close(fd)
    talk = _Talk(give, take, data)
    in_time = False
    try:
        with errand.ended_by(talk.end):
            in_time = talk.hold(time.monotonic() + limit_s)
    finally:
        talk.close()
        status = _end(pid, _GOODBYE_S if in_time else 0.0)
    if not in_time:
        raise ImageError(f"{what}: {'given up' if talk.ended else f'no answer in {limit_s:.3g} s'}, killed")
    if len(talk.answer) > _ANSWER:
        raise ImageError(f"{what}: answered more than {_ANSWER} bytes, killed")
    if status:
        raise ProgramRefused(f"{what}: exit code {os.waitstatus_to_exitcode(status)}", bytes(talk.answer))
    return bytes(talk.answer)


class ProgramRefused(ImageError):
    """It ran and ended with a failure; `answer` is what it printed, for those who know what it may say."""

    def __init__(self, message: str, answer: bytes) -> None:
        super().__init__(message)
        self.answer = answer


class _Talk:
    """Both ends of the conversation, until the program has closed its output, or somebody has ended it."""

    def __init__(self, give: int, take: int, data: bytes) -> None:
        self._give, self._take = give, take
        self._left = memoryview(data)
        self._told = os.eventfd(0, os.EFD_CLOEXEC)
        self.answer = bytearray()
        self.ended = False

    def end(self) -> None:
        """From any thread, until `close`."""
        self.ended = True
        os.eventfd_write(self._told, 1)

    def hold(self, deadline: float) -> bool:
        """False at the deadline, and once it was ended."""
        poll = select.poll()
        poll.register(self._told, select.POLLIN)
        poll.register(self._take, select.POLLIN)
        poll.register(self._give, select.POLLOUT)
        while len(self.answer) <= _ANSWER:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready or self.ended:
                return False
            for fd, _ in ready:
                if fd == self._give and self._fed():
                    poll.unregister(self._give)
                    os.close(self._give)
                    self._give = -1
                elif fd == self._take:
                    piece = os.read(self._take, 1 << 16)
                    if not piece:
                        return True
                    self.answer += piece
        return True

    def _fed(self) -> bool:
        try:
            self._left = self._left[os.write(self._give, self._left) :] if self._left else self._left
        except BlockingIOError:
            return False
        except BrokenPipeError:
            return True  # it does not want to know; its answer or its exit code tells why
        return not self._left

    def close(self) -> None:
        for fd in (self._give, self._take, self._told):
            if fd >= 0:
                os.close(fd)


def _end(pid: int, patience_s: float) -> int:
    """The wait status; what has not ended by itself by then is killed, with all that it started."""
    pidfd = pidfd_open(pid)
    try:
        select.select([pidfd], [], [], patience_s)
    finally:
        os.close(pidfd)
    try:
        os.killpg(pid, signal.SIGKILL)  # nobody has reaped it, so the group is still its own
    except ProcessLookupError:
        pass
    return os.waitpid(pid, 0)[1]
