"""linux.resources and cgroupsPath: each limit as the kernel has it after create, and what a limit does."""

from __future__ import annotations

import os
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import CAPABILITIES, Bundle
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually

case = Group("resources").case

MEBIBYTE = 1 << 20


def value(one: Bundle, name: str) -> str:
    """A file of the container's cgroup, by its v1 name: "memory.limit_in_bytes"."""
    return (one.controller(name.split(".")[0]) / name).read_text().strip()


def disk() -> tuple[int, int]:
    """Major and minor of a disk that this machine has."""
    for block in sorted(Path("/sys/block").iterdir()):
        if not block.name.startswith(("loop", "ram", "zram")):
            major, minor = (block / "dev").read_text().strip().split(":")
            return int(major), int(minor)
    raise AssertionError("no disk below /sys/block")


# ------------------------------------------------------------------------------------------------------ cgroupsPath


@case()
def the_process_is_in_its_cgroup(box: Box) -> None:
    one = box.bundle().up()
    lines = kernel.proc(one.pid(), "cgroup").splitlines()
    mine = [line for line in lines if line.endswith(one.cgroup)]
    assert len(mine) >= (1 if kernel.unified() else 5), lines


@case("cgroup1")
def a_relative_path_is_below_the_caller_s(box: Box) -> None:
    one = box.bundle()
    one.linux["cgroupsPath"] = one.cgroup.lstrip("/")
    one.up()
    assert str(one.pid()) in value(one, "pids.max") + (one.controller("pids") / "cgroup.procs").read_text()


@case()
def without_a_path_there_is_one_of_the_container_s_name(box: Box) -> None:
    one = box.bundle()
    del one.linux["cgroupsPath"]
    one.up()
    lines = kernel.proc(one.pid(), "cgroup").splitlines()
    assert any(one.id in line for line in lines), lines
    one.delete("--force").ok()
    for top in kernel.hierarchies():
        assert not list(top.glob(f"*{one.id}*")), top


@case()
def parents_are_made(box: Box) -> None:
    one = box.bundle()
    one.cgroup = one.linux["cgroupsPath"] = f"{box.cgroup}/a/b/{one.id}"
    one.up()
    assert str(one.pid()) in (one.controller("pids") / "cgroup.procs").read_text()
    one.delete("--force").ok()
    # They may be somebody else's by now: only the container's own is removed.
    assert (kernel.cgroup("pids", f"{box.cgroup}/a/b")).is_dir()
    kernel.remove_cgroup(f"{box.cgroup}/a")


@case()
def dots_in_the_path_do_not_lead_out(box: Box) -> None:
    one = box.bundle()
    one.linux["cgroupsPath"] = f"{box.cgroup}/../../../../{box.cgroup.strip('/')}/{one.id}"
    if one.create().code == 0:
        assert str(one.pid()) in (one.controller("pids") / "cgroup.procs").read_text()
    still = box.bundle("echo", "works")
    assert still.run().ok() == "works\n"


@case()
def what_the_container_makes_below_is_removed_too(box: Box) -> None:
    one = box.bundle().up()
    below = one.controller("pids") / "below/deeper"
    below.mkdir(parents=True)
    one.delete("--force").ok()
    assert not below.parent.parent.exists()


@case()
def a_process_that_stayed_in_the_cgroup_is_killed_by_delete_force(box: Box) -> None:
    one = box.sh("sleep 1000 & echo > /tmp/up; wait").without_namespace("pid").up()
    one.written("tmp/up")
    pids = box.call("ps", "--format", "json", one.id).json()
    assert len(pids) == 2
    one.delete("--force").ok()
    eventually(lambda: not any(kernel.alive(pid) for pid in pids), "both processes to end")


# ----------------------------------------------------------------------------------------------------------- memory


@case("cgroup1", "memory")
def memory_limit(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"limit": 64 * MEBIBYTE}
    assert value(one.up(), "memory.limit_in_bytes") == str(64 * MEBIBYTE)


