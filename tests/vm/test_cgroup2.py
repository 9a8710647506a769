"""The runtime on one cgroup hierarchy: every limit in the kernel's words, devices, freezer, OOM, and what is left.

What is here holds for any runtime (`hack/vm --runtime runc tests/vm/test_cgroup2.py`), but for what asks for ocirun.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime.cgroups import devices, devices_v2
from runtime.linux import bpf
from runtime.resources import DeviceRule
from tests.bundles import OCIRUN, Bundle, Bundles
from tests.support import SOON_S, eventually
from tests.vm.units import CGROUPS, cgroup_of, value

MIB = 1 << 20
DISK = "254:32"  # the machine's swap disk: nobody reads or writes it but these tests
OURS = pytest.mark.skipif("runc" in OCIRUN or "crun" in OCIRUN, reason="ocirun's own")


@pytest.fixture(scope="session", autouse=True)
def disk() -> None:
    """The number that the kernel gave the disk."""
    status = os.stat("/dev/vdc")
    assert f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" == DISK


def limited(home: Bundles, **resources: Any) -> Bundle:
    bundle = home.make()
    bundle.linux["resources"] = resources
    return bundle.up()


def update(bundle: Bundle, **resources: Any) -> None:
    file = bundle.path / "resources.json"
    file.write_text(json.dumps(resources))
    bundle.home.ocirun("update", "--resources", str(file), bundle.id).ok()


def holds(bundle: Bundle, **wanted: str) -> None:
    """`memory_max="1"`: memory.max is 1."""
    cgroup = cgroup_of(bundle)
    names = {key.replace("__", ".").replace("_", ".", 1): want for key, want in wanted.items()}
    assert {name: (cgroup / name).read_text().strip() for name in names} == names


def test_memory_and_swap(home: Bundles) -> None:
    bundle = limited(home, memory={"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB})
    # The spec's swap is memory and swap together.
    assert value(bundle, "memory.max") == str(64 * MIB)
    assert value(bundle, "memory.low") == str(32 * MIB)
    assert value(bundle, "memory.swap.max") == str(32 * MIB)
    home.ocirun("update", "--memory", "80m", "--memory-swap", "80m", bundle.id).ok()
    assert value(bundle, "memory.max") == str(80 * MIB) and value(bundle, "memory.swap.max") == "0"
    home.ocirun("update", "--memory", "-1", bundle.id).ok()
    assert value(bundle, "memory.max") == value(bundle, "memory.swap.max") == "max"


def test_cpu_bandwidth_and_weight(home: Bundles) -> None:
    bundle = limited(home, cpu={"shares": 2048, "quota": 50_000, "period": 200_000})
    assert value(bundle, "cpu.max") == "50000 200000"
    assert int(value(bundle, "cpu.weight")) in (79, 174)  # runc before 1.3.3 drew a straight line
    home.ocirun("update", "--cpu-quota", "30000", bundle.id).ok()
    assert value(bundle, "cpu.max") == "30000 200000"
    home.ocirun("update", "--cpu-quota", "-1", bundle.id).ok()
    assert value(bundle, "cpu.max").startswith("max ")


@OURS
def test_cpu_burst_and_idle(home: Bundles) -> None:
    bundle = limited(home, cpu={"quota": 50_000, "period": 100_000, "burst": 20_000})
    assert value(bundle, "cpu.max.burst") == "20000"
    # Larger than both is only legal in one order, smaller in the other.
    update(bundle, cpu={"quota": 80_000, "burst": 60_000})
    assert value(bundle, "cpu.max.burst") == "60000" and value(bundle, "cpu.max") == "80000 100000"
    update(bundle, cpu={"quota": 10_000, "burst": 5_000})
    assert value(bundle, "cpu.max.burst") == "5000" and value(bundle, "cpu.max") == "10000 100000"
    update(bundle, cpu={"idle": 1})
    assert value(bundle, "cpu.idle") == "1"
    update(bundle, cpu={"idle": 0, "shares": 1024})
    assert value(bundle, "cpu.idle") == "0" and value(bundle, "cpu.weight") == "100"


def test_cpuset(home: Bundles) -> None:
    bundle = home.sh("grep Cpus_allowed_list /proc/self/status")
    bundle.linux["resources"] = {"cpu": {"cpus": "1", "mems": "0"}}
    assert bundle.run().ok().split() == ["Cpus_allowed_list:", "1"]


def test_pids(home: Bundles) -> None:
    bundle = limited(home, pids={"limit": 20})
    assert value(bundle, "pids.max") == "20"
    home.ocirun("update", "--pids-limit", "-1", bundle.id).ok()
    assert value(bundle, "pids.max") == "max"


def test_a_pids_limit_holds(home: Bundles) -> None:
    bundle = home.sh("for i in 1 2 3 4 5 6; do sleep 5 & done; echo all")
    bundle.linux["resources"] = {"pids": {"limit": 4}}
    result = bundle.run()
    assert result.code != 0 and "fork" in result.error and "all" not in result.text


def test_io_rates(home: Bundles) -> None:
    major, minor = map(int, DISK.split(":"))
    rate = {"major": major, "minor": minor}
    bundle = limited(
        home,
        blockIO={
            "throttleReadBpsDevice": [{**rate, "rate": 1 * MIB}],
            "throttleWriteBpsDevice": [{**rate, "rate": 2 * MIB}],
            "throttleReadIOPSDevice": [{**rate, "rate": 300}],
            "throttleWriteIOPSDevice": [{**rate, "rate": 400}],
        },
    )
    assert value(bundle, "io.max") == f"{DISK} rbps={MIB} wbps={2 * MIB} riops=300 wiops=400"


@OURS
def test_io_weight(home: Bundles) -> None:
    bundle = limited(home, blockIO={"weight": 500})
    files = [name for name in ("io.bfq.weight", "io.weight") if (cgroup_of(bundle) / name).exists()]
    assert files, "this kernel weighs no disks"
    assert value(bundle, files[0]) == ("default 500" if files[0] == "io.bfq.weight" else "default 4950")


def test_huge_pages(home: Bundles) -> None:
    bundle = limited(home, hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}])
    assert value(bundle, "hugetlb.2MB.max") == str(4 * MIB)


def test_limits_by_their_own_names(home: Bundles) -> None:
    unified = {
        "memory.high": str(48 * MIB),
        "memory.min": str(4 * MIB),
        "memory.oom.group": "1",
        "cpu.weight": "42",
        "pids.max": "17",
        "cpu.max": "20000 50000",
        "cpuset.cpus.partition": "member",
    }
    bundle = limited(home, unified=unified)
    assert {name: value(bundle, name) for name in unified} == unified


def test_a_limit_that_the_kernel_has_not_is_refused_by_name(home: Bundles) -> None:
    bundle = home.make()
    bundle.linux["resources"] = {"unified": {"memory.nothing": "1"}}
    assert "memory.nothing" in bundle.create().failed("memory.nothing")
    bundle.gone()


@OURS
def test_what_v2_has_no_words_for_is_refused_by_name(home: Bundles) -> None:
    for resources, field in (
        ({"memory": {"disableOOMKiller": True}}, "memory.disableOOMKiller"),
        ({"cpu": {"realtimeRuntime": 1000}}, "cpu.realtimeRuntime"),
        ({"blockIO": {"leafWeight": 100}}, "blockIO.leafWeight"),
        ({"network": {"classID": 7}}, "network.classID"),
    ):
        bundle = home.make()
        bundle.linux["resources"] = resources
        bundle.create().failed(f"linux.resources.{field}")
        bundle.gone()


@OURS
def test_an_update_is_whole_or_nothing(home: Bundles) -> None:
    bundle = limited(home, memory={"limit": 64 * MIB}, pids={"limit": 20}, cpu={"quota": 50_000, "period": 100_000})
    home.ocirun("update", "--memory", "80m", "--pids-limit", "30", "--cpuset-mems", "9", bundle.id).failed("cpu.mems")
    assert value(bundle, "memory.max") == str(64 * MIB) and value(bundle, "pids.max") == "20"
    assert value(bundle, "cpu.max") == "50000 100000"


@OURS  # runc 1.1.5 does not know the field yet
def test_a_memory_limit_below_the_use_is_refused_when_asked(home: Bundles) -> None:
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=32 2>/dev/null; echo done; sleep 1000"
    bundle = home.sh(script).mount("/dev/shm", "tmpfs", "shm", "nosuid")
    bundle.linux["resources"] = {"memory": {"limit": 64 * MIB}}
    bundle.up()
    eventually(lambda: int(value(bundle, "memory.current")) > 32 * MIB)
    file = bundle.path / "resources.json"
    file.write_text(json.dumps({"memory": {"limit": 16 * MIB, "checkBeforeUpdate": True}}))
    assert home.ocirun("update", "--resources", str(file), bundle.id).code != 0
    assert value(bundle, "memory.max") == str(64 * MIB) and bundle.status() == "running"


# ----------------------------------------------------------------------------------------------------------- devices


def programs(bundle: Bundle) -> int:
    fd = os.open(cgroup_of(bundle), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return len(bpf.bpf_prog_query(fd))
    finally:
        os.close(fd)


def with_disk(home: Bundles, *rules: dict[str, Any]) -> Bundle:
    """A container that has the disk's node, and perhaps may use it."""
    bundle = home.make()
    bundle.process["capabilities"] = {kind: ["CAP_MKNOD"] for kind in ("bounding", "effective", "permitted")}
    bundle.linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}, *rules]}
    bundle.up()
    bundle.exec("mknod", "/dev/disk", "b", *DISK.split(":")).ok()
    return bundle


