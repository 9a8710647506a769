"""The parts as `cri` sees them. Read this first.

Seven Protocols, each a page of promises; the real parts and the fakes in tests/fakes pass one contract suite
(tests/contract). Nothing here does anything. Unless a docstring says otherwise a method blocks and is called through
`cri.threads.to_thread`; it may be called from several threads at once; after a crash half-way the same call, made
again, ends the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Protocol

from imagestore.model import Credentials, Image, KeyFile, ProgressFunction
from imagestore.model import Usage as ImageUsage
from runtime.linux.dataclass import dataclass
from runtime.linux.mount import FsMount
from runtime.shim.model import (
    ContainerError,
    ContainerFacts,
    ContainerSpec,
    ExecResult,
    ExecSpec,
    ExecStream,
    Sandbox,
    SandboxSpec,
    ShimUnresponsive,
)
from snapshotter.model import IdMap, SnapshotInfo
from snapshotter.model import Usage as SnapshotUsage

__all__ = [
    "ContainerError",
    "ContainerFacts",
    "ContainerSpec",
    "Checkpoints",
    "Containers",
    "ExecResult",
    "ExecSpec",
    "ExecStream",
    "FsMount",
    "IdMap",
    "Images",
    "InterfaceCounters",
    "Network",
    "NetworkError",
    "NetworkResult",
    "PodNetwork",
    "PortMapping",
    "Sandbox",
    "SandboxSpec",
    "Sandboxes",
    "ShimUnresponsive",
    "Snapshots",
    "Streams",
]

# ---------------------------------------------------------------------------------------------------------- images


class Images(Protocol):
    """imagestore.store.Store."""

    async def pull(
        self,
        reference: str,
        credentials: Credentials | None = None,
        progress: ProgressFunction | None = None,
        namespace: str = "",
        keys: tuple[KeyFile, ...] = (),
        *,
        all_platforms: bool = False,
        platform: str = "",
    ) -> Image:
        """Before: anything. After: the image is whole, unpacked, durable and has `reference` as tag or digest.

        `namespace` is that of the pod it is for, which may have a signature policy of its own. `keys` open encrypted
        layers, besides those that this node has. `all_platforms`: what an index has for others is kept as it is, as
        long as the image is. `platform`: the image for another one than this machine's, "os/arch[/variant]", which
        `reference` then means here. Equal pulls at once are one; cancelling the last waiter leaves only resumable
        ingests. Idempotent: asks the registry for the tag's digest each time. Raises imagestore.model.ImageError and
        its kinds.
        """
        ...

    def get(self, name: str) -> Image | None:
        """By image id ("sha256:…", or an unambiguous prefix of ≥ 3 hex digits), tag or digest reference, normalised."""
        ...

    def permit(self, image: Image, name: str, namespace: str = "", keys: tuple[KeyFile, ...] = ()) -> None:
        """Raises SignatureRefused unless the signature policy of today accepts `image`, called `name` by whoever wants
        to run it (a reference, or its id), with the signatures that it came with. No network. PolicyInvalid.
        DecryptionRefused unless today's keys, `keys` among them, open its layers, where those are encrypted: that they
        have been unpacked for one who had a key is no reason to give them to another. Key providers are asked then, and
        may take their time."""
        ...

    def list(self) -> Sequence[Image]:
        """All whole images."""
        ...

    def remove(self, name: str) -> None:
        """By id: all its names go. By tag or digest: that name goes, and the image with its last one. Unknown: no-op.
        Space comes back with the next `collect`."""
        ...

    def tag(self, name: str, new: str) -> None:
        """Gives the image `name` the further tag `new`, moving it from another image if need be."""
        ...

    def collect(self) -> None:
        """Removes blobs, ingests (older than a day) and layers that no image, pull or snapshot reaches."""
        ...

    def usage(self) -> ImageUsage:
        """Blocks and inodes of everything under the image root, layers included."""
        ...


class Snapshots(Protocol):
    """snapshotter.overlay.Overlay."""

    def prepare(self, key: str, parent: str | None, ids: IdMap | None = None) -> FsMount:
        """A writable view of layer chain `parent`, as a mount description: nothing is mounted here, the runtime does
        that, and maps the layers' ids where `ids` says whose the root directory will be on the host.
        Raises AlreadyExists, NotFound (parent)."""
        ...

    def mount(self, key: str) -> FsMount:
        """The mount of an existing active snapshot again. Raises NotFound."""
        ...

    def remove(self, key: str) -> None:
        """Removes the active snapshot and its files. Unknown: no-op. Crosses no mount (EXDEV names it)."""
        ...

    def usage(self, key: str) -> SnapshotUsage:
        """Blocks and inodes of the writable layer of `key`. Raises NotFound."""
        ...

    def pack(self, key: str, fd: int, check: Callable[[], object] = lambda: None) -> None:
        """Writes the writable layer of `key` to `fd` as a layer's tar, whiteouts in the image spec's words. The files
        may be changing: who wants one moment of them holds their users still. `check` is called now and then, and ends
        it by raising. Raises NotFound, OSError."""
        ...

    def unpack(self, key: str, fd: int) -> None:
        """Fills the writable layer of `key`, which nobody has mounted yet, from a layer's tar, as `pack` writes it and
        as anybody may have: it is read as an image's layer is. On failure the snapshot is there, and good for
        `remove` only. Raises NotFound, UnpackError, OSError."""
        ...

    def list(self) -> Sequence[SnapshotInfo]:
        """All active snapshots: recovery removes those that no container record has."""
        ...

    def lower_directories(self, parent: str) -> Sequence[Path]:
        """The layer directories of a chain, top first: to look up users in an image before it is mounted.
        Every read in them goes through openat2. Raises NotFound."""
        ...


# ------------------------------------------------------------------------------------------------------ containers


class Sandboxes(Protocol):
    """runtime.shim.client.Shims, first half: the pods."""

    def start(self, spec: SandboxSpec) -> Sandbox:
        """Forks a shim from the zygote (starting that if need be). After: namespaces pinned, shm mounted, socket
        answering. On failure everything it made is undone. Raises ContainerError."""
        ...

    def reconnect(self, sandbox: Sandbox) -> Sequence[ContainerFacts] | None:
        """The shim's containers, or None when that very process (pid and start time) is gone. ≤ 2 s, then
        ShimUnresponsive."""
        ...

    def rejoin(self, sandbox: Sandbox) -> tuple[int, Sequence[ContainerFacts]] | None:
        """`reconnect` and `events` in one: the facts are what was when the stream began, so nothing is missed or told
        twice."""
        ...

    def stop(self, sandbox: Sandbox) -> None:
        """Kills what is left in it, unpins, unmounts, ends the shim. Also when the shim is dead already. Idempotent."""
        ...

    def events(self, sandbox: Sandbox) -> int:
        """A CLOEXEC fd the caller owns: frames (runtime.linux.sockets) of JSON {"event":…,"facts":{…}} from now on, of
        the kinds exit, oom and restart; EOF when the shim ends. Exits that happened before are in `reconnect`."""
        ...


class Containers(Protocol):
    """runtime.shim.client.Shims, second half: the containers of a pod."""

    def create(self, sandbox: Sandbox, spec: ContainerSpec) -> ContainerFacts:
        """After: the process is set up and waits before execve; state.json exists. On failure nothing is left.
        Raises ContainerError (step, object, errno, hint)."""
        ...

    def start_container(self, sandbox: Sandbox, container_id: str) -> ContainerFacts:
        """Releases execve and reports its failure. Raises ContainerError; a second start is FAILED_PRECONDITION."""
        ...

    def signal(self, sandbox: Sandbox, container_id: str, number: int, *, everyone: bool = False) -> None:
        """Signals the init, or with `everyone` every process of the container's cgroup. Gone: no-op."""
        ...

    def retire(self, sandbox: Sandbox, container_id: str) -> None:
        """From now on the container is not started again after it has ended; one that waits for that has ended for
        good, and its exit is told. Idempotent; gone: no-op."""
        ...

    def delete(self, sandbox: Sandbox, container_id: str) -> None:
        """Kills what is left, removes cgroup, state and rootfs mount. Idempotent; also for a dead shim."""
        ...

    def exec_sync(self, sandbox: Sandbox, container_id: str, spec: ExecSpec) -> ExecResult:
        """Runs to the end; a child that keeps stdout open delays it by a short drain only (threats S52).
        Raises ContainerError when it cannot start."""
        ...

    def update(self, sandbox: Sandbox, container_id: str, resources: Mapping[str, object]) -> None:
        """runtime-spec `linux.resources`, merged over what is in force; all or nothing."""
        ...

    def reopen_log(self, sandbox: Sandbox, container_id: str) -> None:
        """Opens `log_path` anew; no line is lost or split over the two files."""
        ...


