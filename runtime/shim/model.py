"""What passes between the daemon and the shims, as values: pods, containers, commands, facts and failures.

Only the daemon's side (runtime.shim.client and, through cri.interfaces, cri) imports this: the shims themselves speak
runtime.shim.protocol and do without dataclasses. Refuses to do anything. Invariant: facts are facts; a phase is for
the reader to compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from runtime.linux.dataclass import dataclass
from runtime.linux.mount import FsMount


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a shim needs to hold a pod. `directory` is /run/ocid/pods/ID, made by the caller, 0700.

    The shim makes what is asked for and pins it as `directory`/ns/{ipc,uts} (bind mounts); `netns` is a path that is
    pinned already, or None for the host's. `shm_bytes` > 0: a tmpfs of that size at `directory`/shm.
    `uids` and `gids`, of (container, host, size) each: the pod has a user namespace, at `directory`/ns/user, that owns
    its others; a network namespace of its own is made with it then (`new_netns`) and is at `directory`/ns/net.
    `sysctls` were validated and belong to the namespaces that are the pod's own.
    """

    id: str
    directory: Path
    hostname: str
    netns: Path | None
    new_netns: bool = False
    private_ipc: bool = True
    private_uts: bool = True
    shared_pid: bool = False
    shm_bytes: int = 64 << 20
    sysctls: Mapping[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    uids: tuple[tuple[int, int, int], ...] = ()
    gids: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A live shim: its pid with start time (clock ticks), and its socket. `pause_pid` is 0 without a shared PID
    namespace. Facts for the store; `Sandboxes.reconnect` takes them back."""

    id: str
    directory: Path
    pid: int
    started_ticks: int
    pause_pid: int = 0


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container to create in a sandbox. `bundle` holds config.json, written by the caller.

    `rootfs` is mounted by the container itself in its own mount namespace (native handler) or at `bundle`/rootfs on
    the host (external handler). `log_path` None: output is read and dropped. `handler` is "" for native or the path of
    a runc-compatible binary. `stdin`: keep a pipe open for attach; `stdin_once`: close it after the first attach ends.
    """

    id: str
    bundle: Path
    rootfs: FsMount
    log_path: Path | None
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    handler: str = ""


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """What the shim knows of a container: facts only. Times are ns since the epoch, 0 where it has not happened.

    `restarts` counts how often the shim has started it again; until it has, and is to, `pid` is 0 and there is no exit.
    `exit_code` is 128 + signal for a signalled death, and -1 while there is none; `oom_killed` iff the cgroup's
    oom_kill counter rose. The shim writes them to `bundle`/exit.json before it tells anybody."""

    id: str
    pid: int
    started_ticks: int
    created_ns: int
    started_ns: int
    finished_ns: int
    exit_code: int
    signal: int
    oom_killed: bool
    message: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A command for a running container. `process` is a runtime-spec `process` object, as config.json has it."""

    process: Mapping[str, object]
    timeout_s: float = 0.0
    output_limit: int = 16 << 20


@dataclass(frozen=True, slots=True)
class ExecResult:
    """`timed_out`: the whole tree was killed. `truncated`: a stream reached its limit and the rest was dropped."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class ExecStream:
    """A command that runs on somebody's fds. `control` reads {"ok": {"exit_code": …}} as one frame, then EOF; `console`
    is the master of its terminal, or -1. Both CLOEXEC and the caller's. Closing `control` leaves the command alone."""

    pid: int
    control: int
    console: int


class ContainerError(Exception):
    """A runtime step failed: `str()` is one sentence "verb object: step …: ERRNO words", `hint` may say what to do.

    `code` is one of "not_found", "already_exists", "failed_precondition", "invalid_argument", "unavailable",
    "deadline", "internal".
    """

    def __init__(self, message: str, *, code: str = "internal", hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class ShimUnresponsive(ContainerError):
    """The shim's process is there but did not answer in time: stopped, frozen, or stuck in the kernel.

    Its containers may well be running. `code` is "unavailable": trying later is right, inventing an exit is not."""

    def __init__(self, message: str, *, code: str = "unavailable", hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
