"""What pods and containers use: cgroup files read on the call, writable layers measured beside it.

Refuses to let one container spoil the answer for all: what cannot be read is left out (threats O42). Invariant: a call
never waits for a directory walk; sizes of writable layers are those of the last measurement; and the loop is held for
LOOK_ITEMS at most, however many there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from cri import usage
from cri.api import api_pb2 as pb
from cri.node import Node, PodLook
from cri.processes import Processes, look
from cri.records import Container, Pod
from cri.task_states import TaskStates, TaskWatch
from cri.threads import to_thread
from cri.verbs.run_pod import own_cgroups
from runtime.cgroups.manager import Manager, manager_for
from runtime.cgroups.stats import Stats
from runtime.errors import RuntimeFailure
from runtime.linux.dataclass import dataclass
from snapshotter.model import SnapshotError

log = logging.getLogger(__name__)

T = TypeVar("T")

# How many pods or containers are looked at, and put into words, in one go: others have their turn after 3 ms.
LOOK_ITEMS = 64
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
        self.watch = TaskWatch(node.config.limits.stats_s, self._running, self._pids)

    async def of(self, containers: list[Container]) -> list[pb.ContainerStats]:
        """The use of each container."""
        return [one async for some in self.some_of(containers) for one in some]

    async def some_of(self, containers: list[Container]) -> AsyncGenerator[list[pb.ContainerStats], None]:
        """The same, LOOK_ITEMS at a time; one thread hop for each of these."""
        for some in _batched(containers):
            self._wanted()
            running = {container.id: container.cgroup for container in some if container.running}
            read = await to_thread(self._read, running)
            yield [self._container(container, read.get(container.id)) for container in some]

    async def of_pods(self, pods: list[Pod]) -> list[pb.PodSandboxStats]:
        """The use of each pod with its running containers."""
        return [one async for some in self.some_of_pods(pods) for one in some]

    async def some_of_pods(self, pods: list[Pod]) -> AsyncGenerator[list[pb.PodSandboxStats], None]:
        """The same, LOOK_ITEMS at a time."""
        for some in _batched(pods):
            yield [self._pod(look) for look in await self.look(some)]

    async def look(self, pods: list[Pod], *, full: bool = False) -> list[PodLook]:
        """What there is to see of each pod: one thread hop for all cgroups, and one for all networks. `full`: with what
        only metrics tell."""
        self._wanted()
        if full:
            self.watch.wanted()
        ready = [pod for pod in pods if pod.ready]
        containers = {pod.id: [one for one in self._node.store.containers_of(pod.id) if one.running] for pod in ready}
        groups = own_cgroups(self._node, ready) | {one.id: one.cgroup for some in containers.values() for one in some}
        netns = {pod.id: Path(pod.netns) for pod in ready if pod.netns}
        (read, processes), counters = await asyncio.gather(
            to_thread(
                self._read_pods, groups, {id_: [one.id for one in some] for id_, some in containers.items()}, full
            ),
            self._node.parts.network.counters(list(netns.values())),
        )
        now = time.time_ns()
        looks = []
        for pod in pods:
            parts = [(one, read[one.id]) for one in containers.get(pod.id, ()) if one.id in read]
            own = read.get(pod.id)
            stats = (own or usage.total([one for _, one in parts], now)) if pod.ready else None
            interfaces = counters.get(netns.get(pod.id, Path()))
            looks.append(PodLook(pod, stats, own is not None, processes.get(pod.id, 0), interfaces, tuple(parts)))
        return looks

    def _wanted(self) -> None:
        self._asked = time.monotonic()
        self._wake.set()

    def _read(self, groups: Mapping[str, str], full: bool = False) -> dict[str, Stats]:
        found = {}
        for id_, cgroup in groups.items():
            try:
                manager = self._managers.get(id_)
                if manager is None:
                    manager = self._managers[id_] = manager_for(cgroup, id_)
                stats = manager.stats(full=full)
                # What is gone reads as zero: a counter that seems to go back would be a lie.
                if stats.cpu_usage_ns or manager.exists():
                    found[id_] = stats
            except (OSError, RuntimeFailure, ValueError) as error:
                log.debug("stats of %s: %s", id_[:13], error)
        return found

    def _read_pods(
        self, groups: Mapping[str, str], members: Mapping[str, list[str]], full: bool
    ) -> tuple[dict[str, Stats], dict[str, int]]:
        """What there is to read of `groups`, and how many processes each pod of `members` (ids of containers) has."""
        found = self._read(groups, full)
        counts = {pod: sum(map(self._count, [pod] if pod in found else ids)) for pod, ids in members.items()}
        return found, counts

    def _count(self, id_: str) -> int:
        return len(self._pids(id_))

    def _pids(self, id_: str) -> list[int]:
        """The processes of a cgroup that was read before; none when it is gone."""
        manager = self._managers.get(id_)
        try:
            return manager.pids() if manager is not None else []
        except (OSError, RuntimeFailure):
            return []

    def _running(self) -> list[str]:
        return [container.id for container in self._node.store.containers.values() if container.running]

    def _container(self, container: Container, stats: Stats | None) -> pb.ContainerStats:
        cores = self._rate(container.id, container.started_ns, stats) if stats is not None else 0
        return usage.container_stats(container, stats, cores, self.layer(container.id))

    def _pod(self, look: PodLook) -> pb.PodSandboxStats:
        containers = [self._container(container, stats) for container, stats in look.containers]
        cores = sum(one.cpu.usage_nano_cores.value for one in containers)
        if look.own_cgroup and look.stats is not None:
            cores = self._rate(look.pod.id, look.pod.created_ns, look.stats)
        return usage.pod_stats(look.pod, look.stats, cores, look.processes, look.interfaces, containers)

    def layer(self, container_id: str) -> pb.FilesystemUsage:
        """The writable layer as last measured."""
        layer = self._layers.get(container_id)
        message = pb.FilesystemUsage()
        message.fs_id.mountpoint = self._mount
        message.timestamp = layer.timestamp_ns if layer else time.time_ns()
        message.used_bytes.value = layer.bytes if layer else 0
        message.inodes_used.value = layer.inodes if layer else 0
        return message

    def tasks(self, id_: str) -> TaskStates | None:
        """How many tasks of a running container are in which state, as last seen; may block."""
        return self.watch.of(id_)

    def processes(self, id_: str, init: int) -> Processes | None:
        """What the processes of a cgroup that was read before hold; blocks. None when it is gone."""
        manager = self._managers.get(id_)
        try:
            return look(manager.pids(), init) if manager is not None else None
        except (OSError, RuntimeFailure):
            return None

    def _rate(self, id_: str, since_ns: int, stats: Stats) -> int:
        """Nanoseconds of CPU per second since the last sample; since the beginning for the first."""
        known = self._samples.get(id_)
        last = known or _Sample(since_ns, 0, 0)
        passed = stats.timestamp_ns - last.timestamp_ns
        if known is not None and passed < WINDOW_NS:
            return last.nano_cores
        rate = max(0, stats.cpu_usage_ns - last.cpu_ns) * 1_000_000_000 // max(passed, 1)
        self._samples[id_] = _Sample(stats.timestamp_ns, stats.cpu_usage_ns, rate)
        return rate

    def forget(self, id_: str) -> None:
        """Nothing of a removed container or pod stays."""
        for table in (self._managers, self._samples, self._layers):
            table.pop(id_, None)

    async def measure(self) -> None:
        """Measures the writable layers for ever, one after the other, as long as somebody asks for them."""
        period = self._node.config.limits.stats_s
        while True:
            await self._wake.wait()
            for container in list(self._node.store.containers.values()):
                if container.running or container.id not in self._layers:
                    await self._measure_one(container.id)
            known = self._node.store.containers.keys() | self._node.store.pods.keys()
            for gone in {*self._managers, *self._samples, *self._layers} - known:
                self.forget(gone)
            if time.monotonic() - self._asked > IDLE_PERIODS * period:
                self._wake.clear()
            await asyncio.sleep(period)

    async def _measure_one(self, container_id: str) -> None:
        try:
            used = await to_thread(self._node.parts.snapshots.usage, container_id)
        except (SnapshotError, OSError) as error:
            log.debug("size of the writable layer of %s: %s", container_id[:13], error)
            return
        if container_id in self._node.store.containers:
            self._layers[container_id] = _Layer(time.time_ns(), used.bytes, used.inodes)


def _batched(items: list[T]) -> Iterator[list[T]]:
    return (items[start : start + LOOK_ITEMS] for start in range(0, len(items), LOOK_ITEMS))
