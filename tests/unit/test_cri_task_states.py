"""Tasks by state: real processes, in real states; and the means, over a clock of the test's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cri import task_states
from cri.task_states import TaskWatch, count
from runtime.linux.process import process_state
from tests.costs import SOON_S
from tests.support import eventually

S = 1_000_000_000


@contextlib.contextmanager
def _process(program: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        try:
            yield child.pid
        finally:
            child.kill()


def test_every_thread_is_counted_in_the_state_it_is_in() -> None:
    threads = "import sys, threading; [threading.Thread(target=sys.stdin.read).start() for _ in range(3)]"
    with _process(threads) as sleeping, _process("while True: pass") as running, _process("input()") as stopped:
        eventually(lambda: len(os.listdir(f"/proc/{sleeping}/task")) == 4 and process_state(sleeping) == "S")
        eventually(lambda: process_state(running) == "R" and process_state(stopped) == "S")
        os.kill(stopped, signal.SIGSTOP)
        eventually(lambda: process_state(stopped) == "T")
        wanted = {"sleeping": 4, "running": 1, "stopped": 1, "uninterruptible": 0}
        eventually(lambda: count([sleeping, running, stopped]) == wanted)


def test_what_has_ended_is_not_counted() -> None:
    with subprocess.Popen(["true"]) as child:
        eventually(lambda: process_state(child.pid) == "Z")
        assert count([child.pid]) == dict.fromkeys(("sleeping", "running", "stopped", "uninterruptible"), 0)
        child.wait()
        assert sum((count([child.pid]) or {"": 1}).values()) == 0


def test_r5_more_tasks_than_the_bound_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    helpers = [threading.Thread(target=stop.wait) for _ in range(3)]
    for helper in helpers:
        helper.start()
    try:
        known = len(os.listdir("/proc/self/task"))
        monkeypatch.setattr(task_states, "MAX_TASKS", known)
        assert count([os.getpid()]) is not None
        monkeypatch.setattr(task_states, "MAX_TASKS", known - 1)
        assert count([os.getpid()]) is None
    finally:
        stop.set()
        for helper in helpers:
            helper.join()


def test_a_load_is_a_mean_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100 * S]
    seen: list[dict[str, int] | None] = []
    monkeypatch.setattr(time, "time_ns", lambda: clock[0])
    monkeypatch.setattr(task_states, "count", lambda pids: seen.pop(0))
    watch = TaskWatch(1.0, lambda: ["one"], lambda id_: [])

    def look(running: int, waiting: int, at: int) -> tuple[float, float]:
        seen.append({"running": running, "uninterruptible": waiting})
        clock[0] = at * S
        asyncio.run(watch.look())
        found = watch.of("one")
        assert found is not None and found.timestamp_ns == at * S
        return found.load, found.load_d

    assert look(3, 1, 100) == (3, 1), "all that is known of it"
    load, waiting = look(0, 1, 110)
    assert math.isclose(load, 3 / math.e) and math.isclose(waiting, 1)
    assert look(2, 0, 100_000)[0] == 2, "what was long ago counts for nothing"
    seen += [None, None]
    asyncio.run(watch.look())
    assert watch.of("one") is None, "too many of them"
    # Who asks first does not wait for the next look.
    seen.append({"running": 5, "uninterruptible": 0})
    found = watch.of("one")
    assert found is not None and found.load == 5 and watch.of("one") is found


def test_looking_rests_until_somebody_asks() -> None:
    looks: list[int] = []

    def running() -> list[str]:
        looks.append(1)
        return ["one"]

    async def body() -> None:
        watch = TaskWatch(0.001, running, lambda id_: [])
        task = asyncio.create_task(watch.run())

        async def until(seen: bool) -> None:
            while ("one" in watch._seen) != seen:
                await asyncio.sleep(0)

        for _ in range(100):
            await asyncio.sleep(0)
        assert not looks
        for rounds in (1, 2):
            watch.wanted()
            await until(True)
            await until(False)
            assert len(looks) == rounds * task_states.IDLE_PERIODS, "nobody has asked again"
        task.cancel()

    asyncio.run(asyncio.wait_for(body(), SOON_S))
