"""What the verbs share: the parts, the store, where things lie, who is waiting for what.

Constructed by `cri.daemon` only. Refuses policy: a verb decides, this looks up. Invariant: looking something up takes
no lock and touches no disk (threats R14, O41).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol, TypeVar

from cri import trace
from cri.api import api_pb2 as pb
from cri.calls import Locks, Reservations, Tasks
from cri.config import NATIVE, Config
from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.interfaces import (
    Checkpoints,
    ContainerFacts,
    Containers,
    Images,
    InterfaceCounters,
    Network,
    Sandbox,
    Sandboxes,
    Snapshots,
)
from cri.processes import Processes
from cri.records import Container, Pod
from cri.spec.users import Databases
from cri.store import Store
from cri.streaming.sessions import Request
from cri.task_states import TaskStates
from cri.threads import LIMIT, Threads
from runtime.cgroups.stats import Stats
from runtime.linux.dataclass import dataclass

Record = TypeVar("Record", Pod, Container)
# What a stream awaits once its answer will be complete from then on.
Begun = Callable[[], Awaitable[None]]

EXEC_THREADS = 256


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the server keeps things under the state directory, which a reboot may empty."""

    state: Path

    @property
    def pods(self) -> Path:
        return self.state / "pods"

    @property
    def bundles(self) -> Path:
        return self.state / "bundles"

    def pod(self, pod_id: str) -> Path:
        """The pod's directory: the shim's, with the pod's files of /etc."""
        return self.pods / pod_id

    def bundle(self, container_id: str) -> Path:
        """The container's OCI bundle."""
        return self.bundles / container_id


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts behind their Protocols."""

    images: Images
    snapshots: Snapshots
    sandboxes: Sandboxes
    containers: Containers
    network: Network
    checkpoints: Checkpoints


class Watcher(Protocol):
    """cri.events.Events, as the verbs see it."""

    def watch(self, pod_id: str, take_fd: int) -> None:
        """Reads the pod's events from `take_fd`, which is the watcher's from now on."""
        ...

    def unwatch(self, pod_id: str) -> None:
        """Stops reading them; what had come by now was read."""
        ...


@dataclass(frozen=True, slots=True)
class PodLook:
    """One look at a pod: `stats` is None when it is not ready, and a sum where it has no cgroup of its own. `processes`
    are counted as such; the kernel's own count, in `stats`, is of threads."""

    pod: Pod
    stats: Stats | None
    own_cgroup: bool
    processes: int
    interfaces: Sequence[InterfaceCounters] | None
    containers: tuple[tuple[Container, Stats], ...]


class Reader(Protocol):
    """cri.stats.Statistics, as the verbs see it."""

    async def of(self, containers: list[Container]) -> list[pb.ContainerStats]:
        """The use of each container, in the same order."""
        ...

    def some_of(self, containers: list[Container]) -> AsyncGenerator[list[pb.ContainerStats], None]:
        """The same, in lists of a few."""
        ...

    async def of_pods(self, pods: list[Pod]) -> list[pb.PodSandboxStats]:
        """The use of each pod, in the same order."""
        ...

    def some_of_pods(self, pods: list[Pod]) -> AsyncGenerator[list[pb.PodSandboxStats], None]:
        """The same, in lists of a few."""
        ...

    async def look(self, pods: list[Pod], *, full: bool = False) -> list[PodLook]:
        """What there is to see of each pod, in the same order; `full`: with what only metrics tell."""
        ...

    def layer(self, container_id: str) -> pb.FilesystemUsage:
        """The writable layer as last measured."""
        ...

    def tasks(self, id_: str) -> TaskStates | None:
        """How many tasks of a running container are in which state, as last seen; may block."""
        ...

    def processes(self, id_: str, init: int) -> Processes | None:
        """What the processes of what was looked at hold; blocks. None when it is gone."""
        ...

    def forget(self, id_: str) -> None:
        """Nothing of a removed container or pod stays."""
        ...


class Telling(Protocol):
    """cri.feed.Feed, as the verbs see it."""

    def read(self) -> AsyncGenerator[bytes | None, None]:
        """None once nothing can be missed, then encoded events. Raises LimitExceeded, Unavailable."""
        ...


class Offers(Protocol):
    """cri.streaming.server.Server, as the verbs see it."""

    def offer(self, request: Request) -> str:
        """A URL that works once and soon. Raises LimitExceeded."""
        ...


class Stopping(Protocol):
    """One stopping of one container (cri.verbs.stop_container)."""

    task: asyncio.Task[None] | None

    def hurry(self, deadline: float) -> None:
        """Brings the deadline forward, never back."""
        ...


