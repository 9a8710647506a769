"""Resources as writes: v1's and v2's words for the same wish, and the order in which the kernel takes them."""

from __future__ import annotations

import pytest

from runtime.cgroups import v1, v2
from runtime.cgroups.plan import CONTROLLERS, Now
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.resources import parse

GIB = 1 << 30


def plan(version: int, controller: str, now: Now | None = None, **resources: object) -> list[str]:
    """What is written, as file=value; "?" marks what may be missing, "|" the other name."""
    planner = v1 if version == 1 else v2
    writes = planner.plan(parse(Fields(resources, "linux.resources")), controller, now or Now())
    return [
        f"{write.file}={write.value}{'?' * write.optional}"
        + (f"|{write.otherwise.file}={write.otherwise.value}" if write.otherwise else "")
        for write in writes
    ]


def test_nothing_asked_is_nothing_written() -> None:
    for version in (1, 2):
        assert [plan(version, controller) for controller in CONTROLLERS] == [[]] * len(CONTROLLERS)


def test_v1_memory_in_the_order_that_keeps_limit_below_sum() -> None:
    grown = {"limit": 2 * GIB, "swap": 3 * GIB}
    limit, both = f"memory.limit_in_bytes={2 * GIB}", f"memory.memsw.limit_in_bytes={3 * GIB}"
    assert plan(1, "memory", memory=grown) == [limit, both]  # fresh: the sum is unlimited
    assert plan(1, "memory", Now(GIB, GIB), memory=grown) == [both, limit]
    assert plan(1, "memory", Now(4 * GIB, 4 * GIB), memory=grown) == [limit, both]
    assert plan(1, "memory", Now(GIB, -1), memory=grown) == [limit, both]
    unlimited = ["memory.memsw.limit_in_bytes=-1?", "memory.limit_in_bytes=-1"]
    assert plan(1, "memory", Now(GIB, GIB), memory={"limit": -1, "swap": -1}) == unlimited
    assert plan(1, "memory", Now(GIB, GIB), memory={"limit": -1}) == unlimited


def test_v1_memory_the_rest() -> None:
    wish = {"reservation": 5, "kernel": 6, "kernelTCP": 7, "disableOOMKiller": True, "swappiness": 60}
    assert plan(1, "memory", memory=wish) == [
        "memory.soft_limit_in_bytes=5",
        "memory.kmem.tcp.limit_in_bytes=7",
        "memory.oom_control=1",
        "memory.swappiness=60",
    ]
    assert plan(1, "memory", memory={"disableOOMKiller": False}) == ["memory.oom_control=0?"]


def test_v2_memory_counts_swap_alone() -> None:
    assert plan(2, "memory", memory={"limit": 2 * GIB, "swap": 3 * GIB, "reservation": 9}) == [
        f"memory.swap.max={GIB}",
        f"memory.max={2 * GIB}",
        "memory.low=9",
    ]
    assert plan(2, "memory", memory={"limit": GIB, "swap": GIB}) == ["memory.swap.max=0?", f"memory.max={GIB}"]
    assert plan(2, "memory", memory={"limit": GIB, "swap": -1}) == ["memory.swap.max=max?", f"memory.max={GIB}"]
    assert plan(2, "memory", memory={"limit": -1}) == ["memory.swap.max=max?", "memory.max=max"]
    assert plan(2, "memory", memory={"limit": -1, "swap": 7}) == ["memory.swap.max=7", "memory.max=max"]
    assert plan(2, "memory", memory={"limit": GIB}) == [f"memory.max={GIB}"]


@pytest.mark.parametrize("version", [1, 2])
def test_swap_below_the_limit_is_refused(version: int) -> None:
    with pytest.raises(RuntimeFailure, match="linux.resources.memory.swap: 9 is memory and swap together"):
        plan(version, "memory", memory={"limit": 10, "swap": 9})
    if version == 2:
        with pytest.raises(RuntimeFailure, match="linux.resources.memory.swap: cannot be set without memory.limit"):
            plan(2, "memory", memory={"swap": 9})


def test_v2_refuses_by_name_what_it_has_not() -> None:
    for controller, section, field, value in (
        ("memory", "memory", "disableOOMKiller", True),
        ("memory", "memory", "kernelTCP", 5),
        ("memory", "memory", "swappiness", 1),
        ("cpu", "cpu", "realtimeRuntime", 5),
        ("cpu", "cpu", "realtimePeriod", 5),
        ("blkio", "blockIO", "leafWeight", 50),
        ("net_cls", "network", "classID", 5),
        ("net_prio", "network", "priorities", [{"name": "eth0", "priority": 1}]),
        ("memory", "memory", "useHierarchy", False),
    ):
        with pytest.raises(RuntimeFailure, match=f"linux.resources.{section}.{field}: cgroup v2 has no such limit"):
            plan(2, controller, **{section: {field: value}})
    assert plan(2, "memory", memory={"disableOOMKiller": False}) == []


