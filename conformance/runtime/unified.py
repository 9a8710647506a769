"""cgroup v2: the same limits, freezer, devices and figures where there is one hierarchy only."""

from __future__ import annotations

import json
import os

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually
from conformance.runtime.resources import MEBIBYTE, disk, with_kmsg

case = Group("unified", "cgroup2").case


def limited(box: Box, **resources: object) -> Bundle:
    one = box.bundle()
    one.resources.update(resources)
    return one.up()


def value(one: Bundle, name: str) -> str:
    return (kernel.CGROUPS / one.cgroup.lstrip("/") / name).read_text().strip()


def update(one: Bundle, *flags: str) -> None:
    one.box.call("update", *flags, one.id).ok()


@case()
def limits_of_the_usual_kinds(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE}, cpu={"quota": 25_000, "period": 50_000}, pids={"limit": 20})
    found = [value(one, name) for name in ("memory.max", "cpu.max", "pids.max")]
    assert found == [str(64 * MEBIBYTE), "25000 50000", "20"]


@case()
def unified_keys(box: Box) -> None:
    one = limited(box, unified={"memory.max": "100003840", "pids.max": "33"})
    assert (value(one, "memory.max"), value(one, "pids.max")) == ("100003840", "33")


@case()
def a_unified_key_that_leads_out_is_refused(box: Box) -> None:
    one = box.bundle()
    one.resources["unified"] = {"../memory.max": "100003840"}
    one.create().failed("../memory.max")


@case()
def a_unified_key_of_no_controller_is_refused(box: Box) -> None:
    one = box.bundle()
    one.resources["unified"] = {"nonsense.max": "1"}
    one.create().failed("nonsense")


@case()
def shares_become_a_weight(box: Box) -> None:
    assert 30 <= int(value(limited(box, cpu={"shares": 1024}), "cpu.weight")) <= 110


@case()
def swap_is_swap_alone_and_a_reservation_is_low(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE, "swap": 96 * MEBIBYTE, "reservation": 32 * MEBIBYTE})
    assert value(one, "memory.swap.max") == str(32 * MEBIBYTE)
    assert value(one, "memory.low") == str(32 * MEBIBYTE)


@case("two-cpus")
def cpuset(box: Box) -> None:
    cpu = str(max(os.sched_getaffinity(0)))
    one = limited(box, cpu={"cpus": cpu})
    assert value(one, "cpuset.cpus") == cpu and kernel.status(one.pid())["Cpus_allowed_list"] == cpu


@case()
def throttled_devices_are_one_line(box: Box) -> None:
    major, minor = disk()
    throttled = [{"major": major, "minor": minor, "rate": 1_000_000}]
    one = limited(box, blockIO={"throttleReadBpsDevice": throttled, "throttleWriteIOPSDevice": throttled})
    line = value(one, "io.max").split()
    assert line[0] == f"{major}:{minor}" and {"rbps=1000000", "wiops=1000000"} <= set(line), line


@case()
def update_of_memory_and_swap(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE, "swap": 64 * MEBIBYTE})
    update(one, "--memory", str(128 * MEBIBYTE), "--memory-swap", str(160 * MEBIBYTE))
    assert value(one, "memory.max") == str(128 * MEBIBYTE)
    assert value(one, "memory.swap.max") == str(32 * MEBIBYTE)


@case()
def update_of_quota_period_and_shares(box: Box) -> None:
    one = limited(box, cpu={"shares": 1024})
    before = int(value(one, "cpu.weight"))
    update(one, "--cpu-quota", "30000", "--cpu-period", "60000", "--cpu-share", "4096")
    assert value(one, "cpu.max") == "30000 60000" and int(value(one, "cpu.weight")) > before


@case()
def update_to_no_limits(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE}, pids={"limit": 20})
    update(one, "--memory", "-1", "--memory-swap", "-1", "--pids-limit", "-1")
    assert (value(one, "memory.max"), value(one, "pids.max")) == ("max", "max")


