"""A cgroup of the shims' own: who kills or limits the daemon's does not hit the pods (threats O21, S68).

Zygote and shims live in /ocid.shims of every hierarchy, v1, v2 or both, without limits. Refuses to fail a start over
it: a machine that lets us make no cgroup at the top keeps the shims where they are. Invariant: the cgroup goes with
the last process in it, as whoever ends a shim tries to remove it and the kernel refuses while it is in use.
"""

from __future__ import annotations

import os

from runtime.cgroups.hierarchy import Hierarchy, detect
from runtime.errors import RuntimeFailure
from runtime.linux.cgroup import cgroups_of

NAME = "ocid.shims"
ZYGOTE = "ocid-zygote"  # a zygote's name, and its forks' until they hold a pod
SPARE = "ocid-spare"  # those that wait for a request (runtime.shim.spare)


def leave_daemon(*, always: bool) -> None:
    """Moves this process to the shims' cgroup; unless `always` only in hierarchies where it is not at the top (what
    is at the top is in nobody's reach, and the first move costs 10 ms of RCU, cgroup_attach_lock())."""
    try:
        own = cgroups_of()
        hierarchies = detect()
    except (OSError, RuntimeFailure):
        return
    for hierarchy in hierarchies:
        path = own.get(hierarchy.controllers[0] if hierarchy.version == 1 else "", "/")
        if always or path.rstrip("/") != hierarchy.root.rstrip("/"):
            try:
                _enter(hierarchy)
            except OSError:  # read-only or delegated cgroups: staying is the only choice
                continue


def _enter(hierarchy: Hierarchy) -> None:
    directory = f"{hierarchy.mount}/{NAME}"
    os.makedirs(directory, mode=0o755, exist_ok=True)
    if "cpuset" in hierarchy.controllers:
        # A v1 cpuset takes no process before it has CPUs and memory nodes (cgroup-v1/cpusets.rst, 1.9).
        for name in ("cpuset.cpus", "cpuset.mems"):
            with open(f"{hierarchy.mount}/{name}", encoding="ascii") as file:
                value = file.read().strip()
            with open(f"{directory}/{name}", "w", encoding="ascii") as file:
                file.write(value)
    with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
        file.write(b"0")


def processes() -> set[int]:
    """Whoever is in the shims' cgroup, of those that this pid namespace knows."""
    found: set[int] = set()
    for directory in _directories():
        try:
            with open(f"{directory}/cgroup.procs", encoding="ascii") as file:
                found.update(map(int, file))
        except OSError:  # not there
            continue
    return found - {0}  # those of others


def remove_if_empty() -> None:
    """Removes the shims' cgroup where nobody is in it any more."""
    for directory in _directories():
        try:
            os.rmdir(directory)
        except OSError:  # not there, or still in use
            continue


def _directories() -> list[str]:
    try:
        return [f"{hierarchy.mount}/{NAME}" for hierarchy in detect()]
    except (OSError, RuntimeFailure):
        return []
