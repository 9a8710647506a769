"""`ocirun update`: every flag and the document on stdin, and that all of it comes into force, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from runtime.cgroups.hierarchy import detect
from tests.bundles import Bundle, Bundles, Result, bundles
from tests.probes import interpreter, python
from tests.support import eventually, needs

MIB = 1 << 20
FILES = (
    *("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.oom_control"),
    *("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.cfs_burst_us", "cpu.idle", "cpuset.cpus"),
    *("cpuset.mems", "pids.max", "memory.swappiness", "devices.list", "memory.kmem.tcp.limit_in_bytes"),
)

pytestmark = pytest.mark.skipif(
    all("memory" not in hierarchy.controllers for hierarchy in detect()),
    reason="cgroup v1's files; v2's are tried in the VM lane",
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox", "cgroup1")
    with bundles(tmp_path) as opened:
        yield opened


def limits(one: Bundle) -> dict[str, str]:
    """All that could have changed."""
    files = (Path(top, name) for top in one.home.cgroups(one.id) for name in FILES)
    return {path.name: path.read_text().strip() for path in files if path.exists()}


def update(one: Bundle, *flags: str, **changes: IO[bytes]) -> Result:
    return one.home.ocirun("update", *flags, one.id, **changes)


def document(one: Bundle, text: object) -> Result:
    """The document on stdin."""
    path = one.path / "update.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with path.open("rb") as stdin:
        return update(one, "--resources", "-", stdin=stdin)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--memory", "64m"), {"memory.limit_in_bytes": str(64 * MIB)}),
        (("--memory", str(48 * MIB)), {"memory.limit_in_bytes": str(48 * MIB)}),
        (("--memory=1.5g",), {"memory.limit_in_bytes": str(1536 * MIB)}),
        (("--memory", "1GiB"), {"memory.limit_in_bytes": str(1024 * MIB)}),
        (("--memory", "65536kB"), {"memory.limit_in_bytes": str(64 * MIB)}),
        (("--memory-reservation", "32m"), {"memory.soft_limit_in_bytes": str(32 * MIB)}),
        (("--cpu-share", "256"), {"cpu.shares": "256"}),
        (("--cpu-quota", "40000"), {"cpu.cfs_quota_us": "40000"}),
        (("--cpu-period", "50000"), {"cpu.cfs_period_us": "50000"}),
        (("--cpu-quota", "40000", "--cpu-burst", "1000"), {"cpu.cfs_quota_us": "40000", "cpu.cfs_burst_us": "1000"}),
        (("--cpu-idle", "1"), {"cpu.idle": "1"}),
        (("--cpuset-cpus", "0"), {"cpuset.cpus": "0"}),
        (("--cpuset-mems", "0"), {}),
        (("--pids-limit", "33"), {"pids.max": "33"}),
        (("--pids-limit", "-1"), {}),
        (("--pids-limit", "0"), {}),
        (("--kernel-memory", "64m", "--kernel-memory-tcp", "1m"), {}),
        ((), {}),
    ],
)
def test_flags(home: Bundles, flags: tuple[str, ...], changed: dict[str, str]) -> None:
    one = home.make().up()
    before = limits(one)
    result = update(one, *flags)
    result.ok()
    after = limits(one)
    if "cpu.idle" in changed:
        del before["cpu.shares"], after["cpu.shares"]  # an idle group has the least there is
    assert after == {**before, **changed}
    assert ("--kernel-memory is ignored" in result.error) == ("--kernel-memory" in flags)


def test_memory_and_swap_up_and_down_and_off(home: Bundles) -> None:
    one = home.make().up()
    for limit, both in (("64m", "96m"), ("128m", "256m"), ("200m", "201m"), ("32m", "32m")):
        update(one, "--memory", limit, "--memory-swap", both).ok()
        now = limits(one)
        assert now["memory.limit_in_bytes"] == str(int(limit[:-1]) * MIB)
        assert now["memory.memsw.limit_in_bytes"] == str(int(both[:-1]) * MIB)
    update(one, "--memory", "-1").ok()
    now = limits(one)
    assert int(now["memory.limit_in_bytes"]) > 1 << 60 < int(now["memory.memsw.limit_in_bytes"])


def test_a_document_from_stdin_and_from_a_file(home: Bundles) -> None:
    one = home.make().up()
    before = limits(one)
    wanted = {
        "memory": {"limit": 64 * MIB, "reservation": 0, "swap": 80 * MIB},
        "cpu": {"shares": 700, "quota": 30_000, "period": 60_000, "cpus": "", "mems": ""},
        "pids": {"limit": 21},
        "blockIO": {"weight": 0},
    }
    document(one, wanted).ok()
    changed = {
        "memory.limit_in_bytes": str(64 * MIB),
        "memory.memsw.limit_in_bytes": str(80 * MIB),
        "cpu.shares": "700",
        "cpu.cfs_quota_us": "30000",
        "cpu.cfs_period_us": "60000",
        "pids.max": "21",
    }
    assert limits(one) == {**before, **changed}
    document(one, {}).ok()
    path = home.directory / "wanted.json"
    path.write_text('{"cpu": {"quota": -1}, "ofAnotherRuntime": 5}')
    # With a document no flag counts.
    update(one, "-r", str(path), "--pids-limit", "5").ok()
    assert limits(one) == {**before, **changed, "cpu.cfs_quota_us": "-1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "resources: expected an object"),
        ('{"memory": {"limit": "1g"}}', "resources.memory.limit: expected integer"),
        ('{"memory": {"limit": 1}, "memory": {}}', "duplicate key"),
        ('{"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]}', "hugepageLimits[0].pageSize"),
        ('{"unified": {"../../x": "1"}}', "is no controller's file"),
        ('{"pids": {"limit": 9}, "cpu": {"shares": 1}}', "the minimum allowed cpu-shares is 2"),
        ('{"pids": {"limit": 9}, "network": {"classID": 1}}', "resources.network.classID"),
    ],
)
def test_a_document_that_cannot_be_changes_nothing(home: Bundles, text: str, words: str) -> None:
    one = home.make().up()
    before = limits(one)
    document(one, text).failed(words)
    assert limits(one) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--memory", "much"),
        ("--memory", "1.5.5g"),
        ("--memory", "-1.5g"),
        ("--memory", "g"),
        ("--cpu-share", "64m"),
        ("--cpu-share", "1.5"),
        ("--pids-limit", "٣"),
        ("--pids-limit", "1" * 30),
    ],
)
def test_numbers_that_are_none(home: Bundles, flags: tuple[str, ...]) -> None:
    one = home.make().up()
    before = limits(one)
    update(one, *flags).failed(f"{flags[0]}: ")
    assert limits(one) == before


def test_all_or_nothing(home: Bundles) -> None:
    one = home.make()
    one.linux["resources"] = {"memory": {"limit": 64 * MIB, "swap": 64 * MIB}, "cpu": {"shares": 100}}
    one.up()
    before = limits(one)
    # Each fails in its last part, after others were written: cpuset and cpu come before memory, memory before pids.
    for flags, words in (
        (("--cpu-share", "200", "--cpuset-cpus", "0", "--memory", "1k"), "unable to set memory limit to 1024"),
        (("--cpu-share", "200", "--memory-swap", "1m"), "linux.resources.memory.swap"),
        (("--cpuset-cpus", "4096"), "linux.resources.cpu.cpus"),
        (("--cpu-share", "200", "--cpu-quota", "7"), "linux.resources.cpu.quota"),
        (("--memory", "100m", "--memory-swap", "100m", "--blkio-weight", "5"), "blockIO.weight"),
        (
            ("--cpu-share", "200", "--cpu-rt-runtime", "950000", "--memory", "30m"),
            "linux.resources.cpu.realtimeRuntime",
        ),
    ):
        update(one, *flags).failed(words)
        assert limits(one) == before, flags
    rules = [{"allow": True, "type": "c", "access": "rw"}, {"allow": False, "type": "c", "major": 1, "access": "r"}]
    document(one, {"cpu": {"shares": 300}, "devices": rules}).failed("devices[1]")
    assert limits(one) == before


def test_a_limit_below_what_is_in_use(home: Bundles) -> None:
    one = interpreter(home.make())
    script = "data = bytearray(40 << 20); open('/tmp/full', 'w'); import time; time.sleep(1000)"
    one.process["args"] = python(script)
    one.up()
    eventually((one.rootfs / "tmp/full").exists)
    before = limits(one)
    said = update(one, "--memory", "8m").failed("unable to set memory limit to 8388608 (current usage: ")
    assert ", peak usage: " in said
    assert limits(one) == before and one.status() == "running"
    document(one, {"memory": {"limit": 8 * MIB, "checkBeforeUpdate": True}}).failed("unable to set memory limit")
    document(one, {"memory": {"limit": 80 * MIB, "checkBeforeUpdate": True}}).ok()
    assert limits(one)["memory.limit_in_bytes"] == str(80 * MIB) and one.status() == "running"


def test_of_what_is_created_paused_stopped_and_gone(home: Bundles) -> None:
    one = home.make()
    one.create().ok()
    update(one, "--pids-limit", "11").ok()
    one.start().ok()
    home.ocirun("pause", one.id).ok()
    update(one, "--pids-limit", "12").ok()
    assert limits(one)["pids.max"] == "12" and one.status() == "paused"
    home.ocirun("resume", one.id).ok()
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    update(one, "--pids-limit", "13").failed("container not running")
    one.delete().ok()
    update(one, "--pids-limit", "13").failed("container does not exist")
    home.ocirun("update", "--pids-limit", "13").failed("is required")


def test_o61_devices_of_an_update(home: Bundles) -> None:
    one = home.make().up()
    before = limits(one)["devices.list"]
    rules = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
    ]
    document(one, {"devices": rules}).ok()
    assert set(limits(one)["devices.list"].splitlines()) == {*before.splitlines(), "c 10:229 rwm"}
    document(one, {"devices": rules[:1]}).ok()
    assert set(limits(one)["devices.list"].splitlines()) == set(before.splitlines())
    one.exec("sh", "-c", "echo > /dev/null && head -c 1 /dev/zero").ok()


def test_o61_an_update_that_says_again_what_a_privileged_container_has(home: Bundles) -> None:
    """containerd sends all of linux.resources with every update, and a privileged container may have cgroups of its
    own: then v1 takes no second "allow everything"."""
    one = home.make()
    everything = [{"allow": True, "access": "rwm"}]
    one.linux["resources"] = {"devices": everything}
    one.up()
    (top,) = (Path(top) for top in home.cgroups(one.id) if Path(top, "devices.list").exists())
    assert (top / "devices.list").read_text() == "a *:* rwm\n"
    (top / "own").mkdir()
    try:
        document(one, {"devices": everything, "pids": {"limit": 17}}).ok()
        assert limits(one)["pids.max"] == "17" and limits(one)["devices.list"] == "a *:* rwm"
        refused = [*everything, {"allow": False, "type": "c", "major": 10, "minor": 229, "access": "rwm"}]
        document(one, {"devices": refused, "pids": {"limit": 18}}).failed("linux.resources.devices")
        assert limits(one)["pids.max"] == "17"
    finally:
        (top / "own").rmdir()
