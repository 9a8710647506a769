"""Which cgroups an exec enters: the container's, cgroups below them that --cgroup names, or the init's own below them.

Refuses a name that leads out of the container's cgroup (threats S19), and makes none: it must be there. Invariant: each
directory that is answered is one of state.json's or below it.
"""

from __future__ import annotations

import os

from runtime.cgroups.hierarchy import V2_NAME, below_service, clean
from runtime.cgroups.manager import Gate, Manager, manager_from_paths
from runtime.cgroups.stats import read
from runtime.errors import RuntimeFailure
from runtime.linux.cgroup import cgroups_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.cgroups.hierarchy import Place
    from runtime.state import State


def parse(words: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The values of --cgroup: one PATH, or CONTROLLER[,CONTROLLER…]:PATH once or more. Raises RuntimeFailure."""
    words = list(words)
    found: dict[str, str] = {}
    for word in words:
        controllers, colon, path = word.partition(":")
        if not colon:
            if len(words) != 1:
                raise _wrong(f"{word[:80]} (missing <controller>: prefix)")
            return (("", word),)
        for name in controllers.split(","):
            if not name:
                raise _wrong(f"{word[:80]} (empty <controller> prefix)")
            if name in found:
                raise _wrong(f"controller {name[:40]} specified multiple times")
            found[name] = path
    return tuple(found.items())


def _wrong(problem: str) -> RuntimeFailure:
    return RuntimeFailure(f"invalid --cgroup argument: {problem}", code="invalid_argument")


def gate(facts: State, wanted: tuple[tuple[str, str], ...], own: Manager) -> Gate:
    """The way into `manager`'s cgroups. Raises RuntimeFailure."""
    chosen = manager(facts, wanted, own)
    place = chosen.v2
    if not facts.systemd_unit or place is None or not below_service(place.relative) or _may_enter(place):
        return chosen.gate()
    from runtime.cgroups.systemd import SystemdManager

    unit = facts.manager()
    assert isinstance(unit, SystemdManager)
    below = place.directory.removeprefix(unit.main().directory)
    return Gate(-1, [], lambda pid: unit.attach(pid, below))


def _may_enter(place: Place) -> bool:
    """Whether a process of the caller's may be born in a cgroup of his: it takes the right to move processes in all
    that his own is in as well (cgroups(7), "Delegation containment"). A user's session is not below his systemd's
    service, and what both are in is root's."""
    own = cgroups_of().get(V2_NAME, "/").removeprefix(place.hierarchy.root.rstrip("/"))
    common = os.path.commonpath((own, f"/{place.relative}"))
    return os.access(f"{place.hierarchy.mount}{common}/cgroup.procs", os.W_OK)


def manager(facts: State, wanted: tuple[tuple[str, str], ...], own: Manager) -> Manager:
    """The cgroups to enter; `own` is the manager of the container's. Raises RuntimeFailure."""
    paths = dict(facts.cgroup_paths)
    if not wanted:
        beside = _beside_init(facts, paths)
        return own if beside == paths else manager_from_paths(beside)
    for controller, path in wanted:
        if controller and controller not in paths:
            raise RuntimeFailure(f"unknown controller {controller[:40]} in --cgroup", code="invalid_argument")
        base = dict(facts.cgroup_paths).get(controller)
        for name, directory in facts.cgroup_paths:
            # Controllers that share a hierarchy share the way through it.
            if not controller or directory == base:
                paths[name] = _below(directory, path)
    return manager_from_paths(paths)


def _below(directory: str, path: str) -> str:
    if ".." in path.split("/"):
        raise RuntimeFailure(f"{path[:80]} is not a sub cgroup path", code="invalid_argument")
    return directory if not path.strip("/.") else f"{directory}/{clean(path, '--cgroup')}"


def _beside_init(facts: State, paths: dict[str, str]) -> dict[str, str]:
    """A v2 cgroup that gives controllers to its children takes no process itself (cgroups(7)): a container that did so,
    as systemd does, has moved its init below, and an exec goes there."""
    top = paths.get(V2_NAME)
    if top is None or not read(f"{top}/cgroup.subtree_control").strip():
        return paths
    own = cgroups_of(facts.pid).get(V2_NAME, "").strip("/")
    inside = f"/{own}/".partition(f"/{top.rpartition('/')[2]}/")[2].strip("/")
    return {**paths, V2_NAME: f"{top}/{clean(inside, 'cgroup of the init')}"} if inside else paths
