"""What is known of a container between two commands: <root>/<id>/state.json, with the keys that readers of runc's want.

    <root>/                0700
      <id>/                0700; there from the first moment of create to the last of delete
        state.json         written once the init is ready; atomically, without fsync: <root> does not outlive a boot
        cgroup.json        where the cgroup is going to be, from before it is made
        intel_rdt.json     the same for the class of service, with linux.intelRdt
        seccomp.bpf        the filter that confines the init, and every process that joins it
        start.sock         the init waits here; gone once it was started
        held               a restored container that stands still until it is started (runtime/unstarted.py)
        notify/            only with NOTIFY_SOCKET: what the container sees at /run/notify (runtime/notify.py)

Refuses an id that could be a path. Invariant: facts only; what a container *is* (`status`) is asked of the kernel each
time, by pid and start time, so a reused pid is never taken for a container.
"""

from __future__ import annotations

import os
import stat

from runtime.errors import RuntimeFailure
from runtime.fields import Fields, decode, encode
from runtime.linux.files import write_durable
from runtime.linux.process import is_running, start_time
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from runtime.cgroups.manager import Manager
    from runtime.intel_rdt import Group
    from runtime.memory_policy import MemoryPolicy
    from runtime.namespaces import Namespace
    from runtime.spec import Spec
    from runtime.spec_hooks import Hook

SPEC_VERSION = "1.3.0"  # of runtime-spec's "State", which `describe` follows
START_SOCKET = "start.sock"
HELD = "held"
NOTIFY = "notify"
FILTER = "seccomp.bpf"
NO_FILTER = -1
_FILE = "state.json"
_MAX_STATE = 16 << 20
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
# namespaces(7) names as runc's state.json has them, and the files under /proc/PID/ns.
NAMESPACE_KEYS = {
    "NEWUSER": "user",
    "NEWPID": "pid",
    "NEWNET": "net",
    "NEWIPC": "ipc",
    "NEWUTS": "uts",
    "NEWNS": "mnt",
    "NEWCGROUP": "cgroup",
    "NEWTIME": "time",
}


class State(Record):
    """Facts of one container. `created` is RFC 3339, `started` clock ticks since boot, `annotations` config.json's,
    `namespaces` those of config.json by runc's names, with their paths, `cgroups_path` as it was asked for,
    `filter_flags` those its seccomp filter was loaded with (NO_FILTER: it has none), `listener_path` who decides on the
    calls that it notifies ("": it notifies none), `memory_policy` that of every process which joins; the
    hooks are those that are still to come, as config.json had them; `systemd_unit` is "" for a cgroup that was made
    directly; `descriptors` are what its fds 0, 1 and 2 were when it was made."""

    id: str
    pid: int
    started: int
    created: str
    bundle: str
    rootfs: str
    version: str
    cgroup_paths: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    owner: int = 0
    filter_flags: int = NO_FILTER
    listener_path: str = ""
    listener_metadata: str = ""
    intel_rdt: Group | None = None
    memory_policy: MemoryPolicy | None = None
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()
    systemd_unit: str = ""
    personality: int | None = None
    no_new_keyring: bool = False
    readonly: bool = False
    hostname: str = ""
    namespaces: tuple[tuple[str, str], ...] = ()
    cgroups_path: str = ""
    descriptors: tuple[str, ...] = ()

    def manager(self) -> Manager:
        """The container's cgroups."""
        from runtime.cgroups.manager import UNIT, manager_from_paths

        unit = {UNIT: self.systemd_unit} if self.systemd_unit else {}
        return manager_from_paths({**dict(self.cgroup_paths), **unit})


def namespaces_of(namespaces: Iterable[Namespace]) -> tuple[tuple[str, str], ...]:
    """What `State.namespaces` holds of a spec's."""
    names = {"network": "net", "mount": "mnt"}
    keys = {name: key for key, name in NAMESPACE_KEYS.items()}
    return tuple((keys[names.get(entry.kind, entry.kind)], entry.path) for entry in namespaces)


def descriptors(stdio: tuple[int, int, int]) -> tuple[str, ...]:
    """What these are, as /proc names them: a checkpoint tells by it which pipes to put new ones in the place of."""
    return tuple(_name(fd) for fd in stdio)


