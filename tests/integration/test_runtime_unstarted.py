"""Processes that somebody traces, as criu does those that it has restored, stand still in their cgroup once he lets go.

Shown with a tracer of our own, since criu itself does not know every kernel; tests/vm has the real one.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import lifecycle, state, unstarted
from tests.bundles import Bundles, bundles
from tests.support import eventually, needs

# ptrace(2): SEIZE, INTERRUPT, and once a line comes, DETACH.
TRACER = """
import ctypes, os, sys
pid, ptrace = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True).ptrace
for request in (0x4206, 0x4207):
    assert ptrace(request, pid, None, None) == 0, os.strerror(ctypes.get_errno())
os.waitpid(pid, 0x40000000)
print("stopped", flush=True)
sys.stdin.readline()
assert ptrace(17, pid, None, None) == 0, os.strerror(ctypes.get_errno())
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


class Traced:
    """A container that writes all the time, and is traced."""

    def __init__(self, home: Bundles) -> None:
        self.bundle = home.sh("while :; do echo x >> /tmp/written; done")
        (self.bundle.path / "tmp").mkdir()
        self._written = self.bundle.path / "tmp/written"
        self.bundle.mount("/tmp", "bind", self.bundle.path / "tmp", "bind", "rw")
        self.bundle.up()
        self.root = str(home.root)
        self.directory = state.directory(self.root, self.bundle.id)
        self.manager = state.load(self.root, self.bundle.id).manager()
        eventually(self.written, what="it to write")
        words = [sys.executable, "-c", TRACER, str(self.bundle.pid())]
        self.tracer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.tracer.stdout is not None and self.tracer.stdout.readline() == b"stopped\n"

    def written(self) -> int:
        return self._written.stat().st_size if self._written.exists() else 0

    def let_go(self) -> None:
        self.tracer.communicate(b"go\n")
        assert self.tracer.returncode == 0

    def status(self) -> str:
        return str(lifecycle.describe(self.root, self.bundle.id)["status"])


@pytest.fixture
def traced(home: Bundles) -> Iterator[Traced]:
    made = Traced(home)
    yield made
    if made.tracer.poll() is None:
        made.tracer.kill()
        made.tracer.communicate()


def test_who_is_let_go_stands_still_until_he_is_started(traced: Traced) -> None:
    before = traced.written()
    unstarted.hold(traced.directory, traced.manager, [])
    traced.let_go()
    for _ in range(5):
        assert traced.bundle.status() == "created"
    traced.bundle.home.ocirun("resume", traced.bundle.id).failed("container not paused", 1)
    assert traced.written() == before
    traced.bundle.start().ok()
    assert traced.status() == "running"
    eventually(lambda: traced.written() > before, what="it to go on")
    traced.bundle.home.ocirun("start", traced.bundle.id).failed("cannot start an already running container", 1)


@pytest.mark.parametrize("verb", ["kill", "delete"])
def test_who_is_killed_before_his_start_has_not_run(traced: Traced, verb: str) -> None:
    before = traced.written()
    unstarted.hold(traced.directory, traced.manager, [])
    traced.let_go()
    if verb == "kill":
        lifecycle.kill(traced.root, traced.bundle.id, 9)
        eventually(lambda: traced.status() == "stopped", what="its end")
    else:
        lifecycle.delete(traced.root, traced.bundle.id)  # as of any that is created: without force
    assert traced.written() == before


def test_a_start_that_was_killed_half_way_is_done_by_the_next(traced: Traced) -> None:
    before = traced.written()
    unstarted.hold(traced.directory, traced.manager, [])
    traced.let_go()
    traced.manager.freeze(False)
    eventually(lambda: traced.written() > before, what="it to go on")
    assert traced.status() == "created"
    traced.bundle.start().ok()
    assert traced.status() == "running"