def test_v1_cpu_bandwidth_never_passes_the_larger_share_on_the_way() -> None:
    wish = {"quota": 50_000, "period": 100_000}
    quota, period = "cpu.cfs_quota_us=50000", "cpu.cfs_period_us=100000"
    assert plan(1, "cpu", cpu=wish) == [period, quota]
    assert plan(1, "cpu", Now(cpu_quota=10_000, cpu_period=50_000), cpu=wish) == [period, quota]
    assert plan(1, "cpu", Now(cpu_quota=90_000, cpu_period=200_000), cpu=wish) == [quota, period]


def test_burst_stays_within_the_quota_on_the_way() -> None:
    wish = {"quota": 50_000, "burst": 20_000}
    quota, burst = "cpu.cfs_quota_us=50000", "cpu.cfs_burst_us=20000"
    assert plan(1, "cpu", cpu=wish) == [quota, burst]
    assert plan(1, "cpu", Now(cpu_quota=10_000), cpu=wish) == [quota, burst]
    assert plan(1, "cpu", Now(cpu_quota=90_000), cpu=wish) == [burst, quota]
    assert plan(1, "cpu", Now(cpu_quota=-1), cpu=wish) == [burst, quota]
    assert plan(2, "cpu", Now(cpu_quota=90_000), cpu=wish) == ["cpu.max.burst=20000", "cpu.max=50000 100000"]
    assert plan(1, "cpu", cpu={"burst": 0}) == ["cpu.cfs_burst_us=0?"]


def test_idle_goes_off_before_shares_and_on_after() -> None:
    assert plan(1, "cpu", cpu={"shares": 5, "idle": 0}) == ["cpu.idle=0?", "cpu.shares=5"]
    assert plan(1, "cpu", cpu={"shares": 5, "idle": 1}) == ["cpu.shares=5", "cpu.idle=1"]
    assert plan(2, "cpu", cpu={"shares": 1024, "idle": 0}) == ["cpu.idle=0?", "cpu.weight=100"]
    assert plan(2, "cpu", cpu={"shares": 1024, "idle": 1}) == ["cpu.idle=1"]


def test_v1_realtime() -> None:
    assert plan(1, "cpu", cpu={"realtimeRuntime": 5, "realtimePeriod": 9}) == [
        "cpu.rt_period_us=9",
        "cpu.rt_runtime_us=5",
    ]


def test_v1_shares_that_the_kernel_would_bend_are_refused() -> None:
    assert plan(1, "cpu", cpu={"shares": 2}) == ["cpu.shares=2"]
    for shares, words in ((1, "the minimum allowed cpu-shares is 2"), (262145, "the maximum allowed cpu-shares is")):
        with pytest.raises(RuntimeFailure, match=f"linux.resources.cpu.shares: {words}"):
            plan(1, "cpu", cpu={"shares": shares})


def test_v1_hierarchy() -> None:
    assert plan(1, "memory", memory={"useHierarchy": True}) == ["memory.use_hierarchy=1?"]
    assert plan(1, "memory", memory={"useHierarchy": False}) == ["memory.use_hierarchy=0"]
    assert plan(2, "memory", memory={"useHierarchy": True}) == []


def test_network_and_rdma() -> None:
    priorities = [{"name": "lo", "priority": 0}, {"name": "eth0.7", "priority": 5}]
    assert plan(1, "net_cls", network={"classID": 0x100001}) == ["net_cls.classid=1048577"]
    assert plan(1, "net_prio", network={"priorities": priorities}) == [
        "net_prio.ifpriomap=lo 0",
        "net_prio.ifpriomap=eth0.7 5",
    ]
    devices = {"mlx5_1": {"hcaHandles": 2, "hcaObjects": 0}, "mlx4_0": {"hcaObjects": 10}}
    for version in (1, 2):
        assert plan(version, "rdma", rdma=devices) == [
            "rdma.max=mlx5_1 hca_handle=2 hca_object=0",
            "rdma.max=mlx4_0 hca_object=10",
        ]


