"""restore: images that checkpoint made become a running container again, by criu, under the bundle's config.json.

Refuses to take anything but processes and their memory from the images (threats S71): mounts that come from the host,
namespaces that are joined, cgroups and limits are those of config.json, and before the processes go on, each is looked
at: one that has more rights than config.json gives ends the whole. Invariant: what fails has left no process, cgroup,
directory or mount; criu works in a mount namespace of its own, so the host's mount table never sees the root.
"""

from __future__ import annotations

import json
import os

from runtime import checkpoint, criu, criu_images, restored, seccomp, state, unstarted
from runtime.birth import Created, now
from runtime.checkpoint import Directories, Images
from runtime.create import SECCOMP_CACHE, make_manager, note_cgroups, root_path_of, unwind
from runtime.criu_child import FIRST_FD
from runtime.errors import RuntimeFailure
from runtime.linux.files import AT_FDCWD, read_bounded, remove_tree, write_durable
from runtime.linux.mount import AT_RECURSIVE, OPEN_TREE_CLONE, open_tree
from runtime.linux.process import end_child, pidfd_open, set_no_new_privs
from runtime.linux.record import Record
from runtime.namespaces import PROC_NAMES
from runtime.restore_mounts import PrivateMounts, make_mount_points
from runtime.restored_mounts import verify_mounts
from runtime.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runtime.cgroups.manager import Gate, Manager
    from runtime.linux.mount import FsMount
    from runtime.spec import Spec

_SIGKILL = 9
_YARD = ".criu.cgyard."  # criu's directory for cgroup mounts, in that of its log
_MAX_DESCRIPTORS = 1 << 16


class RestoreRequest(Record):
    """What restore is asked for; `console_socket` gets the terminal's master, "" leaves it to the caller. `rootfs` is
    the root filesystem where it is not at root.path already. `untrusted`: the images are anybody's, so what criu would
    do to the host's cgroups by their word is replaced, and filters and mounts must be those of config.json exactly.
    `held`: what is restored stands still, as created, until lifecycle.start (runtime.unstarted).
    """

    root: str
    id: str
    bundle: str
    spec: Spec
    images: Images
    console_socket: str = ""
    pid_file: str = ""
    systemd_cgroup: bool = False
    rootless: bool | None = None
    lsm_profile: str = ""
    lsm_mount_context: str = ""
    rootfs: FsMount | None = None
    untrusted: bool = False
    held: bool = False


def restore(request: RestoreRequest) -> Created:
    """See the module. The container's init is a child of the caller. Raises RuntimeFailure."""
    spec = request.spec
    if spec.process is None:
        raise RuntimeFailure("config.json: process: is required to restore", code="invalid_argument")
    if spec.intel_rdt is not None:
        raise RuntimeFailure("linux.intelRdt: cannot be restored into", code="invalid_argument")
    descriptors = _descriptors(request.images.image_path)
    program = criu.Criu(request.images.program, request.images.seconds)
    bundle = os.path.abspath(request.bundle)
    rootfs = root_path_of(bundle, spec.root_path, make=request.rootfs is not None)
    manager = make_manager(spec, request.id, systemd=request.systemd_cgroup, no_root=request.rootless)
    undo: list[tuple[str, Callable[[], object]]] = []
    try:
        directory = state.reserve(request.root, request.id)
        undo.append(("remove the state directory", lambda: remove_tree(directory)))
        note_cgroups(directory, manager)
        if spec.seccomp is not None:  # for those that are executed in it later; the images have their own
            filter_program = seccomp.program(spec.seccomp, f"{request.root}/{SECCOMP_CACHE}")
            write_durable(f"{directory}/{state.FILTER}", filter_program, sync=False)
            if request.untrusted:
                criu_images.verify_filters(request.images.image_path, filter_program)
        manager.create(spec.resources)
        undo.append(("remove the cgroup", lambda: _remove_cgroup(manager)))
        restoring = _Restoring(request, bundle, rootfs, directory, manager, descriptors)
        undo.append(("kill what was restored", restoring.kill))
        return restoring.run(program)
    except BaseException as error:
        unwind(undo, error)
        raise


def _remove_cgroup(manager: Manager) -> None:
    manager.kill(_SIGKILL)
    manager.destroy()


def _descriptors(image_path: str) -> list[str]:
    """descriptors.json: data of an image, so bounded, and only names of pipes are ever used of it."""
    path = f"{image_path}/{checkpoint.DESCRIPTORS}"
    try:
        found = json.loads(read_bounded(AT_FDCWD, path, _MAX_DESCRIPTORS))
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeFailure.of(error, what=f"read {path}", code="invalid_argument") from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found) or len(found) > 3:
        raise RuntimeFailure(f"{path}: expected up to three strings", code="invalid_argument")
    return found


