"""A command on a terminal of its own, typed at and read from like a person's; `lines` and `columns` are its size.

Invariant: whatever ends the `with`, the command is gone and the terminal closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from conformance.clients.steps import Surprise

WAIT_S = 20.0
INTERRUPT = "\x03"
# One key to detach with: podman knows its usual two, ^P ^Q, only when they come in two reads.
DETACH_KEY, DETACH = "ctrl-a", "\x01"


class Terminal:
    """`said` is all that came so far."""

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], lines: int = 30, columns: int = 100
    ) -> None:
        self.said = ""
        self._command = " ".join(command)
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        try:
            # setsid --ctty: a session of its own, with this as its controlling terminal.
            self._process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", *command],
                cwd=cwd,
                env=dict(environment),
                stdin=slave,
                stdout=slave,
                stderr=slave,
            )
        finally:
            os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def until(self, text: str) -> str:
        """All that was said up to and with `text`; takes it away, so that the next call sees only what is new."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.said:
            if not self._read(deadline - time.monotonic()):
                raise Surprise(f"{self._command}: expected {text!r} on the terminal, got {self.said!r}")
        head, _, self.said = self.said.partition(text)
        return head + text

    def end(self) -> int:
        """The exit code; reads on until it ends, so that it never blocks in a write."""
        deadline = time.monotonic() + WAIT_S
        while self._read(deadline - time.monotonic()):
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.1, deadline - time.monotonic()))
        raise Surprise(f"{self._command}: does not end; it said {self.said!r}")

    def _read(self, wait_s: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, wait_s))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:
            return False  # EIO: the last holder of the other end is gone
        self.said += data.decode("utf-8", "replace")
        return bool(data)
