"""`ocirun events`: figures of a container as JSON lines, once or again and again until it ends.

Refuses to miss the end: between two lines it waits on the process, not on a clock alone. Invariant: one line, one
event, in the shape of runc's.
"""

from __future__ import annotations

import os
import select

from runtime import state
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux.libc import KernelError
from runtime.linux.process import is_running, pidfd_open
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cgroups.stats import Stats
    from runtime.cli import Context
    from runtime.options import Values

_UNLIMITED = (1 << 64) - 1
FLAGS = {
    "events": (
        Flag(("interval",), "str", "time between two lines, as 500ms, 5s or 1m (default: 5s)"),
        Flag(("stats",), "bool", "one line, and no more"),
    )
}
WORDS = {"events": "CONTAINER"}


def run(context: Context, _name: str, values: Values) -> int:
    if len(values.words) != 1:
        raise UsageError('"CONTAINER" is required, and nothing after it')
    seconds = interval(values.text("interval", "5s"))
    facts = state.load(context.root, values.words[0])
    if state.status(context.root, facts) == "stopped":
        raise RuntimeFailure(f"container with id {facts.id} is not running", code="failed_precondition")
    manager = facts.manager()
    if values.on("stats"):
        _print(facts.id, "stats", figures(manager.stats()))
        return 0
    try:
        pidfd = pidfd_open(facts.pid)
    except KernelError:
        return 0
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    kills = manager.oom_kills()
    while is_running(facts.pid, facts.started):
        _print(facts.id, "stats", figures(manager.stats()))
        ended = poll.poll(seconds * 1000)
        now = manager.oom_kills()
        if now > kills:
            _print(facts.id, "oom", None)
            kills = now
        if ended:
            break
    os.close(pidfd)
    return 0


def interval(text: str) -> float:
    """Seconds of a duration as Go writes it. Raises UsageError."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
        plain = text.removesuffix(unit)
        if plain != text and plain.isascii() and plain.isdecimal() and len(plain) < 8 and int(plain) > 0:
            return int(plain) * factor
    raise UsageError(f"--interval: {text[:40]!r} is no duration above zero, as 500ms, 5s or 1m")


def _print(container_id: str, kind: str, data: dict[str, object] | None) -> None:
    event: dict[str, object] = {"type": kind, "id": container_id}
    if data is not None:
        event["data"] = data
    line = encode(event) + b"\n"
    while line:
        line = line[os.write(1, line) :]


def _limit(value: int) -> int:
    return _UNLIMITED if value < 0 else value


def figures(now: Stats) -> dict[str, object]:
    """What readers of `runc events` look for."""
    return {
        "cpu": {
            "usage": {"total": now.cpu_usage_ns, "kernel": now.cpu_system_ns, "user": now.cpu_user_ns},
            "throttling": {
                "periods": now.periods,
                "throttledPeriods": now.throttled_periods,
                "throttledTime": now.throttled_ns,
            },
        },
        "memory": {
            "cache": now.memory_cache,
            "usage": {"limit": _limit(now.memory_limit), "usage": now.memory_usage, "max": now.memory_peak},
            "swap": {"limit": _limit(now.swap_limit), "usage": now.swap_usage},
            "raw": {
                "rss": now.memory_rss,
                "mapped_file": now.memory_mapped_file,
                "pgfault": now.page_faults,
                "pgmajfault": now.major_page_faults,
                "inactive_file": now.memory_inactive_file,
                "oom_kill": now.oom_kills,
            },
        },
        "pids": {"current": now.pids, "limit": max(now.pids_limit, 0)},
        "blkio": {
            "ioServiceBytesRecursive": _operations(now, "read_bytes", "write_bytes"),
            "ioServicedRecursive": _operations(now, "reads", "writes"),
        },
    }


def _operations(now: Stats, reads: str, writes: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for device in now.io:
        for name, field in (("Read", reads), ("Write", writes)):
            found.append({"major": device.major, "minor": device.minor, "op": name, "value": getattr(device, field)})
    return found
