"""What a machine holds that a container runtime could leave behind, compared before and after.

`Machine.now()` reads mounts, network namespaces, links, nftables tables, cgroup directories and processes; `left_over`
says in sentences what is new. It only looks and never cleans up. With `marks` it reports only what carries one of them
(a path below a test's directory, a process started with a test's environment), so that a comparison stays true while
somebody else uses the same machine. Without, everything new counts but what a machine does on its own: processes of
others (a timer, a login), and the cgroups that hold nothing but those.

    python3 -m conformance.leaks save FILE      writes what is there now
    python3 -m conformance.leaks compare FILE   prints what is new since then; exit code 1 if anything is
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NETNS_DIRECTORIES = (Path("/run/netns"), Path("/run/ocid/netns"))
# iptables-nft makes these by looking at them, and the reference plugins, which tests compare with, share chains in them
# that they never remove. ocid has a table of its own.
IPTABLES = frozenset(
    f"table {family} {name}" for family in ("ip", "ip6") for name in ("nat", "filter", "mangle", "raw", "security")
)
# Names that ocid gives its processes, and the peers that tests start.
OUR_NAMES = ("ocid", "ocirun", "shim", "containerd", "docker-registry", "runc", "crun", "crictl")
# What a process that was just killed takes to be reaped, and its cgroup to go after it.
SETTLE_S = 20.0
# Threads of the kernel come and go on their own: their parent is kthreadd, always pid 2.
KTHREADD = 2
ZYGOTE, SPARE = "ocid-zygote", "ocid-spare"  # runtime.shim.spare
INIT = 1


@dataclass(frozen=True, slots=True)
class Process:
    """One process, by pid and start time (clock ticks): a pid alone is used again."""

    pid: int
    started_ticks: int
    parent: int
    name: str
    command: str
    ended: bool = False  # a zombie: nobody has waited for it yet
    inode: int = 0  # of its directory in /proc, which is no other process's


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything of this mount, network and pid namespace that could be left over."""

    mounts: tuple[str, ...]
    namespaces: frozenset[str]
    links: frozenset[str]
    tables: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[Process]

    @classmethod
    def now(cls, *, shared: bool = True, since: Machine | None = None) -> Machine:
        """Reads all of it; what vanishes while being read is not there. Without `shared` what no mark can be on is left
        out: the tables of nftables, for which a program must be started, and cgroups, which are many. A process that
        was there in `since` is told as it was then: who compares the two wants no more of it, and two files are read
        for each other one."""
        return cls(
            mounts=_mounts(Path("/proc/self/mountinfo").read_text()),
            namespaces=frozenset(_namespaces()),
            # Not /sys/class/net: sysfs shows the namespace it was mounted in.
            links=frozenset(name for _, name in socket.if_nameindex()),
            tables=frozenset(_tables() if shared else ()),
            cgroups=frozenset(_cgroups() if shared else ()),
            processes=frozenset(_processes(since.processes if since else ())),
        )


def left_over(before: Machine, after: Machine, marks: Sequence[str] = ()) -> list[str]:
    """One sentence for each thing of `after` that `before` did not have and that carries one of `marks` (all, if none).

    A process counts when it descends from this one, carries a mark in its environment or command line, and without
    marks also when it looks like a part of ocid or like a container: by its name, or by a pid namespace of its own.
    One that has ended and is pid 1's to wait for does not: nobody else can, and a slow init is not what is tested.
    """
    known = {(process.pid, process.started_ticks) for process in before.processes}
    mine = _descendants(after.processes, os.getpid())
    fresh = [one for one in after.processes if (one.pid, one.started_ticks) not in known and one.pid != os.getpid()]
    fresh = [one for one in fresh if not (one.ended and one.parent == INIT != os.getpid())]
    fresh = _without_spares(before, fresh)
    processes = [one for one in fresh if one.pid in mine or _is_ours(one, marks)]
    counted = frozenset(one.pid for one in processes)
    found = [f"mount {mount}" for mount in _new(before.mounts, after.mounts) if _marked(mount, marks)]
    found += [f"network namespace {one}" for one in sorted(after.namespaces - before.namespaces) if _marked(one, marks)]
    found += [
        f"cgroup {path}"
        for path in sorted(after.cgroups - before.cgroups)
        if _marked(path, marks) and not _holds_only_strangers(path, counted)
    ]
    if not marks:
        found += [f"network link {name}" for name in sorted(after.links - before.links)]
        found += [f"nftables table {name}" for name in sorted(after.tables - before.tables)]
    for process in sorted(processes, key=lambda process: process.pid):
        found.append(f"process {process.pid} ({process.name}): {process.command[:120]}")
    return found


def _without_spares(before: Machine, fresh: Sequence[Process]) -> list[Process]:
    """A zygote's spare shim, and its helper, are forked anew after each pod, or are about to be when `before` looks."""
    there_may_be = {one.command: 2 for one in before.processes if one.name in (ZYGOTE, SPARE)}
    left = []
    for one in fresh:
        if one.name == SPARE and there_may_be.get(one.command):
            there_may_be[one.command] -= 1
        else:
            left.append(one)
    return left