@case("cgroup1", "memory")
def memory_reservation(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"reservation": 32 * MEBIBYTE}
    assert value(one.up(), "memory.soft_limit_in_bytes") == str(32 * MEBIBYTE)


@case("cgroup1", "memory")
def memory_and_swap(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"limit": 64 * MEBIBYTE, "swap": 96 * MEBIBYTE}
    one.up()
    assert value(one, "memory.limit_in_bytes") == str(64 * MEBIBYTE)
    assert value(one, "memory.memsw.limit_in_bytes") == str(96 * MEBIBYTE)


@case("cgroup1", "memory")
def memory_without_a_limit(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"limit": -1}
    assert int(value(one.up(), "memory.limit_in_bytes")) > 1 << 50


@case("cgroup1", "memory")
def swappiness(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"swappiness": 17}
    assert value(one.up(), "memory.swappiness") == "17"


@case("cgroup1", "memory")
def a_swappiness_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"swappiness": 1000}
    one.create().failed("swappiness")


@case("cgroup1", "memory")
def without_the_oom_killer(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"disableOOMKiller": True}
    assert "oom_kill_disable 1" in value(one.up(), "memory.oom_control")


@case("memory")
def more_than_the_memory_limit_is_killed(box: Box) -> None:
    one = box.bundle("tail", "/dev/zero")
    one.resources["memory"] = {"limit": 16 * MEBIBYTE, "swap": 16 * MEBIBYTE}
    assert one.run().code == 137


@case("memory")
def a_memory_limit_that_nothing_can_start_in(box: Box) -> None:
    one = box.bundle()
    one.resources["memory"] = {"limit": 4096}
    one.create().failed()
    box.call("state", one.id).failed("container does not exist")


# -------------------------------------------------------------------------------------------------------------- cpu


@case("cgroup1")
def cpu_shares(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"shares": 512}
    assert value(one.up(), "cpu.shares") == "512"


@case("cgroup1")
def cpu_quota_and_period(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"quota": 25_000, "period": 50_000}
    one.up()
    assert (value(one, "cpu.cfs_quota_us"), value(one, "cpu.cfs_period_us")) == ("25000", "50000")


@case("cgroup1")
def cpu_without_a_quota(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"quota": -1}
    assert value(one.up(), "cpu.cfs_quota_us") == "-1"


@case("cgroup1")
def cpu_burst(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"quota": 25_000, "period": 50_000, "burst": 10_000}
    assert value(one.up(), "cpu.cfs_burst_us") == "10000"


@case("cgroup1")
def cpu_idle(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"idle": 1}
    assert value(one.up(), "cpu.idle") == "1"


@case("cgroup1")
def a_period_that_is_too_short_is_refused(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"quota": 10_000, "period": 10}
    one.create().failed("invalid argument")


@case("cgroup1")
def cpuset(box: Box) -> None:
    cpu = str(max(os.sched_getaffinity(0)))
    one = box.bundle("grep", "Cpus_allowed_list", "/proc/self/status")
    one.resources["cpu"] = {"cpus": cpu, "mems": "0"}
    assert one.run().ok().split()[1] == cpu


@case("cgroup1")
def a_cpu_that_is_not_there(box: Box) -> None:
    one = box.bundle()
    one.resources["cpu"] = {"cpus": "4000"}
    one.create().failed("numerical result out of range")


# ------------------------------------------------------------------------------------------------------------- pids


@case("cgroup1", "pids")
def pids_limit(box: Box) -> None:
    one = box.bundle()
    one.resources["pids"] = {"limit": 20}
    assert value(one.up(), "pids.max") == "20"


@case("pids")
def more_than_the_pids_limit_cannot_fork(box: Box) -> None:
    one = box.sh("i=0; while [ $i -lt 20 ]; do sleep 1000 & i=$((i+1)); done; echo all; kill -9 -1")
    one.resources["pids"] = {"limit": 8}
    said = one.run()
    assert "fork" in said.error and "all" not in said.text, said


@case("cgroup1", "pids")
def pids_without_a_limit(box: Box) -> None:
    one = box.bundle()
    one.resources["pids"] = {"limit": -1}
    assert value(one.up(), "pids.max") == "max"