class _Restoring:
    """One restore, from the request to the state.json."""

    def __init__(
        self,
        request: RestoreRequest,
        bundle: str,
        rootfs: str,
        directory: str,
        manager: Manager,
        descriptors: list[str],
    ) -> None:
        self._request = request
        self._spec = request.spec
        self._bundle = bundle
        self._rootfs = rootfs
        self._directory = directory
        self._manager = manager
        self._descriptors = descriptors
        self._created = now()
        self._pid = self._pidfd = self._console = self._criu = -1
        self._held = False

    def run(self, program: criu.Criu) -> Created:
        tree = self._root_tree()
        try:
            make_mount_points(self._spec, tree, self._bundle)
            with PrivateMounts(self._directory, tree) as self._mounts, self._manager.gate() as gate:
                namespaces: list[int] = []
                try:
                    self._request_of(program, gate, namespaces)
                except BaseException:
                    self._open_network()
                    raise
                finally:
                    for fd in namespaces:
                        os.close(fd)
        finally:
            os.close(tree)
        if self._request.pid_file:
            write_durable(self._request.pid_file, str(self._pid).encode(), 0o644, sync=False)
        made = Created(self._state(), self._pidfd, self._console, ())
        self._pidfd = self._console = -1
        return made

    def _open_network(self) -> None:
        """One that is joined is others' as well: criu closes it, and does not open it when it is killed."""
        from runtime import criu_leftovers

        for namespace in self._spec.namespaces:
            if namespace.kind == "network" and namespace.path:
                criu_leftovers.unlock(namespace.path)

    def _root_tree(self) -> int:
        """The root filesystem as a mount that nobody has yet."""
        if self._request.rootfs is not None:
            return self._request.rootfs.make()
        return open_tree(AT_FDCWD, self._rootfs, OPEN_TREE_CLONE | AT_RECURSIVE)

    def _request_of(self, program: criu.Criu, gate: Gate, namespaces: list[int]) -> None:
        images = self._request.images
        opts: dict[str, criu.Value]
        # Opened here, in the mounts that criu has: it mounts below its working directory.
        with Directories(images) as at:
            opts = images.common("restore.log", at.images, at.work) | {
                "evasive_devices": True,
                "rst_sibling": True,
                "root": self._mounts.root,
                "ext_mnt": [criu.pair(name, source) for name, source in self._sources(self._mounts.null)],
                "inherit_fd": list(self._inherited(namespaces)),
                "join_ns": list(self._joined()),
                "lsm_profile": self._request.lsm_profile,
                "lsm_mount_context": self._request.lsm_mount_context,
            }
            program.request(
                criu.RESTORE,
                lambda pid: self._with_cgroups(pid, opts),
                log=images.log("restore.log"),
                notified=self._notified,
                pass_fds=namespaces,
                prepare=lambda: self._confine(gate),
                adopt=self._manager.adopt,
                cgroup_fd=gate.cgroup_fd,
                # What is restored by then has not been looked at: it must not run for want of its tracer.
                late=lambda: self._manager.kill(_SIGKILL),
            )

    def _confine(self, gate: Gate) -> None:
        """In the process that becomes criu: what it restores begins with what it has itself."""
        gate.enter()
        process = self._spec.process
        if process is not None and process.no_new_privileges:
            set_no_new_privs()  # criu 3.17 does not restore it

    def _with_cgroups(self, pid: int, opts: dict[str, criu.Value]) -> bytes:
        self._criu = pid
        if self._request.untrusted:
            lines = list(_cgroup_lines(pid))
            criu_images.replace_cgroups(self._request.images.image_path, lines, own_namespace=self._spec.has("cgroup"))
        return criu.options(**opts, cg_root=list(_cgroup_roots(pid)))

    def _sources(self, null: str) -> Iterator[tuple[str, str]]:
        """(name in the images, path on the host) of every mount that is not in the images: of config.json alone."""
        known = State("", 0, 0, "", self._bundle, self._rootfs, "", cgroup_paths=tuple(self._manager.paths().items()))
        sources = {
            mount.destination: os.path.join(self._bundle, mount.source)
            for mount in self._spec.mounts
            if mount.kind == "bind"
        }
        sources |= dict(checkpoint.cgroup_binds(self._spec, self._manager.paths()))
        for destination in checkpoint.external_destinations(self._spec, known):
            yield destination, sources.get(destination, destination)
        if self._spec.masked_paths:
            yield checkpoint.MASK, null

    def _inherited(self, namespaces: list[int]) -> Iterator[bytes]:
        """What criu takes as fds of its own: namespaces that were left out of the images, and the pipes of stdio."""
        for namespace in self._spec.namespaces:
            if namespace.path and namespace.kind in checkpoint.EXTERNAL:
                try:
                    namespaces.append(os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise RuntimeFailure.of(
                        error, what=f"{namespace.kind} namespace to restore into", code="invalid_argument"
                    ) from None
                number = FIRST_FD + len(namespaces) - 1
                yield criu.pair(checkpoint.external_key(namespace.kind), number)
        for number, name in enumerate(self._descriptors):
            if name.startswith("pipe:["):
                yield criu.pair(name, number)

    def _joined(self) -> Iterator[bytes]:
        for namespace in self._spec.namespaces:
            if namespace.path and namespace.kind not in checkpoint.EXTERNAL:
                if namespace.kind == "cgroup":
                    raise RuntimeFailure("criu cannot restore into an existing cgroup namespace")
                yield criu.pair(PROC_NAMES[namespace.kind], namespace.path)

    def _notified(self, step: str, pid: int, fd: int) -> None:
        if step == "setup-namespaces":
            self._run_hooks(pid)
        elif step == "post-restore":
            self._pid, self._pidfd = pid, pidfd_open(pid)
            state.save(self._request.root, self._state())
        elif step == "pre-resume":
            # Their rights are their own by now, and none of them has run yet.
            within = self._manager.pids()
            members = restored.members(self._pid, within, but=self._criu)
            try:
                restored.verify(self._spec, self._pid, members, within)
                if self._request.untrusted:
                    sources = dict(self._sources(self._mounts.null))
                    self._verify_terminal()
                    verify_mounts(self._spec, self._pid, os.stat(self._mounts.root), sources)
                if self._spec.root_readonly:
                    self._mounts.protect_root(self._pid)  # criu 3.17 forgets that it was
                if self._request.held:
                    self._held = True
                    unstarted.hold(self._directory, self._manager, set(within) - set(members))
            except BaseException:
                # Before criu hears of it: it would let them go. And criu after them, or it would wait for an init that
                # waits for its children, whose ends only their tracer can take: criu.
                restored.kill([*members, self._criu])
                raise
        elif step == "orphan-pts-master" and fd >= 0:
            self._take_console(fd)

    def _verify_terminal(self) -> None:
        assert self._spec.process is not None  # restore looked
        if self._spec.process.terminal != (self._console >= 0):
            theirs = "have one" if self._console >= 0 else "have none"
            raise RuntimeFailure(
                f"process.terminal: {str(self._spec.process.terminal).lower()}, and the images {theirs}",
                code="failed_precondition",
            )

    def _take_console(self, master: int) -> None:
        from runtime.terminal import name_of, send_master

        if self._request.console_socket:
            send_master(self._request.console_socket, master, name_of(master))
        elif self._console < 0:  # more than the one of its init are its own affair
            self._console = os.dup(master)

    def _run_hooks(self, pid: int) -> None:
        wanted = self._spec.hooks
        if wanted.prestart or wanted.create_runtime:
            from runtime import hooks

            told = state.for_hooks(self._request.id, self._bundle, self._spec.annotations, "creating", pid)
            with self._mounts.outside():
                hooks.run(wanted.prestart, told, "prestart hooks", self._bundle)
                hooks.run(wanted.create_runtime, told, "createRuntime hooks", self._bundle)

    def kill(self) -> None:
        if self._console >= 0:
            os.close(self._console)
        if self._pidfd < 0:
            return
        if self._held:
            self._manager.kill(_SIGKILL)  # cgroup v1 keeps it from the frozen
        end_child(self._pid, self._pidfd)  # unless criu was faster
        work = self._request.images.work_path or self._request.images.image_path
        for name in os.listdir(work):  # which it removes itself, unless it was killed; its mount went with its mounts
            if name.startswith(_YARD):
                os.rmdir(os.path.join(work, name))

    def _state(self) -> State:
        return state.of_spec(
            self._spec,
            self._manager,
            container_id=self._request.id,
            pid=self._pid,
            created=self._created,
            bundle=self._bundle,
            rootfs=self._rootfs,
            stdio=(0, 1, 2),
        )


def _cgroup_roots(pid: int) -> Iterator[bytes]:
    """Where criu is now is where the container's cgroups are to be."""
    for controllers, path in _cgroup_lines(pid):
        for name in controllers.split(","):
            yield criu.pair(name, path)


def _cgroup_lines(pid: int) -> Iterator[tuple[str, str]]:
    """Controllers and path of each line of proc_pid_cgroup(5)."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            yield controllers, path
