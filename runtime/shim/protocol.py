"""Daemon ↔ zygote and daemon ↔ shim: what is said over their unix sockets, both directions side by side.

    daemon                zygote                           shim
      │ ── hello ──────────▶ │                                │
      │ ◀─ {version, pid} ── │                                │
      │ ── start PodMessage ▶│ ── clone(CLONE_PARENT) ──────▶ │ namespaces, pins, shm, socket
      │ ◀────────────── {pid, started_ticks, pause_pid} ───── │ (on the connection it inherited)
      │ ── create ContainerMessage · start · signal · delete ▶│
      │ ◀─ facts, or an error with code, step and hint ────── │
      │ ── exec ExecMessage + fds ───────────────────────────▶│ a command on the caller's fds, killed with all that
      │ ◀─ {exit_code} ────────────────────────────────────── │ it started when the caller closes its sending half
      │ ── events ──────────────────────────────────────────▶ │
      │ ◀─ {} · {"event": "exit", "facts": {…}} · … · EOF ─── │
      │ ── attach + fds (SCM_RIGHTS) ───────────────────────▶ │ the connection becomes the control fd:
      │ ◀─ {} ··· {"resize": [rows, cols]} ··▶ ··· EOF ────── │ EOF = output ended, or the caller detaches
      │ ◀─ an error, before EOF ───────────────────────────── │ one of the readers lagged, and was let go
      │ ── stream StreamMessage + fds ──────────────────────▶ │ a command on the caller's fds, or on a terminal
      │ ◀─ {pid} + terminal ···················· {exit_code} ─│ once it has ended
      │ ── connect ConnectMessage ──────────────────────────▶ │ in the pod's network namespace
      │ ◀─ {} + socket ────────────────────────────────────── │
      │ ── timed [operation, body] ─────────────────────────▶ │ start (of a pod), create, exec or stream, for a
      │ ◀─ {"value": …, "phases": [[name, of, begin, end] …]} │ tracer: the answer, and where its time went

A connection carries one request. Frames are those of runtime.linux.sockets: a length, then JSON. Refuses requests over
MAX_REQUEST, unknown operations and unknown fields, each by name. Invariant: only uid 0 is heard (SO_PEERCRED), and an
error crosses as what it is: message, code, hint.
"""

from __future__ import annotations

import struct

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    Message = TypeVar("Message", bound=Record)

CAN_BE_TIMED = "can be timed here"  # says a shim of what it does not know to time
MAX_REQUEST = 8 << 20  # a process object with 2 MiB of environment, escaped, fits
_HEADER = struct.Struct("=I")


class PodMessage(Record):
    """runtime.shim.model.SandboxSpec, and where the daemon keeps its state. `uids` and `gids`, of [container, host,
    size] each, are those of the pod's user namespace: none, no namespace."""

    id: str
    directory: str
    state: str
    hostname: str
    netns: str
    new_netns: bool
    private_ipc: bool
    private_uts: bool
    shared_pid: bool
    shm_bytes: int
    sysctls: dict[str, str]
    cgroup_parent: str
    uids: list[list[int]]
    gids: list[list[int]]


class IdMessage(Record):
    """Something for container `id`."""

    id: str


class ContainerMessage(Record):
    """runtime.shim.model.ContainerSpec, its FsMount spread out. `log_path` "" is none, `handler` "" is native."""

    id: str
    bundle: str
    fstype: str
    source: str
    options: list[list[str | None]]
    attributes: int
    log_path: str
    terminal: bool
    stdin: bool
    stdin_once: bool
    handler: str


class ExecMessage(Record):
    """runtime.shim.model.ExecSpec for container `id`. The limits are for shims from before the daemon kept them."""

    id: str
    process: dict[str, Any]
    timeout_s: float
    output_limit: int


class SignalMessage(Record):
    """Signal `number` to the init of container `id`, or to all of it."""

    id: str
    number: int
    everyone: bool


class UpdateMessage(Record):
    """runtime-spec `linux.resources` for container `id`."""

    id: str
    resources: dict[str, Any]


class CheckpointMessage(Record):
    """criu's images of container `id` into the directory `images`, its logs into `work`; the container goes on. criu is
    killed after `seconds`."""

    id: str
    images: str
    work: str
    program: str
    seconds: float


class RestoreMessage(Record):
    """A container, as ContainerMessage has it, out of criu's images in the directory `images`; its log goes to `work`.
    It runs when this is answered. criu is killed after `seconds`."""

    container: dict[str, Any]
    images: str
    work: str
    program: str
    seconds: float


class AttachMessage(Record):
    """The fds that travel with it are stdin (iff `stdin`), then stdout, then stderr, as far as there are any."""

    id: str
    stdin: bool
    terminal: bool


class StreamMessage(Record):
    """A command whose stdio is the caller's own fds: stdin, stdout, stderr; with `terminal` a pty between them."""

    id: str
    process: dict[str, Any]
    terminal: bool


