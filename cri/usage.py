"""Figures in the CRI's words: from what was read of cgroups, layers and interfaces to messages. Pure.

Refuses to make up a number: what is not known is not set. Invariant: a pod whose cgroup is not its own is the sum of
its containers, as far as figures can be added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cri.api import api_pb2 as pb
from cri.interfaces import InterfaceCounters
from cri.records import Container, Pod
from runtime.cgroups.stats import Pressure, Stats

DEFAULT_INTERFACE = "eth0"
_SUMMED = (
    *("cpu_usage_ns", "memory_usage", "memory_rss", "memory_cache", "memory_inactive_file", "memory_active_file"),
    *("memory_kernel", "memory_limit_hits", "memory_mapped_file", "page_faults", "major_page_faults", "swap_usage"),
    *("oom_kills", "pids"),
)


def container_stats(
    container: Container, stats: Stats | None, nano_cores: int, layer: pb.FilesystemUsage
) -> pb.ContainerStats:
    """One container; only what it is and its writable layer where `stats` is None."""
    message = pb.ContainerStats(attributes=container.attributes, writable_layer=layer)
    if stats is None:
        return message
    _cpu(message.cpu, stats, nano_cores)
    _memory(message.memory, stats)
    swap = message.swap
    swap.timestamp = stats.timestamp_ns
    swap.swap_usage_bytes.value = stats.swap_usage
    if stats.swap_limit >= 0:
        swap.swap_available_bytes.value = max(0, stats.swap_limit - stats.swap_usage)
    _io(message.io, stats)
    return message


def pod_stats(
    pod: Pod,
    stats: Stats | None,
    nano_cores: int,
    processes: int,
    interfaces: Sequence[InterfaceCounters] | None,
    containers: Iterable[pb.ContainerStats],
) -> pb.PodSandboxStats:
    """One pod; only what it is where `stats` is None."""
    config = pod.request
    message = pb.PodSandboxStats()
    message.attributes.id = pod.id
    message.attributes.metadata.CopyFrom(config.metadata)
    message.attributes.labels.update(config.labels)
    message.attributes.annotations.update(config.annotations)
    if stats is None:
        return message
    linux = message.linux
    linux.containers.extend(containers)
    _cpu(linux.cpu, stats, nano_cores)
    _memory(linux.memory, stats)
    _io(linux.io, stats)
    linux.process.timestamp = stats.timestamp_ns
    linux.process.process_count.value = processes
    if interfaces:
        linux.network.timestamp = stats.timestamp_ns
        default = next((one for one in interfaces if one.name == DEFAULT_INTERFACE), interfaces[0])
        for one in interfaces:
            _interface(linux.network.default_interface if one is default else linux.network.interfaces.add(), one)
    return message


def total(parts: Sequence[Stats], timestamp_ns: int) -> Stats:
    """The sum of containers. Pressure cannot be added up, and a limit is one only where all have one."""
    sums = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
    limits = [part.memory_limit for part in parts]
    limit = sum(limits) if limits and min(limits) >= 0 else -1
    return Stats(timestamp_ns, memory_limit=limit, **sums)


def _cpu(message: pb.CpuUsage, stats: Stats, nano_cores: int) -> None:
    message.timestamp = stats.timestamp_ns
    message.usage_core_nano_seconds.value = stats.cpu_usage_ns
    message.usage_nano_cores.value = nano_cores
    _pressure(message, stats.cpu_pressure)


def _memory(message: pb.MemoryUsage, stats: Stats) -> None:
    message.timestamp = stats.timestamp_ns
    message.usage_bytes.value = stats.memory_usage
    message.working_set_bytes.value = stats.memory_working_set
    message.rss_bytes.value = stats.memory_rss
    message.page_faults.value = stats.page_faults
    message.major_page_faults.value = stats.major_page_faults
    if stats.memory_available >= 0:
        message.available_bytes.value = stats.memory_available
    _pressure(message, stats.memory_pressure)


def _io(message: pb.IoUsage, stats: Stats) -> None:
    if stats.io_pressure is not None:
        message.timestamp = stats.timestamp_ns
        _pressure(message, stats.io_pressure)


def _pressure(message: pb.CpuUsage | pb.MemoryUsage | pb.IoUsage, pressure: Pressure | None) -> None:
    """Microseconds in all, as the kernel and cAdvisor count them."""
    if pressure is None:
        return
    for field, stall in (("Some", pressure.some), ("Full", pressure.full)):
        if stall is not None:
            data = getattr(message.psi, field)
            data.Total, data.Avg10, data.Avg60, data.Avg300 = stall.total_us, stall.avg10, stall.avg60, stall.avg300
            data.SetInParent()


def _interface(message: pb.NetworkInterfaceUsage, counters: InterfaceCounters) -> None:
    message.name = counters.name
    message.rx_bytes.value, message.tx_bytes.value = counters.rx_bytes, counters.tx_bytes
    message.rx_errors.value, message.tx_errors.value = counters.rx_errors, counters.tx_errors
