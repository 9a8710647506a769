"""What is on disk about a pod's containers, and where: containers/ID.json for a cleaner, the runtimes' state.

Refuses ids that are no file names. Invariant: a record is there from before a container's process exists until the
container is deleted.
"""

from __future__ import annotations

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux.files import write_durable
from runtime.linux.process import start_time
from runtime.shim.engine import NativeEngine
from runtime.shim.external import ExternalEngine
from runtime.shim.protocol import Facts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.shim.engine import Engine

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
_MAX_ID = 1024


def engine_for(state: str, directory: str, handler: str) -> Engine:
    """The engine of a handler, with its state under `state` and its scratch files in the pod's directory."""
    root = runtime_root(state, handler)
    return ExternalEngine(handler, root, f"{directory}/scratch") if handler else NativeEngine(root)


def runtime_root(state: str, handler: str) -> str:
    """Where the runtime keeps its state: for the native one what `ocirun --root` is given."""
    return f"{state}/runtime" if not handler else f"{state}/handlers/{handler.strip('/').replace('/', '-')}"


def check_id(container_id: str) -> None:
    """Ids become parts of paths (threats S19). Raises RuntimeFailure."""
    good = container_id and len(container_id) <= _MAX_ID and _ID_CHARACTERS.issuperset(container_id)
    if not good or container_id[0] in ".-+":
        raise RuntimeFailure(
            f"{container_id[:80]!r} is no container id: letters, digits, _ . + - only", code="invalid_argument"
        )


def save_record(path: str, bundle: str, handler: str, facts: Facts) -> None:
    """containers/ID.json: what a cleaner needs once the shim is gone. Raises OSError: without it nothing is begun."""
    value = {"bundle": bundle, "handler": handler, "facts": facts.to_json()}
    write_durable(path, encode(value), sync=False)


def read_record(path: str) -> tuple[str, str] | None:
    """Bundle and handler of a record; None when there is none, ("", "") when it cannot be read."""
    try:
        with open(path, "rb") as file:
            value: Any = decode(file.read())
        return str(value["bundle"]), str(value["handler"])
    except FileNotFoundError:
        return None
    except (RuntimeFailure, KeyError, TypeError):
        return "", ""


def ticks(pid: int) -> int:
    """The start time of a process, 0 when it has ended and been waited for."""
    try:
        return start_time(pid)
    except ProcessLookupError:
        return 0


def be_as_expendable_as(pid: int | str, *, least: int = -1000) -> None:
    """oom_score_adj of process `pid`, or `least` if that is more, for this process and what it starts: a container is
    not as precious as its shim (threats S68). Raising is always allowed; a process that has ended tells nothing."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "rb") as file:
            score = max(least, int(file.read()))
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(str(score).encode())
    except OSError:
        pass
