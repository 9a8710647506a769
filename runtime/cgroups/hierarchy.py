"""Which cgroup hierarchies this machine has, and where in them a container belongs.

Refuses a path that could leave its hierarchy or forge a line of procfs: `..`, NUL, newline (threats S19). Invariant: a
Place lies strictly below the mount point of its hierarchy. Three machines are known: v1, v2, and the hybrid of v1
controllers with a v2 mount at the side, whatever controllers that one has.
"""

from __future__ import annotations

from runtime.errors import RuntimeFailure
from runtime.linux.cgroup import cgroup_mounts, cgroups_of
from runtime.linux.record import Record

TYPE_CHECKING = False  # as in runtime.fields
if TYPE_CHECKING:
    from collections.abc import Mapping

V1_CONTROLLERS = frozenset(
    {"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb"}
    | {"net_cls", "net_prio", "perf_event", "rdma", "misc"}
)
V2_NAME = ""  # the key of the v2 hierarchy in proc_pid_cgroup(5), in paths() and in runc's state.json
SYSTEMD_NAME = "name=systemd"
_COMPONENT, _PATH = 255, 4096  # NAME_MAX, PATH_MAX


class Hierarchy(Record):
    """A mounted hierarchy: v1 with its controllers, or v2, where they are found out when needed."""

    mount: str
    root: str
    version: int
    controllers: tuple[str, ...]


class Place(Record):
    """A container's directory in a hierarchy; `relative` has neither leading slash nor dots."""

    hierarchy: Hierarchy
    relative: str

    @property
    def directory(self) -> str:
        return f"{self.hierarchy.mount}/{self.relative}"


_detected: list[tuple[Hierarchy, ...]] = []


def detect(mountinfo: str = "/proc/self/mountinfo") -> tuple[Hierarchy, ...]:
    """The hierarchies of this machine, v1 first. Looked up once: they do not change under a running node."""
    if mountinfo == "/proc/self/mountinfo" and _detected:
        return _detected[0]
    found: dict[tuple[str, ...], Hierarchy] = {}
    for target, root, version, options in cgroup_mounts(mountinfo):
        names = tuple(name for name in options if name in V1_CONTROLLERS or name == SYSTEMD_NAME)
        if version == 1 and not names:
            continue
        old = found.get(names)
        # A hierarchy may be mounted again elsewhere (containers' rootfs, chroots): the usual place wins.
        if old is None or (target.startswith("/sys/fs/cgroup") and not old.mount.startswith("/sys/fs/cgroup")):
            found[names] = Hierarchy(target, root, version, names)
    if not found:
        raise RuntimeFailure("find cgroups: nothing of type cgroup or cgroup2 is mounted", code="failed_precondition")
    result = tuple(sorted(found.values(), key=lambda hierarchy: (hierarchy.version, hierarchy.mount)))
    if mountinfo == "/proc/self/mountinfo":
        _detected.append(result)
    return result


def places_for(
    cgroups_path: str,
    container_id: str,
    hierarchies: tuple[Hierarchy, ...] | None = None,
    own: Mapping[str, str] | None = None,
) -> tuple[Place, ...]:
    """Where linux.cgroupsPath leads. Absolute: from the top of each hierarchy; relative: from the caller's own cgroup;
    "": the container's id there. Raises RuntimeFailure for a path that is none."""
    hierarchies = detect() if hierarchies is None else hierarchies
    wanted = clean(cgroups_path or container_id, "linux.cgroupsPath" if cgroups_path else "container id")
    if not cgroups_path and "/" in container_id:
        raise _bad("container id", container_id, "holds a slash")
    if cgroups_path.startswith("/"):
        return tuple(Place(hierarchy, wanted) for hierarchy in hierarchies)
    own = cgroups_of() if own is None else own
    pure_v2 = all(hierarchy.version == 2 for hierarchy in hierarchies)
    places = []
    for hierarchy in hierarchies:
        base = _own_path(hierarchy, own)
        if pure_v2:
            # The caller's own cgroup holds the caller, so v2 lets it have no controllers for children (cgroups(7),
            # "no internal processes"): a sibling of it can.
            base = base.rpartition("/")[0]
        places.append(Place(hierarchy, f"{base}/{wanted}" if base else wanted))
    return tuple(places)


def places_from(paths: Mapping[str, str], hierarchies: tuple[Hierarchy, ...] | None = None) -> tuple[Place, ...]:
    """The places that `paths()` named before, as state.json keeps them. Raises RuntimeFailure for a directory outside
    every hierarchy of its controller."""
    if not paths:
        return ()  # a rootless container without cgroups
    hierarchies = detect() if hierarchies is None else hierarchies
    places: dict[str, Place] = {}
    for name, directory in paths.items():
        for hierarchy in hierarchies:
            mine = name in hierarchy.controllers if hierarchy.version == 1 else name == V2_NAME
            if mine and directory.startswith(hierarchy.mount + "/"):
                relative = clean(directory[len(hierarchy.mount) :], f"cgroup path of {name or 'v2'}")
                places[directory] = Place(hierarchy, relative)
                break
        else:
            raise _bad(f"cgroup path of {name or 'v2'}", directory, "is in no cgroup hierarchy of this machine")
    return tuple(places.values())


def own_directories() -> dict[str, str]:
    """The caller's own cgroups, as `Manager.paths` names a container's: what a container is in that has none itself."""
    own, found = cgroups_of(), {}
    for hierarchy in detect():
        directory = f"{hierarchy.mount}/{_own_path(hierarchy, own)}".rstrip("/")
        found.update(dict.fromkeys(hierarchy.controllers if hierarchy.version == 1 else (V2_NAME,), directory))
    return found


def below_service(relative: str) -> bool:
    """Whether the cgroup of a unit is of a user's systemd: the machine's units lie in slices alone, a user's below the
    service that his systemd is (user@UID.service)."""
    return any(part.endswith(".service") for part in relative.split("/")[:-1])


def clean(path: str, what: str) -> str:
    """`path` without leading, trailing and double slashes. Raises RuntimeFailure."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise _bad(what, path, "names the root cgroup")
    if ".." in parts:
        raise _bad(what, path, "leads upwards with '..'")
    if "\0" in path or "\n" in path:
        raise _bad(what, path, "holds a NUL or a newline")
    try:
        size = max(len(part.encode("utf-8", "surrogateescape")) for part in parts)
    except UnicodeEncodeError:
        raise _bad(what, path, "is not valid text") from None
    if size > _COMPONENT or len(path) > _PATH:
        raise _bad(what, path, f"is too long: {_COMPONENT} bytes a part and {_PATH} together are the most")
    return "/".join(parts)


def _bad(what: str, path: str, problem: str) -> RuntimeFailure:
    return RuntimeFailure(f"{what}: {path[:120]!r} {problem}", step="cgroup", code="invalid_argument")


def _own_path(hierarchy: Hierarchy, own: Mapping[str, str]) -> str:
    """The caller's cgroup below the mount point. With a mount of a part of the hierarchy (a container with its host's
    cgroups) the mount's root is cut off; what lies outside of it cannot be reached and gives the top."""
    name = hierarchy.controllers[0] if hierarchy.version == 1 else V2_NAME
    path = own.get(name, "/")
    root = hierarchy.root.rstrip("/")
    if path != root and not path.startswith(root + "/") or "/.." in path:
        return ""
    return path[len(root) :].strip("/")