def test_v2_cpu_max_keeps_the_half_that_is_not_given() -> None:
    assert plan(2, "cpu", cpu={"quota": 5000}) == ["cpu.max=5000 100000"]
    assert plan(2, "cpu", cpu={"quota": -1}) == ["cpu.max=max 100000"]
    assert plan(2, "cpu", Now(cpu_quota=7000, cpu_period=9000), cpu={"period": 8000}) == ["cpu.max=7000 8000"]
    assert plan(2, "cpu", Now(cpu_quota=7000, cpu_period=9000), cpu={"quota": 6000}) == ["cpu.max=6000 9000"]


@pytest.mark.parametrize(
    ("shares", "weight"), [(1, 1), (2, 1), (102, 17), (1024, 100), (2048, 174), (262144, 10000), (1 << 62, 10000)]
)
def test_shares_become_weight(shares: int, weight: int) -> None:
    assert v2.shares_to_weight(shares) == weight


def test_weight_grows_with_shares_and_comes_back() -> None:
    weights = [v2.shares_to_weight(shares) for shares in range(2, 262145, 97)]
    assert weights == sorted(weights) and weights[0] >= 1 and weights[-1] <= 10000
    for weight in (1, 2, 17, 100, 101, 5000, 9999, 10000):
        assert v2.shares_to_weight(v2.weight_to_shares(weight)) <= weight
    assert v2.weight_to_shares(100) == 1024 or v2.shares_to_weight(1024) == 100


@pytest.mark.parametrize("version", [1, 2])
def test_cpuset_and_pids_are_the_same_in_both(version: int) -> None:
    assert plan(version, "cpuset", cpu={"cpus": "0-1", "mems": "0"}) == ["cpuset.cpus=0-1", "cpuset.mems=0"]
    assert plan(version, "pids", pids={"limit": 7}) == ["pids.max=7"]
    assert plan(version, "pids", pids={"limit": -1}) == ["pids.max=max"]
    assert plan(version, "pids", pids={"limit": 0}) == ["pids.max=1"]


def test_block_io() -> None:
    device = {"major": 8, "minor": 16}
    wish = {
        "weight": 500,
        "weightDevice": [{**device, "weight": 1000}],
        "throttleReadBpsDevice": [{**device, "rate": 1}],
        "throttleWriteBpsDevice": [{**device, "rate": 2}],
        "throttleReadIOPSDevice": [{**device, "rate": 3}],
        "throttleWriteIOPSDevice": [{**device, "rate": 0}],
    }
    assert plan(1, "blkio", blockIO=wish) == [
        "blkio.weight=500|blkio.bfq.weight=500",
        "blkio.weight_device=8:16 1000|blkio.bfq.weight_device=8:16 1000",
        "blkio.throttle.read_bps_device=8:16 1",
        "blkio.throttle.write_bps_device=8:16 2",
        "blkio.throttle.read_iops_device=8:16 3",
        "blkio.throttle.write_iops_device=8:16 0",
    ]
    assert plan(2, "blkio", blockIO=wish) == [
        "io.bfq.weight=500|io.weight=default 4950",
        "io.bfq.weight=8:16 1000|io.weight=8:16 10000",
        "io.max=8:16 rbps=1",
        "io.max=8:16 wbps=2",
        "io.max=8:16 riops=3",
        "io.max=8:16 wiops=max",
    ]
    assert plan(1, "blkio", blockIO={"leafWeight": 20}) == ["blkio.leaf_weight=20"]
    assert (v2.io_weight(10), v2.io_weight(1000)) == (1, 10000)


def test_huge_pages() -> None:
    wish = [{"pageSize": "2MB", "limit": 4 << 20}]
    assert plan(1, "hugetlb", hugepageLimits=wish) == [
        "hugetlb.2MB.limit_in_bytes=4194304",
        "hugetlb.2MB.rsvd.limit_in_bytes=4194304?",
    ]
    assert plan(2, "hugetlb", hugepageLimits=wish) == ["hugetlb.2MB.max=4194304", "hugetlb.2MB.rsvd.max=4194304?"]


def test_unified_is_a_write_a_line() -> None:
    writes = v2.unified((("io.max", "8:0 rbps=1\n\n8:16 rbps=2\n"), ("memory.high", "max")))
    assert [(write.file, write.value) for write in writes] == [
        ("io.max", "8:0 rbps=1"),
        ("io.max", "8:16 rbps=2"),
        ("memory.high", "max"),
    ]
    assert writes[0].describe() == "unified.io.max: write '8:0 rbps=1' to io.max"
