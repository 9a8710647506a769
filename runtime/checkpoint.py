"""checkpoint: the processes of a running container become images on disk, by criu.

Refuses a container that does not run, images that would end up nowhere, and `org.criu.config` annotations: an image
does not choose how its dump is made (threats S60); the node's own /etc/criu/runc.conf is heeded, as with runc.
Invariant: what fails leaves the container running as it was, its network open and its connections alive even where criu
was killed (criu_leftovers); what succeeds has left criu's files in the images'
directory and descriptors.json (what fds 0, 1 and 2 of the init were): all that restore takes from there.
"""

from __future__ import annotations

import os

from runtime import criu, lifecycle, state
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, fd_path, path_in_root, read_bounded, write_durable
from runtime.linux.process import CLONE_NEWNET
from runtime.linux.record import Record
from runtime.namespaces import PROC_NAMES
from runtime.rootfs_devices import DEFAULT_DEVICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from runtime.spec import Spec
    from runtime.state import State

DESCRIPTORS = "descriptors.json"
CONFIG_FILE = "/etc/criu/runc.conf"
# criu_cg_mode; runc's default is soft.
CGROUP_MODES = {"": 3, "soft": 3, "full": 4, "strict": 5, "ignore": 0}
EMPTY_NAMESPACES = {"network": CLONE_NEWNET}
# Namespaces that criu can leave out of the images, and put back as fds: since which version.
EXTERNAL = {"network": 31100, "pid": 31500}
MASK = "/dev/null"  # the name by which restore finds what to mask files with
_LOG_LEVEL = 4
_MAX_CONFIG = 16 << 20


class Images(Record):
    """Where and how, for both directions. Paths are absolute; `work_path` and `parent_path` may be "". `seconds` is
    how long criu may take; 0: as long as it likes."""

    program: str
    image_path: str
    work_path: str = ""
    parent_path: str = ""
    tcp_established: bool = False
    tcp_skip_in_flight: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    lazy_pages: bool = False
    file_locks: bool = False
    link_remap: bool = False
    auto_dedup: bool = False
    manage_cgroups: int = CGROUP_MODES["soft"]
    empty_ns: int = 0
    seconds: float = 0.0

    def log(self, name: str) -> str:
        return os.path.join(self.work_path or self.image_path, name)

    def common(self, name: str, images: int, work: int) -> dict[str, criu.Value]:
        """The options of both directions."""
        found: dict[str, criu.Value] = {
            "images_dir_fd": images,
            "log_level": _LOG_LEVEL,
            "log_file": name,
            "notify_scripts": True,
            "orphan_pts_master": True,
            "shell_job": self.shell_job,
            "ext_unix_sk": self.ext_unix_sk,
            "tcp_established": self.tcp_established,
            "file_locks": self.file_locks,
            "auto_dedup": self.auto_dedup,
            "lazy_pages": self.lazy_pages,
            "manage_cgroups": True,  # what criu before 1.8 knew
            "manage_cgroups_mode": self.manage_cgroups,
            "empty_ns": self.empty_ns,
            "config_file": CONFIG_FILE,
        }
        if work >= 0:
            found["work_dir_fd"] = work
        return found


class Directories:
    """The two directories, made where missing, as fds that criu opens in this process (/proc/PID/fd)."""

    def __init__(self, images: Images) -> None:
        self.images = _open(images.image_path)
        try:
            self.work = _open(images.work_path) if images.work_path else -1
        except BaseException:
            os.close(self.images)
            raise

    def __enter__(self) -> Directories:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.images)
        if self.work >= 0:
            os.close(self.work)


def _open(path: str) -> int:
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeFailure.of(error, code="invalid_argument") from None


class CheckpointRequest(Record):
    """What checkpoint is asked for; `page_server` is (address, port), `status_fd` -1 or who waits for lazy pages."""

    root: str
    id: str
    images: Images
    leave_running: bool = False
    pre_dump: bool = False
    page_server: tuple[str, int] | None = None
    status_fd: int = -1


def checkpoint(request: CheckpointRequest) -> None:
    """See the module. Deletes the container unless it is to run on, as runc does. Raises RuntimeFailure."""
    facts = state.load(request.root, request.id)
    now = state.status(request.root, facts)
    if now not in ("running", "paused"):
        raise RuntimeFailure(f"Container cannot be checkpointed in {now} state", code="failed_precondition")
    spec = _spec_of(facts)
    program = criu.Criu(request.images.program, request.images.seconds)
    images = request.images
    with Directories(images) as at:
        opts = images.common("dump.log", at.images, at.work)
        opts |= {
            "pid": facts.pid,
            "root": facts.rootfs,
            "leave_running": request.leave_running,
            "tcp_skip_in_flight": images.tcp_skip_in_flight,
            "link_remap": images.link_remap,
            "external": list(_external_namespaces(facts, spec, program)),
        }
        paths = facts.manager().paths()
        if freezer := paths.get("freezer") or paths.get(""):
            opts["freeze_cgroup"] = freezer
        if request.page_server is not None:
            address, port = request.page_server
            opts["ps"] = criu.message((1, address), (2, port))
        if images.parent_path:
            opts |= {"parent_img": images.parent_path, "track_mem": True}
        if request.pre_dump:
            program.require("mem_track")
        else:
            opts["ext_mnt"] = [criu.pair(path, name) for path, name in _external_mounts(facts, spec)]
            write_durable(
                f"{images.image_path}/{DESCRIPTORS}", encode(list(facts.descriptors or _descriptors(facts))), sync=False
            )
        if images.lazy_pages:
            program.require("lazy_pages")
        steps: list[str] = []
        try:
            program.request(
                criu.PRE_DUMP if request.pre_dump else criu.DUMP,
                criu.options(**opts),
                log=images.log("dump.log"),
                notified=lambda step, _pid, _fd: _notified(step, steps, request.status_fd),
                # Whoever reads from a connection that is half dumped would be told of an error.
                doomed=lambda: facts.manager().freezer().ask(),
            )
        except BaseException as error:
            _as_before(facts, now == "paused", locked="network-lock" in steps, error=error)
            raise
    if not request.leave_running and not request.pre_dump:
        lifecycle.delete(request.root, request.id, force=True)


