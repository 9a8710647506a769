"""Limits in the words of cgroup v1: one pure function a controller, from Resources to writes in order.

Refuses to look at a file: what is in force comes in as `Now`. See Documentation/admin-guide/cgroup-v1/.
"""

from __future__ import annotations

from runtime.cgroups.plan import Now, Write, above
from runtime.errors import RuntimeFailure

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from runtime.resources import Blkio, Cpu, Cpuset, DeviceValue, HugePages, Memory, Pids, RdmaDevice, Resources


def plan(resources: Resources, controller: str, now: Now) -> list[Write]:
    """The writes that `controller` needs. Raises RuntimeFailure for what v1 cannot do."""
    if controller == "memory":
        return memory(resources.memory, now)
    if controller == "cpu":
        return cpu(resources.cpu, now)
    if controller == "cpuset":
        return cpuset(resources.cpuset)
    if controller == "pids":
        return pids(resources.pids)
    if controller == "blkio":
        return blkio(resources.blkio)
    if controller == "rdma":
        return rdma(resources.rdma)
    if controller == "net_cls":
        wanted = resources.network.class_id
        return [] if wanted is None else [Write("net_cls.classid", str(wanted), "network.classID")]
    if controller == "net_prio":
        pairs = resources.network.priorities
        return [Write("net_prio.ifpriomap", f"{name} {value}", "network.priorities") for name, value in pairs]
    return hugetlb(resources.hugetlb)


def memory(want: Memory, now: Now) -> list[Write]:
    """memory.limit_in_bytes may never pass memory.memsw.limit_in_bytes: a limit that grows past the old sum comes
    after it, any other before it."""
    swap, optional = want.swap, False
    if want.limit == -1 and swap is None:
        swap = -1  # unlimited memory under an old sum would be refused
    if swap == -1:
        optional = True  # no swap accounting in this kernel: nothing limits it
    if swap not in (None, -1) and want.limit is not None and above(want.limit) > above(swap or 0):
        raise RuntimeFailure(
            f"linux.resources.memory.swap: {swap} is memory and swap together, so not less than the limit {want.limit}",
            code="invalid_argument",
        )
    limits = []
    if want.use_hierarchy is not None:
        # Since 5.11 there is nothing else, and a kernel without the file has nothing else either.
        value = str(int(want.use_hierarchy))
        limits.append(Write("memory.use_hierarchy", value, "memory.useHierarchy", want.use_hierarchy))
    limits += _memory_limits(want, swap, optional, now)
    if want.reservation is not None:
        limits.append(Write("memory.soft_limit_in_bytes", str(want.reservation), "memory.reservation"))
    if want.kernel_tcp is not None:
        limits.append(Write("memory.kmem.tcp.limit_in_bytes", str(want.kernel_tcp), "memory.kernelTCP"))
    if want.disable_oom_killer is not None:
        value = str(int(want.disable_oom_killer))
        limits.append(Write("memory.oom_control", value, "memory.disableOOMKiller", not want.disable_oom_killer))
    if want.swappiness is not None:
        limits.append(Write("memory.swappiness", str(want.swappiness), "memory.swappiness"))
    return limits


def _memory_limits(want: Memory, swap: int | None, optional: bool, now: Now) -> list[Write]:
    limits = []
    if want.limit is not None:
        limits.append(Write("memory.limit_in_bytes", str(want.limit), "memory.limit"))
    if swap is not None:
        limits.append(Write("memory.memsw.limit_in_bytes", str(swap), "memory.swap", optional))
    old_sum = -1 if now.memory_swap is None else now.memory_swap
    if len(limits) == 2 and want.limit is not None and above(want.limit) > above(old_sum):
        limits.reverse()
    return limits


