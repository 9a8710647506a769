"""What a kubelet's log says of errors. Every error line (klog's E and F) must be one of those listed here, each with
the reason why it says nothing against the runtime; and so must every line of lower severity that carries an error of
the runtime's calls. Lines about a runtime that does not answer are fine while it is known not to be there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

# klog: E1126 15:30:43.123456 pid file.go:123] message
BEGIN = re.compile(r"^(?=[IWEF]\d{4} )", re.MULTILINE)
LINE = re.compile(r"^([IWEF])(\d{4} \d\d:\d\d:\d\d\.\d{6}) +\d+ ([a-z0-9_.-]+\.go):\d+\] (.*)", re.DOTALL)
RUNTIME_ERROR = re.compile(r"rpc error|code = ")
ABSENT = re.compile(
    r"connection refused|no such file or directory|Unavailable|connection error|EOF|reset by peer"
    r"|Failed to stop sandbox"
)

# Pattern of "FILE MESSAGE" -> why it may be there.
ALLOWED: dict[str, str] = {
    # What every kubelet says.
    r"the id is empty": "it asks for statistics of no pod, to see whether the call is there at all",
    r"Skipping pod synchronization.*(PLEG is not healthy|status check may not have completed)": "it has just begun",
    r"Stats initialization may not have completed yet": "it has just begun",
    r"Failed to get system container stats.*unable to find data in memory cache": "likewise, of its own cgroup",
    r"Mount failed: exit status 32.*\bnoswap\b": "it tries whether a tmpfs may be kept off the swap: since Linux 6.4",
    r"Failed to wait until node is registered.*context canceled": "it was ended before that",
    r"checkpoint is not found": "it starts without one",
    r"no imagefs label for configured runtime": "it has such labels for CRI-O alone, and says so to all others",
    r"failed to check if node is newer": "it has no node object without an API server",
    r"Failed to find cgroups of kubelet.*not unified": "the cgroups it is born in are this machine's matter",
    # It removes containers from more than one of its workers, and asks for them in yet another: whoever is later hears
    # that there is none, as from every runtime.
    r"ContainerStatus from runtime service failed.*NotFound": "removed by another of its workers",
    r"(DeleteContainer returned error|Error getting ContainerStatus|Failed to monitor images).*NotFound": "likewise",
    # It probes, and rotates logs, until a container's end is known to it.
    r"ExecSync cmd from runtime service failed.*(the container has ended|a stopped container)": "it has, meanwhile",
    r"reopen the log of .*the container has ended": "likewise, and the CRI lets a runtime refuse it then",
    r"code = Canceled desc = context canceled": "its own call, cancelled by its own end",
    # As a member of a cluster.
    r"""nodes? \\*"node0\\*" not found""": "it has just joined, and the node is not there yet",
    r"failed to read memory cgroup (config|limits) for the pod.*no such file": "the pod has ended",
    r"Failed creating a mirror pod.*already exists": "it has begun anew, and knows of it a moment later",
    r"(mirror_client|mirror_pod|Failed creating a mirror pod).*context canceled": "its own call, cancelled by its end",
    r"conn.go .*use of closed network connection": "its connection to the API server, which it has closed itself",
    r"upgradeaware.go .*websocket: close 1006": "hands.port_forward: kubectl was killed",
    r"upgradeaware.go .*client to backend.*read tcp \S+:10250->\S+ read: connection reset": "likewise, on its own port",
    # What the steps are about.
    r"runAsNonRoot and image will run as root": "confinement.identity: it must refuse",
    r"/no/such/command": "lifecycle.exits: there is none",
    r"ListAndWatch ended unexpectedly.*ocid.invalid": "devices.plugged: the plugin has ended",
    r"CheckpointContainer from runtime service failed.*(err=<|criu failed|file not found)": "checkpoint: it must",
    r"ExecSync.*DeadlineExceeded.*sleep.*54321": "probes.hanging: it must be ended",
    r"CrashLoopBackOff.*pod=(backoff|init-fails|empty-dirs|exits|liveness|(kubelet|ocid|both)-ends|resized)[-_]": (
        "their containers end on purpose"
    ),
    r"Failed while waiting for all the volumes .*unmount.*default/deaf": "shutdown: it is killed when the time is over",
    r"eviction_manager.go .*(cannot evict a critical pod|no pods are active to evict)": "static pods are",
}


@dataclass(frozen=True, slots=True)
class Absence:
    """From when until when the runtime was away."""

    since: datetime
    until: datetime


def scan(text: str, absences: Sequence[Absence]) -> list[str]:
    """The lines that nothing explains, each once with how often it came."""
    found: dict[str, tuple[str, int]] = {}
    for severity, when, file, message in _entries(text):
        if severity not in "EF" and not RUNTIME_ERROR.search(message):
            continue
        if any(re.search(pattern, f"{file} {message}", re.DOTALL) for pattern in ALLOWED):
            continue
        away = any(absence.since <= when <= absence.until for absence in absences)
        if away and ABSENT.search(message):
            continue
        first = message.partition("\n")[0]
        key = re.sub(r"[0-9a-f]{8,}|\d+", "#", f"{file} {first}")
        line, count = found.get(key, (f"{severity} {file} {first}", 0))
        found[key] = line, count + 1
    return [f"{count} × {line[:600]}" for line, count in found.values()]


def _entries(text: str) -> Iterable[tuple[str, datetime, str, str]]:
    """Severity, time, file and message, which may have more lines than one."""
    for entry in BEGIN.split(text):
        if match := LINE.match(entry):
            # klog writes no year, and the time of day as this machine has it.
            when = datetime.strptime(f"{datetime.now().year}{match[2]}", "%Y%m%d %H:%M:%S.%f")
            yield match[1], when, match[3], match[4].strip()
