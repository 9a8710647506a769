"""For the cgroup tests: a manager of its own path in every hierarchy, and processes that are born in it."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.cgroups.hierarchy import detect, places_for
from runtime.cgroups.manager import Manager, manager_for
from runtime.fields import Fields
from runtime.linux.process import clone3
from runtime.resources import Resources, parse


def wish(**resources: object) -> Resources:
    return parse(Fields(resources, "linux.resources"))


@contextmanager
def own_path() -> Iterator[str]:
    """An absolute cgroup path that nobody else has; whatever is in it at the end is killed and removed."""
    path = f"/ocidtest-{uuid.uuid4().hex[:12]}"
    controls = [Path(one.mount, "cgroup.subtree_control") for one in detect() if one.version == 2]
    before = [control.read_text().split() for control in controls]
    try:
        yield path
    finally:
        top = manager_for(path, "x")
        for manager in (top, Manager(tuple(place for place in places_for(path, "x") if place.hierarchy.version == 2))):
            if manager.paths():
                manager.kill()
        top.destroy()
        for control, given in zip(controls, before, strict=True):
            # A v2 manager gives its controllers to everybody's top level; only hugetlb is there to be given.
            if "hugetlb" in control.read_text() and "hugetlb" not in given:
                control.write_text("-hugetlb")


class Child:
    """A forked process: `wait()` reaps it and gives its exit code, negative for a signal."""

    def __init__(self, pid: int, pidfd: int, out: int) -> None:
        self.pid, self._pidfd, self.out = pid, pidfd, out
        self._code: int | None = None

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
            os.close(self.out)
        return self._code

    def read(self, size: int = 65536) -> bytes:
        """What it wrote to stdout, as much as there is now; b"" at its end."""
        return os.read(self.out, size)

    def end(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def fork(run: Callable[[], object], manager: Manager | None = None) -> Child:
    """Runs `run` in a child that is in the manager's cgroups, with a pipe for stdout; its exit code is what `run`
    returns (None: 0), 99 for an exception."""
    reading, writing = os.pipe()
    entered, enters = os.pipe()
    gate = manager.gate() if manager is not None else None
    try:
        pid, pidfd = clone3(0, cgroup_fd=gate.cgroup_fd if gate is not None else -1)
        if pid == 0:
            code = 99
            try:
                signal.alarm(60)  # whatever happens to the test, this ends
                os.dup2(writing, 1)
                if gate is not None:
                    gate.enter()
                os.close(enters)
                result = run()
                code = result if isinstance(result, int) else 0
            finally:
                os._exit(code)
    finally:
        os.close(writing)
        os.close(enters)
        if gate is not None:
            gate.close()
    os.read(entered, 1)  # ends when the child is in
    os.close(entered)
    return Child(pid, pidfd, reading)


def spawn(argv: Sequence[str], manager: Manager | None = None) -> Child:
    """A program in the manager's cgroups."""
    return fork(lambda: os.execvp(argv[0], list(argv)), manager)


def sleeper(manager: Manager | None = None) -> Child:
    return spawn(["sleep", "50"], manager)
