"""What processes that came out of images may not have: more rights than the bundle's config.json gives (threats S71).

Looks only, at /proc, while none of them has run yet. Refuses by naming the process and what it has. Invariant: in a
user namespace that the container made itself, capabilities are not counted: those are the kernel's own gift.
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


def members(init: int, pids: Iterable[int], *, but: int) -> list[int]:
    """The restored ones of `pids`, as this process numbers them: criu (`but`) is among those with its helpers."""
    return [pid for pid in sorted({init, *pids}) if not _descends(pid, but)]


def kill(pids: Iterable[int]) -> None:
    """SIGKILL for each. They are stopped by criu, so no number can have gone to another process."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, _SIGKILL)


def verify(spec: Spec, init: int, pids: Iterable[int]) -> None:
    """Raises RuntimeFailure for the first process that has too much, or an init in a namespace that it should not be
    in. `init` and `pids` as this process numbers them."""
    for namespace in spec.namespaces:
        name = PROC_NAMES[namespace.kind]
        is_in = os.stat(f"/proc/{init}/ns/{name}").st_ino
        if namespace.path:
            if is_in != os.stat(namespace.path).st_ino:
                raise _refused(init, f"is in another {namespace.kind} namespace than {namespace.path}")
        elif is_in == os.stat(f"/proc/self/ns/{name}").st_ino:
            raise _refused(init, f"is in the host's {namespace.kind} namespace")
    home = os.stat(f"/proc/{init}/ns/user").st_ino
    for pid in pids:
        try:
            _verify_process(spec, pid, home)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended


def _descends(pid: int, ancestor: int) -> bool:
    try:
        while pid > 1 and pid != ancestor:
            pid = int(_status(pid)["PPid"])
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    return pid == ancestor


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)


def _verify_process(spec: Spec, pid: int, home: int) -> None:
    assert spec.process is not None  # restore looked
    status = _status(pid)
    if spec.process.no_new_privileges and status.get("NoNewPrivs") != "1":
        raise _refused(pid, "may gain privileges: it lacks no_new_privs")
    if spec.seccomp is not None and status.get("Seccomp") != _FILTERED:
        raise _refused(pid, "has no seccomp filter")
    is_in = os.stat(f"/proc/{pid}/ns/user").st_ino
    if is_in != home:
        if is_in == os.stat("/proc/self/ns/user").st_ino:
            raise _refused(pid, "is in the host's user namespace")
        return
    given = spec.process.capabilities
    allowed = 0 if given is None else given.bounding | given.permitted | given.inheritable
    for key in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"):
        extra = int(status[key], 16) & ~allowed
        if extra:
            from runtime.capabilities import names

            raise _refused(pid, f"has capabilities in {key} that it may not have: {', '.join(names(extra))}")


def _refused(pid: int, what: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"restored process {pid} {what}",
        hint="the images are not those of a container with this config.json",
        code="failed_precondition",
    )
