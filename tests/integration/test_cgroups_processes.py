"""Everybody in a cgroup: killed, frozen, and gone, fork bombs and nested cgroups included."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.cgroups import killer
from runtime.cgroups.hierarchy import Place, detect, places_for
from runtime.cgroups.manager import Manager, manager_for
from runtime.errors import RuntimeFailure
from runtime.linux.process import process_state
from runtime.resources import Resources
from tests.costs import soon
from tests.integration.cgroup_child import Child, fork, own_path, sleeper, spawn, wish
from tests.support import eventually, needs

BOMB = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n"


@pytest.fixture
def path() -> Iterator[str]:
    with own_path() as found:
        yield found


@pytest.fixture(params=["hybrid", "v1", "v2"])
def manager(request: pytest.FixtureRequest, path: str) -> Manager:
    """What this machine has, and each of its sides alone: v1 without cgroup.kill, v2 without v1's freezer."""
    return _only(request.param, f"{path}/ctr")


def _only(kind: str, path: str) -> Manager:
    if kind != "v2":
        needs("cgroup1")
    versions = {"hybrid": (1, 2), "v1": (1,), "v2": (2,)}[kind]
    found = Manager(tuple(place for place in places_for(path, "x") if place.hierarchy.version in versions))
    found.create(wish(pids={"limit": 60}) if kind != "v2" else Resources())
    return found


def two(manager: Manager) -> Child:
    """A process with a child of its own that ignores what it can; stdout has told of both."""
    child = spawn(["sh", "-c", "trap '' TERM; sleep 50 & echo; wait; sleep 50"], manager)
    child.read()
    return child


def test_kill_ends_everybody(manager: Manager) -> None:
    child = two(manager)
    assert len(manager.pids()) == 2
    assert manager.kill() and manager.pids() == []
    assert child.wait() == -signal.SIGKILL
    assert manager.kill()  # of nobody


def test_other_signals_go_to_everybody_once(manager: Manager) -> None:
    child = two(manager)
    assert not manager.kill(signal.SIGTERM)  # the shell ignores it, and its child inherits that
    assert len(manager.pids()) == 2
    manager.kill(signal.SIGUSR1)
    assert child.wait() == -signal.SIGUSR1
    eventually(lambda: manager.pids() == [])


def test_o35_a_fork_bomb_under_a_pids_limit_is_killed_to_the_last(path: str) -> None:
    for kind in ("hybrid", "v1"):
        manager = _only(kind, f"{path}/{kind}")
        child = spawn(["python3", "-S", "-c", BOMB], manager)
        eventually(lambda manager=manager: manager.stats().pids == 60, what="the bomb has gone off")
        assert manager.kill(deadline_s=10) and manager.pids() == []
        assert child.wait() == -signal.SIGKILL
        manager.destroy()
        assert not manager.exists()


def test_kill_reaches_cgroups_below(manager: Manager, path: str) -> None:
    nested = Manager(tuple(Place(place.hierarchy, f"{place.relative}/a/b") for place in manager.places), manager.verify)
    outer = sleeper(manager)  # first: once v2 has given controllers on, processes may be at the leaves only
    nested.create(Resources())
    children = [outer, sleeper(nested)]
    assert sorted(manager.pids()) == sorted(child.pid for child in children)
    assert manager.pids(recursive=False) == [children[0].pid]
    assert manager.kill()
    assert [child.wait() for child in children] == [-9, -9]
    manager.destroy()
    assert not manager.exists()


def counter(manager: Manager) -> Child:
    """A process that writes without end; its pipe shows whether it runs."""
    child = spawn(["python3", "-S", "-c", "import os\nwhile True: os.write(1, b'x')"], manager)
    os.set_blocking(child.out, False)
    return child


def drained(child: Child) -> int:
    total = 0
    while True:
        try:
            total += len(child.read())
        except BlockingIOError:
            return total


def test_freeze_stops_and_thaw_resumes(manager: Manager) -> None:
    child = counter(manager)
    try:
        eventually(lambda: drained(child) > 0)
        for _ in range(5):
            manager.freeze(True)
            assert manager.frozen()
            drained(child)
            time.sleep(0.01)  # time for it to write, if it could
            assert drained(child) == 0
            manager.freeze(True)  # again is fine
            manager.freeze(False)
            assert not manager.frozen()
            eventually(lambda: drained(child) > 0)
    finally:
        manager.kill()
        assert child.wait() == -9


def test_freeze_during_a_storm_of_forks(path: str) -> None:
    """v1's freezer gets stuck in FREEZING with such company."""
    for kind in ("hybrid", "v1"):
        manager = _only(kind, f"{path}/{kind}")
        child = spawn(["sh", "-c", "while :; do sh -c 'sh -c true & wait'; done"], manager)
        eventually(lambda manager=manager: len(manager.pids()) > 1)
        for _ in range(10):
            manager.freeze(True)
            before = manager.pids()
            states = {process_state(pid) for pid in before}
            assert not states & set("RS") or kind == "hybrid", states
            assert manager.pids() == before
            manager.freeze(False)
        assert manager.kill()
        assert child.wait() == -9


def test_o61_a_frozen_container_can_be_killed_and_removed(manager: Manager) -> None:
    children = [two(manager), sleeper(manager)]
    manager.freeze(True)
    with soon():
        assert manager.kill() and manager.pids() == []
        assert [child.wait() for child in children] == [-9, -9]
        manager.destroy()


