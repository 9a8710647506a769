"""Workers that run cases side by side, each in namespaces of its own; one that is stuck is killed and replaced.

Invariant: when `run` has returned, no worker is left, nor anything that one of them started: each is the child of an
`unshare --kill-child` whose pid namespace ends with it, and its directory and cgroups are removed after it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.cases import Case
from conformance.harness.verdicts import FAIL, Outcome

# What a worker takes to start, and a case to be cleaned up after, on top of the case's own limit.
GRACE_S = 30.0


class Worker:
    """A worker process and the case that it runs, if any."""

    def __init__(self, runtime: str, number: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="conformance-", dir="/var/tmp"))
        self.directory.chmod(0o711)
        self.cgroup = f"/conformance-{os.getpid()}-{number}"
        self.case: Case | None = None
        self.began = 0.0
        words = ["conformance.isolated", "conformance.harness.worker", runtime, str(self.directory), self.cgroup]
        environment = {key: value for key, value in os.environ.items() if key != "CONFORMANCE_ISOLATED"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def fileno(self) -> int:
        assert self._process.stdout
        return self._process.stdout.fileno()

    def give(self, case: Case) -> None:
        """Has it run a case."""
        assert self.case is None and self._process.stdin
        self.case = case
        self.began = time.monotonic()
        self._process.stdin.write(f"{case.name}\n".encode())
        self._process.stdin.flush()

    @property
    def deadline(self) -> float:
        assert self.case
        return self.began + self.case.limit_s + GRACE_S

    def take(self) -> Outcome | None:
        """The outcome of its case, once there is something to read; None if the worker has ended instead."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            return None
        self.case = None
        return Outcome(*json.loads(line))

    def _first_inside(self) -> list[int]:
        """pidfds of the children of `unshare`: pid 1 of the worker's namespace, once there is one."""
        found = []
        try:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
            found = [os.pidfd_open(int(pid)) for pid in children.split()]
        except (FileNotFoundError, ProcessLookupError):
            pass
        return found

    def end(self) -> None:
        """Kills it with everything it started, and removes what it worked in."""
        first = self._first_inside()
        self._process.kill()
        self._process.wait()
        # pid 1 of a namespace has ended only when everything else in there has (pid_namespaces(7)).
        for pidfd in first:
            select.select([pidfd], [], [])
            os.close(pidfd)
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            kernel.eventually(lambda: not kernel.remove_cgroup(self.cgroup), f"{self.cgroup} to be empty")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def run(cases: Iterable[Case], runtime: str, jobs: int, report: Callable[[Outcome], None]) -> None:
    """Runs the cases, at most `jobs` at a time; `report` is called with each outcome as it comes."""
    waiting = deque(cases)
    started = 0
    idle: list[Worker] = []
    busy: list[Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                if not idle:
                    idle.append(Worker(runtime, started))
                    started += 1
                worker = idle.pop()
                busy.append(worker)
                worker.give(waiting.popleft())
            nearest = min(worker.deadline for worker in busy)
            ready, _, _ = select.select(busy, [], [], max(0.0, nearest - time.monotonic()))
            for worker in ready:
                case, began = worker.case, worker.began
                assert case
                busy.remove(worker)
                outcome = worker.take()
                if outcome is None:
                    worker.end()
                    outcome = Outcome(case.name, FAIL, time.monotonic() - began, "the worker of this case died")
                else:
                    idle.append(worker)
                report(outcome)
            for worker in [worker for worker in busy if time.monotonic() > worker.deadline]:
                busy.remove(worker)
                assert worker.case
                seconds = time.monotonic() - worker.began
                worker.end()
                report(Outcome(worker.case.name, FAIL, seconds, f"not within {worker.case.limit_s:g} s"))
    finally:
        for worker in (*busy, *idle):
            worker.end()
