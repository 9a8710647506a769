"""Workers: what they answer, how they die, and what they may not keep."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim.loop import Loop, Promise, Task
from runtime.shim.reaper import Reaper, exit_code
from runtime.shim.worker import Answer, Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    before = signal.getsignal(signal.SIGCHLD)

    def report(what: str, error: BaseException) -> None:
        raise AssertionError(f"{what}: {error}")

    loop = Loop(report)
    yield Workers(loop, Reaper(loop))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, before)
    loop.close()


def finish(workers: Workers, task: Task[Answer]) -> Promise[Answer]:
    done = workers.loop.spawn(task)
    while not done.done:
        workers.loop.turn()
    return done


def test_a_worker_answers_with_a_value_and_an_fd(workers: Workers) -> None:
    def job() -> tuple[object, int]:
        reader, writer = os.pipe()
        os.write(writer, b"from the worker")
        return {"pid": os.getpid()}, reader

    answer = finish(workers, workers.run("test", job)).value
    assert answer is not None
    assert isinstance(answer.value, dict) and answer.value["pid"] != os.getpid()
    assert os.read(answer.fd, 100) == b"from the worker"
    assert not os.get_inheritable(answer.fd)
    os.close(answer.fd)


def test_a_workers_failure_is_the_callers(workers: Workers) -> None:
    def job() -> tuple[object, int]:
        raise RuntimeFailure("mount x: EPERM", step="mounts", hint="h", code="failed_precondition")

    error = finish(workers, workers.run("test", job)).error
    assert isinstance(error, RuntimeFailure)
    assert (str(error), error.step, error.hint, error.code) == ("mount x: EPERM", "mounts", "h", "failed_precondition")


def test_a_worker_that_is_killed_is_reported_dead(workers: Workers) -> None:
    def job() -> tuple[object, int]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}, -1

    error = finish(workers, workers.run("create", job)).error
    assert isinstance(error, RuntimeFailure)
    assert str(error) == "create: the process that did it died (signal 11)" and error.code == "unavailable"


def test_a_worker_that_dies_and_leaves_a_child_with_its_fds_is_reported_dead(workers: Workers) -> None:
    reader, writer = os.pipe()

    def job() -> tuple[object, int]:
        if os.fork() == 0:  # holds the worker's end of the socket
            os.read(reader, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}, -1

    assert isinstance(finish(workers, workers.run("test", job, (reader,))).error, RuntimeFailure)
    os.close(writer)
    os.close(reader)


def test_p11_a_worker_keeps_only_the_fds_it_is_given(workers: Workers) -> None:
    reader, writer = os.pipe()

    def job() -> tuple[object, int]:
        return sorted(int(name) for name in os.listdir("/proc/self/fd")), -1

    answer = finish(workers, workers.run("test", job, (writer,))).value
    assert answer is not None and isinstance(answer.value, list)
    # 0 to 2, the socket, the pipe's writer, and the listing itself.
    assert len(answer.value) == 6 and writer in answer.value and reader not in answer.value
    os.close(reader)
    os.close(writer)


def test_o16_statuses_of_children_that_end_at_once_all_arrive(workers: Workers) -> None:
    reaper, loop = workers.reaper, workers.loop
    reader, writer = os.pipe()
    promises = []
    for number in range(200):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)  # EOF releases all of them in one moment
            os._exit(number)
        promises.append(reaper.expect(pid))
    os.close(reader)
    os.close(writer)
    while not all(promise.done for promise in promises):
        loop.turn()
    assert [exit_code(promise.value or 0) for promise in promises] == [(number, 0) for number in range(200)]


def test_the_status_of_a_child_that_ended_before_anybody_asked_is_kept_while_held(workers: Workers) -> None:
    reaper, loop = workers.reaper, workers.loop
    for held in (True, False):
        if held:
            reaper.hold()
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        while True:  # until it was reaped as somebody unknown
            loop.turn()
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
        promise = reaper.expect(pid)
        assert promise.done is held
        if held:
            assert exit_code(promise.value or 0) == (7, 0)
            reaper.release()
