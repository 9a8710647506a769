"""`ocirun spec`: a config.json to start from.

Refuses to write over a config.json. Invariant: what it writes runs here as it is, given a root filesystem.
"""

from __future__ import annotations

import os

from runtime.errors import RuntimeFailure
from runtime.options import Flag, UsageError
from runtime.state import SPEC_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.cli import Context
    from runtime.options import Values

FLAGS = {
    "spec": (
        Flag(("bundle", "b"), "str", "the bundle's directory (default: the working directory)"),
        Flag(("rootless",), "bool", "for the caller, who need not be root: a user namespace with his ids as root's"),
    ),
}
WORDS = {"spec": ""}
_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_HARDENED = ["nosuid", "noexec", "nodev"]


def run(_context: Context, _name: str, values: Values) -> int:
    import json

    if values.words:
        raise UsageError("takes no container")
    path = os.path.join(values.text("bundle", "."), "config.json")
    config = template()
    if values.on("rootless"):
        make_rootless(config, os.geteuid(), os.getegid())
    data = (json.dumps(config, indent=2) + "\n").encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise RuntimeFailure(f"File {path} exists. Remove it first", code="already_exists") from None
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    return 0


def template() -> dict[str, object]:
    """A container of a shell at a terminal, with what a container should have and no more."""
    return {
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "ocirun",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": _HARDENED},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {
                "destination": "/dev/shm",
                "type": "tmpfs",
                "source": "shm",
                "options": [*_HARDENED, "mode=1777", "size=65536k"],
            },
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _HARDENED},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_HARDENED, "ro"]},
            {
                "destination": "/sys/fs/cgroup",
                "type": "cgroup",
                "source": "cgroup",
                "options": [*_HARDENED, "relatime", "ro"],
            },
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
            "maskedPaths": [
                *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
                *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
                "/sys/devices/virtual/powercap",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def make_rootless(config: dict[str, Any], uid: int, gid: int) -> None:
    """Changes a template into one that `uid` can run without anybody's help: root inside is that user outside."""
    linux = config["linux"]
    # An own network would have nothing but a loopback, and nobody to give it more.
    kept = [entry for entry in linux["namespaces"] if entry["type"] not in ("network", "user")]
    linux["namespaces"] = [*kept, {"type": "user"}]
    linux["uidMappings"] = [{"containerID": 0, "hostID": uid, "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": gid, "size": 1}]
    del linux["resources"]
    for mount in config["mounts"]:
        if mount["destination"] == "/sys":
            # sysfs shows a network: that of the host's may be shown again only as it is.
            mount.update(type="none", source="/sys", options=["rbind", *_HARDENED, "ro"])
        mount["options"] = [word for word in mount["options"] if not word.startswith(("uid=", "gid="))]
