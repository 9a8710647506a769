"""What `events` prints, over plain files that look like cgroup v2, v1, and nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cgroups import stats
from runtime.cgroups.figures import figures

MAX = (1 << 64) - 1
PRESSURE = "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n"
V2 = {
    "cpu.stat": "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\n",
    "cpu.pressure": PRESSURE,
    "cpuset.cpus.effective": "0-2,5\n",
    "cpuset.mems.effective": "0\n",
    "memory.current": "1000\n",
    "memory.max": "4096\n",
    "memory.peak": "1100\n",
    "memory.swap.current": "50\n",
    "memory.swap.max": "1024\n",
    "memory.stat": "anon 300\nfile 500\n",
    "memory.events": "low 0\nmax 4\noom 1\noom_kill 2\n",
    "memory.pressure": PRESSURE,
    "pids.current": "3\n",
    "pids.max": "max\n",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=0 dbytes=9 dios=9\n254:16 rbytes=5\n",
    "io.pressure": "",
    "hugetlb.2MB.current": "4194304\n",
    "hugetlb.2MB.events": "max 6\n",
}


def _files(directory: Path, files: dict[str, str]) -> str:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    return str(directory)


def test_v2(tmp_path: Path) -> None:
    found = figures({"": _files(tmp_path / "c", V2)})
    psi = {
        "some": {"avg10": 1.5, "avg60": 0.25, "avg300": 0.0, "total": 77},
        "full": {"avg10": 0.0, "avg60": 0.0, "avg300": 0.0, "total": 5},
    }
    assert found["cpu"] == {
        "usage": {"total": 5_000_000, "kernel": 2_000_000, "user": 3_000_000},
        "throttling": {"periods": 7, "throttledPeriods": 2, "throttledTime": 9000},
        "psi": psi,
    }
    cpuset = found["cpuset"]
    assert isinstance(cpuset, dict) and cpuset["cpus"] == [0, 1, 2, 5] and cpuset["mems"] == [0]
    assert found["memory"] == {
        "cache": 500,
        "usage": {"limit": 4096, "usage": 1000, "max": 1100, "failcnt": 0},
        "swap": {"limit": 5120, "usage": 1050, "failcnt": 0},  # with memory, as v1 has it
        "kernel": {"limit": 0, "failcnt": 0},
        "kernelTCP": {"limit": 0, "failcnt": 0},
        "raw": {"anon": 300, "file": 500},
        "psi": psi,
        "event_count": {"max": 4, "oom": 1, "oom_kill": 2},
    }
    assert found["pids"] == {"current": 3}
    assert found["blkio"] == {
        "ioServiceBytesRecursive": [
            {"major": 8, "op": "Read", "value": 1},
            {"major": 8, "op": "Write", "value": 2},
            {"major": 254, "minor": 16, "op": "Read", "value": 5},
        ],
        "ioServicedRecursive": [{"major": 8, "op": "Read", "value": 3}, {"major": 8, "op": "Write"}],
    }
    assert found["hugetlb"] == {"2MB": {"usage": 4194304, "failcnt": 6}}


def test_v2_without_limits(tmp_path: Path) -> None:
    bare = figures({"": _files(tmp_path / "c", {**V2, "memory.max": "max\n", "pids.max": "12\n"})})
    memory = bare["memory"]
    assert isinstance(memory, dict)
    assert memory["usage"]["limit"] == MAX == memory["swap"]["limit"] and bare["pids"] == {"current": 3, "limit": 12}


def test_v1_throttle_figures_and_huge_pages(tmp_path: Path) -> None:
    blkio = {
        "blkio.throttle.io_serviced_recursive": "8:16 Read 4\n8:16 Total 4\nTotal 4\n",
        "blkio.throttle.io_service_bytes_recursive": "8:16 Read 4096\nTotal 4096\n",
    }
    pages = {"hugetlb.1GB.usage_in_bytes": "5\n", "hugetlb.1GB.max_usage_in_bytes": "6\n", "hugetlb.1GB.failcnt": "7\n"}
    paths = {"memory": _files(tmp_path / "m", {}), "blkio": _files(tmp_path / "b", blkio)}
    found = figures({**paths, "hugetlb": _files(tmp_path / "h", pages)})
    assert found["blkio"] == {
        "ioServiceBytesRecursive": [{"major": 8, "minor": 16, "op": "Read", "value": 4096}],
        "ioServicedRecursive": [
            {"major": 8, "minor": 16, "op": "Read", "value": 4},
            {"major": 8, "minor": 16, "op": "Total", "value": 4},
        ],
    }
    assert found["hugetlb"] == {"1GB": {"usage": 5, "max": 6, "failcnt": 7}}


def test_o42_what_is_gone_or_garbled_is_zero(tmp_path: Path) -> None:
    garbled = dict.fromkeys(V2, "x y\n::\n8\n")
    for paths in ({"": str(tmp_path / "none")}, {"": _files(tmp_path / "c", garbled)}, {"memory": "/none"}, {}):
        found = figures(paths)
        assert found["pids"] == {} and found["intel_rdt"] == {} and found["network_interfaces"] is None
        assert isinstance(found["memory"], dict) and found["memory"]["raw"] == {}


def test_huge_pages_as_statistics_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "page_sizes", lambda: ("2MB", "1GB"))
    one = {"hugetlb.2MB.usage_in_bytes": "4194304\n", "hugetlb.2MB.max_usage_in_bytes": "6291456\n"}
    (found,) = stats.collect({"hugetlb": _files(tmp_path / "v1", one)}, "").huge_pages
    assert found == stats.HugePages("2MB", 4 << 20, 6 << 20)
    (found,) = stats.collect({}, _files(tmp_path / "v2", {**V2, "memory.low": "1048576\n"})).huge_pages
    assert found == stats.HugePages("2MB", 4 << 20)
    assert stats.collect({}, str(tmp_path / "v2")).memory_reservation == 1 << 20
    soft = _files(tmp_path / "m", {"memory.soft_limit_in_bytes": "2097152\n"})
    assert stats.collect({"memory": soft}, "").memory_reservation == 2 << 20


def test_block_devices_as_statistics_have_them(tmp_path: Path) -> None:
    """What I/O schedulers alone count is known where they do, and not made up where they do not."""
    throttle = {
        "blkio.throttle.io_service_bytes_recursive": "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\nTotal 4608\n",
        "blkio.throttle.io_serviced_recursive": "8:0 Read 2\n8:0 Write 1\n8:0 Total 3\nTotal 3\n",
    }
    for kind, number in (("blkio.bfq.", 1), ("blkio.", 2)):
        scheduler = {
            f"{kind}io_merged_recursive": "8:0 Read 5\n8:0 Write 6\n8:0 Total 11\nTotal 11\n",
            f"{kind}io_service_time_recursive": "8:0 Read 7000000000\n8:0 Write 8000000000\nTotal 15000000000\n",
            f"{kind}io_queued_recursive": "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n",
        }
        directory = _files(tmp_path / f"v1-{number}", {**throttle, **scheduler})
        (found,) = stats.collect({"blkio": directory}, "").io
        assert found == stats.DeviceIo(8, 0, 4096, 512, 2, 1, 5, 6, 7_000_000_000, 8_000_000_000, 3)
    (found,) = stats.collect({"blkio": _files(tmp_path / "plain", throttle)}, "").io
    assert found == stats.DeviceIo(8, 0, 4096, 512, 2, 1) and found.reads_merged is None
    (first, _) = stats.collect({}, _files(tmp_path / "v2", V2)).io
    assert first == stats.DeviceIo(8, 0, 1, 2, 3, 0)
