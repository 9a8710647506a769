"""`ocirun events`: runc's JSON, figure by figure against the cgroup's own files, and an OOM as it happens."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.commands.events import interval
from runtime.options import UsageError
from tests.bundles import Bundle, Bundles, bundles
from tests.probes import interpreter, python
from tests.support import SOON_S, eventually, needs

MIB = 1 << 20


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def stats(one: Bundle) -> dict[str, Any]:
    event = json.loads(one.home.ocirun("events", "--stats", one.id).ok())
    assert list(event) == ["type", "id", "data"] and (event["type"], event["id"]) == ("stats", one.id)
    found: dict[str, Any] = event["data"]
    return found


def number(one: Bundle, file: str) -> int:
    return next(int(Path(top, file).read_text()) for top in one.home.cgroups(one.id) if Path(top, file).exists())


def test_every_figure_of_runcs(home: Bundles) -> None:
    needs("cgroup1")  # its files; tests/vm has those of v2
    count = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); done"
    one = home.sh(f"{count}; head -c 65536 /bin/busybox > /tmp/x; exec sleep 1000")
    one.linux["resources"] = {
        "memory": {"limit": 64 * MIB, "swap": 80 * MIB, "kernelTCP": 8 * MIB},
        "pids": {"limit": 9},
        "cpu": {"quota": 4_000, "period": 100_000, "cpus": "0"},
    }
    one.up()
    eventually(lambda: Path(f"/proc/{one.pid()}/comm").read_text() == "sleep\n", what="it to come to rest")
    eventually(lambda: "throttledTime" in stats(one)["cpu"]["throttling"])
    found = stats(one)
    assert list(found) == [
        *("cpu", "cpuset", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"),
    ]
    usage = found["cpu"]["usage"]
    assert 0 < usage["total"] <= number(one, "cpuacct.usage")
    assert 0 <= sum(usage["percpu"]) - usage["total"] < 100_000_000 and {
        "kernel",
        "user",
        "percpu_kernel",
        "percpu_user",
    } < set(usage)
    assert found["cpu"]["throttling"]["throttledTime"] > 0 < found["cpu"]["throttling"]["periods"]
    assert found["cpuset"]["cpus"] == [0] and found["cpuset"]["mems"] == [0]
    assert found["cpuset"]["sched_load_balance"] in (0, 1) and found["cpuset"]["sched_relax_domain_level"] == -1
    assert len(found["cpuset"]) == 11
    memory = found["memory"]
    assert memory["usage"]["limit"] == 64 * MIB and memory["swap"]["limit"] == 80 * MIB
    assert memory["kernelTCP"]["limit"] == 8 * MIB and memory["kernel"]["limit"] > 1 << 60
    assert 0 < memory["usage"]["usage"] <= memory["usage"]["max"] and memory["usage"]["failcnt"] == 0
    raw = dict(line.split() for line in _file(one, "memory.stat").splitlines())
    assert set(memory["raw"]) == set(raw) and memory["raw"]["hierarchical_memory_limit"] == 64 * MIB
    assert found["pids"] == {"current": number(one, "pids.current"), "limit": 9}
    for entry in (*found["blkio"].get("ioServiceBytesRecursive", ()), *found["blkio"].get("ioServicedRecursive", ())):
        assert set(entry) <= {"major", "minor", "op", "value"} and entry["op"]
    assert found["intel_rdt"] == {} and found["network_interfaces"] is None


def _file(one: Bundle, name: str) -> str:
    return next(Path(top, name).read_text() for top in one.home.cgroups(one.id) if Path(top, name).exists())


def test_the_shape_is_runcs(home: Bundles, tmp_path: Path) -> None:
    """Debian's runc reads the same cgroup of the same container: every key that it prints, we print."""
    needs("cgroup1")  # its files; tests/vm has those of v2
    needs("runc")
    one = home.make()
    one.process.pop("noNewPrivileges")
    one.write()
    root = str(tmp_path / "runc")
    command = ["runc", "--root", root]
    subprocess.run([*command, "create", "--bundle", str(one.path), one.id], check=True, stdin=subprocess.DEVNULL)
    try:
        said = subprocess.run([*command, "events", "--stats", one.id], check=True, capture_output=True).stdout
    finally:
        subprocess.run([*command, "delete", "--force", one.id], check=True)
    theirs = json.loads(said)
    ours = {"type": "stats", "id": one.id, "data": stats(one.up())}
    missing = _keys(theirs) - _keys(ours)
    # What is left out when it is zero depends on what the process has done so far.
    assert {key for key in missing if not key.endswith((".max", ".usage", ".value", ".cache"))} == set()
    assert _keys(ours) - _keys(theirs) <= {
        *missing,
        *(key for key in _keys(ours) if ".hugetlb." in key or "blkio" in key),
    }


def _keys(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {key for name, inner in value.items() for key in _keys(inner, f"{path}.{name}")} | {path}
    return {path}


def test_o56_an_oom_is_told_and_once(home: Bundles) -> None:
    needs("cgroup1")  # its files; tests/vm has those of v2
    one = interpreter(home.make())
    one.process["args"] = python(
        "import time\nwhile not os.path.exists('/tmp/go'): time.sleep(0.01)\nbytearray(128 << 20)"
    )
    one.linux["resources"] = {"memory": {"limit": 32 * MIB, "swap": 32 * MIB}}
    one.up()
    with home.popen("events", "--interval", "1h", one.id, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["type"] == "stats"
        (one.rootfs / "tmp/go").touch()
        lines = [json.loads(line) for line in child.stdout]
        assert child.wait(SOON_S) == 0
    assert lines == [{"type": "oom", "id": one.id}]


def test_an_oom_that_the_container_survives(home: Bundles) -> None:
    needs("cgroup1")  # its files; tests/vm has those of v2
    one = interpreter(home.make())
    script = "while True:\n    if os.fork() == 0: bytearray(128 << 20); os._exit(0)\n    os.wait(); time.sleep(0.3)"
    one.process["args"] = python("import time\nwhile not os.path.exists('/tmp/go'): time.sleep(0.01)\n" + script)
    one.linux["resources"] = {"memory": {"limit": 32 * MIB, "swap": 32 * MIB}}
    one.up()
    with home.popen("events", "--interval", "1h", one.id, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (one.rootfs / "tmp/go").touch()
        for _ in range(3):
            assert json.loads(child.stdout.readline()) == {"type": "oom", "id": one.id}
        assert one.status() == "running"
        home.ocirun("kill", one.id, "KILL").ok()
        child.stdout.read()
        assert child.wait(SOON_S) == 0


def test_lines_come_at_the_interval_and_end_with_the_container(home: Bundles) -> None:
    one = home.make().up()
    with home.popen("events", "--interval", "30ms", one.id, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(4):
            assert json.loads(child.stdout.readline())["type"] == "stats"
        home.ocirun("kill", one.id, "KILL").ok()
        assert all(json.loads(line)["type"] == "stats" for line in child.stdout)
        assert child.wait(SOON_S) == 0
    one.becomes("stopped")
    home.ocirun("events", one.id).failed(f"container with id {one.id} is not running")
    home.ocirun("events", "unknown").failed("container does not exist")


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400), ("10us", 1e-5), ("1h0m1s", 3601)]
)
def test_durations(text: str, seconds: float) -> None:
    assert interval(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0s", "5", "s", "-1s", "1x", "1.2.3s", "1s ", "٣s", "0"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--interval"):
        interval(text)
