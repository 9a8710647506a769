"""Capabilities, seccomp, AppArmor, masked paths: what a container may do, as runtime-spec fragments.

Refuses a profile that is empty, missing or unreadable: nothing ever runs unconfined because a name was wrong
(CVE-2023-2431). Invariant: the inheritable set holds only what is ambient (CVE-2022-24769), and privilege comes from
`privileged` in the request and from nowhere else.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from cri.spec.validate import InvalidRequest
from runtime.linux.files import read_bounded
from runtime.linux.libc import KernelError
from runtime.linux.process import capget

MAX_PROFILE = 4 << 20

# linux/capability.h, in the order of their numbers.
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)


@functools.cache
def masked_paths() -> tuple[str, ...]:
    """The default masked paths, with the thermal throttle counters of every CPU here (threats S74)."""
    cpus = "/sys/devices/system/cpu"
    throttles = [f"{cpus}/{name}/thermal_throttle" for name in sorted(os.listdir(cpus)) if name[3:].isdecimal()]
    return _MASKED_PATHS + tuple(path for path in throttles if os.path.isdir(path))


@functools.cache
def held_capabilities() -> frozenset[str]:
    """What this process has: asking the kernel for more would fail, so a privileged container gets these."""
    permitted = capget()[1]
    return frozenset(name for bit, name in enumerate(CAPABILITIES) if permitted >> bit & 1)


def _capability(field: str, name: str) -> str:
    full = name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}"
    if full not in CAPABILITIES:
        raise InvalidRequest(f"capabilities.{field}: there is no capability {name[:40]!r}")
    return full


def _expand(field: str, names: Iterable[str]) -> tuple[bool, list[str]]:
    names = list(names)
    return any(n.upper() == "ALL" for n in names), [_capability(field, n) for n in names if n.upper() != "ALL"]


def capabilities(
    add: Sequence[str], drop: Sequence[str], ambient: Sequence[str], *, privileged: bool
) -> dict[str, list[str]]:
    """runtime-spec `process.capabilities`. ALL comes first in both lists; a named drop wins over a named add."""
    add_all, adds = _expand("add_capabilities", add)
    drop_all, drops = _expand("drop_capabilities", drop)
    ambient_all, ambients = _expand("add_ambient_capabilities", ambient)
    held = held_capabilities()
    if privileged:
        chosen = set(held)
    else:
        chosen = set() if drop_all else set(DEFAULT_CAPABILITIES) & held
        if add_all:
            chosen = set(held)
        chosen |= set(adds)
        chosen |= set(ambients)
        chosen -= set(drops)
    lacking = sorted(chosen - held)
    if lacking:
        raise InvalidRequest(f"capabilities: this node does not have {', '.join(lacking)} to give")
    raised = sorted(chosen) if ambient_all else sorted(set(ambients) & chosen)
    ordered = sorted(chosen)
    return {"bounding": ordered, "effective": ordered, "permitted": ordered, "inheritable": raised, "ambient": raised}


@functools.cache
def _default_profile() -> dict[str, Any]:
    from importlib import resources

    text = resources.files("cri.spec").joinpath("seccomp_default.json").read_text(encoding="utf-8")
    profile: dict[str, Any] = json.loads(text)
    return profile


def default_seccomp(granted: Iterable[str]) -> dict[str, Any]:
    """RuntimeDefault for a container with these capabilities: conditional rules are resolved, the rest stays."""
    have = frozenset(granted)
    profile = dict(_default_profile())
    rules = []
    for rule in profile["syscalls"]:
        needed = rule.get("includes", {}).get("caps", [])
        barred = rule.get("excludes", {}).get("caps", [])
        if not set(needed) <= have or set(barred) & have:
            continue
        rules.append({key: value for key, value in rule.items() if key not in ("includes", "excludes", "comment")})
    profile["syscalls"] = rules
    profile["architectures"] = profile["architectures"].get(os.uname().machine, [])
    profile.pop("comment", None)
    return profile


def localhost_seccomp(path: str) -> dict[str, Any]:
    """A profile of the node's operator, by absolute path. Raises InvalidRequest; never means unconfined."""
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidRequest(f"seccomp.localhost_ref: {path[:80]!r} must be an absolute path without '..'")
    try:
        profile = json.loads(read_bounded(-100, path, MAX_PROFILE))
    except (KernelError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"seccomp.localhost_ref: cannot use {path}: {error}") from error
    if not isinstance(profile, dict) or not isinstance(profile.get("defaultAction"), str):
        raise InvalidRequest(f"seccomp.localhost_ref: {path} is no seccomp profile: it has no defaultAction")
    return profile


@functools.cache
def apparmor_enabled() -> bool:
    """True where the kernel has AppArmor switched on."""
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read(1) == "Y"
    except OSError:
        return False
