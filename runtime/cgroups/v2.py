"""Limits in the words of cgroup v2: one pure function a controller, from Resources to writes in order.

Refuses to look at a file, and by name what v2 cannot do. See Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math

from runtime.cgroups.plan import Now, Write, above
from runtime.cgroups.v1 import cpuset, pids, rdma
from runtime.errors import RuntimeFailure

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.resources import Blkio, Cpu, HugePages, Memory, Resources

_DEFAULT_PERIOD = 100_000


def plan(resources: Resources, controller: str, now: Now) -> list[Write]:
    """The writes that `controller` needs. Raises RuntimeFailure for what v2 cannot do."""
    if controller == "memory":
        return memory(resources.memory, now)
    if controller == "cpu":
        return cpu(resources.cpu, now)
    if controller == "cpuset":
        return cpuset(resources.cpuset)  # the two files have the same names and values in both versions
    if controller == "pids":
        return pids(resources.pids)
    if controller == "blkio":
        return io(resources.blkio)
    if controller == "rdma":
        return rdma(resources.rdma)
    if controller == "net_cls" and resources.network.class_id is not None:
        raise _impossible("network.classID")
    if controller == "net_prio" and resources.network.priorities:
        raise _impossible("network.priorities")
    if controller in ("net_cls", "net_prio"):
        return []
    return hugetlb(resources.hugetlb)


def unified(items: tuple[tuple[str, str], ...]) -> list[Write]:
    """linux.resources.unified: v2's own files by name, a write(2) for each line as the kernel wants it."""
    return [Write(key, line, f"unified.{key}") for key, value in items for line in value.split("\n") if line.strip()]


def memory(want: Memory, now: Now) -> list[Write]:
    if want.disable_oom_killer:
        raise _impossible("memory.disableOOMKiller")
    if want.swappiness is not None:
        raise _impossible("memory.swappiness")  # v2 has one for the whole machine
    if want.use_hierarchy is False:
        raise _impossible("memory.useHierarchy")
    if want.kernel_tcp is not None:
        raise _impossible("memory.kernelTCP")
    writes = []
    swap = swap_only(want, now)
    if swap is not None:
        # No such file: no swap here, so "none" and "any amount" are the same.
        writes.append(Write("memory.swap.max", _limit(swap), "memory.swap", optional=swap <= 0))
    if want.limit is not None:
        writes.append(Write("memory.max", _limit(want.limit), "memory.limit"))
    if want.reservation is not None:
        writes.append(Write("memory.low", _limit(want.reservation), "memory.reservation"))
    return writes


def swap_only(want: Memory, now: Now) -> int | None:
    """The spec's swap is memory and swap together, v2's is swap alone; an update of it alone counts from the limit
    that is in force. Raises RuntimeFailure when the difference cannot be taken."""
    if want.limit == -1 and want.swap is None:
        return -1  # as v1 does it: unlimited memory is unlimited swap
    if want.swap is None or want.swap == -1 or want.limit == -1:
        return want.swap
    limit = now.memory_limit if want.limit is None else want.limit
    if limit is None or limit < 0:
        problem = "cannot be set without memory.limit on cgroup v2, where swap is counted alone"
    elif want.swap < limit:
        problem = f"{want.swap} is memory and swap together, so not less than the limit {limit}"
    else:
        return want.swap - limit
    raise RuntimeFailure(f"linux.resources.memory.swap: {problem}", code="invalid_argument")


def cpu(want: Cpu, now: Now) -> list[Write]:
    if want.realtime_runtime is not None or want.realtime_period is not None:
        raise _impossible("cpu.realtimeRuntime" if want.realtime_runtime is not None else "cpu.realtimePeriod")
    writes = []
    if want.idle == 0:
        writes.append(Write("cpu.idle", "0", "cpu.idle", optional=True))
    if want.shares is not None and want.idle != 1:
        # An idle group's weight is fixed: the kernel refuses a write to it.
        writes.append(Write("cpu.weight", str(shares_to_weight(want.shares)), "cpu.shares"))
    if want.idle == 1:
        writes.append(Write("cpu.idle", "1", "cpu.idle"))
    bandwidth = []
    if want.quota is not None or want.period is not None:
        quota = want.quota if want.quota is not None else now.cpu_quota
        period = want.period if want.period is not None else now.cpu_period
        text = f"{_limit(-1 if quota is None else quota)} {period or _DEFAULT_PERIOD}"
        bandwidth.append(Write("cpu.max", text, "cpu.quota" if want.quota is not None else "cpu.period"))
    if want.burst is not None:
        burst = Write("cpu.max.burst", str(want.burst), "cpu.burst", optional=want.burst == 0)
        old = now.cpu_quota
        shrinks = want.quota is not None and old is not None and above(want.quota) < above(old)
        bandwidth.insert(0 if shrinks else len(bandwidth), burst)
    return writes + bandwidth


def shares_to_weight(shares: int) -> int:
    """v1's 2..262144 (default 1024) as v2's 1..10000 (default 100): the quadratic in log2 that passes through all
    three points, which runc and crun agreed on so that 1024 stays the default and a small request keeps its weight."""
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    power = math.log2(shares)
    return math.ceil(10 ** ((power * power + 125 * power) / 612 - 7 / 34))


def weight_to_shares(weight: int) -> int:
    """The inverse of shares_to_weight: the largest shares that give at most `weight`."""
    low, high = 2, 262144
    while low < high:
        middle = (low + high + 1) // 2
        if shares_to_weight(middle) <= weight:
            low = middle
        else:
            high = middle - 1
    return low


def io(want: Blkio) -> list[Write]:
    if want.leaf_weight is not None or want.leaf_weight_devices:
        raise _impossible("blockIO.leafWeight")
    writes = []
    if want.weight is not None:
        field = "blockIO.weight"
        fallback = Write("io.weight", f"default {io_weight(want.weight)}", field)
        writes.append(Write("io.bfq.weight", str(want.weight), field, otherwise=fallback))
    for item in want.weight_devices:
        field, device = "blockIO.weightDevice", f"{item.major}:{item.minor}"
        fallback = Write("io.weight", f"{device} {io_weight(item.value)}", field)
        writes.append(Write("io.bfq.weight", f"{device} {item.value}", field, otherwise=fallback))
    for items, key, field in (
        (want.read_bps, "rbps", "blockIO.throttleReadBpsDevice"),
        (want.write_bps, "wbps", "blockIO.throttleWriteBpsDevice"),
        (want.read_iops, "riops", "blockIO.throttleReadIOPSDevice"),
        (want.write_iops, "wiops", "blockIO.throttleWriteIOPSDevice"),
    ):
        for item in items:
            # v1 lifts a rate with 0, v2 with "max" (and refuses 0).
            writes.append(Write("io.max", f"{item.major}:{item.minor} {key}={item.value or 'max'}", field))
    return writes


def io_weight(weight: int) -> int:
    """blkio's 10..1000 on io.weight's 1..10000, in a straight line."""
    return 1 + (weight - 10) * 9999 // 990


def hugetlb(want: tuple[HugePages, ...]) -> list[Write]:
    writes = []
    for item in want:
        writes.append(Write(f"hugetlb.{item.page_size}.max", str(item.limit), "hugepageLimits"))
        writes.append(Write(f"hugetlb.{item.page_size}.rsvd.max", str(item.limit), "hugepageLimits", optional=True))
    return writes


def _limit(value: int) -> str:
    return "max" if value < 0 else str(value)


def _impossible(field: str) -> RuntimeFailure:
    return RuntimeFailure(f"linux.resources.{field}: cgroup v2 has no such limit", code="invalid_argument")
