"""Everything that is done to a container after create: start, kill, delete, pause, resume, update, and looking.

Refuses what the container's status does not allow, in the words that callers of runc match on. Invariant: each
function can be called by any process at any time; the truth is the kernel's and state.json's, never the caller's.
"""

from __future__ import annotations

import errno
import os
import select

from runtime import resources, state, sync
from runtime.errors import RuntimeFailure
from runtime.fields import Fields, decode
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree
from runtime.linux.libc import KernelError
from runtime.linux.process import is_running, pidfd_open, signal_running
from runtime.state import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_SIGKILL = 9
# How long the kernel may take to end a killed process: one in uninterruptible sleep cannot be waited for.
KILL_WAIT_S = 10.0


def start(root: str, container_id: str) -> None:
    """Releases execve, or what was restored; returns once that has succeeded. Raises RuntimeFailure with the init's
    step when it has not."""
    facts = state.load(root, container_id)
    now = state.status(root, facts)
    if now == "stopped":
        raise _wrong("cannot start a container that has stopped")
    if now == "paused":
        raise _wrong("cannot start a container in the paused state")
    if now != "created":
        raise _wrong("cannot start an already running container")
    directory = state.directory(root, container_id)
    if state.is_held(root, container_id):
        from runtime import unstarted

        unstarted.release(directory, facts.manager())
        return
    channel = sync.connect(directory, state.START_SOCKET)
    if channel is None:
        raise _wrong("cannot start a container that has stopped")
    try:
        try:
            channel.send("Start")
            channel.receive("Accepted")
        except (sync.Closed, BrokenPipeError):
            # Whoever was faster closed the listener behind us.
            raise _wrong("cannot start an already running container") from None
        _unlink(f"{directory}/{state.START_SOCKET}")
        failpoint("start.accepted")
        sync.until_executed(channel)
    finally:
        channel.close()
    run_poststart(facts)


def run_poststart(facts: State) -> None:
    """A container whose hook fails is stopped (runtime-spec): whoever counted on the hook must not see it run."""
    if not facts.poststart:
        return
    from runtime import hooks

    known = state.for_hooks(facts.id, facts.bundle, facts.annotations, "running", facts.pid)
    try:
        hooks.run(facts.poststart, known, "poststart hooks", facts.bundle)
    except BaseException:
        _end(facts)
        raise


def _wrong(message: str) -> RuntimeFailure:
    return RuntimeFailure(message, code="failed_precondition")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def kill(root: str, container_id: str, number: int, *, everyone: bool = False) -> None:
    """Signals the init, or with `everyone` all of the container. SIGKILL ends all of it in any case: in a PID namespace
    of others nobody does that for us. Raises RuntimeFailure when it is not running."""
    facts = state.load(root, container_id)
    if everyone or (number == _SIGKILL and state.is_held(root, container_id)):
        if number == _SIGKILL and facts.cgroup_paths:
            facts.manager().kill(number)
        else:
            _signal_each(_members(facts), number)
        return
    alone = number == _SIGKILL and not _is_first(facts.pid)
    signalled = _signal(facts, number)
    if alone and facts.cgroup_paths and facts.manager().pids():
        facts.manager().kill(number)
    elif not signalled:
        raise _wrong("container not running")
    elif number == _SIGKILL:
        _thaw(facts)  # a frozen process takes no signal, not even this one, on cgroup v1 (threats O61)


