"""What containers use: cgroup files read on the call, writable layers measured beside it.

Refuses to let one container spoil the answer for all: what cannot be read is left out (threats O42). Invariant: a call
never waits for a directory walk; sizes of writable layers are those of the last measurement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from cri.api import api_pb2 as pb
from cri.node import Node
from cri.records import Container
from cri.threads import to_thread
from runtime.cgroups.manager import Manager, manager_for
from runtime.cgroups.stats import Stats
from runtime.errors import RuntimeFailure
from snapshotter.model import SnapshotError

log = logging.getLogger(__name__)

# Rates are means since a sample at least this old, so that two readers do not see each other's short windows.
WINDOW_NS = 1_000_000_000
# Nobody has asked for so many periods: measuring rests until somebody does.
IDLE_PERIODS = 6


@dataclass(frozen=True, slots=True)
class _Sample:
    timestamp_ns: int
    cpu_ns: int
    nano_cores: int


@dataclass(frozen=True, slots=True)
class _Layer:
    timestamp_ns: int
    bytes: int
    inodes: int


class Statistics:
    """Reads and remembers. One event loop uses it; `_read` runs in a thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._managers: dict[str, Manager] = {}
        self._samples: dict[str, _Sample] = {}
        self._layers: dict[str, _Layer] = {}
        self._asked = 0.0
        self._mount = str(node.config.root)
        self._wake = asyncio.Event()

    async def of(self, containers: list[Container]) -> list[pb.ContainerStats]:
        """The use of each container; one thread hop for all of them."""
        self._asked = time.monotonic()
        self._wake.set()
        running = [container for container in containers if container.running]
        read = await to_thread(self._read, running)
        return [self._message(container, read.get(container.id)) for container in containers]

    def _read(self, containers: list[Container]) -> dict[str, Stats]:
        found = {}
        for container in containers:
            try:
                manager = self._managers.get(container.id)
                if manager is None:
                    manager = self._managers[container.id] = manager_for(container.cgroup, container.id)
                found[container.id] = manager.stats()
            except (OSError, RuntimeFailure, ValueError) as error:
                log.debug("stats of %s: %s", container.id[:13], error)
        return found

    def _message(self, container: Container, stats: Stats | None) -> pb.ContainerStats:
        config = container.request
        message = pb.ContainerStats()
        message.attributes.id = container.id
        message.attributes.metadata.CopyFrom(config.metadata)
        message.attributes.labels.update(config.labels)
        message.attributes.annotations.update(config.annotations)
        layer = self._layers.get(container.id)
        writable = message.writable_layer
        writable.fs_id.mountpoint = self._mount
        writable.timestamp = layer.timestamp_ns if layer else time.time_ns()
        writable.used_bytes.value = layer.bytes if layer else 0
        writable.inodes_used.value = layer.inodes if layer else 0
        if stats is None:
            return message
        message.cpu.timestamp = message.memory.timestamp = message.swap.timestamp = stats.timestamp_ns
        message.cpu.usage_core_nano_seconds.value = stats.cpu_usage_ns
        message.cpu.usage_nano_cores.value = self._rate(container, stats)
        memory = message.memory
        memory.usage_bytes.value = stats.memory_usage
        memory.working_set_bytes.value = stats.memory_working_set
        memory.rss_bytes.value = stats.memory_rss
        memory.page_faults.value = stats.page_faults
        memory.major_page_faults.value = stats.major_page_faults
        if stats.memory_available >= 0:
            memory.available_bytes.value = stats.memory_available
        message.swap.swap_usage_bytes.value = stats.swap_usage
        if stats.swap_limit >= 0:
            message.swap.swap_available_bytes.value = max(0, stats.swap_limit - stats.swap_usage)
        return message

    def _rate(self, container: Container, stats: Stats) -> int:
        """Nanoseconds of CPU per second since the last sample; since the start for the first."""
        last = self._samples.get(container.id) or _Sample(container.started_ns, 0, 0)
        passed = stats.timestamp_ns - last.timestamp_ns
        if passed < WINDOW_NS and last.cpu_ns:
            return last.nano_cores
        rate = max(0, stats.cpu_usage_ns - last.cpu_ns) * 1_000_000_000 // max(passed, 1)
        self._samples[container.id] = _Sample(stats.timestamp_ns, stats.cpu_usage_ns, rate)
        return rate

    def forget(self, container_id: str) -> None:
        """Nothing of a removed container stays."""
        for table in (self._managers, self._samples, self._layers):
            table.pop(container_id, None)

    async def measure(self) -> None:
        """Measures the writable layers for ever, one after the other, as long as somebody asks for them."""
        period = self._node.config.limits.stats_s
        while True:
            await self._wake.wait()
            for container in list(self._node.store.containers.values()):
                if container.running or container.id not in self._layers:
                    await self._measure_one(container.id)
            known = self._node.store.containers
            for gone in {*self._managers, *self._samples, *self._layers} - known.keys():
                self.forget(gone)
            if time.monotonic() - self._asked > IDLE_PERIODS * period:
                self._wake.clear()
            await asyncio.sleep(period)

    async def _measure_one(self, container_id: str) -> None:
        try:
            usage = await to_thread(self._node.parts.snapshots.usage, container_id)
        except (SnapshotError, OSError) as error:
            log.debug("size of the writable layer of %s: %s", container_id[:13], error)
            return
        if container_id in self._node.store.containers:
            self._layers[container_id] = _Layer(time.time_ns(), usage.bytes, usage.inodes)