def reads(bundle: Bundle) -> bool:
    result = bundle.exec("dd", "if=/dev/disk", "of=/dev/null", "count=1")
    assert result.code == 0 or "not permitted" in result.error, result
    return result.code == 0


def test_devices_are_what_the_rules_say(home: Bundles) -> None:
    major, minor = map(int, DISK.split(":"))
    bundle = with_disk(home)
    assert not reads(bundle)
    for name in ("null", "zero", "urandom"):
        bundle.exec("sh", "-c", f"head -c 0 /dev/{name}").ok()
    other = with_disk(home, {"allow": True, "type": "b", "major": major, "minor": minor, "access": "r"})
    assert reads(other)
    other.exec("dd", "if=/dev/zero", "of=/dev/disk", "count=1", "conv=notrunc").failed("not permitted")
    assert programs(bundle) == programs(other) == 1


@OURS
def test_o61_a_thousand_updates_leave_one_program(home: Bundles) -> None:
    major, minor = map(int, DISK.split(":"))
    bundle = with_disk(home)
    rules = [DeviceRule(allow, "b", major, minor, "rw") for allow in (False, True)]
    fd = os.open(cgroup_of(bundle), os.O_RDONLY | os.O_DIRECTORY)
    try:
        # What each update does at its end; a thousand whole ones take minutes under emulation.
        for number in range(1000):
            devices_v2.attach(fd, devices.policy((rules[number % 2],)))
    finally:
        os.close(fd)
    assert programs(bundle) == 1 and reads(bundle)
    for rule in ({"allow": False}, {"allow": True}):
        update(bundle, devices=[{**rule, "type": "b", "major": major, "minor": minor, "access": "rw"}])
    assert programs(bundle) == 1 and reads(bundle)


