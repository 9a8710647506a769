"""What is different when ocirun has not the rights of the machine's root: an ordinary user, or root of a namespace.

Refuses, for an ordinary user, a config without a user namespace, in runc's words: nothing of a container can be made
then. Invariant: nobody gets more than the kernel gives him; ids are mapped by the caller's own right or by newuidmap(1)
and newgidmap(1), which read /etc/subuid and /etc/subgid.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec import Spec
    from runtime.spec_namespaces import IdMapping

_MAX_MESSAGE = 4096


def in_user_namespace() -> bool:
    """True in any user namespace but the first, whose one mapping is every id to itself."""
    with open("/proc/self/uid_map", "rb", buffering=0) as file:
        return file.read(256).split(b"\n")[0].split() != [b"0", b"0", b"4294967295"]


def is_rootless(asked: bool | None) -> bool:
    """Whether cgroups are best-effort: what `--rootless` says, or else whether the rights of root are missing."""
    return asked if asked is not None else os.geteuid() != 0 or in_user_namespace()


def check(spec: Spec) -> None:
    """Raises RuntimeFailure for what an ordinary user cannot have."""
    if os.geteuid() == 0:
        return
    if any(mount.idmap for mount in spec.mounts):
        problem = "mounts: id-mapped mounts are not supported for rootless containers"
        raise RuntimeFailure(problem, code="invalid_argument")
    if not spec.has("user"):
        raise RuntimeFailure(
            "linux.namespaces: rootless container requires user namespaces",
            hint="`ocirun spec --rootless` writes a config.json that an ordinary user can run",
            code="invalid_argument",
        )


def must_be_dumpable(spec: Spec) -> bool:
    """True when the init has to stay open to its caller's eyes (/proc/PID/ns, exec into a created container, hooks).

    An init that is not dumpable belongs to the root of the namespace that ocirun was started in: an ordinary user is
    locked out. It matters to who could look into the init from inside; without joined namespaces nobody is there.
    """
    return os.geteuid() != 0 and not any(namespace.path for namespace in spec.namespaces)


def map_by_tool(tool: str, pid: int, mappings: tuple[IdMapping, ...]) -> None:
    """newuidmap(1) or newgidmap(1). Raises RuntimeFailure with what it says."""
    words = [tool, str(pid), *(str(number) for m in mappings for number in (m.container, m.host, m.size))]
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)]
        try:
            child = os.posix_spawnp(tool, words, os.environ, file_actions=actions)
        except OSError as error:
            failure = RuntimeFailure.of(error, what=f"run {tool}", step="user namespace", code="failed_precondition")
            if error.errno == errno.ENOENT:
                failure.message = f'exec: "{tool}": executable file not found in $PATH'
                failure.hint = "ranges of ids need newuidmap and newgidmap (Debian's package uidmap)"
            raise failure from None
        os.close(write)
        write = -1
        said = b""
        while len(said) < _MAX_MESSAGE and (piece := os.read(read, _MAX_MESSAGE)):
            said += piece
        _, status = os.waitpid(child, 0)
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if status:
        what = " ".join(said.decode(errors="replace").split()) or f"it ended with {os.waitstatus_to_exitcode(status)}"
        raise RuntimeFailure(
            f"{tool} {' '.join(words[2:])[:200]}: {what}",
            step="user namespace",
            code="invalid_argument",
            hint=f"/etc/sub{tool[3]}id must give these ids to the caller, and {tool} must be set-uid root",
        )