# ------------------------------------------------------------------------------------------------------------ blkio


@case("cgroup1", "blkio")
def throttled_devices(box: Box) -> None:
    major, minor = disk()
    one = box.bundle()
    one.resources["blockIO"] = {
        "throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 1_000_000}],
        "throttleWriteBpsDevice": [{"major": major, "minor": minor, "rate": 2_000_000}],
        "throttleReadIOPSDevice": [{"major": major, "minor": minor, "rate": 300}],
        "throttleWriteIOPSDevice": [{"major": major, "minor": minor, "rate": 400}],
    }
    one.up()
    names = ("read_bps", "write_bps", "read_iops", "write_iops")
    found = [value(one, f"blkio.throttle.{name}_device") for name in names]
    assert found == [f"{major}:{minor} {rate}" for rate in (1_000_000, 2_000_000, 300, 400)]


@case("cgroup1", "blkio")
def a_throttled_device_that_is_not_there(box: Box) -> None:
    one = box.bundle()
    one.resources["blockIO"] = {"throttleReadBpsDevice": [{"major": 4000, "minor": 1, "rate": 1}]}
    one.create().failed("no such device")


# ---------------------------------------------------------------------------------------------------------- devices

KMSG = {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}
DENY = {"allow": False, "access": "rwm"}


def with_kmsg(box: Box, script: str, *rules: dict[str, object]) -> Bundle:
    # Whoever reads the kernel's log needs a capability for it as well.
    one = box.sh(script).capabilities(*CAPABILITIES, "CAP_SYSLOG", "CAP_MKNOD")
    one.linux["devices"] = [KMSG]
    one.resources["devices"] = [DENY, *rules]
    return one


@case()
def a_device_that_is_not_allowed(box: Box) -> None:
    said = with_kmsg(box, "exec 3< /dev/kmsg").run()
    assert said.code != 0 and "Operation not permitted" in said.error, said


@case()
def the_default_devices_are_always_allowed(box: Box) -> None:
    one = with_kmsg(
        box,
        "for d in null zero full random urandom; do exec 3< /dev/$d || exit 1; done; echo all > /dev/null; echo all",
    )
    assert one.run().ok() == "all\n"


@case()
def a_device_that_is_allowed(box: Box) -> None:
    entry = {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}
    assert with_kmsg(box, "exec 3< /dev/kmsg && echo read", entry).run().ok() == "read\n"


@case()
def a_device_that_is_allowed_for_reading_only(box: Box) -> None:
    entry = {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}
    said = with_kmsg(box, "exec 3< /dev/kmsg && echo read; echo > /dev/kmsg", entry).run()
    assert said.text == "read\n" and "Operation not permitted" in said.error, said


@case()
def devices_by_a_wildcard(box: Box) -> None:
    entry = {"allow": True, "type": "c", "major": 1, "access": "rw"}
    assert with_kmsg(box, "exec 3< /dev/kmsg && echo read", entry).run().ok() == "read\n"


@case()
def a_device_that_is_denied_out_of_many(box: Box) -> None:
    rules = ({"allow": True, "access": "rwm"}, {"allow": False, "type": "c", "major": 1, "minor": 11, "access": "rw"})
    said = with_kmsg(box, "exec 3< /dev/kmsg", *rules).run()
    assert said.code != 0 and "Operation not permitted" in said.error, said


@case()
def making_a_device_is_a_permission_of_its_own(box: Box) -> None:
    # What is not listed may still be made, not opened: runtimes allow that always.
    one = with_kmsg(box, "mknod /tmp/d c 1 11 && exec 3< /tmp/d")
    said = one.run()
    assert said.code != 0 and "Operation not permitted" in said.error
    assert (one.rootfs / "tmp/d").exists()


# ----------------------------------------------------------------------------------------------------------- others


@case("cgroup1")
def unified_is_refused_on_v1(box: Box) -> None:
    one = box.bundle()
    one.resources["unified"] = {"memory.max": "100000000"}
    one.create().failed("v1")
