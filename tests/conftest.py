"""Every integration test leaves the machine as it found it: compared after each, and all of it at the end in CI.

While others use the same machine, a test answers only for what carries its marks: paths below pytest's own base
directory, and processes that descend from this session or were started with its environment. With OCID_REQUIRE_ALL=1
(CI, where the machine is ours) the end of the session compares everything, cgroups, links and tables included, and a
skipped test fails the session: green means that all of it ran. With OCID_BESIDE=1, set where hack/test runs several
sessions side by side, that comparison is left to who started them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from conformance.leaks import Machine, left_over
from tests.support import ELSEWHERE, needs

if TYPE_CHECKING:
    from tests.shims import Home

MARK = "OCID_TEST_SESSION"
# A process that was just killed takes a moment to be reaped by its parent, and its cgroup and mounts go after it.
SETTLE_S = 20.0

_session_start = pytest.StashKey[Machine]()
_session_leaks = pytest.StashKey[list[str]]()
# A reference that lies beside the repository only where it is developed.
MAY_SKIP = ("cri-v1.json", *(f"needs {ability}" for ability in ELSEWHERE))
_skipped: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    # Syntax trees, documents and hypothesis' examples are many objects that live long: at the default of 700 more than
    # half of the time in which the sources are parsed went into looking through them.
    gc.set_threshold(20_000)
    # What a CI runner or a shell left open would be inherited by programs that tests start, and be taken for a leak.
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.set_inheritable(int(name), int(name) <= 2)
    os.environ[MARK] = uuid.uuid4().hex
    config.stash[_session_start] = Machine.now()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """What is left ends with the process: pytest and the interpreter would look through all of it six times more."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Without the collector: pytest parses the modules, and in CPython 3.11 a parser within a parser is a SystemError
    (AST constructor recursion depth mismatch). A finalizer that complains prints a traceback, which parses, too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # what is here now stays, and is not looked through again and again
        gc.enable()


def settled(before: Machine, marks: list[str]) -> tuple[list[str], Machine]:
    """What is left, after a moment for what is on its way out, and all that is there then."""
    began = time.monotonic()
    while True:
        now = Machine.now(shared=not marks, since=before)
        found = left_over(before, now, marks)
        waited = time.monotonic() - began
        if not found or waited > SETTLE_S:
            return found, now
        time.sleep(min(max(0.01, waited / 8), 0.1))  # each look is at all processes


@pytest.fixture(scope="session", autouse=True)
def forked_commands() -> Iterator[None]:
    """Where tests of this session start `ocid`: what they are forked from."""
    if "tests.warm" not in sys.modules:
        yield
        return
    from tests import warm

    with warm.serving():
        yield


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """What the labs of a session share."""
    needs("root", "busybox", "overlay")
    from tests import shims

    with shims.home(tmp_path_factory.mktemp("home")) as made:
        yield made


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and not any(name in str(report.longrepr) for name in MAY_SKIP)
    ):
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not os.environ.get("OCID_REQUIRE_ALL"):
        return
    found = [] if os.environ.get("OCID_BESIDE") else settled(session.config.stash[_session_start], [])[0]
    session.config.stash[_session_leaks] = found
    if (found or _skipped) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(_session_leaks, [])
    if found:
        terminalreporter.section("left on the machine by this session", red=True)
        terminalreporter.write("".join(f"  {line}\n" for line in found))
    if _skipped and os.environ.get("OCID_REQUIRE_ALL"):
        terminalreporter.section("skipped, though OCID_REQUIRE_ALL is set", red=True)
        terminalreporter.write("".join(f"  {line}\n" for line in _skipped))