def cpu(want: Cpu, now: Now) -> list[Write]:
    """The kernel refuses a share above the parent's at every step: so the ratio of quota to period must not rise in
    between, which puts a growing period first and a shrinking one last."""
    writes = []
    if want.idle == 0:
        writes.append(Write("cpu.idle", "0", "cpu.idle", optional=True))
    if want.shares is not None:
        # The kernel would take the nearest that it can, and say nothing (MIN_SHARES, MAX_SHARES).
        if not 2 <= want.shares <= 262144:
            bound = "minimum allowed cpu-shares is 2" if want.shares < 2 else "maximum allowed cpu-shares is 262144"
            raise RuntimeFailure(f"linux.resources.cpu.shares: the {bound}", step="cgroup", code="invalid_argument")
        # Idle groups take no shares (EINVAL), so idle goes off before and on after this.
        writes.append(Write("cpu.shares", str(want.shares), "cpu.shares"))
    if want.idle == 1:
        writes.append(Write("cpu.idle", "1", "cpu.idle"))
    bandwidth = []
    if want.period is not None:
        bandwidth.append(Write("cpu.cfs_period_us", str(want.period), "cpu.period"))
    if want.quota is not None:
        bandwidth.append(Write("cpu.cfs_quota_us", str(want.quota), "cpu.quota"))
    if len(bandwidth) == 2 and want.period is not None and want.period < (now.cpu_period or 0):
        bandwidth.reverse()
    if want.burst is not None:
        burst = Write("cpu.cfs_burst_us", str(want.burst), "cpu.burst", optional=want.burst == 0)
        # burst <= quota at every step: first where the quota shrinks, last where it grows.
        old = now.cpu_quota
        shrinks = want.quota is not None and old is not None and above(want.quota) < above(old)
        bandwidth.insert(0 if shrinks else len(bandwidth), burst)
    writes += bandwidth
    if want.realtime_period is not None:
        writes.append(Write("cpu.rt_period_us", str(want.realtime_period), "cpu.realtimePeriod"))
    if want.realtime_runtime is not None:
        writes.append(Write("cpu.rt_runtime_us", str(want.realtime_runtime), "cpu.realtimeRuntime"))
    return writes


def cpuset(want: Cpuset) -> list[Write]:
    writes = []
    if want.cpus is not None:
        writes.append(Write("cpuset.cpus", want.cpus, "cpu.cpus"))
    if want.mems is not None:
        writes.append(Write("cpuset.mems", want.mems, "cpu.mems"))
    return writes


def pids(want: Pids) -> list[Write]:
    """0 is written as 1: the init is in already and nothing can fork in either case, and systemd takes no 0."""
    if want.limit is None:
        return []
    return [Write("pids.max", "max" if want.limit < 0 else str(max(want.limit, 1)), "pids.limit")]


def blkio(want: Blkio) -> list[Write]:
    """Weights belong to the scheduler: CFQ's files are gone since 5.0, BFQ's have taken their place."""
    writes = []
    if want.weight is not None:
        text = str(want.weight)
        writes.append(_either("blkio.weight", "blkio.bfq.weight", text, "blockIO.weight"))
    if want.leaf_weight is not None:
        writes.append(Write("blkio.leaf_weight", str(want.leaf_weight), "blockIO.leafWeight"))
    for item in want.weight_devices:
        writes.append(_either("blkio.weight_device", "blkio.bfq.weight_device", _keyed(item), "blockIO.weightDevice"))
    for item in want.leaf_weight_devices:
        writes.append(Write("blkio.leaf_weight_device", _keyed(item), "blockIO.weightDevice"))
    for items, file, field in (
        (want.read_bps, "blkio.throttle.read_bps_device", "blockIO.throttleReadBpsDevice"),
        (want.write_bps, "blkio.throttle.write_bps_device", "blockIO.throttleWriteBpsDevice"),
        (want.read_iops, "blkio.throttle.read_iops_device", "blockIO.throttleReadIOPSDevice"),
        (want.write_iops, "blkio.throttle.write_iops_device", "blockIO.throttleWriteIOPSDevice"),
    ):
        writes += [Write(file, _keyed(item), field) for item in items]
    return writes


def hugetlb(want: tuple[HugePages, ...]) -> list[Write]:
    writes = []
    for item in want:
        text = str(item.limit)
        writes.append(Write(f"hugetlb.{item.page_size}.limit_in_bytes", text, "hugepageLimits"))
        # Reservations fail with ENOMEM instead of SIGBUS later (5.7).
        writes.append(Write(f"hugetlb.{item.page_size}.rsvd.limit_in_bytes", text, "hugepageLimits", optional=True))
    return writes


def rdma(want: tuple[RdmaDevice, ...]) -> list[Write]:
    """The file is the same in both versions."""
    writes = []
    for item in want:
        limits = (("hca_handle", item.handles), ("hca_object", item.objects))
        text = " ".join(f"{key}={value}" for key, value in limits if value is not None)
        writes.append(Write("rdma.max", f"{item.name} {text}", f"rdma.{item.name}"))
    return writes


def _keyed(item: DeviceValue) -> str:
    return f"{item.major}:{item.minor} {item.value}"


def _either(file: str, other: str, value: str, field: str) -> Write:
    return Write(file, value, field, otherwise=Write(other, value, field))
