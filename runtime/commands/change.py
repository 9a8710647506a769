"""`ocirun start`, `kill`, `delete`, `pause` and `resume`."""

from __future__ import annotations

import os

from runtime import lifecycle, state
from runtime.options import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

FLAGS = {
    "start": (),
    "kill": (Flag(("all", "a"), "bool", "send it to every process of the container"),),
    "delete": (Flag(("force", "f"), "bool", "kill it first if it runs; unknown ids are fine"),),
    "pause": (),
    "resume": (),
}
WORDS = {
    "start": "CONTAINER",
    "kill": "CONTAINER [SIGNAL]",
    "delete": "CONTAINER",
    "pause": "CONTAINER",
    "resume": "CONTAINER",
}
# signal(7), x86 and arm
_SIGNALS = (
    *("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM"),
    *("TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF"),
    *("WINCH", "IO", "PWR", "SYS"),
)
_ALIASES = {"IOT": 6, "CLD": 17, "POLL": 29}
_RTMIN, _RTMAX = 34, 64


def run(context: Context, name: str, values: Values) -> int:
    most = 2 if name == "kill" else 1
    if not 1 <= len(values.words) <= most:
        how_many = "a minimum of" if name == "kill" else "exactly"
        raise UsageError(f'"{name}" requires {how_many} 1 argument(s): {WORDS[name]}')
    container_id = values.words[0]
    if name == "start":
        _start(context, container_id)
    elif name == "kill":
        number = signal_number(values.words[1] if len(values.words) > 1 else "TERM")
        lifecycle.kill(context.root, container_id, number, everyone=values.on("all"))
    elif name == "delete":
        lifecycle.delete(context.root, container_id, force=values.on("force"), warn=context.warn)
    elif name == "pause":
        lifecycle.pause(context.root, container_id)
    else:
        lifecycle.resume(context.root, container_id)
    return 0


def _start(context: Context, container_id: str) -> None:
    manager = os.environ.get("NOTIFY_SOCKET")
    directory = state.directory(context.root, container_id)
    if not manager or not os.path.isdir(f"{directory}/{state.NOTIFY}") or not state.waits(context.root, container_id):
        lifecycle.start(context.root, container_id)
        return
    from runtime.linux.process import pidfd_open
    from runtime.notify import Notify

    pid = state.load(context.root, container_id).pid
    pidfd = pidfd_open(pid)
    try:
        notify = Notify(directory, manager, context.warn)
        try:
            lifecycle.start(context.root, container_id)
            notify.wait(pidfd, pid)
        finally:
            notify.close()
    finally:
        os.close(pidfd)


def signal_number(text: str) -> int:
    """A signal by number or name, with or without SIG; RTMIN+n and RTMAX-n too. Raises UsageError."""
    if text.isascii() and text.isdecimal() and len(text) < 4 and int(text) <= _RTMAX:
        return int(text)
    name = text.upper().removeprefix("SIG")
    if name in _SIGNALS:
        return _SIGNALS.index(name) + 1
    if name in _ALIASES:
        return _ALIASES[name]
    for start, base, sign in (("RTMIN", _RTMIN, "+"), ("RTMAX", _RTMAX, "-")):
        rest = name.removeprefix(start)
        if rest == name:
            continue
        offset = int(sign + rest[1:]) if rest[:1] == sign and rest[1:].isdecimal() and rest.isascii() else 0
        if (rest == "" or offset) and _RTMIN <= base + offset <= _RTMAX:
            return base + offset
    raise UsageError(f'unknown signal "{text:.40}"')
