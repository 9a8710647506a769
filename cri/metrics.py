"""cAdvisor's metrics of pods and containers, as ListPodSandboxMetrics carries them to a kubelet's /metrics/cadvisor.

One table says all: name, help, kind, labels of its own, and where the values are. Refuses to make up a sample: what is
not known has none. Invariant: every sample has the labels of its descriptor, in its order. Values are whole numbers on
this wire, so seconds are whole seconds, as with the peers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from cri.api import api_pb2 as pb
from cri.interfaces import InterfaceCounters
from cri.processes import Processes
from cri.records import Container, Pod
from cri.task_states import TaskStates
from runtime.cgroups.hierarchy import detect
from runtime.cgroups.stats import Pressure, Stats, page_sizes
from runtime.linux.dataclass import dataclass

# What Prometheus rules of Kubernetes select by; a pod's own samples have no container, as cAdvisor's have none.
BASE_LABELS = ("container", "id", "image", "name", "namespace", "pod")
_SECOND_NS, _SECOND_US = 1_000_000_000, 1_000_000

Sample = tuple[tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the samples of one container or pod are made of."""

    stats: Stats
    started_ns: int = 0
    limits: pb.LinuxContainerResources | None = None
    layer: pb.FilesystemUsage | None = None
    processes: Processes | None = None
    interfaces: tuple[InterfaceCounters, ...] = ()
    disk: os.statvfs_result | None = None
    tasks: TaskStates | None = None


def _now(_: Facts) -> int:
    """What is read on the call has no time, as the CRI wants it."""
    return 0


def _when_measured(facts: Facts) -> int:
    return facts.layer.timestamp if facts.layer is not None else 0


def _when_seen(facts: Facts) -> int:
    return facts.tasks.timestamp_ns if facts.tasks is not None else 0


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `samples` yields the values of its own labels, and a number; `at` tells what time they are of, and
    `there` whether this machine can have any: what is described has to come, too (critest)."""

    name: str
    help: str
    kind: pb.MetricType
    samples: Callable[[Facts], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    at: Callable[[Facts], int] = _now
    there: Callable[[], bool] = lambda: True


def _one(value: Callable[[Facts], int | None]) -> Callable[[Facts], Iterable[Sample]]:
    def samples(facts: Facts) -> Iterator[Sample]:
        found = value(facts)
        if found is not None and found >= 0:
            yield (), found

    return samples


def _stat(field: str, divisor: int = 1) -> Callable[[Facts], Iterable[Sample]]:
    return _one(lambda facts: int(getattr(facts.stats, field)) // divisor)


def _of_quota(field: str, divisor: int = 1) -> Callable[[Facts], Iterable[Sample]]:
    """Of a CPU quota: without one the kernel counts no periods, and cAdvisor has no sample."""

    def value(facts: Facts) -> int | None:
        has_quota = facts.stats.periods or (facts.limits is not None and facts.limits.cpu_quota > 0)
        return int(getattr(facts.stats, field)) // divisor if has_quota else None

    return _one(value)


def _limited(field: str) -> Callable[[Facts], Iterable[Sample]]:
    """A limit in force, 0 for none, which is cAdvisor's word for it."""
    return _one(lambda facts: max(0, int(getattr(facts.stats, field))))


def _stalled(field: str, which: str) -> Callable[[Facts], Iterable[Sample]]:
    def value(facts: Facts) -> int | None:
        pressure: Pressure | None = getattr(facts.stats, field)
        stall = getattr(pressure, which) if pressure is not None else None
        return stall.total_us // _SECOND_US if stall is not None else None

    return _one(value)


def _limit(field: str) -> Callable[[Facts], Iterable[Sample]]:
    return _one(lambda facts: int(getattr(facts.limits, field)) or None if facts.limits is not None else None)


def _device(field: str, divisor: int = 1) -> Callable[[Facts], Iterable[Sample]]:
    """Of each block device for which the kernel keeps that figure."""

    def samples(facts: Facts) -> Iterator[Sample]:
        for io in facts.stats.io:
            value: int | None = getattr(io, field)
            if value is not None:
                yield (f"{io.major}:{io.minor}",), value // divisor

    return samples


