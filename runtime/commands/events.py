"""`ocirun events`: figures of a container as JSON lines, once or again and again until it ends.

Refuses to miss the end, or a kill for want of memory: between two lines it waits on the process and on the kernel's
own notice, not on a clock alone. Invariant: one line, one event, in the shape of runc's.
"""

from __future__ import annotations

import os
import select
import time

from runtime import state
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux.libc import KernelError
from runtime.linux.process import is_running, pidfd_open
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cgroups.manager import Manager
    from runtime.cli import Context
    from runtime.options import Values
    from runtime.state import State

FLAGS = {
    "events": (
        Flag(("interval",), "str", "time between two lines, as 500ms, 5s or 1m30s (default: 5s)"),
        Flag(("stats",), "bool", "one line, and no more"),
    )
}
WORDS = {"events": "CONTAINER"}
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def run(context: Context, _name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError('"CONTAINER" is required, and nothing after it')
    seconds = interval(values.text("interval", "5s"))
    facts = state.load(context.root, values.words[0])
    if state.status(context.root, facts) == "stopped":
        raise RuntimeFailure(f"container with id {facts.id} is not running", code="failed_precondition")
    manager = facts.manager()
    if values.on("stats"):
        _stats(facts, manager)
        return 0
    try:
        pidfd = pidfd_open(facts.pid)
    except KernelError:
        return 0
    try:
        if is_running(facts.pid, facts.started):
            _follow(facts, manager, pidfd, seconds)
    finally:
        os.close(pidfd)
    return 0


def _follow(facts: State, manager: Manager, pidfd: int, seconds: float) -> None:
    from runtime.cgroups.oom import OomNotice

    before, told = manager.oom_kills(), False
    with OomNotice(manager.paths()) as notice:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if notice.fd >= 0:
            poll.register(notice.fd, notice.events)
        due, ended = 0.0, False
        while not ended:
            now = time.monotonic()
            if now >= due:
                _stats(facts, manager)
                due = now + seconds
            ready = dict(poll.poll(max(0.0, due - time.monotonic()) * 1000))
            ended = pidfd in ready
            if notice.fd in ready:
                if notice.take():
                    _print(facts.id, "oom", None)
                    told = True
                elif not notice.there():
                    poll.unregister(notice.fd)
    # The end may be seen before the notice (threats O56): the counter knows.
    if not told and manager.oom_kills() > before:
        _print(facts.id, "oom", None)


def interval(text: str) -> float:
    """Seconds of a duration as Go writes it: 1m30s, 1.5s, 500ms. Raises UsageError."""
    total, rest = 0.0, text
    while rest:
        number = rest[: len(rest) - len(rest.lstrip("0123456789."))]
        rest = rest[len(number) :]
        unit = rest[: len(rest) - len(rest.lstrip("hmsuµn"))]
        rest = rest[len(unit) :]
        if unit not in _UNITS or not number.replace(".", "", 1).isdigit() or len(number) > 12:
            raise UsageError(f"--interval: {text[:40]!r} is no duration, as 500ms, 5s or 1m30s")
        total += float(number) * _UNITS[unit]
    if total <= 0:
        raise UsageError("--interval: duration interval must be greater than 0")
    return total


def _stats(facts: State, manager: Manager) -> None:
    from runtime.cgroups.figures import figures

    rdt = None
    if facts.intel_rdt is not None:
        from runtime import intel_rdt  # for machines that have it

        rdt = intel_rdt.figures(facts.intel_rdt)
    _print(facts.id, "stats", figures(manager.paths(), rdt))


def _print(container_id: str, kind: str, data: dict[str, object] | None) -> None:
    event: dict[str, object] = {"type": kind, "id": container_id}
    if data is not None:
        event["data"] = data
    line = encode(event) + b"\n"
    while line:
        line = line[os.write(1, line) :]
