"""linux.resources of a container, as the cgroup filesystem and the container's own fate show it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.cgroups.hierarchy import detect
from tests.bundles import Bundle, Bundles, bundles
from tests.probes import interpreter, python
from tests.support import eventually, needs

MIB = 1 << 20


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox", "cgroup1")
    with bundles(tmp_path) as opened:
        yield opened


def controllers() -> set[str]:
    return {name for hierarchy in detect() for name in hierarchy.controllers}


v1_only = pytest.mark.skipif("memory" not in controllers(), reason="cgroup v1's files; v2's are tried in the VM lane")


def limited(home: Bundles, **resources: object) -> Bundle:
    """A running container with these resources."""
    one = home.make()
    one.linux["resources"] = resources
    return one.up()


def file(one: Bundle, name: str) -> str:
    """A cgroup file of the container, wherever it is."""
    found = [Path(top, name) for top in one.home.cgroups(one.id) if Path(top, name).exists()]
    assert found, f"no {name} in {one.home.cgroups(one.id)}"
    return found[0].read_text().strip()


def disk() -> tuple[int, int]:
    """A block device of this machine that can be throttled."""
    for name in sorted(os.listdir("/sys/block"), key=lambda name: (name.startswith(("loop", "zram")), name)):
        major, minor = Path("/sys/block", name, "dev").read_text().split(":")
        return int(major), int(minor)
    pytest.skip("this machine has no block device")


@v1_only
def test_memory(home: Bundles) -> None:
    one = limited(
        home,
        memory={
            "limit": 64 * MIB,
            "swap": 96 * MIB,
            "reservation": 32 * MIB,
            "kernelTCP": 16 * MIB,
            "swappiness": 10,
            "disableOOMKiller": True,
            "useHierarchy": True,
            "kernel": 50 * MIB,
        },
    )
    assert file(one, "memory.limit_in_bytes") == str(64 * MIB)
    assert file(one, "memory.memsw.limit_in_bytes") == str(96 * MIB)
    assert file(one, "memory.soft_limit_in_bytes") == str(32 * MIB)
    assert file(one, "memory.kmem.tcp.limit_in_bytes") == str(16 * MIB)
    assert file(one, "memory.swappiness") == "10"
    assert "oom_kill_disable 1" in file(one, "memory.oom_control")
    assert file(one, "memory.use_hierarchy") == "1"
    home.ocirun("update", "-r", "-", one.id, stdin=_given(home, {"memory": {"disableOOMKiller": False}})).ok()
    assert "oom_kill_disable 0" in file(one, "memory.oom_control")


def _given(home: Bundles, document: object) -> Any:
    """A file to be stdin."""
    path = home.directory / "stdin.json"
    path.write_text(json.dumps(document))
    return path.open("rb")


@v1_only
def test_unlimited_memory_is_unlimited_swap(home: Bundles) -> None:
    one = limited(home, memory={"limit": -1})
    assert int(file(one, "memory.limit_in_bytes")) > 1 << 60 < int(file(one, "memory.memsw.limit_in_bytes"))


@v1_only
def test_the_limit_holds(home: Bundles) -> None:
    one = interpreter(home.make())
    one.process["args"] = python("data = bytearray(256 << 20); print('had it')")
    one.linux["resources"] = {"memory": {"limit": 48 * MIB, "swap": 48 * MIB}}
    result = one.run()
    assert result.code == 137 and "had it" not in result.text


@v1_only
def test_cpu(home: Bundles) -> None:
    one = limited(
        home, cpu={"shares": 512, "quota": 50_000, "period": 100_000, "burst": 20_000, "cpus": "0", "mems": "0"}
    )
    assert file(one, "cpu.shares") == "512"
    assert (file(one, "cpu.cfs_quota_us"), file(one, "cpu.cfs_period_us")) == ("50000", "100000")
    assert file(one, "cpu.cfs_burst_us") == "20000"
    assert (file(one, "cpuset.cpus"), file(one, "cpuset.mems")) == ("0", "0")
    assert one.exec("grep", "Cpus_allowed_list", "/proc/self/status").ok().split() == ["Cpus_allowed_list:", "0"]
    idle = limited(home, cpu={"idle": 1})
    assert file(idle, "cpu.idle") == "1"


@v1_only
def test_o61_the_container_sees_all_cpus_whatever_its_caller_is_bound_to(home: Bundles) -> None:
    one = home.make("grep", "Cpus_allowed_list", "/proc/self/status")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        said = one.run().ok().split()[1]
    finally:
        os.sched_setaffinity(0, before)
    every = re.search(r"\d+-?\d*", Path("/sys/devices/system/cpu/online").read_text())
    assert every is not None and said == every.group()


@v1_only
@pytest.mark.parametrize(
    ("shares", "words"),
    [(1, "the minimum allowed cpu-shares is 2"), (300_000, "the maximum allowed cpu-shares is 262144")],
)
def test_shares_out_of_range(home: Bundles, shares: int, words: str) -> None:
    one = home.make()
    one.linux["resources"] = {"cpu": {"shares": shares}}
    one.run().failed(words)
    one.gone()


def test_pids(home: Bundles) -> None:
    one = limited(home, pids={"limit": 7})
    assert file(one, "pids.max") == "7"
    assert file(limited(home, pids={"limit": -1}), "pids.max") == "max"
    two = home.sh("for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; echo all")
    two.linux["resources"] = {"pids": {"limit": 4}}
    result = two.run()
    assert "can't fork" in result.error and "all" not in result.text


@v1_only
def test_block_io(home: Bundles) -> None:
    major, minor = disk()
    device = {"major": major, "minor": minor}
    one = limited(
        home,
        blockIO={
            "throttleReadBpsDevice": [{**device, "rate": 1 << 20}],
            "throttleWriteBpsDevice": [{**device, "rate": 2 << 20}],
            "throttleReadIOPSDevice": [{**device, "rate": 100}],
            "throttleWriteIOPSDevice": [{**device, "rate": 200}],
        },
    )
    for name, rate in (("read_bps", 1 << 20), ("write_bps", 2 << 20), ("read_iops", 100), ("write_iops", 200)):
        assert file(one, f"blkio.throttle.{name}_device") == f"{major}:{minor} {rate}"
    lifted = {"blockIO": {"throttleReadBpsDevice": [{**device, "rate": 0}]}}
    home.ocirun("update", "-r", "-", one.id, stdin=_given(home, lifted)).ok()
    assert file(one, "blkio.throttle.read_bps_device") == ""


@v1_only
def test_weights_belong_to_bfq(home: Bundles) -> None:
    one = limited(home, blockIO={"weight": 500})
    assert file(one, "blkio.bfq.weight").split("\n")[0] in ("500", "default 500")
    image = home.directory / "disk"
    image.write_bytes(bytes(4 * MIB))
    loop = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    path = Path("/sys/block", Path(loop.stdout.strip()).name)
    try:
        before = re.search(r"\[(.*)\]", (path / "queue/scheduler").read_text())
        if "bfq" not in (path / "queue/scheduler").read_text() or before is None:
            pytest.skip("this kernel has no bfq")
        major, minor = map(int, (path / "dev").read_text().split(":"))
        wanted = {"blockIO": {"weightDevice": [{"major": major, "minor": minor, "weight": 200}]}}
        refused = home.ocirun("update", "-r", "-", one.id, stdin=_given(home, wanted)).failed("blockIO.weightDevice")
        assert "bfq" in refused
        (path / "queue/scheduler").write_text("bfq")
        home.ocirun("update", "-r", "-", one.id, stdin=_given(home, wanted)).ok()
        assert f"{major}:{minor} 200" in file(one, "blkio.bfq.weight_device")
        (path / "queue/scheduler").write_text(before.group(1))
    finally:
        subprocess.run(["losetup", "--detach", loop.stdout.strip()], check=True)


def test_devices(home: Bundles) -> None:
    one = home.sh(
        "for d in null mine; do head -c 0 /dev/$d && echo $d; done\n"
        "mknod /tmp/x c 1 9 && head -c 0 /tmp/x && echo random"
    )
    one.process["capabilities"] = {
        kind: ["CAP_MKNOD", "CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")
    }
    one.linux["devices"] = [{"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}]
    for allow, said in ((False, ["null", "random"]), (True, ["null", "mine", "random"])):
        rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
        rules += [{"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"}] if allow else []
        one.linux["resources"] = {"devices": rules}
        (one.rootfs / "tmp/x").unlink(missing_ok=True)
        result = one.run()
        if allow and "No such device" in result.error:
            said = ["null", "random"]  # nothing drives it here: but it is not the cgroup that refuses
            assert "Operation not permitted" not in result.error
        assert result.text.split() == said, result


def test_huge_pages(home: Bundles) -> None:
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        pytest.skip("this machine has no huge pages of 2 MiB")
    one = limited(home, hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}])
    found = {
        path.name: path.read_text().strip()
        for top in home.cgroups(one.id)
        for path in Path(top).glob("hugetlb.2MB.*")
        if path.name.endswith(("max", "limit_in_bytes"))
    }
    assert set(found.values()) == {str(4 * MIB)} and len(found) == 2, found


@pytest.mark.parametrize(
    ("resources", "needed", "words"),
    [
        ({"network": {"classID": 1}}, "net_cls", "linux.resources.network.classID: this machine has no net_cls"),
        (
            {"network": {"priorities": [{"name": "lo", "priority": 1}]}},
            "net_prio",
            "linux.resources.network.priorities: this machine has no net_prio",
        ),
        ({"rdma": {"mlx": {"hcaHandles": 1}}}, "rdma", "linux.resources.rdma.mlx: this machine has no rdma"),
        ({"unified": {"memory.high": "1G"}}, "", "linux.resources.unified.memory.high: cgroup v1 has no such files"),
        ({"blockIO": {"leafWeight": 100}}, "", "linux.resources.blockIO.leafWeight: this kernel's cgroups have no"),
    ],
)
@v1_only
def test_what_this_machine_has_not_is_refused_by_its_path(
    home: Bundles, resources: dict[str, object], needed: str, words: str
) -> None:
    if needed in controllers():
        pytest.skip(f"this machine has {needed}")
    one = home.make()
    one.linux["resources"] = resources
    one.run().failed(words)
    one.gone()


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (
            {"hugepageLimits": [{"pageSize": "2MB/../../../x", "limit": 1}]},
            "hugepageLimits[0].pageSize: expected a size",
        ),
        (
            {"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]},
            "hugepageLimits: this kernel's cgroups have no hugetlb.3MB",
        ),
        ({"unified": {"../memory.max": "1"}}, "is no controller's file"),
        ({"unified": {"cgroup.procs": "1"}}, "is no controller's file"),
        ({"memory": {"limit": "64m"}}, "linux.resources.memory.limit: expected integer"),
        ({"memory": {"limit": 64 * MIB, "swap": MIB}}, "linux.resources.memory.swap"),
        ({"cpu": {"cpus": "0-9999"}}, "linux.resources.cpu.cpus"),
        ({"cpu": {"quota": 10}}, "linux.resources.cpu.quota"),
    ],
)
def test_s19_what_cannot_be_is_refused_before_anything_is_made(
    home: Bundles, resources: dict[str, object], words: str
) -> None:
    one = home.sh("echo ran > /tmp/ran")
    one.linux["resources"] = resources
    one.run().failed(words)
    assert not (one.rootfs / "tmp/ran").exists()
    one.gone()


@pytest.mark.parametrize("path", ["/../up", "/a/../../b", "..", "/a\nb", "/", "/" + "x" * 300])
def test_s19_cgroup_paths_stay_below_their_hierarchy(home: Bundles, path: str) -> None:
    before = _directories()
    one = home.make()
    one.linux["cgroupsPath"] = path
    one.run().failed("linux.cgroupsPath")
    assert _directories() - before == set()


def _directories() -> set[str]:
    tops = (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir())
    return {
        str(entry)
        for top in tops
        if not top.is_symlink()
        for entry in top.iterdir()
        if entry.name in ("up", "b", "x" * 300)
    }


def test_s60_annotations_change_no_limit(home: Bundles) -> None:
    names = ("memory.limit_in_bytes", "memory.max", "pids.max", "cpu.shares", "cpu.weight", "cpuset.cpus")

    def limits(one: Bundle) -> dict[str, str]:
        files = (Path(top, name) for top in home.cgroups(one.id) for name in names)
        return {path.name: path.read_text() for path in files if path.exists()}

    plain, loud = home.make(), home.make()
    for one in (plain, loud):
        one.linux["resources"] = {"memory": {"limit": 64 * MIB}, "pids": {"limit": 9}}
    loud.config["annotations"] = {
        "org.systemd.property.MemoryMax": "'infinity'",
        "run.oci.systemd.subgroup": "../../x",
        "run.oci.delegate-cgroup": "../../x",
        "org.criu.config": "/etc/shadow",
        "io.kubernetes.cri-o.UnifiedCgroup": "memory.max=max",
        "cpu-quota.crio.io": "disable",
    }
    before = limits(plain.up())
    assert before and before == limits(loud.up())
    inside = [one.exec("cat", "/proc/self/cgroup").ok().replace(one.id, "ID") for one in (plain, loud)]
    assert inside[0] == inside[1]


@v1_only
def test_o34_a_container_of_six_mebibytes_runs_and_takes_an_exec(home: Bundles) -> None:
    one = limited(home, memory={"limit": 6 * MIB, "swap": 6 * MIB})
    for _ in range(3):
        assert one.exec("echo", "here").ok() == "here\n"
    assert one.status() == "running"
    assert int(file(one, "memory.max_usage_in_bytes")) <= 6 * MIB
    assert re.search(r"^oom_kill 0$", file(one, "memory.oom_control"), re.M)


def test_a_memory_policy_is_the_processs_and_every_execs(home: Bundles) -> None:
    if not Path("/sys/devices/system/node").exists():
        pytest.skip("this kernel knows no NUMA nodes")
    one = home.make()
    one.linux["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    one.up()
    policies = {line.split()[1] for line in Path(f"/proc/{one.pid()}/numa_maps").read_text().splitlines()}
    assert policies == {"bind=static:0"}
    joined = {line.split()[1] for line in one.exec("cat", "/proc/self/numa_maps").ok().splitlines()}
    assert joined == {"bind=static:0"}
    assert {line.split()[1] for line in Path("/proc/self/numa_maps").read_text().splitlines()} == {"default"}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"mode": "MPOL_BIND", "nodes": "9999"}, "linux.memoryPolicy.nodes: expected a list of nodes"),
        ({"mode": "MPOL_SOME"}, "linux.memoryPolicy.mode: expected one of"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_NO"]}, "linux.memoryPolicy.flags[0]: expected one of"),
        ({}, "linux.memoryPolicy.mode: is required"),
        ({"mode": "MPOL_BIND"}, "linux.memoryPolicy: mode 0x2 nodes none: set_mempolicy"),
        ({"mode": "MPOL_DEFAULT", "nodes": "0"}, "linux.memoryPolicy: mode 0x0 nodes 0: set_mempolicy"),
    ],
)
def test_memory_policies_that_cannot_be(home: Bundles, policy: dict[str, object], words: str) -> None:
    one = home.make()
    one.linux["memoryPolicy"] = policy
    one.run().failed(words)
    one.gone()


def test_intel_rdt_where_there_is_none(home: Bundles) -> None:
    if "resctrl" in Path("/proc/self/mounts").read_text():
        pytest.skip("this machine has resctrl mounted")
    one = home.make()
    one.linux["intelRdt"] = {"closID": "gold", "memBwSchema": "MB:0=20"}
    one.run().failed("linux.intelRdt: intelRdt is specified in config, but Intel RDT is not supported or enabled")
    one.gone()
    one.linux["intelRdt"] = {"closID": "../gold"}
    one.run().failed("linux.intelRdt.closID")
    del one.linux["intelRdt"]
    one.up()
    for flag, words in (("--l3-cache-schema", "Intel RDT/CAT: l3 cache schema"), ("--mem-bw-schema", "Intel RDT/MBA")):
        home.ocirun("update", flag, "L3:0=f", one.id).failed(words)


def test_o35_the_cgroup_goes_although_processes_die_slowly(home: Bundles) -> None:
    one = home.sh("for i in $(seq 40); do sh -c 'sleep 1000 & sleep 1000' & done; sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    one.up()
    eventually(lambda: len(home.processes(one.id)) > 80, what="all to be there")
    one.delete().ok()
    one.gone()


@v1_only
def test_o62_an_exec_waits_for_no_disk(home: Bundles) -> None:
    """Whoever execs, and a writer that has used up all that it may write, share a cgroup of 1 MB/s: a probe waits for
    a disk like that as soon as anything on its way is synced."""
    one = home.make().up()
    number = home.root.stat().st_dev
    major, minor = _whole_disk(os.major(number), os.minor(number))
    slow = next(Path(top).parent / "slow" for top in home.cgroups(one.id) if Path(top, "blkio.reset_stats").exists())
    slow.mkdir()
    writer = None
    try:
        for name in ("read", "write"):
            (slow / f"blkio.throttle.{name}_bps_device").write_text(f"{major}:{minor} {1 << 20}")
        enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(slow)]
        target = home.directory / "written"
        command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", "count=200", "oflag=direct", "status=none"]
        writer = subprocess.Popen([*enter, *command])
        eventually(lambda: target.exists() and target.stat().st_size >= 2 << 20, what="the writer to be at its limit")
        took = []
        for index in range(9):
            pid_file = str(home.directory / f"pid{index}")
            began = time.monotonic()
            subprocess.run([*enter, *home.command("exec", "--pid-file", pid_file, one.id, "true")], check=True)
            took.append(time.monotonic() - began)
        assert writer.poll() is None, "the disk was not slow"
        began = time.monotonic()
        sync = ["dd", "if=/dev/zero", f"of={target}.synced", "bs=64k", "count=16", "conv=fsync", "status=none"]
        subprocess.run([*enter, *sync], check=True)
        assert sorted(took)[4] < (time.monotonic() - began) / 2, took  # whoever syncs waits for a second or more
    finally:
        if writer is not None:
            writer.kill()
            writer.wait()
        eventually(lambda: not (slow / "cgroup.procs").read_text(), what="the slow cgroup to be empty")
        slow.rmdir()


def _whole_disk(major: int, minor: int) -> tuple[int, int]:
    """The disk of a partition: throttles are for whole disks."""
    path = Path(f"/sys/dev/block/{major}:{minor}").resolve()
    if (path / "partition").exists():
        path = path.parent
    if not (path / "dev").exists():
        pytest.skip("the state is on no block device")
    whole, part = (path / "dev").read_text().split(":")
    return int(whole), int(part)
