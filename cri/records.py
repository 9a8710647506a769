"""What the database holds of pods and containers: facts, from which every phase is computed.

No I/O. Invariant: a record never says what state something is in, only what happened and when (ns since the epoch,
0 for what has not happened); so a record cannot disagree with itself after a crash.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.capabilities import capabilities
from cri.interfaces import ContainerFacts, PodNetwork, PortMapping, Sandbox
from cri.spec import validate
from runtime.linux.dataclass import dataclass

NO_EXIT = -1
# What is reported when the true code is lost: never 0, which would say that all went well (threats O17).
LOST_EXIT = 255
_PROTOCOLS = {pb.TCP: "tcp", pb.UDP: "udp", pb.SCTP: "sctp"}


@dataclass(frozen=True)
class Pod:
    """A pod. `config` is the PodSandboxConfig as it came; `netns` is "" for the host's network; `cgroup_made`
    is the topmost part of its cgroup parent that was not there before it."""

    id: str
    name: str
    namespace: str
    uid: str
    attempt: int
    handler: str
    config: bytes
    created_ns: int
    network: str = ""
    netns: str = ""
    ips: str = ""
    network_result: str = ""
    pid: int = 0
    started_ticks: int = 0
    pause_pid: int = 0
    cgroup_made: str = ""
    made_ns: int = 0
    stopping_ns: int = 0
    lost_ns: int = 0
    stopped_ns: int = 0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What no two pods share."""
        return (self.name, self.namespace, self.uid, self.attempt)

    @property
    def ready(self) -> bool:
        """SANDBOX_READY: containers can be made in it."""
        return bool(self.made_ns) and not (self.stopping_ns or self.lost_ns or self.stopped_ns)

    @cached_property
    def request(self) -> pb.PodSandboxConfig:
        """`config` parsed; not to be changed."""
        return pb.PodSandboxConfig.FromString(self.config)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    def sandbox(self, directory: Path) -> Sandbox:
        """The shim as `Sandboxes` wants it."""
        return Sandbox(self.id, directory, self.pid, self.started_ticks, self.pause_pid)

    def pod_network(self) -> PodNetwork:
        """The pod as `Network` wants it."""
        ports = tuple(
            PortMapping(port.host_port, port.container_port, _PROTOCOLS.get(port.protocol, "tcp"), port.host_ip)
            for port in self.request.port_mappings
            if port.host_port
        )
        sysctls = validate.sysctls(self.request.linux.sysctls, private_network=True, private_ipc=True)
        return PodNetwork(
            self.id,
            self.name,
            self.namespace,
            self.uid,
            Path(self.netns),
            ports,
            self.network,
            capabilities(self.request),
            {key: value for key, value in sysctls.items() if validate.names_interface(key)},
        )


@dataclass(frozen=True)
class Container:
    """A container. `config` is the ContainerConfig as it came, `resources` the LinuxContainerResources in force;
    `image_name` is what people call its image, where the request had only the id; `image_ref` names it by digest,
    `volume_images` are the ids of the images that its mounts show, in their order."""

    id: str
    pod_id: str
    name: str
    attempt: int
    config: bytes
    created_ns: int
    image_id: str = ""
    image_name: str = ""
    image_ref: str = ""
    volume_images: str = ""
    log_path: str = ""
    cgroup: str = ""
    stop_signal: str = ""
    resources: bytes = b""
    uid: int = 0
    gid: int = 0
    groups: str = ""
    pid: int = 0
    started_ticks: int = 0
    made_ns: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = NO_EXIT
    signal: int = 0
    oom_killed: int = 0
    restarts: int = 0
    reason: str = ""
    message: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What no two containers share."""
        return (self.pod_id, self.name, self.attempt)

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return bool(self.started_ns) and not self.finished_ns

    @property
    def is_due(self) -> bool:
        """It has ended, and its shim is about to start it again: it is running, without a process."""
        return self.running and not self.pid

    @property
    def state(self) -> pb.ContainerState:
        """CONTAINER_CREATED, _RUNNING or _EXITED."""
        if self.finished_ns:
            return pb.CONTAINER_EXITED
        return pb.CONTAINER_RUNNING if self.started_ns else pb.CONTAINER_CREATED

    @cached_property
    def request(self) -> pb.ContainerConfig:
        """`config` parsed; not to be changed."""
        return pb.ContainerConfig.FromString(self.config)

    @cached_property
    def attributes(self) -> pb.ContainerAttributes:
        """What statistics say of who it is; not to be changed."""
        config = self.request
        return pb.ContainerAttributes(
            id=self.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
        )

    @property
    def exit_reason(self) -> str:
        """CRI's word for how it ended, "" while it has not. OOM is said only where the kernel counted one."""
        if not self.finished_ns:
            return ""
        if self.reason:
            return self.reason
        if self.oom_killed:
            return "OOMKilled"
        return "Completed" if self.exit_code == 0 else "Error"


def facts_of(facts: ContainerFacts) -> dict[str, int | str]:
    """What a shim says, as fields of `Container`. A shim knows no exit as long as `finished_ns` is 0."""
    changed: dict[str, int | str] = {
        "pid": facts.pid,
        "started_ticks": facts.started_ticks,
        "restarts": facts.restarts,
    }
    if facts.started_ns:  # an exit may be told before its start: that does not undo what is known of it
        changed["started_ns"] = facts.started_ns
    if facts.finished_ns:
        changed |= {
            "finished_ns": facts.finished_ns,
            # An end without a code is an error, whatever happened.
            "exit_code": facts.exit_code if facts.exit_code >= 0 else LOST_EXIT,
            "signal": facts.signal,
            "oom_killed": int(facts.oom_killed),
        }
    if facts.message:
        changed["message"] = facts.message
    return changed