class Exits:
    """Who waits for a container to end."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def event(self, container_id: str) -> asyncio.Event:
        """Set once the container has ended or is gone."""
        return self._events.setdefault(container_id, asyncio.Event())

    def happened(self, container_id: str) -> None:
        """Wakes everybody who waits for it."""
        event = self._events.pop(container_id, None)
        if event is not None:
            event.set()


@dataclass(slots=True)
class Node:
    """One node's worth of everything."""

    config: Config
    store: Store
    parts: Parts
    events: Watcher = field(init=False)
    statistics: Reader = field(init=False)
    feed: Telling = field(init=False)
    streams: Offers | None = None
    tasks: Tasks = field(default_factory=Tasks)
    locks: Locks = field(default_factory=Locks)
    exits: Exits = field(default_factory=Exits)
    stopping: dict[str, Stopping] = field(default_factory=dict)
    # What shims say of containers whose start has not been answered yet: first it has started, then it has ended.
    starting: dict[str, list[ContainerFacts]] = field(default_factory=dict)
    processes: dict[str, dict[str, object]] = field(default_factory=dict)
    exec_threads: Threads = field(default_factory=lambda: Threads("exec", EXEC_THREADS))
    create_threads: Threads = field(default_factory=lambda: Threads("create", LIMIT))
    # Whether AppArmor's default profile is loaded; blocks.
    default_apparmor: Callable[[], bool] = lambda: False
    users: Databases = field(default_factory=Databases)
    pod_names: Reservations[str] = field(init=False)
    container_names: Reservations[str] = field(init=False)
    paths: Paths = field(init=False)

    def __post_init__(self) -> None:
        self.pod_names = Reservations(self.tasks)
        self.container_names = Reservations(self.tasks)
        self.paths = Paths(self.config.state)

    def pod(self, id_or_prefix: str) -> Pod:
        """The pod of this id, or of this unambiguous beginning of one. Raises NotFound."""
        pod = _find(self.store.pods, id_or_prefix, "pod sandbox")
        trace.about(pod=pod.id)
        return pod

    def container(self, id_or_prefix: str) -> Container:
        """The container of this id, or of this unambiguous beginning of one. Raises NotFound."""
        container = _find(self.store.containers, id_or_prefix, "container")
        trace.about(pod=container.pod_id, container=container.id)
        return container

    def sandbox(self, pod: Pod) -> Sandbox:
        """The pod's shim."""
        return pod.sandbox(self.paths.pod(pod.id))

    def sandbox_of(self, container: Container) -> Sandbox:
        """The shim of the container's pod."""
        return self.sandbox(self.store.pods[container.pod_id])

    def streaming(self) -> Offers:
        """Where streams are served. Raises FailedPrecondition where this process serves none."""
        if self.streams is None:
            raise FailedPrecondition("streams are served by a daemon only (ocid serve)")
        return self.streams

    def handler(self, name: str) -> tuple[str, str]:
        """The handler of a request: its name, and the path of its binary or "" for native. Raises InvalidArgument."""
        name = name or self.config.runtime.default_handler
        path = self.config.runtime.handlers.get(name)
        if path is None:
            known = ", ".join(sorted(self.config.runtime.handlers))
            raise InvalidArgument(f"runtime_handler: no handler {name!r} is configured; there are: {known}")
        return name, "" if path == NATIVE else path

    def running(self, container: Container, verb: str) -> Container:
        """`container` if it runs. Raises FailedPrecondition."""
        if not container.running:
            state = "has ended" if container.finished_ns else "was not started"
            raise FailedPrecondition(f"{verb} {container.name} ({container.id[:13]}): the container {state}")
        return container


def _find(records: Mapping[str, Record], wanted: str, what: str) -> Record:
    record = records.get(wanted)
    if record is not None:
        return record
    if not wanted:
        raise InvalidArgument(f"{what}: the id is empty")
    found = [record for id_, record in records.items() if id_.startswith(wanted)] if len(wanted) < 64 else []
    if len(found) > 1:
        raise InvalidArgument(f"{what} {wanted[:64]!r}: {len(found)} ids begin so, say more of it")
    if not found:
        raise NotFound(f"{what} {wanted[:80]!r} not found")
    return found[0]


def volume_key(container_id: str, index: int) -> str:
    """The snapshot of an image that mount number `index` of a container shows."""
    return f"{container_id}.{index}"


def new_id() -> str:
    """64 hex digits that nobody can guess."""
    return os.urandom(32).hex()


def now_ns() -> int:
    """Now, for a record. Never for a timeout (threats P15)."""
    return time.time_ns()
