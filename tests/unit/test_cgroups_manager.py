"""The manager over a tree of plain files that looks like cgroup v2 or v1: what is written, kept and taken back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cgroups.hierarchy import Hierarchy, Place
from runtime.cgroups.manager import Manager
from runtime.cgroups.stats import Pressure, Stall
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.resources import DeviceRule, Resources, parse

V2_FILES = {
    "cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma",
    "cgroup.subtree_control": "",
    "cgroup.procs": "",
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "cpu.max.burst": "0",
    "cpu.stat": "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\n",
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.low": "0",
    "memory.high": "max",
    "memory.current": "1000",
    "memory.peak": "1100",
    "memory.swap.current": "50",
    "memory.stat": "anon 300\nfile 500\ninactive_file 200\nactive_file 250\nkernel 60\nfile_mapped 40\npgfault 11\n"
    "pgmajfault 3\n",
    "memory.events": "low 0\nhigh 0\nmax 4\noom 1\noom_kill 2\noom_group_kill 0\n",
    "pids.max": "max",
    "pids.current": "3",
    "io.weight": "default 100\n",
    "io.max": "8:0 rbps=77 wbps=max riops=max wiops=max\n",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 rbytes=5\n",
}


def no_check(fd: int, hierarchy: Hierarchy) -> None:
    os.fstat(fd)


def wish(**resources: object) -> Resources:
    return parse(Fields(resources, "linux.resources"))


@pytest.fixture
def v2(tmp_path: Path) -> Iterator[Manager]:
    """A v2 container `pod/ctr` that exists; there is no kernel to load a device program into, so none is asked for."""
    top = tmp_path / "cgroup"
    for directory in (top, top / "pod", top / "pod" / "ctr"):
        directory.mkdir()
        for name, content in V2_FILES.items():
            (directory / name).write_text(content)
    yield Manager((Place(Hierarchy(str(top), "/", 2, ()), "pod/ctr"),), no_check)


def content(manager: Manager, file: str) -> str:
    return Path(manager.paths()[""], file).read_text()


def everything(manager: Manager) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(manager.paths()[""]).iterdir()}


def test_v2_update(v2: Manager) -> None:
    limits = wish(
        memory={"limit": 1 << 20, "swap": 3 << 20},
        cpu={"shares": 1024, "quota": 5000, "burst": 100},
        pids={"limit": 10},
        blockIO={"weight": 1000},
        unified={"memory.high": "999"},
    )
    v2.set(limits)
    assert content(v2, "memory.max") == str(1 << 20) and content(v2, "memory.swap.max") == str(2 << 20)
    assert content(v2, "cpu.max") == "5000 100000" and content(v2, "cpu.max.burst") == "100"
    assert content(v2, "pids.max") == "10" and content(v2, "io.weight") == "default 10000"
    assert content(v2, "memory.high") == "999"
    assert v2.pure_v2() and v2.exists() and v2.paths() == {"": str(Path(v2.paths()[""]))}


def test_update_is_all_or_nothing(v2: Manager) -> None:
    Path(v2.paths()[""], "pids.max").unlink()
    before = everything(v2)
    with pytest.raises(
        RuntimeFailure, match="linux.resources.pids.limit: this kernel's cgroups have no pids.max"
    ) as caught:
        v2.set(wish(memory={"limit": 5}, cpu={"shares": 2, "quota": 5000}, pids={"limit": 1}))
    assert caught.value.code == "invalid_argument" and caught.value.hint
    assert {name: text.strip() for name, text in everything(v2).items()} == {
        name: text.strip() for name, text in before.items()
    }


def test_update_restores_lines_by_device(v2: Manager) -> None:
    Path(v2.paths()[""], "memory.high").unlink()
    rates = [{"major": 8, "minor": 0, "rate": 1}, {"major": 8, "minor": 16, "rate": 2}]
    with pytest.raises(RuntimeFailure, match="unified.memory.high"):
        v2.set(wish(blockIO={"throttleReadBpsDevice": rates}, unified={"memory.high": "1"}))
    # A plain file keeps the last write alone: it is the first device's, whose old line is written back last.
    assert content(v2, "io.max") == "8:0 rbps=77 wbps=max riops=max wiops=max"


def test_plan_is_what_set_would_write(v2: Manager) -> None:
    writes = v2.plan(wish(memory={"limit": 5}, cpu={"period": 2000}))
    assert [(write.file, write.value) for write in writes] == [("cpu.max", "max 2000"), ("memory.max", "5")]
    assert content(v2, "memory.max") == "max"


def test_check_before_update(v2: Manager) -> None:
    with pytest.raises(
        RuntimeFailure,
        match=r"memory.limit: unable to set memory limit to 999 \(current usage: 1000, peak usage: 1100\)",
    ):
        v2.set(wish(memory={"limit": 999, "checkBeforeUpdate": True}))
    v2.set(wish(memory={"limit": 1000, "checkBeforeUpdate": True}))
    v2.set(wish(memory={"limit": 999}))


def test_v2_swap_alone_counts_from_the_limit_in_force(v2: Manager) -> None:
    v2.set(wish(memory={"limit": 1 << 20}))
    v2.set(wish(memory={"swap": 3 << 20}))
    assert content(v2, "memory.swap.max") == str(2 << 20) and content(v2, "memory.max") == str(1 << 20)
    with pytest.raises(RuntimeFailure, match="memory.swap: 5 is memory and swap together, so not less than the limit"):
        v2.set(wish(memory={"swap": 5}))


def test_v2_rdma_is_restored_by_device(v2: Manager) -> None:
    for name, line in (("rdma.max", "mlx5_1 hca_handle=7 hca_object=max"), ("memory.high", "max")):
        Path(v2.paths()[""], name).write_text(line)
    v2.set(wish(rdma={"mlx5_1": {"hcaHandles": 2, "hcaObjects": 5}}))
    assert content(v2, "rdma.max") == "mlx5_1 hca_handle=2 hca_object=5"
    Path(v2.paths()[""], "memory.high").unlink()
    for device, before in (("mlx5_1", "hca_handle=2 hca_object=5"), ("mlx4_0", "hca_handle=max")):
        with pytest.raises(RuntimeFailure, match="unified.memory.high"):
            v2.set(wish(rdma={device: {"hcaHandles": 9}}, unified={"memory.high": "1"}))
        assert content(v2, "rdma.max") == f"{device} {before}"


def test_v2_stats(v2: Manager) -> None:
    found = v2.stats()
    assert (found.cpu_usage_ns, found.cpu_user_ns, found.cpu_system_ns) == (5_000_000, 3_000_000, 2_000_000)
    assert (found.periods, found.throttled_periods, found.throttled_ns) == (7, 2, 9000)
    assert (found.memory_usage, found.memory_peak, found.memory_limit) == (1000, 1100, -1)
    assert found.memory_working_set == 800 and found.memory_available == -1
    assert (found.memory_rss, found.memory_cache, found.page_faults, found.major_page_faults) == (300, 500, 11, 3)
    assert (found.memory_active_file, found.memory_kernel, found.memory_limit_hits) == (250, 60, 4)
    assert (found.swap_usage, found.swap_limit, found.oom_kills) == (50, -1, 2)
    assert (found.pids, found.pids_limit) == (3, -1)
    assert [(io.major, io.minor, io.read_bytes, io.write_bytes, io.reads, io.writes) for io in found.io] == [
        (8, 0, 1, 2, 3, 4),
        (8, 16, 5, 0, 0, 0),
    ]
    assert v2.oom_kills() == 2
    short = v2.stats(full=False)
    assert short.memory_working_set == 800 and short.cpu_usage_ns == 5_000_000
    assert (short.io, short.oom_kills, short.memory_peak, short.pids) == ((), 0, 0, 0)
    assert found.cpu_pressure is None
    for name in ("cpu", "io"):
        Path(v2.paths()[""], f"{name}.pressure").write_text(
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=5\n"
        )
    Path(v2.paths()[""], "memory.pressure").write_text("some avg10=x total=77\n")
    found = v2.stats()
    assert found.cpu_pressure == found.io_pressure == Pressure(Stall(77, 1.5, 0.25, 0.0), Stall(5, 0.5, 0.0, 0.0))
    assert found.memory_pressure is None


def test_o42_stats_of_what_is_gone_or_garbled_are_zero(v2: Manager) -> None:
    directory = Path(v2.paths()[""])
    (directory / "memory.stat").write_text("anon x\n")
    (directory / "pids.current").write_text("")
    (directory / "cpu.stat").unlink()
    (directory / "io.stat").write_text("8:0\n")
    found = v2.stats()
    assert found.cpu_usage_ns == 0 == found.memory_rss == found.memory_inactive_file == found.pids
    assert len(found.io) == 1
    gone = Manager((Place(Hierarchy(str(directory.parent), "/", 2, ()), "none"),), no_check)
    assert gone.stats().memory_usage == 0 and gone.pids() == [] and not gone.exists() and gone.kill()
    gone.destroy()


def test_v2_create_gives_controllers_to_every_level_and_fails_whole(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    top.mkdir()
    (top / "cgroup.controllers").write_text("cpu memory rdma")
    (top / "cgroup.subtree_control").write_text("cpu")
    manager = Manager((Place(Hierarchy(str(top), "/", 2, ()), "a/b"),), no_check)
    with pytest.raises(RuntimeFailure, match="make cgroup .*/a/b"):
        manager.create(Resources())  # a directory of plain files has no cgroup.controllers of its own
    assert "+memory" in (top / "cgroup.subtree_control").read_text()  # and never rdma, which nobody asked for
    assert "rdma" not in (top / "cgroup.subtree_control").read_text()
    assert not (top / "a").exists()


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    top.mkdir()
    manager = Manager((Place(Hierarchy(str(top), "/", 1, ("memory",)), "a"),), no_check)
    for limits, message in (
        (wish(pids={"limit": 1}), "linux.resources.pids.limit: this machine has no pids cgroup controller"),
        (wish(unified={"memory.high": "1"}), "linux.resources.unified.memory.high: cgroup v1 has no such files"),
        (wish(hugepageLimits=[{"pageSize": "2MB", "limit": 1}]), "hugepageLimits: this machine has no hugetlb"),
        (wish(memory={"limit": 5, "swap": 4}), "memory.swap: 4 is memory and swap together"),
        (
            Resources(devices=(DeviceRule(True, "c", 10, -1, "r"), DeviceRule(False, "c", 10, 1, "r"))),
            r"devices\[1\]: c 10:1 cannot be taken out",
        ),
    ):
        with pytest.raises(RuntimeFailure, match=message):
            manager.create(limits)
    assert list(top.iterdir()) == []


def test_s19_only_a_cgroup_filesystem_is_written_to(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    top.mkdir()
    for version in (1, 2):
        manager = Manager((Place(Hierarchy(str(top), "/", version, ("memory",)), "a/b"),))
        with pytest.raises(RuntimeFailure, match=f"it is no cgroup v{version} filesystem"):
            manager.create(Resources())
        (top / "a" / "b").mkdir(parents=True, exist_ok=True)
        (top / "a" / "b" / "memory.limit_in_bytes").write_text("9")
        for call in (lambda m=manager: m.set(wish(memory={"limit": 1})), lambda m=manager: m.enter(1), manager.gate):
            with pytest.raises(RuntimeFailure, match=f"it is no cgroup v{version} filesystem"):
                call()
        assert (top / "a" / "b" / "memory.limit_in_bytes").read_text() == "9"


def test_links_in_the_way_are_not_followed(v2: Manager, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "memory.max").write_text("marker")
    directory = Path(v2.paths()[""])
    (directory / "memory.max").unlink()
    (directory / "memory.max").symlink_to(outside / "memory.max")
    with pytest.raises(RuntimeFailure, match="memory.limit.*ELOOP"):
        v2.set(wish(memory={"limit": 5}))
    (directory.parent / "link").symlink_to(outside)
    for file in outside.parent.glob("cgroup/pod/link"):
        assert file.is_symlink()
    linked = Manager((Place(Hierarchy(str(directory.parent.parent), "/", 2, ()), "pod/link"),), no_check)
    with pytest.raises(RuntimeFailure):
        linked.set(wish(memory={"limit": 5}))
    assert (outside / "memory.max").read_text() == "marker"