def _as_before(facts: State, paused: bool, *, locked: bool, error: BaseException) -> None:
    """After a criu that may have been killed: any other has seen to it itself."""
    manager = facts.manager()
    try:
        if locked:
            from runtime import criu_leftovers

            criu_leftovers.unlock(f"/proc/{facts.pid}/ns/net")
            criu_leftovers.mend_connections(manager.pids())
        if manager.frozen() != paused:
            manager.freeze(paused)
    except (OSError, RuntimeFailure) as second:
        error.add_note(f"and could not leave the container as it was: {second}")


def _spec_of(facts: State) -> Spec:
    """The bundle's config.json: which mounts and namespaces are not the container's own."""
    from runtime import spec

    try:
        return spec.parse(read_bounded(AT_FDCWD, f"{facts.bundle}/config.json", _MAX_CONFIG))
    except OSError as error:
        raise RuntimeFailure.of(error, what="read config.json", code="failed_precondition") from None


def _notified(step: str, steps: list[str], status_fd: int) -> None:
    steps.append(step)
    if step == "post-dump":
        failpoint("checkpoint.dumped")
    if step == "status-ready" and status_fd >= 0:
        os.write(status_fd, b"\0")
        os.close(status_fd)


def _descriptors(facts: State) -> Iterator[str]:
    """What the init has on 0, 1 and 2 now: of a container whose maker did not note what it gave."""
    for number in (0, 1, 2):
        try:
            yield os.readlink(f"/proc/{facts.pid}/fd/{number}")
        except OSError:
            yield ""


def external_key(kind: str) -> str:
    """The name that the images have for a namespace which is not in them; runc's, so that either can restore them."""
    return f"extRoot{PROC_NAMES[kind].capitalize()}NS"


def _external_namespaces(facts: State, spec: Spec, program: criu.Criu) -> Iterator[str]:
    for namespace in spec.namespaces:
        since = EXTERNAL.get(namespace.kind)
        if not namespace.path or since is None:
            continue
        name = PROC_NAMES[namespace.kind]
        if program.version() < since:
            raise RuntimeFailure(
                f"criu lacks support for external {name} namespace during checkpointing process (old criu version?)",
                code="failed_precondition",
            )
        # Of the init, not of the path: that may be another namespace by now.
        yield f"{name}[{os.stat(f'/proc/{facts.pid}/ns/{name}').st_ino}]:{external_key(namespace.kind)}"


def _external_mounts(facts: State, spec: Spec) -> Iterator[tuple[str, str]]:
    """Mount points whose filesystem is the host's, as the container's kernel names them, with their name in the
    images."""
    root = os.open(f"/proc/{facts.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for destination in external_destinations(spec, facts):
            if path := path_in_root(root, destination):
                yield path, destination
        for masked in spec.masked_paths:
            path = path_in_root(root, masked)
            if path and not os.path.isdir(f"{fd_path(root)}{path}"):
                yield path, MASK
    finally:
        os.close(root)


def external_destinations(spec: Spec, facts: State) -> Sequence[str]:
    """Destinations of config.json that are bound from the host: restore must have a source for each."""
    found = [mount.destination for mount in spec.mounts if mount.kind == "bind"]
    if spec.has("user"):  # where nodes cannot be made, they are the host's
        found += [device.path for device in (*DEFAULT_DEVICES, *spec.devices) if device.kind != "p"]
    return found + [destination for destination, _ in cgroup_binds(spec, dict(facts.cgroup_paths))]


def cgroup_binds(spec: Spec, cgroups: dict[str, str]) -> list[tuple[str, str]]:
    """(mount point, source) of the v1 cgroups that a container without a cgroup namespace is shown; with one, and on
    v2, they are mounts of its own to criu."""
    if spec.has("cgroup") or set(cgroups) <= {""}:
        return []
    from runtime.rootfs_cgroup import planned_binds

    return [
        (f"{mount.destination}/{name}", path)
        for mount in spec.mounts
        if mount.kind == "cgroup"
        for name, path in planned_binds(mount, cgroups)
    ]