class Streams(Protocol):
    """runtime.shim.client.Shims, third part: fds that bytes of a pod pass through, and never the shim."""

    def exec_stream(
        self,
        sandbox: Sandbox,
        container_id: str,
        process: Mapping[str, object],
        fds: Sequence[int] = (),
        *,
        terminal: bool = False,
    ) -> ExecStream:
        """Runs a command on copies of `fds` (stdin, stdout, stderr; they stay the caller's), or on a terminal of its
        own whose master comes back: once that is closed it hangs up. The control fd tells the exit code, also when the
        container ends; closing it leaves the command alone. Raises ContainerError when the command cannot start."""
        ...

    def attach(self, sandbox: Sandbox, container_id: str, fds: Sequence[int], *, stdin: bool, terminal: bool) -> int:
        """Hands the caller's fds (stdin, stdout, stderr as present) to the shim, which copies the container's streams
        to them as well as to the log. Returns a CLOEXEC control fd: write JSON {"resize":[rows,cols]} frames to it,
        read EOF when the container's output has ended, and an error before it where a reader was so far behind that
        it was let go; closing it detaches."""
        ...

    def connect(self, sandbox: Sandbox, port: int) -> int:
        """A TCP connection to `port` of the pod's loopback, IPv4 first, made inside its network namespace: a CLOEXEC
        socket that the caller owns. Raises ContainerError when nobody listens there."""
        ...


