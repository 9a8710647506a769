"""A container as a scope of systemd's: where it is, what it may use, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from runtime.linux import bpf
from tests.bundles import Bundle
from tests.support import SOON_S, eventually
from tests.vm.units import CGROUPS, Units, cgroup_of, known_units, reexecute, shown, systemctl, value

MIB = 1 << 20


def test_the_scope_is_where_its_path_says(managed: Units) -> None:
    bundle = managed.make().up()
    unit = managed.unit(bundle)
    assert cgroup_of(bundle) == CGROUPS / managed.cgroup / unit
    told = shown(unit, "ActiveState", "Slice", "Delegate", "ControlGroup", "Transient")
    assert told == {
        "ActiveState": "active",
        "Slice": managed.cgroup,
        "Delegate": "yes",
        "ControlGroup": f"/{managed.cgroup}/{unit}",
        "Transient": "yes",
    }
    bundle.delete().ok()
    bundle.gone()
    assert known_units(unit) == []


def test_a_slice_with_dashes_is_a_path(managed: Units) -> None:
    bundle = managed.make()
    inner = managed.cgroup.replace(".slice", "-pod-a.slice")
    stem = managed.cgroup.removesuffix(".slice")
    bundle.linux["cgroupsPath"] = f"{inner}:test:{bundle.id}"
    bundle.up()
    assert cgroup_of(bundle) == (
        CGROUPS / managed.cgroup / f"{stem}-pod.slice" / f"{stem}-pod-a.slice" / managed.unit(bundle)
    )
    bundle.delete().ok()
    systemctl("stop", inner, f"{stem}-pod.slice")


def test_without_a_path_it_is_in_the_system_slice(managed: Units) -> None:
    bundle = managed.make()
    del bundle.linux["cgroupsPath"]
    bundle.up()
    assert cgroup_of(bundle) == CGROUPS / "system.slice" / f"ocirun-{bundle.id}.scope"
    bundle.delete().ok()
    assert known_units(f"ocirun-{bundle.id}.scope") == []
    assert not (CGROUPS / "system.slice" / f"ocirun-{bundle.id}.scope").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/a/b", "expected cgroupsPath to be of format"),
        ("a.slice:b", "expected cgroupsPath to be of format"),
        ("a.slice:b:c:d", "expected cgroupsPath to be of format"),
        ("a:b:c", "no slice"),
        ("a--b.slice:b:c", "no slice"),
        ("../a.slice:b:c", "no unit"),
        ("system.slice:b/../../x:c", "no unit"),
        ("system.slice:b:", "names no unit"),
        ("system.slice:b:c.slice", "a slice holds no process"),
        ("system.slice:b:" + "x" * 250, "no unit"),
    ],
)
def test_a_path_that_is_no_unit_is_refused_before_anything_is_made(managed: Units, path: str, words: str) -> None:
    bundle = managed.make()
    bundle.linux["cgroupsPath"] = path
    bundle.create().failed(words)
    assert not (managed.root / bundle.id).exists()


LIMITS = {
    "memory": {"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB},
    "cpu": {"shares": 2048, "quota": 45_000, "period": 90_000, "cpus": "1", "mems": "0"},
    "pids": {"limit": 77},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],  # of which systemd knows nothing
}
KERNEL = {
    "memory.max": str(64 * MIB),
    "memory.low": str(32 * MIB),
    "memory.swap.max": str(32 * MIB),
    "cpu.weight": "174",
    "cpu.max": "45000 90000",
    "cpuset.cpus": "1",
    "cpuset.mems": "0",
    "pids.max": "77",
    "hugetlb.2MB.max": str(4 * MIB),
}
TOLD = {
    "MemoryMax": str(64 * MIB),
    "MemoryLow": str(32 * MIB),
    "MemorySwapMax": str(32 * MIB),
    "CPUWeight": "174",
    "CPUQuotaPerSecUSec": "500ms",
    "CPUQuotaPeriodUSec": "90ms",
    "AllowedCPUs": "1",
    "AllowedMemoryNodes": "0",
    "TasksMax": "77",
}


def _in_force(bundle: Bundle, wanted: dict[str, str]) -> None:
    assert {file: value(bundle, file) for file in wanted} == wanted


def test_systemd_knows_the_limits_and_its_reload_changes_none(managed: Units) -> None:
    bundle = managed.make()
    bundle.linux["resources"] = LIMITS
    bundle.up()
    _in_force(bundle, KERNEL)
    assert shown(managed.unit(bundle), *TOLD) == TOLD
    systemctl("daemon-reload")
    _in_force(bundle, KERNEL)
    reexecute()
    _in_force(bundle, KERNEL)
    assert shown(managed.unit(bundle), *TOLD) == TOLD


def test_limits_by_their_own_names_are_systemds_too(managed: Units) -> None:
    bundle = managed.make()
    bundle.linux["resources"] = {
        "unified": {"memory.high": str(48 * MIB), "memory.max": "max", "pids.max": "33", "cpu.max": "20000 100000"},
        "memory": {"limit": 64 * MIB},
    }
    bundle.up()
    wanted = {"memory.high": str(48 * MIB), "memory.max": "max", "pids.max": "33", "cpu.max": "20000 100000"}
    _in_force(bundle, wanted)
    systemctl("daemon-reload")
    _in_force(bundle, wanted)
    told = shown(managed.unit(bundle), "MemoryHigh", "MemoryMax", "TasksMax", "CPUQuotaPerSecUSec")
    assert told == {
        "MemoryHigh": str(48 * MIB),
        "MemoryMax": "infinity",
        "TasksMax": "33",
        "CPUQuotaPerSecUSec": "200ms",
    }


def test_an_update_reaches_systemd_and_the_kernel(managed: Units) -> None:
    bundle = managed.make()
    bundle.linux["resources"] = LIMITS
    bundle.up()
    flags = ("--memory", "128m", "--memory-swap", "128m", "--cpu-quota", "27000", "--cpuset-cpus", "0-1")
    managed.ocirun("update", *flags, "--pids-limit", "99", bundle.id).ok()
    wanted = {
        **KERNEL,
        "memory.max": str(128 * MIB),
        "memory.swap.max": "0",
        "cpu.max": "27000 90000",
        "cpuset.cpus": "0-1",
        "pids.max": "99",
    }
    _in_force(bundle, wanted)
    told = shown(managed.unit(bundle), "MemoryMax", "MemorySwapMax", "TasksMax", "AllowedCPUs", "CPUWeight")
    assert told == {
        "MemoryMax": str(128 * MIB),
        "MemorySwapMax": "0",
        "TasksMax": "99",
        "AllowedCPUs": "0-1",
        "CPUWeight": "174",
    }
    systemctl("daemon-reload")
    _in_force(bundle, wanted)


def test_an_update_that_the_kernel_refuses_changes_nothing(managed: Units) -> None:
    bundle = managed.make()
    bundle.linux["resources"] = LIMITS
    bundle.up()
    managed.ocirun("update", "--memory", "128m", "--memory-swap", "128m", "--cpuset-mems", "7", bundle.id).failed(
        "cpu.mems"
    )
    _in_force(bundle, KERNEL)
    assert shown(managed.unit(bundle), *TOLD) == TOLD


def test_one_process_is_allowed_where_one_is(managed: Units) -> None:
    # The scope is made around the init: nothing else of ours needs room in it.
    bundle = managed.make("true")
    bundle.linux["resources"] = {"pids": {"limit": 1}}
    bundle.run().ok()
    bundle.gone()


def _programs(bundle: Bundle) -> int:
    fd = os.open(cgroup_of(bundle), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return len(bpf.bpf_prog_query(fd))
    finally:
        os.close(fd)


def test_device_rules_survive_systemds_reload(managed: Units) -> None:
    """threats O61"""
    bundle = managed.make()
    bundle.process["capabilities"] = {
        kind: ["CAP_MKNOD"] for kind in ("bounding", "effective", "permitted", "inheritable")
    }
    bundle.linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    bundle.up()
    bundle.exec("mknod", "/dev/disk", "b", "254", "0").ok()
    for refresh in ((), ("daemon-reload",), ("set-property", "--runtime", managed.unit(bundle), "MemoryMax=1G")):
        if refresh:
            systemctl(*refresh)
        bundle.exec("dd", "if=/dev/disk", "of=/dev/null", "count=1").failed("not permitted")
        bundle.exec("dd", "if=/dev/zero", "of=/dev/null", "count=1").ok()
        assert _programs(bundle) == 1
    allowed = {"devices": [{"allow": True, "type": "b", "major": 254, "minor": 0, "access": "r"}]}
    managed.ocirun("update", "--resources", _file(bundle, allowed), bundle.id).ok()
    systemctl("daemon-reload")
    bundle.exec("dd", "if=/dev/disk", "of=/dev/null", "count=1").ok()
    assert _programs(bundle) == 1


def _file(bundle: Bundle, document: object) -> str:
    path = bundle.path / "resources.json"
    path.write_text(json.dumps(document))
    return str(path)


# ------------------------------------------------------------------------------------------------ ends, and failures


def test_run_leaves_no_unit(managed: Units) -> None:
    bundle = managed.sh("cat /proc/self/cgroup; exit 3")
    result = bundle.run()
    assert result.code == 3 and "0::/" in result.text
    bundle.gone()
    assert known_units(managed.unit(bundle)) == []


def test_a_container_that_was_killed_leaves_no_unit(managed: Units) -> None:
    bundle = managed.make().up()
    managed.ocirun("kill", bundle.id, "KILL").ok()
    bundle.becomes("stopped")
    bundle.delete(force=False).ok()
    bundle.gone()
    assert known_units(managed.unit(bundle)) == []


def test_a_container_that_ran_out_of_memory_leaves_no_unit(managed: Units) -> None:
    bundle = managed.make("dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1")
    bundle.linux["resources"] = {"memory": {"limit": 16 * MIB, "swap": 16 * MIB}}
    assert bundle.run().code == 137
    bundle.gone()
    assert known_units(managed.unit(bundle)) == []


def test_a_unit_that_systemd_stopped_is_a_stopped_container(managed: Units) -> None:
    bundle = managed.make().up()
    systemctl("kill", "--signal=KILL", managed.unit(bundle))
    bundle.becomes("stopped")
    bundle.delete(force=False).ok()
    bundle.gone()


def test_what_a_container_makes_below_its_cgroup_goes_with_it(managed: Units) -> None:
    bundle = managed.make().up()
    top = cgroup_of(bundle)
    (top / "inner/most").mkdir(parents=True)
    bundle.exec("sleep", "1000", flags=("--detach",)).ok()
    bundle.delete().ok()
    bundle.gone()
    assert not top.exists()


def test_a_create_that_fails_leaves_no_unit_and_its_id_works_again(managed: Units) -> None:
    bundle = managed.make()
    bundle.mount("/x", "bind", "/there/is/no/such/thing", "bind")
    bundle.create().failed("/there/is/no/such/thing")
    bundle.gone()
    assert known_units(managed.unit(bundle)) == []
    bundle.config["mounts"].pop()
    bundle.up()


@pytest.mark.parametrize("point", ["create.noted", "create.cloned", "cgroup.made", "cgroup.limited", "create.ready"])
def test_a_create_that_is_killed_is_deleted_by_force(managed: Units, point: str) -> None:
    bundle = managed.make()
    bundle.write()
    killed = managed.popen("create", "--bundle", str(bundle.path), bundle.id, env={"OCID_FAILPOINTS": f"{point}=kill"})
    assert killed.wait(SOON_S) == -9
    managed.ocirun("delete", "--force", bundle.id).ok()
    bundle.gone()
    assert known_units(managed.unit(bundle)) == []
    bundle.up()


def test_a_unit_of_somebody_else_is_not_touched(managed: Units) -> None:
    bundle = managed.make()
    unit = managed.unit(bundle)
    subprocess.run(
        ["systemd-run", "--quiet", "--scope", f"--unit={unit}", "--slice=other.slice", "sh", "-c", "sleep 1000 &"],
        check=True,
        timeout=SOON_S,
    )
    bundle.create().failed("already")
    assert shown(unit, "ActiveState", "Slice") == {"ActiveState": "active", "Slice": "other.slice"}
    systemctl("stop", unit, "other.slice")
    bundle.up()


def test_a_failed_unit_of_the_same_name_is_forgotten(managed: Units) -> None:
    bundle = managed.make()
    unit = managed.unit(bundle)
    subprocess.run(
        [
            *("systemd-run", "--quiet", "--scope", f"--unit={unit}", f"--slice={managed.cgroup}"),
            *("--property=TimeoutStopSec=1", "--property=RuntimeMaxSec=1", "sleep", "1000"),
        ],
        check=False,
        timeout=SOON_S,
    )
    eventually(lambda: shown(unit, "ActiveState")["ActiveState"] == "failed", what="the unit to fail")
    bundle.up()
    assert shown(unit, "ActiveState")["ActiveState"] == "active"


def test_a_stopped_bus_is_an_error_in_time_and_not_for_ever(managed: Units) -> None:
    """threats O36"""
    bundle = managed.make()
    dbus = int(shown("dbus.service", "MainPID")["MainPID"])
    subprocess.run(["kill", "-STOP", str(dbus)], check=True)
    try:
        bundle.create().failed("the system bus did not answer in time")
    finally:
        subprocess.run(["kill", "-CONT", str(dbus)], check=True)
    bundle.gone()
    bundle.up()
    assert known_units(managed.unit(bundle)) == [managed.unit(bundle)]


def test_without_a_bus_systemd_is_asked_itself(managed: Units) -> None:
    """threats O36"""
    bundle = managed.make()
    os.rename("/run/dbus/system_bus_socket", "/run/dbus/hidden")
    try:
        bundle.linux["resources"] = LIMITS
        bundle.up()
        _in_force(bundle, KERNEL)
        bundle.delete().ok()
        bundle.gone()
    finally:
        os.rename("/run/dbus/hidden", "/run/dbus/system_bus_socket")
    assert known_units(managed.unit(bundle)) == []


# ------------------------------------------------------------------------------------------------------- annotations


def test_annotations_may_bound_a_units_life(managed: Units) -> None:
    bundle = managed.make()
    bundle.config["annotations"] = {
        "org.systemd.property.TimeoutStopUSec": "uint64 7000000",
        "org.systemd.property.RuntimeMaxSec": "900",
        "org.systemd.property.Description": "'mine'",
        "org.systemd.property.After": "['a.service', 'b.service']",
    }
    bundle.up()
    told = shown(managed.unit(bundle), "TimeoutStopUSec", "RuntimeMaxUSec", "Description", "After")
    assert {"a.service", "b.service"} <= set(told.pop("After").split())
    assert told == {"TimeoutStopUSec": "7s", "RuntimeMaxUSec": "15min", "Description": "mine"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ExecStopPost", "[('/bin/sh', ['sh', '-c', 'id'], false)]"),
        ("MemoryMax", "uint64 18446744073709551615"),
        ("Slice", "'system.slice'"),
        ("Delegate", "false"),
        ("TimeoutStopUSec", "@t $(id)"),
        ("TimeoutStopUSec", "-1"),
        ("Description", "unquoted"),
        ("Description", "'%n'"),
        ("After", "['a', b]"),
    ],
)
def test_annotations_may_do_no_more(managed: Units, name: str, text: str) -> None:
    """threats S60"""
    bundle = managed.make()
    bundle.config["annotations"] = {f"org.systemd.property.{name}": text}
    bundle.create().failed(f"annotations.org.systemd.property.{name}")
    assert not (managed.root / bundle.id).exists()
    assert known_units(managed.unit(bundle)) == []


# -------------------------------------------------------------------------------------------------- living containers


def test_exec_pause_and_figures_are_those_of_the_scope(managed: Units) -> None:
    bundle = managed.make().up()
    bundle.exec("sleep", "1000", flags=("--detach",)).ok()
    assert len(value(bundle, "cgroup.procs").split()) == 2
    assert len(json.loads(managed.ocirun("ps", "--format", "json", bundle.id).ok())) == 2
    managed.ocirun("pause", bundle.id).ok()
    assert value(bundle, "cgroup.freeze") == "1" and bundle.status() == "paused"
    managed.ocirun("resume", bundle.id).ok()
    assert bundle.status() == "running"
    figures = json.loads(managed.ocirun("events", "--stats", bundle.id).ok())
    assert figures["data"]["pids"]["current"] == 2


def test_a_cgroup_namespace_begins_at_the_scope(managed: Units) -> None:
    bundle = managed.sh("cat /proc/self/cgroup")
    assert bundle.run().ok() == "0::/\n"


def test_the_host_is_told_where_the_container_is(managed: Units) -> None:
    bundle = managed.make().up()
    kept = json.loads(Path(managed.root, bundle.id, "state.json").read_text())
    assert kept["cgroup_paths"] == {"": str(CGROUPS / managed.cgroup / managed.unit(bundle))}