@case()
def update_leaves_the_devices_as_they_are(box: Box) -> None:
    one = with_kmsg(box, "sleep 1000").up()
    update(one, "--pids-limit", "30")
    one.exec("sh", "-c", "exec 3< /dev/kmsg").failed("Operation not permitted")
    assert one.exec("sh", "-c", "exec 3< /dev/zero && echo opened").ok() == "opened\n"


@case()
def pause_and_resume(box: Box) -> None:
    one = limited(box)
    box.call("pause", one.id).ok()
    assert value(one, "cgroup.freeze") == "1" and "frozen 1" in value(one, "cgroup.events")
    box.call("resume", one.id).ok()
    assert "frozen 0" in value(one, "cgroup.events")


@case()
def the_cgroup_namespace_is_rooted_in_the_container_s(box: Box) -> None:
    assert box.bundle("cat", "/proc/self/cgroup").run().ok() == "0::/\n"


@case()
def the_cgroup_mount_shows_only_the_container_s_own(box: Box) -> None:
    one = box.sh("cat /sys/fs/cgroup/cgroup.procs; cat /sys/fs/cgroup/pids.max; ! mkdir /sys/fs/cgroup/x 2>/dev/null")
    one.mount("/sys", "sysfs", "sysfs", "ro").mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro")
    one.resources["pids"] = {"limit": 21}
    found = one.run().ok().split()
    assert "1" in found and found[-1] == "21"


@case("userns")
def a_read_only_cgroup_mount_in_a_user_namespace(box: Box) -> None:
    """threats S7: without a cgroup namespace the host's hierarchy would be writable."""
    one = box.sh("mkdir /sys/fs/cgroup/x").user_namespace().without_namespace("cgroup")
    one.mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro")
    assert "Read-only file system" in one.run().failed()


@case()
def exec_is_in_the_same_cgroup_or_one_below(box: Box) -> None:
    one = box.bundle().without_namespace("cgroup").up()
    mine = kernel.proc(one.pid(), "cgroup").strip()
    assert one.exec("cat", "/proc/self/cgroup").ok().strip() == mine
    (kernel.CGROUPS / one.cgroup.lstrip("/") / "below").mkdir()
    assert one.exec("cat", "/proc/self/cgroup", flags=("--cgroup", "below")).ok().strip() == f"{mine}/below"


@case()
def kill_all_without_a_pid_namespace(box: Box) -> None:
    one = box.sh("sleep 1000 & sleep 1000 & echo > /tmp/up; wait").without_namespace("pid").up()
    one.written("tmp/up")
    pids = box.call("ps", "--format", "json", one.id).json()
    assert len(pids) == 3
    box.call("kill", "--all", one.id, "KILL").ok()
    eventually(lambda: not any(kernel.alive(pid) for pid in pids), "every process to end")


@case()
def events_stats(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE}, pids={"limit": 20})
    data = box.call("events", "--stats", one.id).json()["data"]
    assert data["memory"]["usage"]["limit"] == 64 * MEBIBYTE and data["memory"]["usage"]["usage"] > 0
    assert data["pids"] == {"current": 1, "limit": 20} and data["cpu"]["usage"]["total"] > 0


@case()
def events_tell_of_an_oom(box: Box) -> None:
    one = box.sh("while [ ! -e /tmp/go ]; do sleep 0.02; done; tail /dev/zero; sleep 1000")
    one.resources["memory"] = {"limit": 16 * MEBIBYTE, "swap": 16 * MEBIBYTE}
    one.up()
    out = box.path("events")
    with open(out, "w") as file:
        box.popen("events", "--interval", "100ms", one.id, stdout=file)

    def kinds() -> set[str]:
        whole = (line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n"))
        return {json.loads(line)["type"] for line in whole}

    eventually(lambda: kinds() == {"stats"}, "events to come")
    (one.rootfs / "tmp/go").touch()
    eventually(lambda: kinds() == {"stats", "oom"}, "the oom event", 60)


@case()
def a_cgroup_that_stayed_is_removed_with_its_children(box: Box) -> None:
    one = box.bundle().up()
    (kernel.CGROUPS / one.cgroup.lstrip("/") / "a/b").mkdir(parents=True)
    one.delete("--force").ok()
    assert not (kernel.CGROUPS / one.cgroup.lstrip("/")).exists()
