"""create: from a parsed config.json to a process that is set up completely and waits for start.

Refuses an id that is taken, a bundle without a root, a spec without a process. Plans before it acts: everything that
can be refused is refused before anything is made. Invariant: what fails here has left no process, cgroup, directory or
mount; what succeeds has a state.json that any later command, of any process, can go on from.
"""

from __future__ import annotations

import os

from runtime import labels, rootfs, rootless, state
from runtime.birth import Birth, Created, close_console
from runtime.cgroups.manager import Manager, manager_for
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree, write_durable
from runtime.linux.progress import phase
from runtime.linux.record import Record
from runtime.spec import Spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.linux.mount import FsMount

    Undo = list[tuple[str, Callable[[], object]]]

_SIGKILL = 9
SECCOMP_CACHE = ".seccomp"


class CreateRequest(Record):
    """What create is asked for. `rootfs` is mounted by the container on its root path, in its own mount namespace, with
    the ids of a user namespace if it has one; None: the bundle has it there. `stdio` stays the caller's.
    `console_socket` gets the terminal's master; "" leaves it to the caller (Created.console). `systemd_cgroup`: the
    cgroup is a unit, and spec.cgroups_path its name.
    `pidfd_socket` gets a pidfd of the init; `notify` makes the directory that runtime.notify has mounted. `rootless`:
    cgroups are best-effort; None: where the rights of root are missing. `hold`: the caller starts it, too, with
    Created.start, and its init ends if the caller ends before. `sibling`: the init is a child of the caller's parent,
    who waits for it, where it takes one clone (runtime.cloning); and it is set up in the caller's memory, where that
    will do (runtime.shared_birth): if it is killed meanwhile the caller ends, too, having written `last_words` to that
    fd, and what was made is left to whoever hears them."""

    root: str
    id: str
    bundle: str
    spec: Spec
    stdio: tuple[int, int, int] = (0, 1, 2)
    rootfs: FsMount | None = None
    console_socket: str = ""
    pid_file: str = ""
    pidfd_socket: str = ""
    preserve_fds: int = 0
    no_pivot: bool = False
    systemd_cgroup: bool = False
    no_new_keyring: bool = False
    notify: bool = False
    rootless: bool | None = None
    hold: bool = False
    sibling: bool = False
    last_words: tuple[int, bytes] = (-1, b"")


def create(request: CreateRequest) -> Created:
    """See the module. Raises RuntimeFailure with the step of the init that failed."""
    spec = request.spec
    if spec.process is None:
        raise RuntimeFailure("config.json: process: process property must not be empty", code="invalid_argument")
    rootfs.check(spec, no_pivot=request.no_pivot)
    labels.check(spec.process)
    bundle = os.path.abspath(request.bundle)
    root_path = root_path_of(bundle, spec.root_path, make=request.rootfs is not None)
    state.check_id(request.id)
    phase("prepare")
    filter_program = _filter_of(spec, request.root)
    rootless.check(spec)
    manager = make_manager(spec, request.id, systemd=request.systemd_cgroup, no_root=request.rootless)
    rdt = None
    if spec.intel_rdt is not None:
        from runtime import intel_rdt  # for machines that have it

        rdt = intel_rdt.Membership(spec.intel_rdt, request.id)
    undo: Undo = []
    try:
        directory = state.reserve(request.root, request.id)
        if spec.hooks.poststop:
            undo.append(("run the poststop hooks", lambda: _run_poststop(request, bundle)))
        undo.append(("remove the state directory", lambda: remove_tree(directory)))
        if request.notify:
            os.mkdir(f"{directory}/{state.NOTIFY}", 0o755)
        failpoint("create.reserved")
        note_cgroups(directory, manager)
        failpoint("create.noted")
        if filter_program:
            write_durable(f"{directory}/{state.FILTER}", filter_program, sync=False)
        phase("cgroup")
        manager.create(spec.resources)
        undo.append(("remove the cgroup", lambda: _remove_cgroup(manager)))
        failpoint("create.cgroup")
        if rdt is not None:
            note = encode(state.describe_group(rdt.plan()))
            write_durable(f"{directory}/intel_rdt.json", note, sync=False)
            rdt.join()
            undo.append(("leave the class of service", rdt.leave))
        phase("clone")
        with Birth(request, bundle, root_path, directory, manager, filter_program, rdt) as birth:
            undo.append(("kill the init", birth.kill))
            created = birth.run()
            undo.append(("close the console", lambda: close_console(created.console)))
            failpoint("create.ready")
            phase("record")
            state.save(request.root, created.state)
            if request.pid_file:
                write_durable(request.pid_file, str(created.state.pid).encode(), 0o644, sync=False)
            failpoint("create.saved")
            birth.release(created if request.hold else None)
        return created
    except BaseException as error:
        unwind(undo, error)
        raise


def _filter_of(spec: Spec, root: str) -> bytes:
    """The program of the seccomp profile; b"" for none. Who listens to it has to be there already."""
    if spec.seccomp is None:
        return b""
    from runtime import seccomp

    if spec.seccomp.listener_path:
        from runtime import seccomp_notify  # few containers have a listener

        seccomp_notify.expect(spec.seccomp.listener_path)
    return seccomp.program(spec.seccomp, f"{root}/{SECCOMP_CACHE}")


def root_path_of(bundle: str, path: str, *, make: bool) -> str:
    """root.path with its links followed, once: a directory."""
    joined = os.path.join(bundle, path)
    try:
        if make:
            os.makedirs(joined, 0o755, exist_ok=True)
        fd = os.open(joined, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeFailure.of(error, what="root.path", code="invalid_argument") from None
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def make_manager(spec: Spec, container_id: str, *, systemd: bool, no_root: bool | None) -> Manager:
    """The manager of the cgroups that a new container is to have."""
    if not systemd:
        return manager_for(spec.cgroups_path, container_id, rootless=rootless.is_rootless(no_root))
    from runtime.cgroups.systemd import systemd_manager

    return systemd_manager(spec.cgroups_path, container_id, spec.annotations, no_root)


def note_cgroups(directory: str, manager: Manager) -> None:
    """Before the cgroup is made: so that `delete --force` finds it if this process is killed now (threats O37).

    Not where somebody lives already: then `manager.create` refuses, and the note would be the death of others."""
    if manager.pids():
        return
    write_durable(f"{directory}/cgroup.json", encode(manager.note()), sync=False)


def _remove_cgroup(manager: Manager) -> None:
    manager.kill(_SIGKILL)
    manager.destroy()


def _run_poststop(request: CreateRequest, bundle: str) -> None:
    """A container that failed to be made has stopped: the lifecycle goes on there (runtime-spec)."""
    from runtime import hooks

    known = state.for_hooks(request.id, bundle, request.spec.annotations, "stopped", 0)
    hooks.run_all(request.spec.hooks.poststop, known, "poststop hooks", bundle)


def unwind(undo: Undo, error: BaseException) -> None:
    for what, action in reversed(undo):
        try:
            action()
        except (OSError, RuntimeFailure) as failed:
            error.add_note(f"and could not {what}: {failed}")