class Checkpoints(Protocol):
    """runtime.shim.client.Shims, fourth part: containers held still, and written down."""

    def pause(self, sandbox: Sandbox, container_id: str) -> None:
        """Freezes a running container. Raises ContainerError, also where it is frozen already."""
        ...

    def resume(self, sandbox: Sandbox, container_id: str) -> None:
        """Thaws it. One that is not frozen, has ended, or is gone: no-op. Raises ContainerError: it may be frozen
        still, and the caller tries again."""
        ...

    def checkpoint(
        self, sandbox: Sandbox, container_id: str, images: Path, work: Path, program: str, seconds: float
    ) -> None:
        """Writes criu's images of a running or frozen container into `images`, its logs into `work`; whether it
        succeeds or fails, the container is afterwards as it was. Raises ContainerError; "deadline" after `seconds`,
        when criu is killed."""
        ...

    def restore(
        self, sandbox: Sandbox, spec: ContainerSpec, images: Path, work: Path, program: str, seconds: float
    ) -> ContainerFacts:
        """After: as after `create`, but that `start_container` lets processes go on with what they had in memory. They
        have no right, mount, namespace or cgroup but those of config.json in the bundle: `images` are anybody's, and
        nothing of them has run. criu's logs are in `work`. On failure nothing is left. Raises ContainerError;
        "deadline" after `seconds`."""
        ...


# --------------------------------------------------------------------------------------------------------- network


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the host for a port of the pod; `protocol` is "tcp", "udp" or "sctp"."""

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """A pod as CNI sees it. `network` is "" for the default conflist or the name of one; `capabilities` are what a
    plugin may ask to be told besides ports, by the names of CNI's conventions (dns, bandwidth …); `sysctls` are those
    of its interfaces, which are there only now (cri.spec.validate has their keys)."""

    id: str
    name: str
    namespace: str
    uid: str
    netns: Path
    ports: tuple[PortMapping, ...] = ()
    network: str = ""
    capabilities: Mapping[str, object] = field(default_factory=dict, hash=False)
    sysctls: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class NetworkResult:
    """Addresses of the pod, primary first, without prefix length; `raw` is the CNI result for the record."""

    ips: tuple[str, ...]
    raw: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class InterfaceCounters:
    """What an interface of a pod has carried, as the pod sees it."""

    name: str
    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_dropped: int
    tx_dropped: int


class Network(Protocol):
    """cri.network.cni.Cni. All of it is async, but for what blocks nobody."""

    def netns_path(self, pod_id: str) -> Path:
        """Where `new_netns` pins a pod's namespace: known before there is one, for the record."""
        ...

    async def new_netns(self, pod_id: str, source: Path | None = None) -> Path:
        """A fresh, pinned network namespace with `lo` up; from the warm pool where there is one. Name = pod id.
        With `source` the one that is pinned there, which a user namespace may own, pinned once more."""
        ...

    async def remove_netns(self, path: Path) -> None:
        """Unpins it. Idempotent."""
        ...

    async def add(self, pod: PodNetwork) -> NetworkResult:
        """CNI ADD of every plugin; on failure DEL was called for all of them. Raises NetworkError naming the plugin,
        and telling by `left` that a DEL has failed, so that `delete` is to be called until it works."""
        ...

    async def delete(self, pod: PodNetwork) -> None:
        """CNI DEL, with the netns gone too. Idempotent. Raises NetworkError: the caller keeps it and retries."""
        ...

    async def check(self, pod: PodNetwork) -> str | None:
        """CNI CHECK of every plugin: None when the pod is connected as `add` left it, else what is not, in one sentence
        that names network and plugin. Rules of ocid's own that are gone (a flushed ruleset) are put back."""
        ...

    async def counters(self, paths: Sequence[Path]) -> Mapping[Path, Sequence[InterfaceCounters]]:
        """What the interfaces but `lo` of each namespace have carried. One that is gone is left out."""
        ...

    async def status(self) -> str | None:
        """None when pods can get a network, else the reason in one sentence, as NetworkReady's message."""
        ...

    async def collect(self, valid: frozenset[str]) -> None:
        """Releases leases and netns of pods outside `valid` (a node that was killed leaves none)."""
        ...


class NetworkError(Exception):
    """A network step failed; one sentence that names network, plugin and cause.

    `code` tells who is to blame: "invalid_argument", "failed_precondition" (the node's configuration), "unknown" (a
    plugin's own failure, passed on as other runtimes do), "unavailable", "deadline", "exhausted", "internal"."""

    left = False

    def __init__(self, message: str, *, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code