def _transferred(facts: Facts) -> Iterator[Sample]:
    for io in facts.stats.io:
        device = (f"{io.major}:{io.minor}", str(io.major), str(io.minor))
        yield (*device, "Read"), io.read_bytes
        yield (*device, "Write"), io.write_bytes


def _carried(field: str) -> Callable[[Facts], Iterable[Sample]]:
    return lambda facts: (((one.name,), getattr(one, field)) for one in facts.interfaces)


def _faults(facts: Facts) -> Iterator[Sample]:
    yield ("pgfault", "hierarchy"), facts.stats.page_faults
    yield ("pgmajfault", "hierarchy"), facts.stats.major_page_faults


def _huge_pages(field: str) -> Callable[[Facts], Iterable[Sample]]:
    def samples(facts: Facts) -> Iterator[Sample]:
        for pages in facts.stats.huge_pages:
            value: int | None = getattr(pages, field)
            if value is not None:
                yield (pages.size,), value

    return samples


def _layer(field: str) -> Callable[[Facts], Iterable[Sample]]:
    def samples(facts: Facts) -> Iterator[Sample]:
        if facts.layer is not None:
            yield (facts.layer.fs_id.mountpoint,), getattr(facts.layer, field).value

    return samples


def _held(field: str) -> Callable[[Facts], Iterable[Sample]]:
    return _one(lambda facts: getattr(facts.processes, field) if facts.processes is not None else None)


def _open_files(facts: Facts) -> Iterator[Sample]:
    if facts.processes is not None and facts.processes.open_files is not None:
        yield ("max_open_files",), facts.processes.open_files


def _disk(value: Callable[[os.statvfs_result], int]) -> Callable[[Facts], Iterable[Sample]]:
    """Of the filesystem that the writable layer is on."""

    def samples(facts: Facts) -> Iterator[Sample]:
        if facts.disk is not None and facts.layer is not None:
            yield (facts.layer.fs_id.mountpoint,), value(facts.disk)

    return samples


def _states(facts: Facts) -> Iterator[Sample]:
    for state, number in facts.tasks.states.items() if facts.tasks is not None else ():
        yield (state,), number


def _load(field: str) -> Callable[[Facts], Iterable[Sample]]:
    """Thousandths, as cAdvisor has them."""
    return _one(lambda facts: round(1000 * getattr(facts.tasks, field)) if facts.tasks is not None else None)


def _has_scheduler_figures() -> bool:
    """Whether an I/O scheduler counts for cgroups: see runtime.cgroups.stats.DeviceIo."""
    mounts = [place.mount for place in detect() if "blkio" in place.controllers]
    return any(os.path.exists(f"{mount}/blkio.{kind}io_merged_recursive") for mount in mounts for kind in ("bfq.", ""))


def _has_huge_pages() -> bool:
    return _has_huge_page_peaks() or (bool(page_sizes()) and _v2_alone_has("hugetlb"))


def _v2_alone_has(controller: str) -> bool:
    """Beside v1, v2's figures are not read."""
    first, *others = detect()
    if others or first.version == 1:
        return False
    with open(f"{first.mount}/cgroup.controllers", encoding="ascii") as file:
        return controller in file.read().split()


def _has_huge_page_peaks() -> bool:
    """v1 alone counts the most that there was."""
    return bool(page_sizes()) and any("hugetlb" in place.controllers for place in detect())


def _cpu_total(facts: Facts) -> Iterator[Sample]:
    yield ("total",), facts.stats.cpu_usage_ns // _SECOND_NS