def _name(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""  # closed by the caller, who may


def check_id(container_id: str) -> str:
    """The id itself. Raises RuntimeFailure unless it is a file name of harmless characters (threats S19)."""
    if not container_id:
        raise RuntimeFailure("container id cannot be empty", code="invalid_argument")
    if (
        len(container_id) > 1024
        or container_id in (".", "..")
        or container_id[0] in ".-"
        or set(container_id) - _ID_CHARACTERS
    ):
        raise RuntimeFailure(
            f"invalid container ID format: {container_id[:80]!r}",
            hint="letters, digits and _+-. only, not starting with . or -",
            code="invalid_argument",
        )
    return container_id


def directory(root: str, container_id: str) -> str:
    """The container's directory; it may not be there."""
    return f"{root}/{check_id(container_id)}"


def reserve(root: str, container_id: str) -> str:
    """Makes the container's directory, and so takes the id. Raises RuntimeFailure when it is taken."""
    path = directory(root, container_id)
    try:
        if not os.path.isdir(root):
            os.makedirs(root, 0o700, exist_ok=True)
            if os.geteuid() != 0:
                os.chmod(root, 0o1700)  # sticky: what cleans XDG_RUNTIME_DIR lets it be (XDG Base Directory)
    except OSError as error:
        raise RuntimeFailure.of(error, what=f"make {root}") from None
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        raise RuntimeFailure(
            f"container with id exists: {container_id}: container with given ID already exists",
            code="already_exists",
            hint="delete it, or choose another id",
        ) from None
    except OSError as error:
        raise RuntimeFailure.of(error, what=f"make {path}") from None
    return path


def of_spec(
    spec: Spec,
    manager: Manager,
    *,
    container_id: str,
    pid: int,
    created: str,
    bundle: str,
    rootfs: str,
    stdio: tuple[int, int, int],
) -> State:
    """What restore knows of a container that it has made of `spec`, whose init is `pid`, and create knows more of."""
    from runtime.cgroups.manager import UNIT

    seccomp = spec.seccomp
    return State(
        id=container_id,
        pid=pid,
        started=start_time(pid),
        created=created,
        bundle=bundle,
        rootfs=rootfs,
        version=SPEC_VERSION,
        cgroup_paths=tuple(manager.paths().items()),
        systemd_unit=manager.note().get(UNIT, ""),
        annotations=spec.annotations,
        owner=os.geteuid(),
        filter_flags=NO_FILTER if seccomp is None else seccomp.flags,
        listener_path="" if seccomp is None else seccomp.listener_path,
        listener_metadata="" if seccomp is None else seccomp.listener_metadata,
        memory_policy=spec.memory_policy,
        poststop=spec.hooks.poststop,
        personality=spec.personality,
        readonly=spec.root_readonly,
        hostname=spec.hostname,
        namespaces=namespaces_of(spec.namespaces),
        cgroups_path=spec.cgroups_path or f"/{container_id}",
        descriptors=descriptors(stdio),
    )


def save(root: str, state: State) -> None:
    """Writes state.json, whole or not at all."""
    namespaces = {key: f"/proc/{state.pid}/ns/{name}" for key, name in NAMESPACE_KEYS.items()}
    config = {
        "rootfs": state.rootfs,
        "labels": [f"bundle={state.bundle}"],
        "version": state.version,
        "no_new_keyring": state.no_new_keyring,
        "readonlyfs": state.readonly,
        "hostname": state.hostname,
        "namespaces": [{"type": key, "path": path} for key, path in state.namespaces],
        "cgroups": {"path": state.cgroups_path},
    }
    document = {
        "id": state.id,
        "init_process_pid": state.pid,
        "init_process_start": state.started,
        "created": state.created,
        "config": config,
        "rootless": state.owner != 0,
        "cgroup_paths": dict(state.cgroup_paths),
        "namespace_paths": namespaces,
        "external_descriptors": list(state.descriptors),
        "intel_rdt_path": "",
        "annotations": dict(state.annotations),
        "bundle": state.bundle,
        "owner": state.owner,
        "seccomp_flags": state.filter_flags,
        "seccomp_listener": {"path": state.listener_path, "metadata": state.listener_metadata},
        "systemd_unit": state.systemd_unit,
        "personality": state.personality,
    }
    if state.poststart or state.poststop:
        from runtime.spec_hooks import to_json

        document["hooks"] = {"poststart": to_json(state.poststart), "poststop": to_json(state.poststop)}
    if (group := state.intel_rdt) is not None:
        document["intel_rdt_path"] = group.directory
        document["intel_rdt"] = describe_group(group)
    if (policy := state.memory_policy) is not None:
        document["memory_policy"] = {"mode": policy.mode, "nodes": policy.nodes}
    write_durable(f"{directory(root, state.id)}/{_FILE}", encode(document), sync=False)


def load(root: str, container_id: str) -> State:
    """The facts. Raises RuntimeFailure: not_found when there is no such container, failed_precondition when its
    create never came to an end."""
    path = directory(root, container_id)
    try:
        fd = os.open(f"{path}/{_FILE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if os.path.isdir(path):
            raise RuntimeFailure(
                f"container does not exist: {container_id} was never completely created",
                code="failed_precondition",
                hint="delete it with --force",
            ) from None
        raise RuntimeFailure("container does not exist", code="not_found", hint=f"no {path}") from None
    try:
        # Room for as much as there is: for the most that there may be, it would be mapped and unmapped each time.
        raw = os.read(fd, min(os.fstat(fd).st_size, _MAX_STATE))
    finally:
        os.close(fd)
    return _parse(raw, f"{path}/{_FILE}")


def _parse(raw: bytes, what: str) -> State:
    try:
        fields = Fields(decode(raw, "the file"))
        config = fields.required_object("config")
        hooks = None
        if fields.has("hooks"):
            from runtime.spec_hooks import parse_hooks

            hooks = parse_hooks(fields)
        listener = fields.object("seccomp_listener") or Fields({})
        return State(
            id=fields.str("id", required=True),
            pid=fields.int("init_process_pid", required=True),
            started=fields.int("init_process_start", required=True),
            created=fields.str("created"),
            bundle=fields.str("bundle"),
            rootfs=config.str("rootfs"),
            version=config.str("version"),
            cgroup_paths=tuple(fields.mapping("cgroup_paths").items()),
            annotations=tuple(fields.mapping("annotations").items()),
            owner=fields.int("owner"),
            filter_flags=fields.int("seccomp_flags", required=True),
            listener_path=listener.str("path"),
            listener_metadata=listener.str("metadata"),
            intel_rdt=group_of(fields.object("intel_rdt")),
            memory_policy=_policy(fields.object("memory_policy")),
            poststart=hooks.poststart if hooks is not None else (),
            poststop=hooks.poststop if hooks is not None else (),
            systemd_unit=fields.str("systemd_unit"),
            personality=fields.optional_int("personality", 0),
            no_new_keyring=config.bool("no_new_keyring"),
            readonly=config.bool("readonlyfs"),
            hostname=config.str("hostname"),
            namespaces=tuple((entry.str("type"), entry.str("path")) for entry in config.objects("namespaces")),
            cgroups_path=(config.object("cgroups") or Fields({})).str("path"),
            descriptors=fields.strs("external_descriptors"),
        )
    except RuntimeFailure as failure:
        raise RuntimeFailure(
            f"{what} is damaged: {failure}",
            code="failed_precondition",
            hint="delete the container with --force: that goes by its cgroup",
        ) from None


def describe_group(group: Group) -> dict[str, object]:
    """linux.intelRdt's class of service as JSON; `group_of` reads it."""
    return {"path": group.directory, "monitor": group.monitor, "own": group.own}


def group_of(fields: Fields | None) -> Group | None:
    """What `describe_group` said."""
    if fields is None:
        return None
    from runtime.intel_rdt import Group

    return Group(fields.str("path", required=True), fields.str("monitor"), fields.bool("own"))


def _policy(fields: Fields | None) -> MemoryPolicy | None:
    if fields is None:
        return None
    from runtime.memory_policy import MemoryPolicy

    return MemoryPolicy(fields.int("mode", required=True), fields.str("nodes"))


def status(root: str, state: State) -> str:
    """runtime-spec's status: "created", "running" or "stopped"; and runc's "paused"."""
    if not is_running(state.pid, state.started):
        return "stopped"
    if is_held(root, state.id):
        return "created"
    try:
        if state.cgroup_paths and is_frozen(state, state.manager()):
            return "paused"
    except (OSError, RuntimeFailure):
        pass  # of a hierarchy that is no longer there
    return "created" if waits(root, state.id) else "running"


def is_frozen(state: State, manager: Manager) -> bool:
    """Whether the container, whose cgroups are `manager`'s, stands still."""
    try:
        return bool(state.cgroup_paths) and manager.frozen()
    except (OSError, RuntimeFailure):
        return False  # the cgroup is going away: so is the container


def waits(root: str, container_id: str) -> bool:
    """True while the init has not been started."""
    try:
        return stat.S_ISSOCK(os.lstat(f"{directory(root, container_id)}/{START_SOCKET}").st_mode)
    except FileNotFoundError:
        return False


def is_held(root: str, container_id: str) -> bool:
    """True while a restored container has not been started (runtime.unstarted)."""
    return os.path.lexists(f"{directory(root, container_id)}/{HELD}")


def ids(root: str) -> Iterator[str]:
    """Every id under `root`, in order."""
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return
    for name in names:
        if not name.startswith(".") and not set(name) - _ID_CHARACTERS and os.path.isdir(f"{root}/{name}"):
            yield name


def describe(state: State, status: str, pid: int | None = None) -> dict[str, object]:
    """What `state` prints: the state object of runtime-spec's "State", and what runc adds to it."""
    shown = state.pid if pid is None else pid
    document: dict[str, object] = {
        "ociVersion": state.version,
        "id": state.id,
        "pid": 0 if status == "stopped" else shown,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "owner": "",
    }
    if state.annotations:
        document["annotations"] = dict(state.annotations)
    return document


def for_hooks(container_id: str, bundle: str, annotations: Iterable[tuple[str, str]], status: str, pid: int) -> bytes:
    """The state object of runtime-spec's "State", which hooks get on their stdin; `pid` 0: there is none."""
    document: dict[str, object] = {"ociVersion": SPEC_VERSION, "id": container_id, "status": status}
    if pid:
        document["pid"] = pid
    document["bundle"] = bundle
    if named := dict(annotations):
        document["annotations"] = named
    return encode(document)