def _is_first(pid: int) -> bool:
    """True for pid 1 of a PID namespace: with it the kernel ends everybody else there."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
            return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in lines)
    except OSError:
        return False


def _members(facts: State) -> list[int]:
    """Who is in the container. A rootless one may have no cgroup: then who is in its PID namespace."""
    if facts.cgroup_paths:
        return facts.manager().pids()
    from runtime.namespaces import members

    return members(facts.pid) if is_running(facts.pid, facts.started) else []


def _signal(facts: State, number: int) -> bool:
    """False when the init is gone. The start time is checked after the pidfd is held: no other process can be hit."""
    try:
        pidfd = pidfd_open(facts.pid)
    except KernelError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return False
        raise
    try:
        if not is_running(facts.pid, facts.started):
            return False
        return signal_running(pidfd, number)
    except KernelError as error:
        raise RuntimeFailure.of(error, what=f"signal container {facts.id}") from None
    finally:
        os.close(pidfd)


def _signal_each(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            pidfd = pidfd_open(pid)
        except KernelError:
            continue
        try:
            signal_running(pidfd, number)
        finally:
            os.close(pidfd)


def _thaw(facts: State) -> None:
    try:
        manager = facts.manager()
        if manager.frozen():
            manager.freeze(False)
    except (OSError, RuntimeFailure):
        pass  # no freezer, or no cgroup any more


def _ignore(_text: str) -> None:
    pass


def delete(root: str, container_id: str, *, force: bool = False, warn: Callable[[str], None] = _ignore) -> None:
    """Removes a stopped container; with `force` one in any state, half-made ones and unknown ids included. A poststop
    hook that fails is only worth a warning: there is nothing left to undo.
    Raises RuntimeFailure when something of it could not be removed: the same call goes on from there."""
    directory = state.directory(root, container_id)
    try:
        facts = state.load(root, container_id)
    except RuntimeFailure as failure:
        if failure.code == "not_found" and force:
            return
        if failure.code != "failed_precondition" or not force:
            raise
        _remove_half_made(directory)
        return
    now = state.status(root, facts)
    if now not in ("stopped", "created") and not force:
        raise _wrong(f"cannot delete container {container_id} that is not stopped: {now}")
    manager = facts.manager()
    if state.is_held(root, container_id):
        manager.kill(_SIGKILL)  # all at once: who is thawed for his end only must not run
    _end(facts)
    manager.kill(_SIGKILL)  # with a shared PID namespace the rest lives on after the init
    manager.destroy()
    if facts.intel_rdt is not None:
        from runtime import intel_rdt

        intel_rdt.leave(facts.intel_rdt)
    failpoint("delete.cgroup")
    remove_tree(directory)
    if facts.poststop:
        from runtime import hooks

        known = state.for_hooks(facts.id, facts.bundle, facts.annotations, "stopped", 0)
        for text in hooks.run_all(facts.poststop, known, "poststop hooks", facts.bundle):
            warn(text)


def _end(facts: State) -> None:
    """SIGKILL for the init, and a bounded wait for its end."""
    try:
        pidfd = pidfd_open(facts.pid)
    except KernelError:
        return
    try:
        if not is_running(facts.pid, facts.started) or not signal_running(pidfd, _SIGKILL):
            return
        _thaw(facts)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(KILL_WAIT_S * 1000):
            raise RuntimeFailure(
                f"container {facts.id}: process {facts.pid} did not end within {KILL_WAIT_S:g} s of SIGKILL",
                hint="it hangs in the kernel; delete again once it is gone",
                code="unavailable",
            )
    finally:
        os.close(pidfd)


def _remove_half_made(directory: str) -> None:
    """What a create that was killed left: its init ended with it (runtime/sync.py); the cgroup is named in a note."""
    from runtime.cgroups.manager import manager_from_paths

    try:
        fd = os.open(f"{directory}/cgroup.json", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        pass
    else:
        try:
            paths = Fields({"cgroup": decode(os.read(fd, 1 << 16), "cgroup.json")}).mapping("cgroup")
        finally:
            os.close(fd)
        manager = manager_from_paths(paths)
        manager.kill(_SIGKILL)
        manager.destroy()
    _leave_class(directory)
    remove_tree(directory)


def _leave_class(directory: str) -> None:
    try:
        fd = os.open(f"{directory}/intel_rdt.json", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    from runtime import intel_rdt

    try:
        group = state.group_of(Fields(decode(os.read(fd, 1 << 16), "intel_rdt.json")))
    finally:
        os.close(fd)
    if group is not None:
        intel_rdt.leave(group)


def describe(root: str, container_id: str) -> dict[str, object]:
    """The OCI state of one container. Raises RuntimeFailure (not_found)."""
    facts = state.load(root, container_id)
    return state.describe(facts, state.status(root, facts))


def list_states(root: str) -> list[dict[str, object]]:
    """The OCI state of every container under `root`; half-made ones, and those that go away meanwhile, are left out."""
    found = []
    for container_id in state.ids(root):
        try:
            facts = state.load(root, container_id)
            found.append({**state.describe(facts, state.status(root, facts)), "owner": _user_name(facts.owner)})
        except RuntimeFailure:
            continue
    return found


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def pids(root: str, container_id: str) -> list[int]:
    """All processes of the container, as this PID namespace numbers them."""
    return _members(state.load(root, container_id))


def pause(root: str, container_id: str) -> None:
    """Freezes the container. Raises RuntimeFailure unless it is running or created."""
    facts = state.load(root, container_id)
    now = state.status(root, facts)
    if now not in ("running", "created"):
        raise _wrong(f"container not running: it is {now}")
    facts.manager().freeze(True)


def resume(root: str, container_id: str) -> None:
    """Thaws the container. Raises RuntimeFailure unless it is paused."""
    facts = state.load(root, container_id)
    if state.status(root, facts) != "paused":
        raise _wrong("container not paused")
    facts.manager().freeze(False)


def update(root: str, container_id: str, wanted: Mapping[str, object], schemata: tuple[str, ...] = ()) -> None:
    """Puts new limits (runtime-spec linux.resources) and resctrl's schemata into force, all or nothing."""
    facts = state.load(root, container_id)
    if state.status(root, facts) == "stopped":
        raise _wrong("container not running")
    limits = resources.parse(Fields(dict(wanted), "resources"))
    if not schemata:
        facts.manager().set(limits)
        return
    from runtime import intel_rdt

    if facts.intel_rdt is None:
        problem = "updating a non-existent Intel RDT configuration is not supported"
        raise _wrong(f"{problem}: container {container_id} has no linux.intelRdt, and its class is everybody's")
    before = intel_rdt.update(facts.intel_rdt, schemata)
    try:
        facts.manager().set(limits)
    except BaseException as error:
        try:
            intel_rdt.update(facts.intel_rdt, before)
        except RuntimeFailure as second:
            error.add_note(f"and could not go back: {second}")
        raise