class ConnectMessage(Record):
    """A TCP connection to `port` of the pod's loopback; the socket travels with the answer."""

    port: int


class SweepMessage(Record):
    """Work on a pod whose shim is gone, done by a process that the zygote forks for it. `action` is "signal" (container
    `id` gets `number`), "lost" (kill everything, tell what is known), "delete" (container `id`) or "stop" (all)."""

    action: str
    directory: str
    state: str
    id: str = ""
    number: int = 0
    everyone: bool = False


class Facts:
    """runtime.shim.model.ContainerFacts as the shim keeps them, changing as things happen."""

    __slots__ = (
        "created_ns",
        "exit_code",
        "finished_ns",
        "id",
        "message",
        "oom_killed",
        "pid",
        "restarts",
        "signal",
        "started_ns",
        "started_ticks",
    )

    def __init__(self, container_id: str) -> None:
        self.id = container_id
        self.pid = 0
        self.started_ticks = 0
        self.created_ns = 0
        self.started_ns = 0
        self.finished_ns = 0
        self.exit_code = -1
        self.signal = 0
        self.oom_killed = False
        self.message = ""
        self.restarts = 0

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> Facts:
        """What `to_json` gave; a field that is missing or of another type keeps its default."""
        facts = cls("")
        if isinstance(value, dict):
            for name in cls.__slots__:
                if type(value.get(name)) is type(getattr(facts, name)):
                    setattr(facts, name, value[name])
        return facts


def parse(kind: type[Message], body: object) -> Message:
    """The body of a request as its message. Raises RuntimeFailure that names missing and unknown fields."""
    fields = kind._fields
    if not isinstance(body, dict) or body.keys() != set(fields):
        got = sorted(body) if isinstance(body, dict) else type(body).__name__
        raise RuntimeFailure(
            f"read {kind.__name__}: expected fields {sorted(fields)}, got {got}", code="invalid_argument"
        )
    return kind(*(body[name] for name in fields))


def request(operation: str, message: Record | None = None, *, timed: bool = False) -> bytes:
    """The frame body of a request; `timed`: its phases are to come back with the answer."""
    body = {} if message is None else {name: getattr(message, name) for name in message._fields}
    return encode(["timed", [operation, body]] if timed else [operation, body])


def untimed(body: object, *operations: str) -> tuple[str, object]:
    """Operation and body inside a timed request, which must be one of `operations`. Raises RuntimeFailure."""
    if not isinstance(body, list) or len(body) != 2 or body[0] not in operations:
        raise RuntimeFailure(f"only {', '.join(operations)} {CAN_BE_TIMED}", code="invalid_argument")
    return body[0], body[1]


def operation(payload: bytes) -> str:
    """The name in a request, without a look at the rest; "" where there is none to be seen."""
    if not payload.startswith(b'["'):
        return ""
    return payload[2 : max(2, payload.find(b'"', 2))].decode("ascii", "replace")


def parse_request(payload: bytes) -> tuple[str, object]:
    """Operation and body. Raises RuntimeFailure."""
    value = decode(payload, "a message", MAX_REQUEST)
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise RuntimeFailure("read a request: expected [operation, body]", code="invalid_argument")
    return value[0], value[1]


def reply(value: object) -> bytes:
    """The frame body of a success."""
    return encode({"ok": value})


def failure(error: BaseException) -> bytes:
    """The frame body of a failure. Whatever is no RuntimeFailure reads as one, and is "internal"."""
    if isinstance(error, OSError) and not isinstance(error, RuntimeFailure):
        error = RuntimeFailure.of(error)
    elif not isinstance(error, RuntimeFailure):
        error = RuntimeFailure(f"{type(error).__name__}: {error}")
    return encode({"error": error.to_json()})


def parse_reply(payload: bytes) -> Any:
    """The value of a success. Raises the RuntimeFailure of a failure."""
    value = decode(payload, "a message", MAX_REQUEST)
    if isinstance(value, dict) and "error" in value:
        raise RuntimeFailure.from_json(value["error"])
    if isinstance(value, dict) and "ok" in value:
        return value["ok"]
    raise RuntimeFailure(f"read a reply: expected ok or error, got {value!r:.80}")


def event(kind: str, facts: Facts) -> bytes:
    """The frame body of an event: `kind` is "exit", "oom" or "restart"."""
    return encode({"event": kind, "facts": facts.to_json()})


def resize(console: int, payload: bytes) -> None:
    """TIOCSWINSZ for {"resize": [rows, columns]}. Raises RuntimeFailure for anything else."""
    import termios  # here: a shared object that only terminals need

    value: Any = decode(payload, "a resize", 256)
    size: Any = value.get("resize") if isinstance(value, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 <= n < 65536 for n in size):
        raise RuntimeFailure('read a resize: expected {"resize": [rows, columns]}', code="invalid_argument")
    termios.tcsetwinsize(console, (size[0], size[1]))


def frame(payload: bytes) -> bytes:
    """A payload as it goes over the wire."""
    return _HEADER.pack(len(payload)) + payload
