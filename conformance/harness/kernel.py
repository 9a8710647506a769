"""What the kernel shows of a container, read from outside: /proc, mount tables, cgroup directories. And waiting."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CGROUPS = Path("/sys/fs/cgroup")


def eventually(probe: Callable[[], T], what: str, seconds: float = 15.0) -> T:
    """The first true value of `probe`, asked again every few milliseconds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def proc(pid: int, name: str) -> str:
    """The text of a file below /proc/PID."""
    return Path(f"/proc/{pid}/{name}").read_text(errors="replace")


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status, by key."""
    return dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines() if ":\t" in line)


def caps(pid: int, kind: str) -> int:
    """One of the capability sets of a process: Inh, Prm, Eff, Bnd or Amb."""
    return int(status(pid)[f"Cap{kind}"], 16)


def namespace(pid: int | str, kind: str) -> str:
    """Which namespace of a kind (as in /proc/PID/ns) a process is in."""
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def alive(pid: int) -> bool:
    """True while the process has not ended; a zombie has."""
    try:
        return proc(pid, "stat").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes() -> list[int]:
    """Every process of this pid namespace that has not ended."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and alive(int(name))]


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo. `options` are those of the mount, `superblock` those of its filesystem."""

    target: str
    root: str
    options: frozenset[str]
    propagation: frozenset[str]
    kind: str
    source: str
    superblock: frozenset[str]


def mounts(pid: int | str = "self") -> list[MountPoint]:
    """The mount table that a process sees, in mount order."""
    return list(parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_text()))


def parse_mountinfo(text: str) -> Iterator[MountPoint]:
    """Lines of /proc/PID/mountinfo (proc_pid_mountinfo(5))."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, root, target, options, *tags = before.split(" ")
        kind, source, superblock = (after.split(" ") + ["", ""])[:3]
        yield MountPoint(
            target=_unescape(target),
            root=_unescape(root),
            options=frozenset(options.split(",")),
            propagation=frozenset(tag.split(":")[0] for tag in tags),
            kind=kind,
            source=_unescape(source),
            superblock=frozenset(superblock.split(",")),
        )


def mount_at(target: str, pid: int | str = "self") -> MountPoint:
    """The topmost mount at a path, as a process sees it."""
    found = [point for point in mounts(pid) if point.target == target]
    assert found, f"nothing is mounted at {target}: {[point.target for point in mounts(pid)]}"
    return found[-1]


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


# ------------------------------------------------------------------------------------------------------- cgroups


def unified() -> bool:
    """True when cgroup v2 is all there is."""
    return (CGROUPS / "cgroup.controllers").exists()


@functools.cache
def v1_controllers() -> dict[str, Path]:
    """Where each v1 controller is mounted (`name=` hierarchies too)."""
    found = {}
    for point in mounts():
        if point.kind == "cgroup":
            for option in point.superblock:
                if option not in ("rw", "ro", "xattr", "clone_children", "noprefix"):
                    found[option] = Path(point.target)
    return found


def hierarchies() -> list[Path]:
    """Where every hierarchy is mounted, v1 and v2, each once."""
    return sorted({Path(point.target) for point in mounts() if point.kind in ("cgroup", "cgroup2")})


def cgroup(controller: str, path: str) -> Path:
    """The directory of a cgroup (as linux.cgroupsPath names it) in the hierarchy of a controller."""
    top = CGROUPS if unified() else v1_controllers()[controller]
    return top / path.lstrip("/")


def own_cgroups() -> set[str]:
    """Where this process is in the hierarchies, without "/" (cgroups(7), /proc/PID/cgroup): a path that does not begin
    with a slash is taken from there."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return {line.split(":", 2)[2].strip("/") for line in lines} - {""}


def remove_cgroup(path: str) -> list[str]:
    """Removes a cgroup and those below it in every hierarchy, and below the caller's own cgroups; which of them could
    not be removed."""
    left = []
    tops = [top / own for top in hierarchies() for own in ("", *own_cgroups())]
    for top in tops:
        for directory, _, _ in os.walk(top / path.lstrip("/"), topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                left.append(f"{directory} ({os.strerror(error.errno or 0)})")
    return left