def test_o37_a_cgroup_that_somebody_else_removes_meanwhile_is_an_empty_one(path: str) -> None:
    """systemd takes away a scope that has run empty while we kill what is in it: the kernel answers ENOENT to a write
    into cgroup.kill when the other's rmdir(2) is just at it, and ENODEV once it is done."""
    manager = _only("v2", f"{path}/ctr")
    assert manager.v2 is not None
    directory = manager.v2.directory

    def come_and_go() -> None:
        while True:
            with suppress(FileExistsError):
                os.mkdir(directory)
            with suppress(OSError):
                os.rmdir(directory)

    child = fork(come_and_go)
    try:
        for _ in range(3000):  # who does not know ENOENT has met it by the third, and ENODEV by the three hundredth
            assert manager.kill()
    finally:
        child.end()


def test_a_signal_to_the_frozen_waits_for_the_thaw(manager: Manager) -> None:
    child = sleeper(manager)
    manager.freeze(True)
    manager.kill(signal.SIGTERM)
    if not manager.pure_v2():
        assert manager.pids() == [child.pid]
    manager.freeze(False)
    assert child.wait() == -signal.SIGTERM


def test_freezing_what_is_gone(manager: Manager) -> None:
    manager.destroy()
    manager.freeze(False)
    assert not manager.frozen()
    with pytest.raises(RuntimeFailure, match="freeze cgroup .*ENOENT"):
        manager.freeze(True)


def test_o35_removal_right_after_the_kill(manager: Manager) -> None:
    for _ in range(10):
        child = two(manager)
        manager.kill()
        manager.destroy()
        assert not manager.exists()
        child.wait()
        manager.create(Resources())


def test_o35_removal_waits_for_those_who_are_just_leaving(manager: Manager) -> None:
    child = fork(lambda: time.sleep(0.1), manager)
    manager.destroy()
    assert not manager.exists()
    assert child.wait() == 0


def test_o35_removal_with_processes_names_them_and_can_be_repeated(manager: Manager) -> None:
    child = sleeper(manager)
    with soon(), pytest.raises(RuntimeFailure, match=f"EBUSY it still holds process {child.pid}$") as caught:
        manager.destroy(deadline_s=0.05)
    assert caught.value.code == "failed_precondition"
    assert manager.exists() and manager.pids() == [child.pid]
    manager.kill()
    manager.destroy()
    assert not manager.exists()
    child.wait()


def test_removal_takes_cgroups_below_and_is_idempotent(manager: Manager) -> None:
    for directory in manager.paths().values():
        for nested in ("a/b/c", "a/d", "e"):
            os.makedirs(f"{directory}/{nested}", exist_ok=True)
    manager.destroy()
    manager.destroy()
    assert not manager.exists()


def test_removal_of_a_deep_nest_needs_no_recursion(path: str) -> None:
    manager = _only("v1", f"{path}/deep")
    directory = manager.paths()["freezer"]
    fd = os.open(directory, os.O_PATH)
    for _ in range(300):
        os.mkdir("n", dir_fd=fd)
        below = os.open("n", os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    manager.destroy()
    assert not os.path.exists(directory)


def test_a_pid_that_left_the_cgroup_is_not_signalled(path: str) -> None:
    """The list of pids is old by the time it is used: only who is still there gets the signal."""
    manager = _only("v1", f"{path}/v1")
    child, stranger = sleeper(manager), sleeper()
    answers = [[child.pid, stranger.pid], [child.pid]]
    try:
        assert killer._signal_once(signal.SIGKILL, lambda: answers.pop(0), 5)
        assert child.wait() == -9
        assert process_state(stranger.pid) in "RSD"
    finally:
        stranger.end()


def test_more_processes_than_fds(path: str) -> None:
    manager = manager_for(f"{path}/many", "x")
    manager.create(Resources())
    child = spawn(["sh", "-c", "i=0; while [ $i -lt 400 ]; do sleep 50 & i=$((i+1)); done; echo; wait"], manager)
    child.read()
    assert len(manager.pids()) == 401
    v1 = Manager(tuple(place for place in manager.places if place.hierarchy.version == 1))
    assert v1.kill(deadline_s=10)
    assert child.wait() == -9


# ------------------------------------------------------------------------------------------------------------ threats


def test_s22_no_release_agent_by_way_of_a_new_user_namespace(path: str) -> None:
    """What the cgroups have to do with it: a container's are not its own to configure, and release_agent is at the
    top only. The system calls are the seccomp tests' matter."""
    manager = manager_for(f"{path}/ctr", "x")
    manager.create(Resources())
    for directory in manager.paths().values():
        assert not Path(directory, "release_agent").exists()
        notify = Path(directory, "notify_on_release")
        assert not notify.exists() or notify.read_text() == "0\n"


def test_moving_in_by_runc_s_way_is_seen(path: str) -> None:
    """Another tool writes a pid into cgroup.procs of one hierarchy after the other; the manager knows it at the end."""
    manager = manager_for(f"{path}/ctr", "x")
    manager.create(Resources())
    with subprocess.Popen(["sleep", "50"]) as process:
        for directory in manager.paths().values():
            Path(directory, "cgroup.procs").write_text(str(process.pid))
        assert manager.pids() == [process.pid]
        assert manager.kill()
    assert process.returncode == -9
    assert {one.version for one in detect()} == {1, 2}
