"""What processes that came out of images may not have: more rights than the bundle's config.json gives (threats S71).

Looks only, at /proc, while none of them has run yet: at every thread, since each has rights of its own. Refuses by
naming the process and what it has. Invariant: in a user namespace that the container made itself, capabilities are not
counted: those are the kernel's own gift.
"""

from __future__ import annotations

import os
from contextlib import suppress

from runtime.errors import RuntimeFailure
from runtime.namespaces import PROC_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.spec import Spec

_SIGKILL = 9
_FILTERED = "2"  # proc_pid_status(5): SECCOMP_MODE_FILTER
_SETGID, _SETUID, _SYS_NICE = 1 << 6, 1 << 7, 1 << 23  # linux/capability.h
_ORDINARY = (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)


def members(init: int, pids: Iterable[int], *, but: int) -> list[int]:
    """The restored ones: `init` with all that descends from it, and of `pids`, the cgroup's, those that are not criu's
    (`but`) or its helpers. As this process numbers them."""
    parents = _parents()
    found = {init, *pids} | {pid for pid in parents if _descends(pid, init, parents)}
    return [pid for pid in sorted(found) if not _descends(pid, but, parents)]


def kill(pids: Iterable[int]) -> None:
    """SIGKILL for each. They are stopped by criu, so no number can have gone to another process."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, _SIGKILL)


def verify(spec: Spec, init: int, pids: Iterable[int], within: Iterable[int]) -> None:
    """Raises RuntimeFailure for the first process that has too much or is not among `within`, those of the container's
    cgroup, or an init in a namespace that it should not be in. Pids as this process numbers them."""
    for namespace in spec.namespaces:
        name = PROC_NAMES[namespace.kind]
        is_in = os.stat(f"/proc/{init}/ns/{name}").st_ino
        if namespace.path:
            if is_in != os.stat(namespace.path).st_ino:
                raise _refused(init, f"is in another {namespace.kind} namespace than {namespace.path}")
        elif is_in == os.stat(f"/proc/self/ns/{name}").st_ino:
            raise _refused(init, f"is in the host's {namespace.kind} namespace")
    home, inside = os.stat(f"/proc/{init}/ns/user").st_ino, frozenset(within)
    if not spec.has("user") and home != os.stat("/proc/self/ns/user").st_ino:
        raise _refused(init, "is in a user namespace, of which config.json has none")
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if pid not in inside and _status(f"{pid}")["State"][:1] not in "ZX":
                raise _refused(pid, "is outside of the container's cgroup")
            _be_as_expendable(spec, pid)
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    _verify_thread(spec, pid, int(thread), home)


def _parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[int(name)] = int(_status(name)["PPid"])
    return found


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


def _status(path: str) -> dict[str, str]:
    with open(f"/proc/{path}/status", encoding="utf-8", errors="replace") as lines:
        return dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)


def _be_as_expendable(spec: Spec, pid: int) -> None:
    """The images' oom_score_adj may make it less so; more is its own choice."""
    assert spec.process is not None  # restore looked
    wanted = spec.process.oom_score_adj
    with open("/proc/self/oom_score_adj" if wanted is None else f"/proc/{pid}/oom_score_adj", "rb") as file:
        least = int(file.read()) if wanted is None else wanted
    with open(f"/proc/{pid}/oom_score_adj", "r+b", buffering=0) as file:
        if int(file.read()) < least:
            file.write(str(least).encode())


def _verify_thread(spec: Spec, pid: int, thread: int, home: int) -> None:
    process = spec.process
    assert process is not None  # restore looked
    status = _status(f"{pid}/task/{thread}")
    if process.no_new_privileges and status.get("NoNewPrivs") != "1":
        raise _refused(pid, "may gain privileges: it lacks no_new_privs")
    if spec.seccomp is not None and status.get("Seccomp") != _FILTERED:
        raise _refused(pid, "has no seccomp filter")
    _verify_labels(spec, pid, thread)
    is_in = os.stat(f"/proc/{pid}/task/{thread}/ns/user").st_ino
    if is_in != home:
        if is_in == os.stat("/proc/self/ns/user").st_ino:
            raise _refused(pid, "is in the host's user namespace")
        return
    given = process.capabilities
    bounds = given.bounding | given.permitted | given.inheritable
    held = bounds
    # Without privileges to gain, no execve has given more than the ambient ones to somebody who is not root.
    if process.no_new_privileges and process.user.uid and not bounds & _SETUID:
        held = given.ambient
    for key in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"):
        extra = int(status[key], 16) & ~(held if key in ("CapPrm", "CapEff", "CapAmb") else bounds)
        if extra:
            from runtime.capabilities import names

            raise _refused(pid, f"has capabilities in {key} that it may not have: {', '.join(names(extra))}")
    if process.no_new_privileges:
        _verify_ids(spec, pid, status, bounds)
    if not bounds & _SYS_NICE and process.scheduler is None:
        policy, nice = os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)
        if policy & 0xFFFF not in _ORDINARY or nice < 0:
            raise _refused(pid, f"has a priority that it may not have: policy {policy}, nice {nice}")


def _verify_ids(spec: Spec, pid: int, status: dict[str, str], bounds: int) -> None:
    """Without privileges to gain and the capability to, nobody has become anybody else."""
    assert spec.process is not None  # restore looked
    user = spec.process.user
    if not bounds & _SETUID and {int(word) for word in status["Uid"].split()} != {user.uid}:
        raise _refused(pid, f"has the uids {status['Uid']}, and may have {user.uid} only")
    if not bounds & _SETGID:
        groups = {int(word) for word in f"{status['Gid']} {status.get('Groups', '')}".split()}
        if other := sorted(groups - {user.gid, *user.additional_gids}):
            raise _refused(pid, f"has groups that it may not have: {', '.join(map(str, other))}")


def _verify_labels(spec: Spec, pid: int, thread: int) -> None:
    assert spec.process is not None  # restore looked
    for wanted, place in ((spec.process.apparmor_profile, "attr/apparmor"), (spec.process.selinux_label, "attr")):
        if not wanted:
            continue
        with open(f"/proc/{pid}/task/{thread}/{place}/current", "rb") as file:
            found = os.fsdecode(file.read()).rstrip("\n\0")
        if found.removesuffix(" (enforce)") != wanted:
            raise _refused(pid, f"has the label {found[:80]!r}, not {wanted!r}")


def _refused(pid: int, what: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"restored process {pid} {what}",
        hint="the images are not those of a container with this config.json",
        code="failed_precondition",
    )
