"""Making a container's cgroups and putting limits into force there: what create and update do, and nobody else.

Refuses a cgroup that holds processes already, and what no controller of this machine can do, by the field's path and
before anything is made. Invariant: `create` and `change` take effect as a whole or not at all.
"""

from __future__ import annotations

import errno
import os

from runtime.cgroups import devices, stats, tree, v1, v2
from runtime.cgroups.apply import Journal, Step, apply, busy_memory, failure
from runtime.cgroups.plan import CONTROLLERS, Now, Write
from runtime.errors import RuntimeFailure
from runtime.linux.failpoint import failpoint
from runtime.linux.libc import KernelError

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.cgroups.hierarchy import Place
    from runtime.cgroups.manager import Manager
    from runtime.resources import Resources

_V2_CONTROLLERS = {name: name for name in ("cpuset", "cpu", "memory", "pids", "hugetlb")} | {"blkio": "io"}
# What a caller without the rights is told by cgroupfs, or by its mount.
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.EROFS)


def create(manager: Manager, resources: Resources) -> None:
    """Makes the directories and applies the limits. A cgroup that is there already is taken when it is empty (and
    thawed, if a crash left it frozen). On failure what was made here is gone again. Raises RuntimeFailure."""
    wanted = plans(manager, resources, Now())  # what cannot be is refused before anything is made
    policy = devices.policy(resources.devices or ())
    made: list[str] = []
    opened: dict[Place, int] = {}
    umask = os.umask(0o022)
    try:
        for place in manager.places:
            try:
                opened[place], new = tree.make_place(place, manager.verify, _preparation(manager, place, resources))
            except OSError as error:
                if manager.optional and error.errno in _FORBIDDEN:
                    continue
                raise
            if not new or new[-1] != place.directory:
                _take_over(manager, place)
            made += new
        if len(opened) < len(manager.places):
            manager.keep(tuple(opened))
            wanted = plans(manager, resources, Now())
        failpoint("cgroup.made")
        apply([_step(opened, place, write) for place, write in wanted], None)
        _apply_devices(manager, opened, policy, None)
        failpoint("cgroup.limited")
    except BaseException as error:
        tree.unmake(made)
        if isinstance(error, OSError):
            raise RuntimeFailure.of(error, step="cgroup", what=f"make cgroup {manager.main().directory}") from error
        raise
    finally:
        os.umask(umask)
        for fd in opened.values():
            os.close(fd)


def _take_over(manager: Manager, place: Place) -> None:
    if held := tree.all_pids(place.directory):
        raise RuntimeFailure(
            f"make cgroup {place.directory}: it holds process {', '.join(map(str, held[:10]))} already",
            step="cgroup",
            hint="linux.cgroupsPath must be this container's alone",
            code="failed_precondition",
        )
    if place is manager.main():
        manager.freezer().freeze(False)


def make(manager: Manager) -> None:
    """The directories alone, of which some may be there. Raises RuntimeFailure; then those made here are gone."""
    from runtime.resources import Resources

    made: list[str] = []
    try:
        for place in manager.places:
            fd, new = tree.make_place(place, manager.verify, _preparation(manager, place, Resources()))
            os.close(fd)
            made += new
    except OSError as error:
        tree.unmake(made)
        raise RuntimeFailure.of(error, step="cgroup", what=f"make cgroup {manager.main().directory}") from error


def give(manager: Manager, controllers: list[str]) -> None:
    """For a v2 cgroup that somebody else has made: these controllers too, where the kernel has them, from the top down.
    Raises RuntimeFailure."""
    for place in manager.places:
        try:
            fd, made = tree.make_place(place, manager.verify, lambda parent, child: _enable(parent, controllers))
        except OSError as error:
            raise RuntimeFailure.of(error, step="cgroup", what=f"open cgroup {place.directory}") from error
        os.close(fd)
        tree.unmake(made)  # it has gone meanwhile


def _preparation(manager: Manager, place: Place, resources: Resources) -> Callable[[int, int], None] | None:
    """What every level of a new path needs before the next one is made."""
    if place.hierarchy.version == 2:
        wanted = [
            name
            for ours, name in _V2_CONTROLLERS.items()
            if manager.pure_v2() or (ours == "hugetlb" and resources.hugetlb and ours not in manager.by_controller)
        ]
        if resources.rdma and manager.pure_v2():
            wanted.append("rdma")
        return (lambda parent, child: _enable(parent, wanted)) if wanted else None
    return _inherit_cpuset if "cpuset" in place.hierarchy.controllers else None