C, G = pb.COUNTER, pb.GAUGE
FAMILIES: tuple[Family, ...] = (
    Family("container_cpu_usage_seconds_total", "CPU time consumed", C, _cpu_total, ("cpu",)),
    Family("container_cpu_user_seconds_total", "CPU time in user mode", C, _stat("cpu_user_ns", _SECOND_NS)),
    Family("container_cpu_system_seconds_total", "CPU time in the kernel", C, _stat("cpu_system_ns", _SECOND_NS)),
    Family("container_cpu_cfs_periods_total", "Enforcement periods elapsed", C, _of_quota("periods")),
    Family("container_cpu_cfs_throttled_periods_total", "Periods throttled", C, _of_quota("throttled_periods")),
    Family("container_cpu_cfs_throttled_seconds_total", "Time throttled", C, _of_quota("throttled_ns", _SECOND_NS)),
    Family("container_memory_usage_bytes", "Memory in use, whenever it was accessed", G, _stat("memory_usage")),
    Family("container_memory_working_set_bytes", "Memory that cannot go at once", G, _stat("memory_working_set")),
    Family("container_memory_max_usage_bytes", "Most memory ever in use", G, _stat("memory_peak")),
    Family("container_memory_rss", "Anonymous memory in bytes", G, _stat("memory_rss")),
    Family("container_memory_cache", "Page cache in bytes", G, _stat("memory_cache")),
    Family("container_memory_kernel_usage", "Memory of the kernel in bytes", G, _stat("memory_kernel")),
    Family("container_memory_failcnt", "How often the limit was met", C, _stat("memory_limit_hits")),
    Family("container_memory_total_active_file_bytes", "Page cache in use", G, _stat("memory_active_file")),
    Family("container_memory_total_inactive_file_bytes", "Page cache to go first", G, _stat("memory_inactive_file")),
    Family("container_memory_mapped_file", "Memory mapped files in bytes", G, _stat("memory_mapped_file")),
    Family("container_memory_swap", "Swap in use in bytes", G, _stat("swap_usage")),
    Family("container_memory_failures_total", "Page faults", C, _faults, ("failure_type", "scope")),
    Family(
        "container_hugetlb_usage_bytes",
        "Huge pages in use",
        G,
        _huge_pages("usage"),
        ("pagesize",),
        there=_has_huge_pages,
    ),
    Family(
        "container_hugetlb_max_usage_bytes",
        "Most huge pages ever in use",
        G,
        _huge_pages("peak"),
        ("pagesize",),
        there=_has_huge_page_peaks,
    ),
    Family("container_oom_events_total", "Processes killed for want of memory", C, _stat("oom_kills")),
    Family("container_pressure_cpu_waiting_seconds_total", "Some waited for CPU", C, _stalled("cpu_pressure", "some")),
    Family("container_pressure_cpu_stalled_seconds_total", "All waited for CPU", C, _stalled("cpu_pressure", "full")),
    Family(
        "container_pressure_memory_waiting_seconds_total",
        "Some waited for memory",
        C,
        _stalled("memory_pressure", "some"),
    ),
    Family(
        "container_pressure_memory_stalled_seconds_total",
        "All waited for memory",
        C,
        _stalled("memory_pressure", "full"),
    ),
    Family("container_pressure_io_waiting_seconds_total", "Some waited for IO", C, _stalled("io_pressure", "some")),
    Family("container_pressure_io_stalled_seconds_total", "All waited for IO", C, _stalled("io_pressure", "full")),
    Family(
        "container_blkio_device_usage_total",
        "Bytes carried to and from block devices",
        C,
        _transferred,
        ("device", "major", "minor", "operation"),
    ),
    Family(
        "container_fs_usage_bytes", "Bytes of the writable layer", G, _layer("used_bytes"), ("device",), _when_measured
    ),
    Family("container_fs_reads_total", "Reads completed", C, _device("reads"), ("device",)),
    Family("container_fs_reads_bytes_total", "Bytes read", C, _device("read_bytes"), ("device",)),
    Family("container_fs_writes_total", "Writes completed", C, _device("writes"), ("device",)),
    Family("container_fs_writes_bytes_total", "Bytes written", C, _device("write_bytes"), ("device",)),
    *(
        Family(f"container_fs_{name}", text, kind, _device(field, divisor), ("device",), there=_has_scheduler_figures)
        for name, field, divisor, kind, text in (
            ("reads_merged_total", "reads_merged", 1, C, "Reads merged with others"),
            ("writes_merged_total", "writes_merged", 1, C, "Writes merged with others"),
            ("read_seconds_total", "read_ns", _SECOND_NS, C, "Time from a read's dispatch to its end"),
            ("write_seconds_total", "write_ns", _SECOND_NS, C, "Time from a write's dispatch to its end"),
            ("io_current", "queued", 1, G, "Reads and writes under way"),
        )
    ),
    Family("container_fs_inodes_total", "Inodes of its filesystem", G, _disk(lambda disk: disk.f_files), ("device",)),
    Family("container_fs_inodes_free", "Inodes free there", G, _disk(lambda disk: disk.f_ffree), ("device",)),
    Family(
        "container_fs_limit_bytes",
        "Size of its filesystem",
        G,
        _disk(lambda disk: disk.f_blocks * disk.f_frsize),
        ("device",),
    ),
    Family("container_processes", "Processes running", G, _held("count")),
    Family("container_file_descriptors", "Descriptors that are open", G, _held("files")),
    Family("container_sockets", "Sockets that are open", G, _held("sockets")),
    Family("container_ulimits_soft", "Soft limits of its first process", G, _open_files, ("ulimit",)),
    Family("container_threads", "Threads running", G, _stat("pids")),
    Family("container_threads_max", "Threads allowed, 0 without a limit", G, _limited("pids_limit")),
    Family("container_tasks_state", "Tasks by state", G, _states, ("state",), at=_when_seen),
    Family(
        "container_cpu_load_average_10s",
        "Thousandths of tasks that ran, a mean over 10 seconds",
        G,
        _load("load"),
        at=_when_seen,
    ),
    Family(
        "container_cpu_load_d_average_10s",
        "Thousandths of tasks that waited uninterruptibly, a mean over 10 seconds",
        G,
        _load("load_d"),
        at=_when_seen,
    ),
    Family(
        "container_start_time_seconds",
        "Start since the epoch",
        G,
        _one(lambda facts: facts.started_ns // _SECOND_NS or None),
    ),
    Family(
        "container_last_seen",
        "Last look since the epoch",
        G,
        _one(lambda facts: facts.stats.timestamp_ns // _SECOND_NS),
    ),
    Family("container_spec_cpu_period", "CPU period in microseconds", G, _limit("cpu_period")),
    Family("container_spec_cpu_quota", "CPU quota in microseconds", G, _limit("cpu_quota")),
    Family("container_spec_cpu_shares", "CPU shares", G, _limit("cpu_shares")),
    Family("container_spec_memory_limit_bytes", "Memory limit", G, _limit("memory_limit_in_bytes")),
    Family(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is spared while others can give theirs, 0 for none",
        G,
        _limited("memory_reservation"),
    ),
    Family(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together",
        G,
        _limit("memory_swap_limit_in_bytes"),
    ),
    *(
        Family(f"container_network_{way}_{what}_total", text, C, _carried(f"{short}_{field}"), ("interface",))
        for way, short in (("receive", "rx"), ("transmit", "tx"))
        for what, field, text in (
            ("bytes", "bytes", "Bytes carried"),
            ("packets", "packets", "Packets carried"),
            ("packets_dropped", "dropped", "Packets dropped"),
            ("errors", "errors", "Errors met"),
        )
    ),
)
# All that there is of a pod whose cgroup is not its own: a sum of its containers would be no cgroup's figure.
OF_NETWORKS = tuple(family for family in FAMILIES if family.name.startswith("container_network_"))


def descriptors() -> Iterator[pb.MetricDescriptor]:
    """Every metric that a list may hold on this machine, with its labels in order."""
    for family in FAMILIES:
        if family.there():
            yield pb.MetricDescriptor(name=family.name, help=family.help, label_keys=BASE_LABELS + family.labels)


def pod_labels(pod: Pod, cgroup: str) -> tuple[str, ...]:
    """The values of BASE_LABELS for a pod."""
    return ("", cgroup, "", pod.id, pod.namespace, pod.name)


def container_labels(container: Container, pod: Pod) -> tuple[str, ...]:
    """The values of BASE_LABELS for a container."""
    image = container.image_name or container.request.image.image
    return (container.name, container.cgroup, image, container.id, pod.namespace, pod.name)


def samples(facts: Facts, labels: tuple[str, ...], families: Iterable[Family] = FAMILIES) -> Iterator[pb.Metric]:
    """All that `facts` can say of `families`."""
    for family in families:
        timestamp = family.at(facts)
        for own, value in family.samples(facts):
            metric = pb.Metric(
                name=family.name, timestamp=timestamp, metric_type=family.kind, label_values=labels + own
            )
            metric.value.value = value
            yield metric
