"""The cgroups of one container, whichever versions of cgroups this machine has.

    manager = manager_for(cgroups_path, container_id)
    manager.create(resources)              # directories and limits, or nothing
    with manager.gate() as gate:           # in the parent, before the fork
        pid, pidfd = clone3(flags, cgroup_fd=gate.cgroup_fd)
        if pid == 0: ...; gate.enter()     # in the child, while it has one thread
    manager.kill(SIGKILL); manager.destroy()

Refuses to join a cgroup that holds processes already, and paths that lead out of a hierarchy. Invariant: `create` and
`set` take effect as a whole or not at all; a manager holds no fd between calls, so it costs nothing to keep.

Why a gate: moving *another* process takes a lock over all of fork and exit, which costs an RCU grace period, 15 ms on
two idle cores (cgroup_procs_write_start in kernel/cgroup/cgroup.c). A thread that writes "0" for itself into v1's
`tasks`, or is born in a v2 cgroup (CLONE_INTO_CGROUP), needs no lock: 0.1 ms. `enter` is for whoever cannot.
"""

from __future__ import annotations

import errno
import os

from runtime.cgroups import devices, stats, tree, v1, v2
from runtime.cgroups.apply import Journal, Step, apply, busy_memory, failure
from runtime.cgroups.freezer import Freezer
from runtime.cgroups.hierarchy import V2_NAME, places_for, places_from
from runtime.cgroups.killer import SIGKILL, kill_all, wait_until_removable
from runtime.cgroups.plan import CONTROLLERS, Now, Write
from runtime.errors import RuntimeFailure
from runtime.linux.failpoint import failpoint
from runtime.linux.libc import KernelError

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from runtime.cgroups.hierarchy import Place
    from runtime.cgroups.stats import Stats
    from runtime.resources import Resources

UNIT = "systemd"  # the key of the unit's name in note()
_V2_CONTROLLERS = {name: name for name in ("cpuset", "cpu", "memory", "pids", "hugetlb")} | {"blkio": "io"}
# What a caller without the rights is told by cgroupfs, or by its mount.
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.EROFS)


def manager_for(cgroups_path: str, container_id: str, *, rootless: bool = False) -> Manager:
    """The manager of a new container: linux.cgroupsPath, or "" for a cgroup named by the id below the caller's own.
    `rootless`: device rules that may not be set are left out, and with "" cgroups that may not be made as well."""
    try:
        places = places_for(cgroups_path, container_id)
    except RuntimeFailure as failure:
        if not rootless or cgroups_path or failure.code != "failed_precondition":
            raise
        places = ()  # none is mounted
    return Manager(places, rootless=rootless, optional=rootless and not cgroups_path)


def manager_from_paths(paths: Mapping[str, str]) -> Manager:
    """The manager of a container that was made before, from what `paths()` or `note()` said then."""
    unit = paths.get(UNIT)
    if unit is None:
        return Manager(places_from(paths))
    from runtime.cgroups.systemd import SystemdManager

    return SystemdManager(places_from({name: path for name, path in paths.items() if name != UNIT}), unit)


