"""linux.resources: what is read, what is refused by its path, and how an update merges."""

from __future__ import annotations

import pytest

from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.resources import (
    Blkio,
    Cpu,
    Cpuset,
    DeviceRule,
    DeviceValue,
    HugePages,
    Memory,
    Network,
    Pids,
    RdmaDevice,
    Resources,
    merge,
    parse,
)


def read(**resources: object) -> Resources:
    return parse(Fields(resources, "linux.resources"))


def test_everything_is_read() -> None:
    device = {"major": 8, "minor": 16}
    found = read(
        memory={
            "limit": 1 << 30,
            "reservation": 1 << 29,
            "swap": -1,
            "kernel": 5,
            "kernelTCP": 7,
            "swappiness": 0,
            "disableOOMKiller": True,
            "useHierarchy": True,
            "checkBeforeUpdate": True,
        },
        cpu={
            "shares": 512,
            "quota": -5,
            "period": 100000,
            "burst": 0,
            "realtimeRuntime": 1,
            "realtimePeriod": 2,
            "idle": 1,
            "cpus": "0-3,7,8-15:2/4",
            "mems": "0",
        },
        pids={"limit": -7},
        blockIO={
            "weight": 500,
            "leafWeight": 10,
            "weightDevice": [{**device, "weight": 100}, {**device, "leafWeight": 200}],
            "throttleReadBpsDevice": [{**device, "rate": 1}],
            "throttleWriteBpsDevice": [{**device, "rate": 2}],
            "throttleReadIOPSDevice": [{**device, "rate": 3}],
            "throttleWriteIOPSDevice": [{**device, "rate": 0}],
        },
        hugepageLimits=[{"pageSize": "2MB", "limit": 0}],
        devices=[{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "access": "wr"}],
        unified={"memory.high": "max", "io.max": "8:0 rbps=1\n8:16 rbps=2"},
        network={"classID": 0x100001, "priorities": [{"name": "eth0", "priority": 500}]},
        rdma={"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}},
    )
    assert found == Resources(
        memory=Memory(1 << 30, 1 << 29, -1, 7, 0, True, True, True),
        cpu=Cpu(512, -1, 100000, 0, 1, 2, 1),
        cpuset=Cpuset("0-3,7,8-15:2/4", "0"),
        pids=Pids(-1),
        blkio=Blkio(
            500,
            10,
            (DeviceValue(8, 16, 100),),
            (DeviceValue(8, 16, 200),),
            (DeviceValue(8, 16, 1),),
            (DeviceValue(8, 16, 2),),
            (DeviceValue(8, 16, 3),),
            (DeviceValue(8, 16, 0),),
        ),
        hugetlb=(HugePages("2MB", 0),),
        devices=(DeviceRule(False, "a", -1, -1, "rwm"), DeviceRule(True, "c", 1, -1, "rw")),
        unified=(("io.max", "8:0 rbps=1\n8:16 rbps=2"), ("memory.high", "max")),
        network=Network(0x100001, (("eth0", 500),)),
        rdma=(RdmaDevice("mlx5_1", 3, 10000),),
    )


def test_absent_null_and_zero_are_not_given() -> None:
    assert read() == Resources()
    assert read(memory=None, cpu=None, pids={}, network={}, rdma={}, blockIO={}, unified={}) == Resources()
    zeros = read(
        memory={"limit": 0, "swap": 0, "reservation": 0},
        cpu={"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""},
        blockIO={"weight": 0},
        network={"classID": 0, "priorities": []},
    )
    assert zeros == Resources()
    assert read(pids={"limit": 0}).pids == Pids(0)  # a limit since runtime-spec 1.3
    assert read().devices is None and read(devices=[]).devices == ()


@pytest.mark.parametrize(
    ("resources", "path"),
    [
        ({"memory": {"limit": "1G"}}, 'memory.limit: expected integer, got "1G"'),
        ({"memory": {"limit": -2}}, "memory.limit: expected integer from -1"),
        ({"memory": {"limit": 1 << 63}}, "memory.limit: expected integer"),
        ({"memory": {"limit": True}}, "memory.limit: expected integer, got true"),
        ({"memory": {"swappiness": 101}}, "memory.swappiness: expected integer from 0 to 100"),
        ({"memory": []}, "memory: expected object"),
        ({"cpu": {"idle": 2}}, "cpu.idle: expected integer from 0 to 1"),
        ({"cpu": {"shares": -1}}, "cpu.shares: expected integer"),
        ({"pids": {"limit": 1.5}}, "pids.limit: expected integer"),
        ({"blockIO": {"weight": 9}}, "blockIO.weight: expected integer from 10 to 1000"),
        ({"blockIO": {"weightDevice": [{"major": 8}]}}, r"blockIO.weightDevice\[0\].minor: is required"),
        ({"network": {"classID": -1}}, "network.classID: expected integer from 0"),
        ({"network": {"priorities": [{"priority": 1}]}}, r"network.priorities\[0\].name: is required"),
        ({"rdma": {"mlx": {}}}, "rdma.mlx: needs hcaHandles, hcaObjects or both"),
        ({"rdma": {"mlx": {"hcaHandles": -1}}}, "rdma.mlx.hcaHandles: expected integer from 0"),
        ({"devices": [{"type": "x"}]}, r"devices\[0\].type: expected one of"),
        ({"devices": [{"type": "c", "access": "rx"}]}, r"devices\[0\].access: expected letters"),
        ({"devices": [{"type": "c"}]}, r"devices\[0\].access: is required"),
        ({"devices": [{"allow": True, "major": 1}]}, r'devices\[0\].type: a rule for type "a"'),
        ({"devices": [{"allow": True, "access": "r"}]}, r'devices\[0\].type: a rule for type "a"'),
        ({"devices": [{"type": "c", "major": -2, "access": "r"}]}, r"devices\[0\].major: expected integer from -1"),
        ({"devices": [{"access": "rwm"}] * 5000}, "devices: 5000 entries"),
    ],
)
def test_what_is_wrong_is_named_by_path(resources: dict[str, object], path: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"^linux\.resources\." + path) as caught:
        read(**resources)
    assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize(
    "text", ["0-", "-1", "a", "0,,1", "0-3:2", "0:1/2", "0\n1", " 0", "0;1", "٣", "0-1-2", "1" * 5000]
)
def test_cpu_lists_hold_nothing_but_numbers(text: str) -> None:
    with pytest.raises(RuntimeFailure, match="linux.resources.cpu.cpus: expected a list"):
        read(cpu={"cpus": text})


@pytest.mark.parametrize(
    "size", ["../x", "2MB/../../x", "2MB/", "2mb", "MB", "-2MB", "02MB", "2 MB", "2TB", "٢MB", "1" * 11 + "MB"]
)
def test_s19_page_sizes_are_no_paths(size: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"hugepageLimits\[0\].pageSize: expected a size"):
        read(hugepageLimits=[{"pageSize": size, "limit": 1}])


@pytest.mark.parametrize(
    "key",
    [
        "../memory.max",
        "cgroup.procs",
        "cgroup.kill",
        "memory",
        "memory.",
        ".max",
        "memory..max",
        "memory.max/x",
        "/memory.max",
    ]
    + ["memory.max\n", "", "memory.mäx", "m" * 130 + ".x"],
)
def test_s19_unified_keys_are_files_of_controllers(key: str) -> None:
    with pytest.raises(RuntimeFailure, match="unified: .* is no controller's file"):
        read(unified={key: "1"})


@pytest.mark.parametrize("name", ["", "a b", "a/b", "eth0\n1 2", "ä", "e" * 65, "\x1b"])
def test_s19_names_of_interfaces_and_rdma_devices_are_words(name: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"network.priorities\[0\].name: (.* is no name of|is required)"):
        read(network={"priorities": [{"name": name, "priority": 1}]})
    with pytest.raises(RuntimeFailure, match="rdma: .* is no name of an RDMA device"):
        read(rdma={name: {"hcaHandles": 1}})


def test_unified_values_are_text() -> None:
    with pytest.raises(RuntimeFailure, match="unified: the value of memory.max is too long or holds control"):
        read(unified={"memory.max": "1\x1b"})
    with pytest.raises(RuntimeFailure, match="unified.memory.max: holds a NUL byte"):
        read(unified={"memory.max": "1\0"})
    with pytest.raises(RuntimeFailure, match="unified.memory.max: expected string"):
        read(unified={"memory.max": 1})


def test_merge_takes_what_is_given_and_keeps_the_rest() -> None:
    base = read(
        memory={"limit": 1000, "swap": 2000},
        cpu={"shares": 2, "cpus": "0"},
        pids={"limit": 5},
        blockIO={"weight": 10, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]},
        hugepageLimits=[{"pageSize": "2MB", "limit": 1}],
        devices=[{"allow": False}],
        unified={"memory.high": "1"},
        network={"classID": 4, "priorities": [{"name": "a", "priority": 1}]},
        rdma={"x": {"hcaHandles": 1}},
    )
    over = read(
        memory={"limit": 1500, "disableOOMKiller": False},
        cpu={"quota": 7, "mems": "0"},
        blockIO={
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}, {"major": 8, "minor": 1, "rate": 3}],
        },
        hugepageLimits=[{"pageSize": "2MB", "limit": 4}, {"pageSize": "1GB", "limit": 0}],
        unified={"memory.high": "2", "cpu.weight": "3"},
        network={"priorities": [{"name": "b", "priority": 2}]},
        rdma={"x": {"hcaHandles": 2}},
    )
    merged = merge(base, over)
    assert merged.memory == Memory(limit=1500, swap=2000, disable_oom_killer=False)
    assert merged.cpu == Cpu(shares=2, quota=7) and merged.cpuset == Cpuset("0", "0") and merged.pids == Pids(5)
    assert merged.blkio == Blkio(weight=10, read_bps=(DeviceValue(8, 0, 9), DeviceValue(8, 1, 3)))
    assert merged.hugetlb == (HugePages("2MB", 4), HugePages("1GB", 0))
    assert merged.devices == base.devices and merged.unified == (("cpu.weight", "3"), ("memory.high", "2"))
    assert merged.network == Network(4, (("a", 1), ("b", 2))) and merged.rdma == (RdmaDevice("x", 2),)
    assert merge(base, Resources()) == base == merge(Resources(), base)
    assert merge(base, Resources(devices=())).devices == ()
