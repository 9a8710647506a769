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

import os

from runtime.cgroups import stats, tree
from runtime.cgroups.freezer import Freezer
from runtime.cgroups.hierarchy import V2_NAME, places_for, places_from
from runtime.errors import RuntimeFailure
from runtime.linux.signals import SIGKILL

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from runtime.cgroups.hierarchy import Place
    from runtime.cgroups.plan import Write
    from runtime.cgroups.stats import Stats
    from runtime.resources import Resources

UNIT = "systemd"  # the key of the unit's name in note()
# For the dying to be gone. A machine with ten times more to do than processors takes seconds for what is asked of it.
PATIENCE_S = 10.0


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
    where there is no v2 hierarchy; `enter()` is for the child. `late`, where it is given, is for the caller: somebody
    else moves the child, which waits."""

    __slots__ = ("_tasks", "cgroup_fd", "late")

    def __init__(self, cgroup_fd: int, tasks: list[int], late: Callable[[int], None] | None = None) -> None:
        self.cgroup_fd = cgroup_fd
        self._tasks = tasks
        self.late = late

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

    __slots__ = ("by_controller", "optional", "places", "rootless", "v2", "verify")
    adopts = False  # whether `adopt` has anything to do

    def __init__(
        self,
        places: tuple[Place, ...],
        verify: tree.Verify = tree.verify_cgroup,
        *,
        rootless: bool = False,
        optional: bool = False,
    ) -> None:
        self.verify = verify
        self.rootless = rootless
        self.optional = optional
        self.keep(places)

    def keep(self, places: tuple[Place, ...]) -> None:
        self.places = places
        self.v2 = next((place for place in places if place.hierarchy.version == 2), None)
        self.by_controller = {name: place for place in places for name in place.hierarchy.controllers}

    # ------------------------------------------------------------------------------------------------ where and who

    def paths(self) -> dict[str, str]:
        """Directories by v1 controller and "" for v2: what state.json keeps and manager_from_paths takes."""
        found = {name: place.directory for name, place in self.by_controller.items()}
        if self.v2 is not None:
            found[V2_NAME] = self.v2.directory
        return found

    def note(self) -> dict[str, str]:
        """All that manager_from_paths needs: `paths()`, and the unit's name where systemd made it."""
        return self.paths()

    def pure_v2(self) -> bool:
        """True where v2 has every controller; False on v1 and on the hybrid."""
        return self.v2 is not None and all(place.hierarchy.version == 2 for place in self.places)

    def exists(self) -> bool:
        """True while any of the directories is there."""
        return any(os.path.isdir(place.directory) for place in self.places)

    def pids(self, recursive: bool = True) -> list[int]:
        """The container's processes, zombies left out; [] when the cgroup is gone."""
        if not self.places:
            return []
        return tree.all_pids(self.main().directory, recursive)

    def main(self) -> Place:
        """The place that knows all processes: v2's, or v1's freezer, which is what stops them."""
        if self.v2 is not None and self.pure_v2():
            return self.v2
        for name in ("freezer", "pids", "memory", "devices", "cpu"):
            if name in self.by_controller:
                return self.by_controller[name]
        return self.places[0]

    # -------------------------------------------------------------------------------------------- create and destroy

    def create(self, resources: Resources) -> None:
        """Makes the directories and applies the limits. A cgroup that is there already is taken when it is empty (and
        thawed, if a crash left it frozen). On failure what was made here is gone again. Raises RuntimeFailure."""
        from runtime.cgroups import limits  # what only create and update need is not loaded for an exec

        limits.create(self, resources)

    def make(self) -> None:
        """Makes the directories and nothing else: for a cgroup that others are to come into. Raises RuntimeFailure."""
        from runtime.cgroups import limits

        limits.make(self)

    def adopt(self, pid: int) -> None:
        """For a cgroup that begins with its first process: makes it around `pid`, which waits. Here it is made."""

    def destroy(self, deadline_s: float = PATIENCE_S) -> None:
        """Removes the directories, children first; missing ones are fine. Waits at most `deadline_s` for processes
        that are just ending. Raises RuntimeFailure naming those that are not."""
        from runtime.cgroups.killer import wait_until_removable

        wait_until_removable(self.places, self.verify, deadline_s)

    # -------------------------------------------------------------------------------------------------------- limits

    def plan(self, resources: Resources) -> list[Write]:
        """The writes that `set` would do now, in order."""
        from runtime.cgroups import limits

        return [write for _, write in limits.plans(self, resources, limits.now(self))]

    def set(self, resources: Resources) -> None:
        """Puts what `resources` gives into force; the rest stays. All of it, or, when a write fails, what was before.
        Device rules are touched only when they are given. Raises RuntimeFailure."""
        from runtime.cgroups import limits

        limits.change(self, resources)

    # ----------------------------------------------------------------------------------------------------- processes

    def enter(self, pid: int) -> None:
        """Moves another process, with all its threads, into every cgroup. Slow, see the module: a child of ours comes
        in by `gate`. Raises RuntimeFailure."""
        for place in self.places:
            try:
                fd = tree.open_place(place, self.verify)
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
            for place in self.places:
                if place.hierarchy.version == 2:
                    cgroup_fd = tree.open_place(place, self.verify)
                else:
                    tasks.append(tree.open_to_write(place, "tasks", self.verify))
        except OSError as error:
            Gate(cgroup_fd, tasks).close()
            raise RuntimeFailure.of(error, step="cgroup", what=f"open cgroup {self.main().directory}") from error
        return Gate(cgroup_fd, tasks)

    def cgroup_fd(self) -> int:
        """Pure v2: an fd for CLONE_INTO_CGROUP that the caller owns, and all that is needed to be in. Else -1."""
        if self.v2 is None or not self.pure_v2():
            return -1
        return tree.open_place(self.v2, self.verify)

    def kill(self, number: int = SIGKILL, deadline_s: float = PATIENCE_S) -> bool:
        """Signals every process in here. SIGKILL is repeated, against forks and freezers, until nobody is left or the
        deadline passes; True when the cgroup is empty then. A missing cgroup is an empty one."""
        from runtime.cgroups.killer import kill_all

        v2_directory = "" if self.v2 is None else self.v2.directory
        return kill_all(number, self.pids, self.freezer(), v2_directory, deadline_s)

    def freezer(self) -> Freezer:
        place = self.by_controller.get("freezer")
        if place is not None:
            return Freezer(place.directory, 1)
        return Freezer("" if self.v2 is None else self.v2.directory, 2)

    def freeze(self, on: bool) -> None:
        """Stops everybody, or lets them go on; returns when that is so. Raises RuntimeFailure, and what could not be
        frozen whole is thawed again."""
        freezer = self.freezer()
        if not freezer.directory:
            problem = "cannot toggle freezer: cgroups not configured for container"
            raise RuntimeFailure(problem, step="cgroup", code="failed_precondition")
        freezer.freeze(on)

    def frozen(self) -> bool:
        """True while the container is frozen by `freeze`, not merely by a cgroup above it."""
        freezer = self.freezer()
        return bool(freezer.directory) and freezer.frozen()

    # ------------------------------------------------------------------------------------------------------- figures

    def stats(self, *, full: bool = True) -> Stats:
        """What the container uses; see `stats.collect`. Never fails: what cannot be read is zero."""
        directories = {name: place.directory for name, place in self.by_controller.items()}
        v2 = self.v2.directory if self.v2 is not None else ""
        return stats.collect(directories, v2 if self.pure_v2() else "", v2, full)

    def oom_kills(self) -> int:
        """How many processes of the container the kernel has killed for want of memory since the cgroup was made. One
        that was there before `create` may not start at 0: take the difference."""
        memory = self.by_controller.get("memory")
        if memory is not None:
            return stats.oom_kills_v1(memory.directory)
        return 0 if self.v2 is None else stats.oom_kills_v2(self.v2.directory)
