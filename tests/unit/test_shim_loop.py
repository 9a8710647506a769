"""The loop: deadlines come in order, a callback that raises harms nobody. Collectors keep what they are allowed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from runtime.shim import rest
from runtime.shim.commands import Collector
from runtime.shim.loop import READ, Loop


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def loop(reports: list[str]) -> Iterator[Loop]:
    made = Loop(lambda what, error: reports.append(f"{what}: {error}"))
    made.open()
    yield made
    made.close()


def test_deadlines_come_in_order_and_can_be_cancelled(loop: Loop) -> None:
    seen: list[int] = []
    loop.after(0.02, lambda: seen.append(2))
    loop.after(0.0, lambda: seen.append(1))
    loop.after(0.01, lambda: seen.append(9)).cancel()
    while len(seen) < 2:
        loop.turn()
    assert seen == [1, 2]


def test_o33_an_idle_loop_has_no_deadline(loop: Loop) -> None:
    assert loop._patience() == -1
    timer = loop.after(60, lambda: None)
    assert 0 < loop._patience() <= 60
    timer.cancel()
    assert loop._patience() == -1


def test_rest_comes_once_after_the_last_of_what_there_was_to_do(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "QUIET", 0.03)
    rests: list[float] = []
    busy = False
    resting = rest.Rest(loop, lambda: busy)
    resting.is_due()
    assert loop._patience() == -1  # there is nothing to be done
    resting.act = lambda: rests.append(time.monotonic())
    resting.is_due()
    assert len(loop._timers) == 1
    last = time.monotonic()
    until = last + 0.02
    while (now := time.monotonic()) < until:
        last = now  # before it is due: this process may be made to wait between the two
        resting.is_due()
    assert len(loop._timers) == 1
    while loop._timers:
        loop.turn()
    assert len(rests) == 1 and rests[0] >= last + 0.03
    busy = True
    resting.is_due()
    while loop._timers:
        loop.turn()
    assert len(rests) == 1


def test_a_callback_that_raises_is_reported_and_others_run(loop: Loop, reports: list[str]) -> None:
    pipes = [os.pipe() for _ in range(2)]
    seen: list[int] = []

    def bad(_events: int) -> None:
        os.read(pipes[0][0], 1)
        raise RuntimeError("bad")

    loop.watch(pipes[0][0], READ, bad)
    loop.watch(pipes[1][0], READ, lambda _events: seen.append(len(os.read(pipes[1][0], 1))))
    for _, writer in pipes:
        os.write(writer, b"x")
    while not (seen and reports):
        loop.turn()
    assert reports == ["handle an event: bad"]
    for reader, writer in pipes:
        loop.unwatch(reader)
        os.close(reader)
        os.close(writer)


def test_s51_a_collector_keeps_its_limit_and_reads_on() -> None:
    reader, writer = os.pipe()
    collector = Collector(reader, 1000)
    for _ in range(50):
        os.write(writer, b"x" * 60_000)
        assert collector.read()
    os.close(writer)
    assert not collector.read()
    assert (collector.kept(), collector.truncated) == (b"x" * 1000, True)
    os.close(reader)


def test_a_collector_at_its_limit_exactly_is_not_truncated() -> None:
    reader, writer = os.pipe()
    collector = Collector(reader, 5)
    os.write(writer, b"12345")
    os.close(writer)
    assert collector.read() and not collector.read()
    assert (collector.kept(), collector.truncated) == (b"12345", False)
    os.close(reader)