class Gate:
    """A way into a container's cgroups, held open across a fork. `cgroup_fd` is for clone3 (CLONE_INTO_CGROUP), -1
    where there is no v2 hierarchy; `enter()` is for the child."""

    __slots__ = ("_tasks", "cgroup_fd")

    def __init__(self, cgroup_fd: int, tasks: list[int]) -> None:
        self.cgroup_fd = cgroup_fd
        self._tasks = tasks

    def enter(self) -> None:
        """Moves the calling thread, the only one of its process, into every v1 cgroup. The v2 one is entered by
        birth alone. As late as possible: what the interpreter allocates after it is the container's (threats O34)."""
        for fd in self._tasks:
            os.write(fd, b"0")

    def fds(self) -> tuple[int, ...]:
        """All fds, for a child that closes what it does not know."""
        return (*self._tasks, *((self.cgroup_fd,) if self.cgroup_fd >= 0 else ()))

    def close(self) -> None:
        fds, self.cgroup_fd, self._tasks = self.fds(), -1, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Manager:
    """See the module. `verify` says whether an fd is on the filesystem it should be on; tests bring their own."""

    __slots__ = ("_by_controller", "_optional", "_places", "_rootless", "_v2", "_verify")

    def __init__(
        self,
        places: tuple[Place, ...],
        verify: tree.Verify = tree.verify_cgroup,
        *,
        rootless: bool = False,
        optional: bool = False,
    ) -> None:
        self._verify = verify
        self._rootless = rootless
        self._optional = optional
        self._keep(places)

    def _keep(self, places: tuple[Place, ...]) -> None:
        self._places = places
        self._v2 = next((place for place in places if place.hierarchy.version == 2), None)
        self._by_controller = {name: place for place in places for name in place.hierarchy.controllers}

    # ------------------------------------------------------------------------------------------------ where and who

    def paths(self) -> dict[str, str]:
        """Directories by v1 controller and "" for v2: what state.json keeps and manager_from_paths takes."""
        found = {name: place.directory for name, place in self._by_controller.items()}
        if self._v2 is not None:
            found[V2_NAME] = self._v2.directory
        return found

    def note(self) -> dict[str, str]:
        """All that manager_from_paths needs: `paths()`, and the unit's name where systemd made it."""
        return self.paths()

    def pure_v2(self) -> bool:
        """True where v2 has every controller; False on v1 and on the hybrid."""
        return self._v2 is not None and all(place.hierarchy.version == 2 for place in self._places)

    def exists(self) -> bool:
        """True while any of the directories is there."""
        return any(os.path.isdir(place.directory) for place in self._places)

    def pids(self, recursive: bool = True) -> list[int]:
        """The container's processes, zombies left out; [] when the cgroup is gone."""
        if not self._places:
            return []
        return tree.all_pids(self._main().directory, recursive)

    def _main(self) -> Place:
        """The place that knows all processes: v2's, or v1's freezer, which is what stops them."""
        if self._v2 is not None and self.pure_v2():
            return self._v2
        for name in ("freezer", "pids", "memory", "devices", "cpu"):
            if name in self._by_controller:
                return self._by_controller[name]
        return self._places[0]

    # -------------------------------------------------------------------------------------------- create and destroy

    def create(self, resources: Resources) -> None:
        """Makes the directories and applies the limits. A cgroup that is there already is taken when it is empty (and
        thawed, if a crash left it frozen). On failure what was made here is gone again. Raises RuntimeFailure."""
        plans = self._plans(resources, Now())  # what cannot be is refused before anything is made
        policy = devices.policy(resources.devices or ())
        made: list[str] = []
        opened: dict[Place, int] = {}
        umask = os.umask(0o022)
        try:
            for place in self._places:
                try:
                    opened[place], new = tree.make_place(place, self._verify, self._preparation(place, resources))
                except OSError as error:
                    if self._optional and error.errno in _FORBIDDEN:
                        continue
                    raise
                if not new or new[-1] != place.directory:
                    self._take_over(place)
                made += new
            if len(opened) < len(self._places):
                self._keep(tuple(opened))
                plans = self._plans(resources, Now())
            failpoint("cgroup.made")
            apply([self._step(opened, place, write) for place, write in plans], None)
            self._apply_devices(opened, policy, None)
            failpoint("cgroup.limited")
        except BaseException as error:
            tree.unmake(made)
            if isinstance(error, OSError):
                raise RuntimeFailure.of(error, step="cgroup", what=f"make cgroup {self._main().directory}") from error
            raise
        finally:
            os.umask(umask)
            for fd in opened.values():
                os.close(fd)

    def _take_over(self, place: Place) -> None:
        if held := tree.all_pids(place.directory):
            raise RuntimeFailure(
                f"make cgroup {place.directory}: it holds process {', '.join(map(str, held[:10]))} already",
                step="cgroup",
                hint="linux.cgroupsPath must be this container's alone",
                code="failed_precondition",
            )
        if place is self._main():
            self._freezer().freeze(False)

    def _preparation(self, place: Place, resources: Resources) -> Callable[[int, int], None] | None:
        """What every level of a new path needs before the next one is made."""
        if place.hierarchy.version == 2:
            wanted = [
                name
                for ours, name in _V2_CONTROLLERS.items()
                if self.pure_v2() or (ours == "hugetlb" and resources.hugetlb and ours not in self._by_controller)
            ]
            if resources.rdma and self.pure_v2():
                wanted.append("rdma")
            return (lambda parent, child: _enable(parent, wanted)) if wanted else None
        return _inherit_cpuset if "cpuset" in place.hierarchy.controllers else None

    def adopt(self, pid: int) -> None:
        """For a cgroup that begins with its first process: makes it around `pid`, which waits. Here it is made."""

    def destroy(self, deadline_s: float = 2.0) -> None:
        """Removes the directories, children first; missing ones are fine. Waits at most `deadline_s` for processes
        that are just ending. Raises RuntimeFailure naming those that are not."""
        wait_until_removable(self._places, self._verify, deadline_s)

    # -------------------------------------------------------------------------------------------------------- limits

    def plan(self, resources: Resources) -> list[Write]:
        """The writes that `set` would do now, in order."""
        return [write for _, write in self._plans(resources, self._now())]

    def set(self, resources: Resources) -> None:
        """Puts what `resources` gives into force; the rest stays. All of it, or, when a write fails, what was before.
        Device rules are touched only when they are given. Raises RuntimeFailure."""
        policy = None if resources.devices is None else devices.policy(resources.devices)
        self._check_usage(resources)
        plans = self._plans(resources, self._now())
        opened: dict[Place, int] = {}
        journal = Journal()
        try:
            for place in self._places:
                opened[place] = tree.open_place(place, self._verify)
            apply([self._step(opened, place, write) for place, write in plans], journal)
            failpoint("cgroup.updated")
            if policy is not None:
                self._apply_devices(opened, policy, journal)
        except BaseException as error:
            journal.undo(error)
            if isinstance(error, OSError):
                raise RuntimeFailure.of(error, step="cgroup", what=f"update cgroup {self._main().directory}") from error
            raise
        finally:
            for fd in opened.values():
                os.close(fd)

    def _plans(self, resources: Resources, now: Now) -> list[tuple[Place, Write]]:
        plans: list[tuple[Place, Write]] = []
        for controller in CONTROLLERS:
            place = self._by_controller.get(controller)
            if place is not None:
                plans += [(place, write) for write in v1.plan(resources, controller, now)]
            elif self._v2 is not None and (self.pure_v2() or controller == "hugetlb"):
                plans += [(self._v2, write) for write in v2.plan(resources, controller, now)]
            elif wanted := v1.plan(resources, controller, now):
                problem = f"this machine has no {controller} cgroup controller"
                if self._optional or not self._places:
                    problem = f"cannot set {controller} limit: container could not join or create cgroup"
                raise RuntimeFailure(
                    f"linux.resources.{wanted[0].field}: {problem}",
                    step="cgroup",
                    code="invalid_argument",
                )
        if resources.unified and not (self.pure_v2() and self._v2 is not None):
            raise RuntimeFailure(
                f"linux.resources.unified.{resources.unified[0][0]}: cgroup v1 has no such files",
                step="cgroup",
                code="invalid_argument",
            )
        if self._v2 is not None:
            plans += [(self._v2, write) for write in v2.unified(resources.unified)]
        return plans

    def _step(self, opened: dict[Place, int], place: Place, write: Write) -> Step:
        return Step(opened[place], place.directory, write)

    def _apply_devices(self, opened: dict[Place, int], wanted: devices.Policy, journal: Journal | None) -> None:
        """Last of all: the v2 program is replaced in one system call, so nothing after it can fail."""
        place = self._by_controller.get("devices")
        if place is None:
            if self._v2 is None or not self.pure_v2():
                if self._rootless:
                    return
                raise RuntimeFailure("linux.resources.devices: this machine has no devices controller", step="cgroup")
            try:
                devices.attach(opened[self._v2], wanted)
            except KernelError as error:
                if self._rootless and error.errno in _FORBIDDEN:
                    return  # as the peers: without the rights for it, nor can the container make a device
                what = f"linux.resources.devices: limit {self._v2.directory}"
                raise RuntimeFailure.of(error, step="cgroup", what=what) from error
            return
        fd = opened[place]
        current = devices.v1_current(tree.read_at(fd, "devices.list"))
        if journal is not None:
            for file, value in reversed(devices.v1_changes(wanted, current)):
                journal.record(fd, file, [value])
        for file, value in devices.v1_changes(current, wanted):
            try:
                tree.write_at(fd, file, value)
            except OSError as error:
                if self._rootless and error.errno in _FORBIDDEN:
                    return
                if value == "a" and error.errno == errno.EINVAL and current.allow and not wanted.exceptions:
                    return  # it has cgroups below it, and all is allowed already: containerd's updates say it again
                raise failure(
                    Step(fd, place.directory, Write(file, value, "devices")), Write(file, value, "devices"), error
                ) from error

    def _now(self) -> Now:
        """What the order of an update's writes depends on."""

        def value(controller: str, file: str) -> int | None:
            place = self._by_controller.get(controller)
            if place is None:
                return None
            raw = stats.read(f"{place.directory}/{file}").strip()
            return None if not raw else -1 if raw.startswith(b"-") else stats.number(raw)

        quota, period = value("cpu", "cpu.cfs_quota_us"), value("cpu", "cpu.cfs_period_us")
        limit, both = value("memory", "memory.limit_in_bytes"), value("memory", "memory.memsw.limit_in_bytes")
        if self._v2 is not None and "memory" not in self._by_controller:
            raw = stats.read(f"{self._v2.directory}/memory.max")
            limit = stats.number(raw) if raw else None
        if self._v2 is not None and "cpu" not in self._by_controller:
            words = stats.read(f"{self._v2.directory}/cpu.max").split()
            if len(words) == 2:
                quota, period = stats.number(words[0]), stats.number(words[1])
        return Now(limit, both, quota, period)

    def _check_usage(self, resources: Resources) -> None:
        """checkBeforeUpdate: v2 takes any limit and kills what is above it, so it is looked at first."""
        limit = resources.memory.limit
        if not resources.memory.check_before_update or limit is None or limit < 0:
            return
        now = self.stats()
        if limit < now.memory_usage:
            raise RuntimeFailure(
                busy_memory(limit, now.memory_usage, now.memory_peak),
                step="cgroup",
                errno=errno.EBUSY,
                hint="checkBeforeUpdate asked for this refusal",
                code="failed_precondition",
            )

    # ----------------------------------------------------------------------------------------------------- processes

    def enter(self, pid: int) -> None:
        """Moves another process, with all its threads, into every cgroup. Slow, see the module: a child of ours comes
        in by `gate`. Raises RuntimeFailure."""
        for place in self._places:
            try:
                fd = tree.open_place(place, self._verify)
                try:
                    tree.write_at(fd, "cgroup.procs", str(pid))
                finally:
                    os.close(fd)
            except OSError as error:
                raise RuntimeFailure.of(error, step="cgroup", what=f"move {pid} into {place.directory}") from error

    def gate(self) -> Gate:
        """The quick way in for a child that is about to be forked. The caller closes it. Raises RuntimeFailure."""
        tasks: list[int] = []
        cgroup_fd = -1
        try:
            for place in self._places:
                fd = tree.open_place(place, self._verify)
                if place.hierarchy.version == 2:
                    cgroup_fd = fd
                    continue
                try:
                    tasks.append(os.open("tasks", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd))
                finally:
                    os.close(fd)
        except OSError as error:
            Gate(cgroup_fd, tasks).close()
            raise RuntimeFailure.of(error, step="cgroup", what=f"open cgroup {self._main().directory}") from error
        return Gate(cgroup_fd, tasks)

    def cgroup_fd(self) -> int:
        """Pure v2: an fd for CLONE_INTO_CGROUP that the caller owns, and all that is needed to be in. Else -1."""
        if self._v2 is None or not self.pure_v2():
            return -1
        return tree.open_place(self._v2, self._verify)

    def kill(self, number: int = SIGKILL, deadline_s: float = 2.0) -> bool:
        """Signals every process in here. SIGKILL is repeated, against forks and freezers, until nobody is left or the
        deadline passes; True when the cgroup is empty then. A missing cgroup is an empty one."""
        v2_directory = "" if self._v2 is None else self._v2.directory
        return kill_all(number, self.pids, self._freezer(), v2_directory, deadline_s)

    def _freezer(self) -> Freezer:
        place = self._by_controller.get("freezer")
        if place is not None:
            return Freezer(place.directory, 1)
        return Freezer("" if self._v2 is None else self._v2.directory, 2)

    def freeze(self, on: bool) -> None:
        """Stops everybody, or lets them go on; returns when that is so. Raises RuntimeFailure, and what could not be
        frozen whole is thawed again."""
        freezer = self._freezer()
        if not freezer.directory:
            problem = "cannot toggle freezer: cgroups not configured for container"
            raise RuntimeFailure(problem, step="cgroup", code="failed_precondition")
        freezer.freeze(on)

    def frozen(self) -> bool:
        """True while the container is frozen by `freeze`, not merely by a cgroup above it."""
        freezer = self._freezer()
        return bool(freezer.directory) and freezer.frozen()

    # ------------------------------------------------------------------------------------------------------- figures

    def stats(self) -> Stats:
        """What the container uses. Never fails: what cannot be read is zero."""
        directories = {name: place.directory for name, place in self._by_controller.items()}
        return stats.collect(directories, self._v2.directory if self._v2 is not None and self.pure_v2() else "")

    def oom_kills(self) -> int:
        """How many processes of the container the kernel has killed for want of memory since the cgroup was made. One
        that was there before `create` may not start at 0: take the difference."""
        memory = self._by_controller.get("memory")
        if memory is not None:
            return stats.oom_kills_v1(memory.directory)
        return 0 if self._v2 is None else stats.oom_kills_v2(self._v2.directory)


def _inherit_cpuset(parent: int, child: int) -> None:
    """A new v1 cpuset is empty and takes no process until it has processors and memory nodes (cpuset(7))."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not tree.read_at(child, file).strip():
            tree.write_at(child, file, tree.read_at(parent, file).strip())


def _enable(parent: int, wanted: list[str]) -> None:
    """Gives the children of a v2 cgroup the controllers that are available there. One that cannot be given (RT
    processes and cpu, processes in the cgroup itself) is left out: a limit that needs it will say so by name."""
    available = tree.read_at(parent, "cgroup.controllers").split()
    given = tree.read_at(parent, "cgroup.subtree_control").split()
    missing = [name for name in wanted if name in available and name not in given]
    if not missing:
        return
    try:
        tree.write_at(parent, "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))
    except OSError:
        for name in missing:
            try:
                tree.write_at(parent, "cgroup.subtree_control", f"+{name}")
            except OSError:
                continue
