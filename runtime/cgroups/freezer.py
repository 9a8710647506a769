"""Stopping and resuming everybody in a cgroup: v1's freezer and v2's cgroup.freeze.

Refuses to leave a half-frozen cgroup behind. v1's freezer can hang in FREEZING for ever while a task of it is in a
fork or waits for one that is frozen already: thawing for an instant and asking again resolves it.
"""

from __future__ import annotations

import errno
import os
import select
import time

from runtime.cgroups.stats import read, table
from runtime.errors import RuntimeFailure

_DEADLINE_S = 10.0  # as long as the peers
_NAP_S = 0.0005
_TRIES_BEFORE_THAW = 20


class Freezer:
    """The freezer of one container: `directory` in v1's freezer hierarchy or in v2's, by `version`."""

    __slots__ = ("directory", "version")

    def __init__(self, directory: str, version: int) -> None:
        self.directory = directory
        self.version = version

    def frozen(self) -> bool:
        """True when it was asked to freeze by name and is frozen, or on the way there."""
        if self.version == 1:
            return read(f"{self.directory}/freezer.self_freezing").strip() == b"1"
        return read(f"{self.directory}/cgroup.freeze").strip() == b"1"

    def ask(self) -> None:
        """Asks everybody to stop, and does not wait until they have: who is traced stops once he is let go."""
        try:
            name, value = ("cgroup.freeze", b"1") if self.version == 2 else ("freezer.state", b"FROZEN")
            _write(f"{self.directory}/{name}", value)
        except OSError:
            pass  # none, or gone

    def freeze(self, on: bool, deadline_s: float = _DEADLINE_S) -> None:
        """Returns when the state is reached. Raises RuntimeFailure; then the cgroup is thawed."""
        try:
            if not self.directory:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            if self.version == 2:
                self._freeze_v2(on, deadline_s)
            elif on:
                self._freeze_v1(deadline_s)
            else:
                _write(f"{self.directory}/freezer.state", b"THAWED")
        except OSError as error:
            if not on and error.errno in (errno.ENOENT, errno.ENODEV):
                return  # gone: nobody is frozen in it
            what = f"{'freeze' if on else 'thaw'} cgroup {self.directory}"
            raise RuntimeFailure.of(error, step="cgroup", what=what) from error

    def _freeze_v1(self, deadline_s: float) -> None:
        state = f"{self.directory}/freezer.state"
        deadline = time.monotonic() + deadline_s
        tries = 0
        while True:
            # Each write looks at all tasks anew, so writing again is part of the cure.
            _write(state, b"FROZEN")
            if read(state).strip() == b"FROZEN":
                return
            tries += 1
            if time.monotonic() > deadline:
                _write(state, b"THAWED")
                raise RuntimeFailure(
                    f"freeze cgroup {self.directory}: still FREEZING after {deadline_s} s",
                    step="cgroup",
                    errno=errno.EBUSY,
                    hint="a process of it is stuck in the kernel; it runs on",
                    code="failed_precondition",
                )
            if tries % _TRIES_BEFORE_THAW == 0:
                _write(state, b"THAWED")
            select.select([], [], [], _NAP_S)

    def _freeze_v2(self, on: bool, deadline_s: float) -> None:
        wanted = int(on)
        deadline = time.monotonic() + deadline_s
        events = os.open(f"{self.directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _write(f"{self.directory}/cgroup.freeze", b"%d" % wanted)
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while table(os.pread(events, 4096, 0)).get(b"frozen", wanted) != wanted:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                poll.poll(left * 1000)
            else:
                return
        finally:
            os.close(events)
        if on:
            _write(f"{self.directory}/cgroup.freeze", b"0")
            raise RuntimeFailure(
                f"freeze cgroup {self.directory}: not frozen after {deadline_s} s",
                step="cgroup",
                errno=errno.EBUSY,
                hint="a process of it is stuck in the kernel; it runs on",
                code="failed_precondition",
            )
        # A frozen cgroup above keeps this one frozen: it has been told, and goes on when that one does.


def _write(path: str, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
