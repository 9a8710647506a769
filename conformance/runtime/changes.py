"""What changes a container that runs: update, pause and resume; and events, which tell of it."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually
from conformance.runtime.resources import MEBIBYTE, value

case = Group("changes").case


def update(one: Bundle, *flags: str) -> None:
    one.box.call("update", *flags, one.id).ok()


def limited(box: Box, **resources: dict[str, Any]) -> Bundle:
    one = box.bundle()
    one.resources.update(resources)
    return one.up()


# ----------------------------------------------------------------------------------------------------------- update


@case("cgroup1", "memory")
def update_of_the_memory_limit(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE})
    update(one, "--memory", str(48 * MEBIBYTE))
    assert value(one, "memory.limit_in_bytes") == str(48 * MEBIBYTE)


@case("cgroup1", "memory")
def update_of_the_memory_reservation(box: Box) -> None:
    one = limited(box)
    update(one, "--memory-reservation", str(48 * MEBIBYTE))
    assert value(one, "memory.soft_limit_in_bytes") == str(48 * MEBIBYTE)


@case("cgroup1", "memory")
def update_of_memory_and_swap_together(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE, "swap": 64 * MEBIBYTE})
    # Up needs swap first, and down needs memory first.
    update(one, "--memory", str(128 * MEBIBYTE), "--memory-swap", str(160 * MEBIBYTE))
    assert value(one, "memory.memsw.limit_in_bytes") == str(160 * MEBIBYTE)
    update(one, "--memory", str(32 * MEBIBYTE), "--memory-swap", str(40 * MEBIBYTE))
    assert value(one, "memory.limit_in_bytes") == str(32 * MEBIBYTE)
    assert value(one, "memory.memsw.limit_in_bytes") == str(40 * MEBIBYTE)


@case("cgroup1", "memory")
def update_to_no_memory_limit(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE})
    update(one, "--memory-swap", "-1", "--memory", "-1")
    assert int(value(one, "memory.limit_in_bytes")) > 1 << 50


@case("cgroup1")
def update_of_cpu_shares_quota_and_period(box: Box) -> None:
    one = limited(box)
    update(one, "--cpu-share", "300", "--cpu-quota", "30000", "--cpu-period", "60000")
    names = ("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    assert [value(one, name) for name in names] == ["300", "30000", "60000"]


@case("cgroup1")
def update_of_the_quota_alone_keeps_the_period(box: Box) -> None:
    one = limited(box, cpu={"quota": 20_000, "period": 80_000})
    update(one, "--cpu-quota", "40000")
    assert (value(one, "cpu.cfs_quota_us"), value(one, "cpu.cfs_period_us")) == ("40000", "80000")


@case("cgroup1")
def update_to_no_quota(box: Box) -> None:
    one = limited(box, cpu={"quota": 20_000, "period": 80_000})
    update(one, "--cpu-quota", "-1")
    assert value(one, "cpu.cfs_quota_us") == "-1"


@case("cgroup1", "two-cpus")
def update_of_the_cpuset(box: Box) -> None:
    one = limited(box)
    cpu = str(max(os.sched_getaffinity(0)))
    update(one, "--cpuset-cpus", cpu)
    assert value(one, "cpuset.cpus") == cpu
    assert kernel.status(one.pid())["Cpus_allowed_list"] == cpu


@case("cgroup1", "pids")
def update_of_the_pids_limit(box: Box) -> None:
    one = limited(box, pids={"limit": 20})
    update(one, "--pids-limit", "33")
    assert value(one, "pids.max") == "33"


@case("cgroup1", "pids")
def update_to_no_pids_limit(box: Box) -> None:
    one = limited(box, pids={"limit": 20})
    update(one, "--pids-limit", "-1")
    assert value(one, "pids.max") == "max"


@case("cgroup1")
def update_from_stdin(box: Box) -> None:
    one = limited(box)
    wanted = {"memory": {"limit": 48 * MEBIBYTE}, "cpu": {"shares": 256}, "pids": {"limit": 21}}
    box.call("update", "--resources", "-", one.id, input=json.dumps(wanted)).ok()
    names = ("memory.limit_in_bytes", "cpu.shares", "pids.max")
    assert [value(one, name) for name in names] == [str(48 * MEBIBYTE), "256", "21"]


@case("cgroup1")
def update_from_a_file(box: Box) -> None:
    one = limited(box)
    file = box.path("resources")
    file.write_text(json.dumps({"cpu": {"shares": 257}}))
    update(one, "-r", str(file))
    assert value(one, "cpu.shares") == "257"


@case()
def update_from_what_is_not_json(box: Box) -> None:
    one = limited(box)
    box.call("update", "-r", "-", one.id, input="{").failed(code=1)


@case("cgroup1")
def update_changes_nothing_else(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE}, cpu={"shares": 300}, pids={"limit": 20})
    update(one, "--pids-limit", "30")
    assert value(one, "memory.limit_in_bytes") == str(64 * MEBIBYTE) and value(one, "cpu.shares") == "300"


@case("cgroup1")
def update_leaves_the_devices_as_they_are(box: Box) -> None:
    one = limited(box, devices=[{"allow": False, "access": "rwm"}])  # type: ignore[arg-type]
    before = value(one, "devices.list")
    update(one, "--cpu-share", "300")
    assert value(one, "devices.list") == before and "a *:* rwm" not in before


@case("cgroup1")
def update_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    update(one, "--cpu-share", "300")
    assert value(one, "cpu.shares") == "300"


@case("cgroup1", "freezer")
def update_of_a_paused_container(box: Box) -> None:
    one = limited(box)
    box.call("pause", one.id).ok()
    update(one, "--cpu-share", "300")
    assert one.status() == "paused" and value(one, "cpu.shares") == "300"


@case()
def update_of_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    box.call("update", "--cpu-share", "300", one.id).failed()


@case()
def update_of_an_unknown_container(box: Box) -> None:
    box.call("update", "--cpu-share", "300", "unknown").failed("container does not exist")


@case()
def update_with_a_value_that_is_no_number(box: Box) -> None:
    one = limited(box)
    box.call("update", "--cpu-share", "many", one.id).failed()
    box.call("update", "--memory", "many", one.id).failed()


@case("cgroup1")
def an_update_that_the_kernel_refuses(box: Box) -> None:
    one = limited(box)
    box.call("update", "--cpu-period", "10", one.id).failed("invalid argument")


# ------------------------------------------------------------------------------------------------- pause and resume


def counter(one: Bundle) -> int:
    text = (one.rootfs / "tmp/n").read_text()
    return int(text or 0)


@case("freezer")
def pause_stops_every_process(box: Box) -> None:
    one = box.sh("i=0; while :; do i=$((i+1)); echo $i > /tmp/n; done").up()
    one.written("tmp/n")
    box.call("pause", one.id).ok()
    before = counter(one)
    time.sleep(0.1)
    assert counter(one) == before
    box.call("resume", one.id).ok()
    eventually(lambda: counter(one) > before, "it to go on")


@case("cgroup1", "freezer")
def pause_freezes_the_cgroup(box: Box) -> None:
    one = box.bundle().up()
    state = one.controller("freezer") / "freezer.state"
    box.call("pause", one.id).ok()
    assert state.read_text() == "FROZEN\n"
    box.call("resume", one.id).ok()
    assert state.read_text() == "THAWED\n"


@case("freezer")
def pause_twice(box: Box) -> None:
    one = box.bundle().up()
    box.call("pause", one.id).ok()
    box.call("pause", one.id).failed("container not running")
    assert one.status() == "paused"


@case()
def pause_of_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    box.call("pause", one.id).failed("container not running")


@case()
def pause_of_an_unknown_container(box: Box) -> None:
    box.call("pause", "unknown").failed("container does not exist")


@case()
def resume_of_a_running_container(box: Box) -> None:
    one = box.bundle().up()
    box.call("resume", one.id).failed("container not paused")


@case("freezer")
def pause_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    box.call("pause", one.id).ok()
    assert one.status() == "paused"
    box.call("resume", one.id).ok()
    assert one.status() == "created"
    one.start().ok()


@case("freezer")
def kill_of_a_paused_container(box: Box) -> None:
    one = box.bundle().up()
    pid = one.pid()
    box.call("pause", one.id).ok()
    one.kill("KILL").ok()
    box.call("resume", one.id)
    eventually(lambda: not kernel.alive(pid), "it to end")


@case("freezer")
def list_shows_that_it_is_paused(box: Box) -> None:
    one = box.bundle().up()
    box.call("pause", one.id).ok()
    [entry] = box.call("list", "--format", "json").json()
    assert entry["status"] == "paused"


# ----------------------------------------------------------------------------------------------------------- events


@case("cgroup1")
def events_stats_once(box: Box) -> None:
    one = limited(box, memory={"limit": 64 * MEBIBYTE}, pids={"limit": 20})
    found = box.call("events", "--stats", one.id).json()
    assert found["type"] == "stats" and found["id"] == one.id
    data = found["data"]
    assert data["cpu"]["usage"]["total"] > 0 and len(data["cpu"]["usage"]["percpu"]) >= 1
    assert data["memory"]["usage"]["limit"] == 64 * MEBIBYTE and data["memory"]["usage"]["usage"] > 0
    assert data["pids"] == {"current": 1, "limit": 20}


@case("cgroup1")
def events_stats_has_every_part(box: Box) -> None:
    data = box.call("events", "--stats", limited(box).id).json()["data"]
    assert {"cpu", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"} <= data.keys(), data.keys()
    assert {"throttling", "usage"} <= data["cpu"].keys()
    assert {"usage", "swap", "kernel", "kernelTCP", "raw"} <= data["memory"].keys()
    assert data["memory"]["raw"]["pgfault"] > 0


@case()
def events_come_again_and_again(box: Box) -> None:
    one = limited(box)
    out = box.path("events")
    with open(out, "w") as file:
        child = box.popen("events", "--interval", "100ms", one.id, stdout=file)
    eventually(lambda: len(out.read_text().splitlines()) >= 3, "three events")
    child.kill()
    assert {json.loads(line)["type"] for line in out.read_text().splitlines()[:3]} == {"stats"}


@case()
def events_end_with_the_container(box: Box) -> None:
    one = limited(box)
    child = box.popen("events", "--interval", "100ms", one.id)
    time.sleep(0.2)
    one.stopped()
    one.delete().ok()
    assert child.wait(20) == 0


@case("memory")
def events_tell_of_an_oom(box: Box) -> None:
    one = box.sh("while [ ! -e /tmp/go ]; do sleep 0.02; done; tail /dev/zero; sleep 1000")
    one.resources["memory"] = {"limit": 16 * MEBIBYTE, "swap": 16 * MEBIBYTE}
    one.up()
    out = box.path("events")
    with open(out, "w") as file:
        box.popen("events", "--interval", "100ms", one.id, stdout=file)
    eventually(lambda: '"stats"' in out.read_text(), "events to come")
    (one.rootfs / "tmp/go").touch()
    eventually(lambda: f'{{"type":"oom","id":"{one.id}"' in out.read_text().replace(" ", ""), "the oom event")


@case()
def events_of_an_unknown_container(box: Box) -> None:
    box.call("events", "--stats", "unknown").failed("container does not exist")


@case()
def events_of_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    box.call("events", "--stats", one.id).failed("not running")