def settled(before: Machine) -> list[str]:
    """What is left over once a daemon has gone, after what was just ended had its time; for whoever is in namespaces of
    their own. The nftables table stays as long as a node lives; cgroups are the one thing that has no namespace: others
    on this machine may make some meanwhile, but not where OCID_REQUIRE_ALL says that it is CI's."""
    ignored = ("nftables table",) if os.environ.get("OCID_REQUIRE_ALL") else ("nftables table", "cgroup")
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = [line for line in left_over(before, Machine.now()) if not line.startswith(ignored)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _is_ours(process: Process, marks: Sequence[str]) -> bool:
    if marks:
        return _marked(process.command + _environment(process.pid), marks)
    return process.name.startswith(OUR_NAMES) or _pid_namespace(process.pid) not in ("", _pid_namespace(os.getpid()))


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _holds_only_strangers(cgroup: str, counted: frozenset[int]) -> bool:
    """True for a cgroup with processes of which none counts: a session or a service of the machine."""
    pids: set[int] = set()
    for directory, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):
            pids.update(map(int, Path(directory, "cgroup.procs").read_text().split()))
    return bool(pids) and not pids & counted


def _new(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """`after` less `before`, counting: two equal mounts on top of each other are two."""
    if before == after:
        return []
    rest = list(before)
    fresh = []
    for item in after:
        if item in rest:
            rest.remove(item)
        else:
            fresh.append(item)
    return fresh


def _marked(text: str, marks: Sequence[str]) -> bool:
    return not marks or any(mark in text for mark in marks)


@functools.lru_cache(maxsize=2)  # mostly it is the same as at the last look
def _mounts(mountinfo: str) -> tuple[str, ...]:
    found = []
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        # proc_pid_mountinfo(5): field 5 is the mount point; after the dash come type and source.
        found.append(f"{head.split()[4]} ({' '.join(tail.split()[:2])})")
    return tuple(found)


def _namespaces() -> Iterable[str]:
    for directory in NETNS_DIRECTORIES:
        if directory.is_dir():
            yield from (str(path) for path in directory.iterdir())


def _tables() -> Iterable[str]:
    result = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    return [line for line in result.stdout.splitlines() if line not in IPTABLES]


def _cgroups() -> Iterable[str]:
    queue = [str(CGROUPS)]
    while queue:
        with contextlib.suppress(FileNotFoundError), os.scandir(queue.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield entry.path
                    if entry.stat(follow_symlinks=False).st_nlink > 2:  # or there are files only, sixty of them
                        queue.append(entry.path)


def _processes(known: Iterable[Process] = ()) -> Iterable[Process]:
    before = {(one.pid, one.inode): one for one in known}
    with os.scandir("/proc") as entries:
        found = [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdigit()]
    for pid, inode in found:
        if (pid, inode) in before:
            yield before[pid, inode]
            continue
        try:
            stat = contents(f"/proc/{pid}/stat").decode("utf-8", "replace")
            command = contents(f"/proc/{pid}/cmdline")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # proc_pid_stat(5): the name is in parentheses and may hold spaces and parentheses itself.
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        parent, started_ticks = int(rest[1]), int(rest[19])
        if KTHREADD in (parent, pid):
            continue
        words = command.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        yield Process(pid, started_ticks, parent, name, words, rest[0] in "ZX", inode)


def contents(path: str) -> bytes:
    """All of a file below /proc. Two of them for each process: without a Path and three buffers that is a third."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = read = os.read(fd, 1 << 16)
        while read:
            read = os.read(fd, 1 << 16)
            found += read
        return found
    finally:
        os.close(fd)


def _descendants(processes: Iterable[Process], root: int) -> frozenset[int]:
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    queue = [root]
    while queue:
        fresh = children.get(queue.pop(), [])
        found.update(fresh)
        queue.extend(fresh)
    return frozenset(found)


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _save(file: Path) -> None:
    now = Machine.now()
    document = {
        "mounts": list(now.mounts),
        "namespaces": sorted(now.namespaces),
        "links": sorted(now.links),
        "tables": sorted(now.tables),
        "cgroups": sorted(now.cgroups),
        "processes": [list(astuple(one)) for one in now.processes],
    }
    file.write_text(json.dumps(document))


def _load(file: Path) -> Machine:
    document = json.loads(file.read_text())
    return Machine(
        mounts=tuple(document["mounts"]),
        namespaces=frozenset(document["namespaces"]),
        links=frozenset(document["links"]),
        tables=frozenset(document["tables"]),
        cgroups=frozenset(document["cgroups"]),
        processes=frozenset(Process(*fields) for fields in document["processes"]),
    )


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("save", "compare"):
        print("usage: python3 -m conformance.leaks save|compare FILE", file=sys.stderr)
        return 2
    file = Path(arguments[1])
    if arguments[0] == "save":
        _save(file)
        return 0
    before = _load(file)
    # The shell that calls us, and what it runs beside us, is not left over.
    ancestors = _ancestors(os.getpid())
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = Machine.now()
        mine = frozenset(process for process in after.processes if process.pid not in ancestors)
        found = left_over(before, replace(after, processes=mine))
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for line in found:
        print(f"left over: {line}")
    return 1 if found else 0


def _ancestors(pid: int) -> frozenset[int]:
    parents = {process.pid: process.parent for process in _processes()}
    found = set()
    while pid in parents:
        found.add(pid)
        pid = parents[pid]
    return frozenset(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