# ----------------------------------------------------------------------------------------- ends, freezer, namespaces


def test_a_frozen_container_is_paused_and_killed_nevertheless(home: Bundles) -> None:
    """threats O61"""
    bundle = home.sh("while :; do :; done").up()
    home.ocirun("pause", bundle.id).ok()
    assert "frozen 1" in value(bundle, "cgroup.events") and bundle.status() == "paused"
    bundle.exec("true").failed("paused")
    home.ocirun("resume", bundle.id).ok()
    assert "frozen 0" in value(bundle, "cgroup.events") and bundle.status() == "running"
    home.ocirun("pause", bundle.id).ok()
    home.ocirun("kill", bundle.id, "KILL").ok()
    bundle.becomes("stopped")
    bundle.delete(force=False).ok()
    bundle.gone()


def test_o35_everybody_dies_with_a_container_that_shares_the_hosts_pids(home: Bundles) -> None:
    bundle = home.sh("for i in 1 2 3; do (trap '' TERM HUP; sleep 1000) & done; wait")
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "pid"]
    bundle.up()
    eventually(lambda: len(value(bundle, "cgroup.procs").split()) == 4)
    bundle.delete().ok()
    bundle.gone()


@OURS
def test_cgroups_that_a_container_made_go_with_it(home: Bundles) -> None:
    bundle = home.make().up()
    inner = cgroup_of(bundle) / "a/b"
    inner.mkdir(parents=True)
    (inner / "cgroup.procs").write_text(str(bundle.pid()))
    bundle.delete().ok()
    bundle.gone()
    assert not inner.parent.parent.exists()


@OURS
def test_a_create_that_fails_leaves_no_cgroup(home: Bundles) -> None:
    bundle = home.make()
    bundle.mount("/x", "bind", "/there/is/no/such/thing", "bind")
    bundle.create().failed("/there/is/no/such/thing")
    bundle.gone()


