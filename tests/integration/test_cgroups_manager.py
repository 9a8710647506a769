"""The manager on the real hierarchies of this machine: directories, limits, figures, and what failure leaves."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.cgroups import stats
from runtime.cgroups.hierarchy import detect, places_for
from runtime.cgroups.manager import Manager, manager_for, manager_from_paths
from runtime.errors import RuntimeFailure
from runtime.linux.cgroup import cgroups_of
from runtime.resources import Resources
from tests.costs import calls, waits, work
from tests.integration.cgroup_child import fork, own_path, sleeper, spawn, wish
from tests.support import needs

MIB = 1 << 20


@pytest.fixture
def path() -> Iterator[str]:
    needs("cgroup1")  # on v2 alone the same is shown through ocirun: tests/vm/test_cgroup2.py
    with own_path() as found:
        yield found


@pytest.fixture
def manager(path: str) -> Manager:
    return manager_for(f"{path}/pod/ctr", "ctr")


def value(manager: Manager, controller: str, file: str) -> str:
    return Path(manager.paths()[controller], file).read_text().strip()


def test_create_is_in_every_hierarchy_and_destroy_in_none(manager: Manager, path: str) -> None:
    manager.create(
        wish(
            memory={"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB, "swappiness": 7},
            cpu={"shares": 512, "quota": 50_000, "period": 200_000, "burst": 10_000, "cpus": "0", "mems": "0"},
            pids={"limit": 33},
            blockIO={"weight": 300},
        )
    )
    assert set(manager.paths()) == {name for one in detect() for name in (one.controllers or ("",))}
    assert all(
        Path(directory).is_dir() and directory.endswith(f"{path}/pod/ctr") for directory in manager.paths().values()
    )
    assert value(manager, "memory", "memory.limit_in_bytes") == str(64 * MIB)
    assert value(manager, "memory", "memory.memsw.limit_in_bytes") == str(96 * MIB)
    assert value(manager, "memory", "memory.soft_limit_in_bytes") == str(32 * MIB)
    assert value(manager, "memory", "memory.swappiness") == "7"
    assert value(manager, "cpu", "cpu.shares") == "512" and value(manager, "cpu", "cpu.cfs_quota_us") == "50000"
    assert (
        value(manager, "cpu", "cpu.cfs_period_us") == "200000" and value(manager, "cpu", "cpu.cfs_burst_us") == "10000"
    )
    assert value(manager, "cpuset", "cpuset.cpus") == "0" and value(manager, "cpuset", "cpuset.mems") == "0"
    assert value(manager, "pids", "pids.max") == "33"
    child = sleeper(manager)
    try:
        assert set(cgroups_of(child.pid).values()) == {f"{path}/pod/ctr"}
        assert manager.pids() == [child.pid] == manager_from_paths(manager.paths()).pids()
        assert manager.kill() and manager.pids() == []  # a zombie is nobody
        manager.destroy()
        assert not manager.exists()
    finally:
        child.end()


def test_modes_do_not_depend_on_the_umask(manager: Manager) -> None:
    before = os.umask(0o077)
    try:
        manager.create(Resources())
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert {Path(directory).stat().st_mode & 0o777 for directory in manager.paths().values()} == {0o755}


def test_cpusets_are_inherited_at_every_level(manager: Manager) -> None:
    manager.create(Resources())
    online = Path("/sys/fs/cgroup/cpuset/cpuset.cpus").read_text().strip()
    directory = Path(manager.paths()["cpuset"])
    assert (
        (directory / "cpuset.cpus").read_text().strip()
        == online
        == (directory.parent / "cpuset.cpus").read_text().strip()
    )


def test_relative_and_default_paths_are_below_the_callers_own() -> None:
    name = f"ocidtest-{os.getpid()}-default"
    own = cgroups_of()
    manager = manager_for("", name)
    manager.create(Resources())
    try:
        child = sleeper(manager)
        try:
            found = cgroups_of(child.pid)
            assert found == {controller: f"{path.rstrip('/')}/{name}" for controller, path in own.items()}
        finally:
            child.end()
    finally:
        manager.destroy()


def test_enter_moves_every_thread(manager: Manager) -> None:
    manager.create(Resources())

    def threads() -> None:
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(50,), daemon=True).start()
        os.write(1, b"x")
        time.sleep(50)

    child = fork(threads)
    try:
        child.read()
        manager.enter(child.pid)
        for directory in manager.paths().values():
            if "unified" not in directory:
                assert len(Path(directory, "tasks").read_text().split()) == 4
    finally:
        child.end()


def test_enter_of_nobody_is_an_error(manager: Manager) -> None:
    manager.create(Resources())
    child = sleeper()
    child.end()
    with pytest.raises(RuntimeFailure, match=f"move {child.pid} into .*ESRCH no such process"):
        manager.enter(child.pid)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cpu": {"cpus": "4095"}}, "linux.resources.cpu.cpus: write '4095' to .*: EINVAL|ERANGE"),
        ({"cpu": {"quota": 10}}, "linux.resources.cpu.quota: write '10' .*: EINVAL invalid argument"),
        ({"cpu": {"quota": 5000, "burst": 6000}}, "linux.resources.cpu.burst: .*EINVAL"),
        ({"pids": {"limit": 1 << 40}}, "linux.resources.pids.limit: .*EINVAL"),
        ({"cpu": {"realtimeRuntime": 5000}}, "linux.resources.cpu.realtimeRuntime: .*EINVAL"),
        ({"blockIO": {"leafWeight": 50}}, "blockIO.leafWeight: this kernel's cgroups have no blkio.leaf_weight"),
        (
            {"blockIO": {"throttleReadBpsDevice": [{"major": 9, "minor": 9, "rate": 1}]}},
            "throttleReadBpsDevice: .*ENODEV",
        ),
    ],
)
def test_create_that_fails_leaves_nothing(path: str, manager: Manager, limits: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeFailure, match=message) as caught:
        manager.create(wish(**limits))
    assert caught.value.code == "invalid_argument" and caught.value.step == "cgroup"
    assert not manager_for(path, "x").exists()
    manager.create(Resources())  # and the same call works once the cause is gone


def test_s19_bad_paths_make_nothing() -> None:
    tops = [one.mount for one in detect()]
    before = {top: sorted(os.listdir(top)) for top in tops}
    for bad in ("/ocidtest-x/../../ocidtest-y", "../ocidtest-y", "/ocidtest\nx", "/ocidtest\0", "/" + "o" * 300):
        with pytest.raises(RuntimeFailure):
            manager_for(bad, "x").create(Resources())
    for bad in ("..", "ocidtest/x", "ocidtest\n"):
        with pytest.raises(RuntimeFailure):
            manager_for("", bad).create(Resources())
    mine = {top: [name for name in os.listdir(top) if name not in before[top] and "ocidtest" in name] for top in tops}
    assert not any("ocidtest-y" in names or "ocidtest\nx" in names for names in mine.values())


def test_a_cgroup_with_processes_is_not_joined(path: str, manager: Manager) -> None:
    manager.create(Resources())
    child = sleeper(manager)
    try:
        with pytest.raises(RuntimeFailure, match=f"it holds process {child.pid} already") as caught:
            manager_for(f"{path}/pod/ctr", "other").create(wish(pids={"limit": 3}))
        assert caught.value.code == "failed_precondition"
        assert manager.pids() == [child.pid] and value(manager, "pids", "pids.max") == "max"
    finally:
        child.end()


def test_an_empty_frozen_leftover_is_taken_and_thawed(path: str, manager: Manager) -> None:
    manager.create(wish(pids={"limit": 3}))
    manager.freeze(True)
    again = manager_for(f"{path}/pod/ctr", "ctr")
    again.create(wish(pids={"limit": 5}))
    assert not again.frozen() and value(again, "pids", "pids.max") == "5"
    child = spawn(["true"], again)
    assert child.wait() == 0


@pytest.mark.parametrize("point", ["cgroup.made", "cgroup.limited"])
@pytest.mark.parametrize("action", ["error", "kill"])
def test_broken_in_the_middle_of_create(path: str, point: str, action: str) -> None:
    script = (
        "import sys\nfrom runtime.cgroups.manager import manager_for\nfrom runtime.resources import Resources\n"
        "manager_for(sys.argv[1], 'x').create(Resources())\n"
    )
    environment = {**os.environ, "OCID_FAILPOINTS": f"{point}={action}"}
    done = subprocess.run(
        [sys.executable, "-c", script, f"{path}/ctr"], env=environment, capture_output=True, check=False
    )
    manager = manager_for(f"{path}/ctr", "x")
    if action == "error":
        assert b"FailpointError" in done.stderr and not manager_for(path, "x").exists()
    else:
        assert done.returncode == -9 and manager.exists()  # garbage, which the next create takes
    manager.create(wish(pids={"limit": 5}))
    assert value(manager, "pids", "pids.max") == "5"


def test_a_parent_that_comes_and_goes_meanwhile(path: str) -> None:
    """Another create fails all the time, and takes back the parents that it made. Counted in rounds of both: by the
    clock, a busy machine would see few of them."""
    bad = wish(pids={"limit": 1 << 40})
    over, ended = os.pipe()
    os.set_blocking(over, False)

    def goes_on() -> bool:
        try:
            return bool(os.read(over, 1))
        except BlockingIOError:
            return True

    def fail() -> None:
        os.close(ended)
        rounds = 0
        while goes_on() or rounds < 10:
            rounds += 1
            try:
                manager_for(f"{path}/a/b/other", "x").create(bad)
            except RuntimeFailure as failure:
                assert "pids.limit" in str(failure), failure

    child = fork(fail)
    try:
        for _ in range(50):
            manager = manager_for(f"{path}/a/b/mine", "x")
            manager.create(Resources())
            manager.destroy()
            manager_for(f"{path}/a", "x").destroy()
    finally:
        os.close(ended)
        os.close(over)
    assert child.wait() == 0


# ------------------------------------------------------------------------------------------------------------- update


def test_memory_goes_up_and_down_in_the_right_order(manager: Manager) -> None:
    manager.create(wish(memory={"limit": 64 * MIB, "swap": 64 * MIB}))
    for limit, swap in ((128, 128), (32, 64), (64, 64), (16, 16), (256, 512)):
        manager.set(wish(memory={"limit": limit * MIB, "swap": swap * MIB}))
        assert value(manager, "memory", "memory.limit_in_bytes") == str(limit * MIB)
        assert value(manager, "memory", "memory.memsw.limit_in_bytes") == str(swap * MIB)
    manager.set(wish(memory={"limit": -1}))
    found = manager.stats()
    assert found.memory_limit == -1 == found.swap_limit


def test_cpu_bandwidth_below_a_parent_that_is_limited_as_well(path: str, manager: Manager) -> None:
    manager.create(Resources())
    parent = manager_for(f"{path}/pod", "pod")
    parent.set(wish(cpu={"quota": 50_000, "period": 100_000}))
    for quota, period in ((5_000, 10_000), (500_000, 1_000_000), (1_000, 2_000), (50_000, 100_000), (9_000, 200_000)):
        manager.set(wish(cpu={"quota": quota, "period": period}))
        assert value(manager, "cpu", "cpu.cfs_quota_us") == str(quota)
        assert value(manager, "cpu", "cpu.cfs_period_us") == str(period)
    with pytest.raises(RuntimeFailure, match="linux.resources.cpu.(quota|period): .*EINVAL") as caught:
        manager.set(wish(cpu={"quota": 60_000, "period": 100_000}))
    assert "parent" in caught.value.hint
    assert value(manager, "cpu", "cpu.cfs_quota_us") == "9000"
    assert value(manager, "cpu", "cpu.cfs_period_us") == "200000"


def test_burst_and_idle(manager: Manager) -> None:
    manager.create(wish(cpu={"quota": 50_000, "burst": 50_000, "shares": 100}))
    manager.set(wish(cpu={"quota": 20_000, "burst": 10_000}))
    manager.set(wish(cpu={"quota": 60_000, "burst": 60_000}))
    assert value(manager, "cpu", "cpu.cfs_burst_us") == "60000"
    manager.set(wish(cpu={"idle": 1, "shares": 2}))
    assert value(manager, "cpu", "cpu.idle") == "1"
    manager.set(wish(cpu={"idle": 0, "shares": 300}))
    assert value(manager, "cpu", "cpu.idle") == "0" and value(manager, "cpu", "cpu.shares") == "300"


def test_update_is_all_or_nothing(manager: Manager) -> None:
    rate = {"major": 254, "minor": 0}
    manager.create(
        wish(
            memory={"limit": 64 * MIB, "swap": 64 * MIB},
            cpu={"shares": 200, "quota": 50_000, "cpus": "0-1"},
            pids={"limit": 9},
            devices=[{"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rw"}],
        )
    )
    listing = value(manager, "devices", "devices.list")

    def everything() -> tuple[object, ...]:
        files = [("memory", "memory.limit_in_bytes"), ("memory", "memory.memsw.limit_in_bytes"), ("cpu", "cpu.shares")]
        files += [("cpu", "cpu.cfs_quota_us"), ("cpu", "cpu.cfs_period_us"), ("cpuset", "cpuset.cpus")]
        files += [("blkio", "blkio.throttle.read_bps_device"), ("memory", "memory.oom_control"), ("pids", "pids.max")]
        return tuple(value(manager, *file) for file in files)

    before = everything()
    change = {
        "memory": {"limit": 128 * MIB, "swap": 256 * MIB, "disableOOMKiller": True},
        "cpu": {"shares": 300, "quota": 1000, "period": 2000, "cpus": "1"},
        "devices": [{"allow": True}],
        "blockIO": {"throttleReadBpsDevice": [{**rate, "rate": 1 << 20}]},
    }
    with pytest.raises(RuntimeFailure, match="pids.limit") as caught:
        manager.set(wish(**change, pids={"limit": 1 << 40}))
    assert everything() == before and value(manager, "devices", "devices.list") == listing
    assert not getattr(caught.value, "__notes__", [])
    with pytest.raises(RuntimeFailure, match="leafWeight"):
        manager.set(wish(**{**change, "blockIO": {**change["blockIO"], "leafWeight": 10}}))
    assert everything() == before


def test_a_device_update_that_fails_takes_the_limits_back(path: str, manager: Manager) -> None:
    manager.create(wish(pids={"limit": 9}))
    # v1 refuses "a" to a cgroup that has children.
    child = manager_for(f"{path}/pod/ctr/nested", "nested")
    child.create(Resources())
    with pytest.raises(RuntimeFailure, match="linux.resources.devices: write 'a' to .*EINVAL"):
        manager.set(wish(pids={"limit": 20}, devices=[{"allow": True}]))
    assert value(manager, "pids", "pids.max") == "9"


def test_a_limit_below_what_is_in_use_says_so(manager: Manager) -> None:
    manager.create(wish(memory={"limit": 256 * MIB}))
    child = fork(lambda: (held := bytearray(b"x") * (64 * MIB), os.write(1, b"x"), time.sleep(50), held), manager)
    try:
        child.read()
        with pytest.raises(RuntimeFailure, match="memory.limit: unable to set memory limit to") as caught:
            manager.set(wish(memory={"limit": 4 * MIB}))
        assert "use more than that now" in caught.value.hint
        assert value(manager, "memory", "memory.limit_in_bytes") == str(256 * MIB)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(RuntimeFailure, match="unable to set memory limit to"):
            manager.set(wish(memory={"limit": 4 * MIB, "checkBeforeUpdate": True}))
    finally:
        child.end()


def test_update_of_what_is_gone_is_an_error(manager: Manager) -> None:
    with pytest.raises(RuntimeFailure, match="update cgroup .*ENOENT"):
        manager.set(wish(pids={"limit": 5}))
    with pytest.raises(RuntimeFailure, match="open cgroup .*ENOENT"):
        manager.gate()


def test_throttles_come_and_go(manager: Manager) -> None:
    device = {"major": 254, "minor": 0}  # the disk of this machine
    manager.create(wish(blockIO={"throttleWriteIOPSDevice": [{**device, "rate": 50}]}))
    assert value(manager, "blkio", "blkio.throttle.write_iops_device") == "254:0 50"
    manager.set(wish(blockIO={"throttleWriteIOPSDevice": [{**device, "rate": 0}]}))
    assert value(manager, "blkio", "blkio.throttle.write_iops_device") == ""


def test_huge_pages_of_a_hybrid_are_limited_by_its_v2_side(manager: Manager) -> None:
    manager.create(wish(hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}]))
    assert value(manager, "", "hugetlb.2MB.max") == str(4 * MIB) == value(manager, "", "hugetlb.2MB.rsvd.max")
    with pytest.raises(RuntimeFailure, match="hugepageLimits: this kernel's cgroups have no hugetlb.4MB.max"):
        manager.set(wish(hugepageLimits=[{"pageSize": "2MB", "limit": 0}, {"pageSize": "4MB", "limit": 0}]))
    assert value(manager, "", "hugetlb.2MB.max") == str(4 * MIB)


# ------------------------------------------------------------------------------------------------- memory and figures


def hog(size: int) -> None:
    held = bytearray()
    while len(held) < size:
        held += b"x" * MIB


def test_oom_is_counted(manager: Manager) -> None:
    manager.create(wish(memory={"limit": 24 * MIB, "swap": 24 * MIB}))
    assert manager.oom_kills() == 0
    for count in (1, 2, 3):
        assert fork(lambda: hog(200 * MIB), manager).wait() == -9
        assert manager.oom_kills() == count == manager.stats().oom_kills
    killed = sleeper(manager)
    manager.kill()
    assert killed.wait() == -9 and manager.oom_kills() == 3  # a SIGKILL alone is no OOM


def test_oom_in_a_cgroup_that_the_container_made_counts(path: str, manager: Manager) -> None:
    manager.create(Resources())
    nested = manager_for(f"{path}/pod/ctr/inner/most", "x")
    nested.create(wish(memory={"limit": 24 * MIB, "swap": 24 * MIB}))
    assert fork(lambda: hog(200 * MIB), nested).wait() == -9
    assert manager.oom_kills() == 1


def test_oom_by_the_limit_of_the_pod_counts_for_the_container(path: str, manager: Manager) -> None:
    manager.create(Resources())
    manager_for(f"{path}/pod", "pod").set(wish(memory={"limit": 24 * MIB, "swap": 24 * MIB}))
    assert fork(lambda: hog(200 * MIB), manager).wait() == -9
    assert manager.oom_kills() == 1


def test_o34_a_container_of_six_mebibytes_starts(manager: Manager) -> None:
    manager.create(wish(memory={"limit": 6 * MIB, "swap": 6 * MIB}))
    assert spawn(["true"], manager).wait() == 0
    assert manager.oom_kills() == 0


def test_figures(manager: Manager) -> None:
    manager.create(wish(memory={"limit": 128 * MIB}, pids={"limit": 7}, cpu={"quota": 5_000, "period": 10_000}))

    def busy() -> None:
        held = bytearray(b"x") * (40 * MIB)
        until = time.process_time() + 0.1
        while time.process_time() < until:
            sum(range(10_000))  # on its own account, not the kernel's: v1 tells the two apart by ticks
        os.write(1, b"x")
        time.sleep(50)
        del held

    child = fork(busy, manager)
    try:
        child.read()
        found = manager.stats()
        assert found.cpu_usage_ns > 90_000_000 and found.cpu_user_ns > 0 and found.throttled_periods > 0
        assert found.throttled_ns > 0 and found.periods >= found.throttled_periods
        assert 40 * MIB <= found.memory_rss <= found.memory_usage <= found.memory_peak <= 128 * MIB
        assert found.memory_limit == 128 * MIB and 0 < found.memory_available < 128 * MIB
        assert found.memory_working_set <= found.memory_usage
        assert found.page_faults > 1000 and found.oom_kills == 0
        assert (found.pids, found.pids_limit) == (1, 7)
        assert abs(found.timestamp_ns - time.time_ns()) < 10**9
    finally:
        child.end()


def test_io_figures(manager: Manager, tmp_path: Path) -> None:
    at = Path(f"/sys/dev/block/{os.major(tmp_path.stat().st_dev)}:{os.minor(tmp_path.stat().st_dev)}").resolve()
    disk = at.parent if (at / "partition").exists() else at
    major, minor = map(int, (disk / "dev").read_text().split(":"))
    # The kernel counts a disk's only from when it first had a limit.
    limit = {"major": major, "minor": minor, "rate": 1 << 40}
    manager.create(wish(blockIO={"throttleWriteBpsDevice": [limit]}))
    file = tmp_path / "data"

    def write() -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
        os.write(fd, b"x" * MIB)

    assert fork(write, manager).wait() == 0
    found = [one for one in manager.stats().io if (one.major, one.minor) == (major, minor)]
    assert [one.write_bytes >= MIB and one.writes >= 1 for one in found] == [True]


def test_figures_of_one_container_are_nineteen_files_and_little_else(manager: Manager) -> None:
    """A tenth of a millisecond or so; a node asks for each of its containers every ten seconds."""
    manager.create(wish(memory={"limit": 64 * MIB}))
    child = sleeper(manager)
    try:
        asked = calls(manager.stats)
        assert asked["read"] == asked["close"] <= 19 and asked.total() <= 60, asked
        assert asked["open"] - asked["read"] <= 2, asked  # no file of an I/O scheduler
        assert waits(manager.stats) == 0
        assert work(manager.stats) < 2.5
    finally:
        child.end()


def test_making_and_removing_cost_about_a_millisecond(manager: Manager, path: str) -> None:
    manager_for(f"{path}/pod", "pod").create(Resources())
    hierarchies = len({place.directory for place in manager.places})

    def make() -> None:
        manager.create(wish(memory={"limit": 64 * MIB}, cpu={"shares": 5}))

    def make_and_remove() -> None:
        make()
        manager.destroy()

    make_and_remove()  # what is imported on demand is so once
    making, removing = calls(make), calls(manager.destroy)
    assert making["write"] <= 4 and making.total() <= 13 * hierarchies, making
    assert removing["rmdir"] == hierarchies and removing.total() <= 4 * hierarchies, removing
    assert waits(make_and_remove) == 0
    assert work(make_and_remove, rounds=150) < 14  # so that some are not in the way of others


def test_the_gate_spares_the_grace_period(manager: Manager) -> None:
    """Who is moved by pid sleeps for one (15 ms), unless somebody else was a moment ago; who enters does not."""
    manager.create(Resources())
    by_pid, by_gate = [], []
    with manager.gate() as gate:
        for _ in range(9):
            by_pid.append(_sleeps(lambda: manager.enter(os.getpid())))
            by_gate.append(_sleeps(gate.enter))
    assert any(by_pid), "this kernel makes nobody wait: it cannot be shown here what the gate is for"
    assert sorted(by_gate)[4] == 0, by_gate


def _sleeps(enter: Callable[[], None]) -> int:
    """How often a child sleeps that calls it, when grace periods have passed since anybody was moved."""
    number = {"x86_64": 324, "aarch64": 283}[os.uname().machine]
    for _ in range(3):  # membarrier(2), MEMBARRIER_CMD_GLOBAL: waits for one
        assert ctypes.CDLL(None).syscall(number, 1, 0, 0) == 0

    def tell() -> None:
        os.write(1, str(waits(enter, rounds=1)).encode())

    child = fork(tell)
    told = int(child.read())
    assert child.wait() == 0
    return told


def test_no_fd_is_left_open(manager: Manager) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    manager.create(wish(memory={"limit": 64 * MIB}))
    manager.set(wish(memory={"limit": 32 * MIB}))
    with pytest.raises(RuntimeFailure):
        manager.set(wish(cpu={"quota": 1}))
    manager.gate().close()
    manager.stats()
    manager.freeze(True)
    manager.kill()
    manager.destroy()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_s67_what_a_container_forks_stays_below_its_pod(path: str, manager: Manager) -> None:
    manager.create(Resources())
    child = spawn(["sh", "-c", "setsid sleep 50 & echo $!; wait"], manager)
    try:
        grandchild = int(child.read())
        assert set(cgroups_of(grandchild).values()) == {f"{path}/pod/ctr"}
    finally:
        manager.kill()
        child.wait()


def test_v1_counts_of_a_place_without_children_are_not_walked(manager: Manager) -> None:
    manager.create(Resources())
    assert os.stat(manager.paths()["memory"]).st_nlink == 2  # what oom_kills and pids rely on
    assert stats.oom_kills_v1(manager.paths()["memory"]) == 0
    assert len(places_for("/x", "x")) == len(detect())
