"""What something costs, in figures that another process on the machine does not blur.

A limit in seconds is missed by a busy machine and says nothing on a fast one. Tests ask for one of these instead:

    calls(run)     how often it calls the kernel, by name: exact
    waits(run)     how often it sleeps, in the best of several runs: 0 says that it waits for nothing
    work(run)      its processor time in units of a fixed loop that is measured in turn with it
    within(n)      the same for a block that runs once
    soon()         that a block ends at all, where without its protection it would hang for a thousand seconds
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Far above what the slowest machine takes, far below what hangs: costs time only in a test that fails.
SOON_S = 60.0
# No machine is as quick as that: less need not be looked at.
_UNIT_AT_LEAST_S = 20e-6
# Functions of the module posix that ask no kernel.
_PURE = frozenset(("fspath", "major", "makedev", "minor", "waitstatus_to_exitcode"))


def calls(run: Callable[[], object]) -> Counter[str]:
    """The functions of `os` that `run` calls in this thread, each of them one system call, and how often."""
    found: Counter[str] = Counter()

    def look(frame: FrameType, event: str, called: object) -> None:
        if event == "c_call" and getattr(called, "__module__", "") == "posix":
            name = getattr(called, "__name__", "")
            found.update(() if name in _PURE else (name,))

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def waits(run: Callable[[], object], rounds: int = 20) -> int:
    """How often this thread gave up the processor of its own accord during `run`: the fewest of several rounds, since
    a lock that somebody else happens to hold is no property of `run`."""

    def once() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        run()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before

    return min(once() for _ in range(rounds))


def work(run: Callable[[], object], rounds: int = 30) -> float:
    """The processor time of `run` in units, of which one is about a tenth of a millisecond on a machine of 2024."""
    units, runs = [], []
    for _ in range(rounds):
        units.append(unit())
        runs.append(_spent(run))
    return min(runs) / min(units)


@contextmanager
def within(units: float) -> Iterator[None]:
    """Fails when the block takes more processor time than that. It runs once: leave room for what disturbs it."""
    began = time.thread_time()
    yield
    spent = time.thread_time() - began
    if spent > units * _UNIT_AT_LEAST_S:
        one = min(unit() for _ in range(10))
        assert spent < units * one, f"took {spent / one:.0f} units of processor time, the limit is {units}"


@contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON_S, "this should not have to wait for anything"


def _spent(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def unit() -> float:
    """The seconds of processor time that one unit takes just now."""
    began = time.thread_time()
    total = 0
    for number in range(4000):
        total += number & 7
    return time.thread_time() - began
