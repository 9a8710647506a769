"""How many tasks of each container run, sleep, wait or are stopped, and means of that over ten seconds: cAdvisor's
`container_tasks_state` and `container_cpu_load_average_10s`.

Looked at beside the calls, every so often, and only while somebody asks for metrics; blocks in a thread. Refuses to
guess: a container of more tasks than the bound has no figures (threats R5).
Invariant: no file of a container is opened. What the kernel tells of tasks that wait for a disk comes by a netlink
family that knows no cgroup v2 (cgroupstats), and is in no file: those are among the uninterruptible here.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Collection, Sequence

from cri.threads import to_thread
from runtime.linux.dataclass import dataclass
from runtime.linux.process import process_state

MAX_TASKS = 4096
# cAdvisor's mean: what was seen so long ago counts 1/e.
_MEMORY_S = 10.0
# Nobody has asked for so many periods: looking rests until somebody does.
IDLE_PERIODS = 6
_KINDS = {"R": "running", "S": "sleeping", "I": "sleeping", "D": "uninterruptible", "T": "stopped", "t": "stopped"}


@dataclass(frozen=True, slots=True)
class TaskStates:
    """One look: numbers of tasks by state, and decaying means of those that run and of the uninterruptible."""

    timestamp_ns: int
    states: dict[str, int]
    load: float
    load_d: float


def count(pids: Sequence[int]) -> dict[str, int] | None:
    """The threads of `pids` by state; zombies are none. None when there are too many of them."""
    found = dict.fromkeys(("sleeping", "running", "stopped", "uninterruptible"), 0)
    left = MAX_TASKS
    for pid in pids:
        try:
            tids = os.listdir(f"/proc/{pid}/task")
        except OSError:  # it has ended
            continue
        left -= len(tids)
        if left < 0:
            return None
        for tid in tids:
            try:
                kind = _KINDS.get(process_state(int(tid)))
            except OSError:
                continue
            if kind is not None:
                found[kind] += 1
    return found


class TaskWatch:
    """Looks at what `running` names, by the processes that `pids` tells of it; one event loop uses it."""

    def __init__(
        self, period_s: float, running: Callable[[], Collection[str]], pids: Callable[[str], Sequence[int]]
    ) -> None:
        self._period = period_s
        self._running = running
        self._pids = pids
        self._seen: dict[str, TaskStates] = {}
        self._wake = asyncio.Event()

    def wanted(self) -> None:
        """Somebody asks: there is a look by the next time."""
        self._wake.set()

    def of(self, id_: str) -> TaskStates | None:
        """As last seen; blocks for a look at what was not seen yet. None where there are too many tasks."""
        found = self._seen.get(id_)
        if found is None and (states := count(self._pids(id_))) is not None:
            found = self._seen[id_] = self._next(id_, time.time_ns(), states)
        return found

    async def run(self) -> None:
        """Looks for ever, and rests while nobody asks."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for _ in range(IDLE_PERIODS):
                await self.look()
                await asyncio.sleep(self._period)
                if self._wake.is_set():
                    break
            else:
                self._seen.clear()  # too old to go on from

    async def look(self) -> None:
        """One look at all."""
        ids = tuple(self._running())
        found = await to_thread(lambda: {id_: count(self._pids(id_)) for id_ in ids})
        now = time.time_ns()
        self._seen = {id_: self._next(id_, now, states) for id_, states in found.items() if states is not None}

    def _next(self, id_: str, now: int, states: dict[str, int]) -> TaskStates:
        last = self._seen.get(id_)
        running, waiting = states["running"], states["uninterruptible"]
        if last is None:
            return TaskStates(now, states, running, waiting)
        kept = math.exp(-max(0, now - last.timestamp_ns) / (_MEMORY_S * 1e9))
        return TaskStates(now, states, _mean(last.load, running, kept), _mean(last.load_d, waiting, kept))


def _mean(last: float, now: int, kept: float) -> float:
    return last * kept + now * (1 - kept)