def change(manager: Manager, resources: Resources) -> None:
    """Puts what `resources` gives into force; the rest stays. All of it, or, when a write fails, what was before.
    Device rules are touched only when they are given. Raises RuntimeFailure."""
    policy = None if resources.devices is None else devices.policy(resources.devices)
    check_usage(manager, resources)
    wanted = plans(manager, resources, now(manager))
    opened: dict[Place, int] = {}
    journal = Journal()
    try:
        for place in manager.places:
            opened[place] = tree.open_place(place, manager.verify)
        apply([_step(opened, place, write) for place, write in wanted], journal)
        failpoint("cgroup.updated")
        if policy is not None:
            _apply_devices(manager, opened, policy, journal)
    except BaseException as error:
        journal.undo(error)
        if isinstance(error, OSError):
            raise RuntimeFailure.of(error, step="cgroup", what=f"update cgroup {manager.main().directory}") from error
        raise
    finally:
        for fd in opened.values():
            os.close(fd)


def plans(manager: Manager, resources: Resources, now: Now) -> list[tuple[Place, Write]]:
    plans: list[tuple[Place, Write]] = []
    for controller in CONTROLLERS:
        place = manager.by_controller.get(controller)
        if place is not None:
            plans += [(place, write) for write in v1.plan(resources, controller, now)]
        elif manager.v2 is not None and (manager.pure_v2() or controller == "hugetlb"):
            plans += [(manager.v2, write) for write in v2.plan(resources, controller, now)]
        elif wanted := v1.plan(resources, controller, now):
            problem = f"this machine has no {controller} cgroup controller"
            if manager.optional or not manager.places:
                problem = f"cannot set {controller} limit: container could not join or create cgroup"
            raise RuntimeFailure(
                f"linux.resources.{wanted[0].field}: {problem}",
                step="cgroup",
                code="invalid_argument",
            )
    if resources.unified and not (manager.pure_v2() and manager.v2 is not None):
        raise RuntimeFailure(
            f"linux.resources.unified.{resources.unified[0][0]}: cgroup v1 has no such files",
            step="cgroup",
            code="invalid_argument",
        )
    if manager.v2 is not None:
        plans += [(manager.v2, write) for write in v2.unified(resources.unified)]
    return plans


def _step(opened: dict[Place, int], place: Place, write: Write) -> Step:
    return Step(opened[place], place.directory, write)


def _apply_devices(manager: Manager, opened: dict[Place, int], wanted: devices.Policy, journal: Journal | None) -> None:
    """Last of all: the v2 program is replaced in one system call, so nothing after it can fail."""
    place = manager.by_controller.get("devices")
    if place is None:
        if manager.v2 is None or not manager.pure_v2():
            if manager.rootless:
                return
            raise RuntimeFailure("linux.resources.devices: this machine has no devices controller", step="cgroup")
        try:
            from runtime.cgroups import devices_v2  # v1 has files for it

            devices_v2.attach(opened[manager.v2], wanted)
        except KernelError as error:
            if manager.rootless and error.errno in _FORBIDDEN:
                return  # as the peers: without the rights for it, nor can the container make a device
            what = f"linux.resources.devices: limit {manager.v2.directory}"
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
            if manager.rootless and error.errno in _FORBIDDEN:
                return
            if value == "a" and error.errno == errno.EINVAL and current.allow and not wanted.exceptions:
                return  # it has cgroups below it, and all is allowed already: containerd's updates say it again
            raise failure(
                Step(fd, place.directory, Write(file, value, "devices")), Write(file, value, "devices"), error
            ) from error


def now(manager: Manager) -> Now:
    """What the order of an update's writes depends on."""

    def value(controller: str, file: str) -> int | None:
        place = manager.by_controller.get(controller)
        if place is None:
            return None
        raw = stats.read(f"{place.directory}/{file}").strip()
        return None if not raw else -1 if raw.startswith(b"-") else stats.number(raw)

    quota, period = value("cpu", "cpu.cfs_quota_us"), value("cpu", "cpu.cfs_period_us")
    limit, both = value("memory", "memory.limit_in_bytes"), value("memory", "memory.memsw.limit_in_bytes")
    if manager.v2 is not None and "memory" not in manager.by_controller:
        raw = stats.read(f"{manager.v2.directory}/memory.max")
        limit = stats.number(raw) if raw else None
    if manager.v2 is not None and "cpu" not in manager.by_controller:
        words = stats.read(f"{manager.v2.directory}/cpu.max").split()
        if len(words) == 2:
            quota, period = stats.number(words[0]), stats.number(words[1])
    return Now(limit, both, quota, period)


def check_usage(manager: Manager, resources: Resources) -> None:
    """checkBeforeUpdate: v2 takes any limit and kills what is above it, so it is looked at first."""
    limit = resources.memory.limit
    if not resources.memory.check_before_update or limit is None or limit < 0:
        return
    now = manager.stats()
    if limit < now.memory_usage:
        raise RuntimeFailure(
            busy_memory(limit, now.memory_usage, now.memory_peak),
            step="cgroup",
            errno=errno.EBUSY,
            hint="checkBeforeUpdate asked for this refusal",
            code="failed_precondition",
        )


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