def test_out_of_memory_is_the_end_and_is_told(home: Bundles) -> None:
    bundle = home.sh("trap : CHLD; while :; do dd if=/dev/zero of=/dev/null bs=64M count=1; sleep 1; done")
    bundle.linux["resources"] = {"memory": {"limit": 16 * MIB, "swap": 16 * MIB}}
    bundle.create().ok()
    with open(bundle.path / "events", "wb+") as out:
        events = home.popen("events", "--interval", "500ms", bundle.id, stdout=out)
        bundle.start().ok()
        eventually(lambda: b'"type":"oom"' in (bundle.path / "events").read_bytes(), 30)
        bundle.delete().ok()
        events.wait(SOON_S)
    bundle.gone()


def test_a_group_that_dies_together(home: Bundles) -> None:
    bundle = home.sh("sleep 1000 & dd if=/dev/zero of=/dev/null bs=64M count=1; echo survived")
    bundle.linux["resources"] = {
        "memory": {"limit": 16 * MIB, "swap": 16 * MIB},
        "unified": {"memory.oom.group": "1"},
    }
    result = bundle.run()
    assert result.code == 137 and "survived" not in result.text
    bundle.gone()


@OURS
def test_o34_six_mebibytes_are_enough_to_start_and_to_exec(home: Bundles) -> None:
    bundle = limited(home, memory={"limit": 6 * MIB})
    assert bundle.exec("echo", "here").ok() == "here\n"
    assert "oom_kill 0" in value(bundle, "memory.events")


@pytest.mark.parametrize("kind", ["rw", "ro"])
def test_a_container_sees_its_own_cgroup_alone(home: Bundles, kind: str) -> None:
    bundle = home.sh(
        "cat /proc/self/cgroup /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/inner && echo made; ls /sys/fs/cgroup"
    )
    bundle.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    bundle.mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", kind)
    bundle.linux["resources"] = {"pids": {"limit": 9}}
    result = bundle.run()
    lines = result.text.split()
    assert lines[0] == "0::/" and lines[1] == "1" and "pids.max" in lines
    assert ("made" in lines) == (kind == "rw")
    assert kind == "rw" or "Read-only file system" in result.error
    bundle.gone()


def test_s7_without_a_cgroup_namespace_the_hosts_cgroups_are_read_only_when_asked(home: Bundles) -> None:
    bundle = home.sh(
        "f=0; for file in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/cgroup.subtree_control"
        " /sys/fs/cgroup/*.slice/cgroup.freeze; do"
        " (echo 1 >$file) 2>&1 | grep -q 'Read-only' || { echo $file; f=1; }; done; exit $f"
    )
    bundle.user_namespace()
    bundle.linux["namespaces"] = [one for one in bundle.linux["namespaces"] if one["type"] != "cgroup"]
    bundle.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    bundle.mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "ro")
    bundle.run().ok()
    bundle.gone()


@OURS
def test_figures_are_v2s(home: Bundles) -> None:
    bundle = limited(home, memory={"limit": 64 * MIB}, pids={"limit": 20})
    bundle.exec("sh", "-c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done").ok()
    data = json.loads(home.ocirun("events", "--stats", bundle.id).ok())["data"]
    assert data["cpu"]["usage"]["total"] > 0 and data["pids"] == {"current": 1, "limit": 20}
    assert data["memory"]["usage"]["limit"] == 64 * MIB and data["memory"]["usage"]["usage"] > 0


@OURS
def test_a_threaded_or_busy_parent_is_an_error_that_says_so(home: Bundles) -> None:
    bundle = home.make()
    parent = CGROUPS / home.cgroup
    parent.mkdir()
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        # No internal processes (cgroups(7)): this one can give its children no memory controller.
        (parent / "cgroup.procs").write_text(str(sleeper.pid))
        bundle.linux["resources"] = {"memory": {"limit": 64 * MIB}}
        bundle.create().failed("memory.limit")
        assert [path for path in parent.iterdir() if path.is_dir()] == []
    finally:
        sleeper.kill()
        sleeper.wait()
    bundle.up()


@OURS
def test_a_relative_path_is_beside_the_callers_own(home: Bundles) -> None:
    bundle = home.make()
    bundle.linux["cgroupsPath"] = ""
    bundle.up()
    own = Path("/proc/self/cgroup").read_text().strip().removeprefix("0::").rpartition("/")[0]
    assert cgroup_of(bundle) == CGROUPS / f"{own}/{bundle.id}".lstrip("/")
    bundle.delete().ok()
