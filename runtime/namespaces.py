"""Linux namespaces: which are new, which are joined by path, and by whom.

Refuses a path that is no namespace of its type before any process is made. Invariant: the caller of create never
changes its own namespaces; new ones are made by the clone that makes the init, and joined ones are joined by that init,
or, where a process cannot move itself (a PID namespace) or has other rights afterwards (a user namespace), by a
short-lived process between (user_namespaces(7), pid_namespaces(7)).
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.files import NSFS_MAGIC, fstatfs_type
from runtime.linux.libc import KernelError
from runtime.linux.namespace import namespace_type, owner
from runtime.linux.process import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    setns,
)
from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# runtime-spec config-linux.md "Namespaces"; the order is the order of joining. "mount" is never joined.
FLAGS = {
    "user": CLONE_NEWUSER,
    "pid": CLONE_NEWPID,
    "network": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
    "time": CLONE_NEWTIME,
    "mount": CLONE_NEWNS,
}
# The name of each under /proc/PID/ns.
PROC_NAMES = {
    "user": "user",
    "pid": "pid",
    "network": "net",
    "ipc": "ipc",
    "uts": "uts",
    "cgroup": "cgroup",
    "time": "time",
    "mount": "mnt",
}


class Namespace(Record):
    """One entry of linux.namespaces; `path` "" asks for a new one."""

    kind: str
    path: str = ""


def new_flags(namespaces: Iterable[Namespace]) -> int:
    """CLONE_NEW* of those that are to be made."""
    flags = 0
    for namespace in namespaces:
        if not namespace.path:
            flags |= FLAGS[namespace.kind]
    return flags


def others(pid: int) -> int:
    """CLONE_NEW* of those namespaces of `pid` that are not the caller's: setns(2) refuses the user namespace that one
    is in already, and from within another one every namespace of the host's."""
    flags = 0
    for kind, name in PROC_NAMES.items():
        try:
            if os.stat(f"/proc/{pid}/ns/{name}").st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
                flags |= FLAGS[kind]
        except FileNotFoundError:
            continue  # a kernel without this kind; of a process that is gone, nothing can be joined anyway
    return flags


def belongs_elsewhere(pid: int, kind: str) -> bool:
    """True when the namespace of `pid` belongs to another user namespace than the one that `pid` is in."""
    fd = os.open(f"/proc/{pid}/ns/{PROC_NAMES[kind]}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        owned = owner(fd)
    except PermissionError:
        return True
    finally:
        os.close(fd)
    try:
        return os.fstat(owned).st_ino != os.stat(f"/proc/{pid}/ns/user").st_ino
    finally:
        os.close(owned)


def members(pid: int) -> list[int]:
    """The processes in the PID namespace of `pid`, or only itself where that is the caller's own too: who is in the
    container, as far as that can be known without a cgroup."""
    try:
        wanted = os.stat(f"/proc/{pid}/ns/pid").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
    if wanted == os.stat("/proc/self/ns/pid").st_ino:
        return [pid]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == wanted:
                    found.append(int(entry))
            except OSError:
                continue  # gone, a zombie, or somebody else's
    return sorted(found)


def _identity(kind: str, path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise RuntimeFailure.of(
            error, step="namespaces", what=f"join {kind} namespace", code="invalid_argument"
        ) from None
    return status.st_dev, status.st_ino


class Joins:
    """The fds of the namespaces to join, open in the parent, and who joins which.

    `before`: by the process between, before it clones the init. `inside`: by the init itself. Both in order. `callers`:
    the kinds of those that have a path and are the caller's own.
    """

    def __init__(self, namespaces: Iterable[Namespace]) -> None:
        self.before: list[tuple[int, int]] = []
        self.inside: list[tuple[int, int]] = []
        self.callers: set[str] = set()
        wanted = {namespace.kind: namespace for namespace in namespaces}
        # Inside another user namespace the init has no rights over the namespaces of others: all is joined before.
        early = "user" in wanted
        try:
            for kind, flag in FLAGS.items():
                if kind not in wanted or not wanted[kind].path:
                    continue
                if _identity(kind, wanted[kind].path) == _identity(kind, f"/proc/self/ns/{PROC_NAMES[kind]}"):
                    self.callers.add(kind)
                    continue  # joined already; for a user namespace setns(2) even refuses it
                target = self.before if early or kind == "pid" else self.inside
                target.append((_open(kind, wanted[kind].path), flag))
        except BaseException:
            self.close()
            raise

    def join_before(self) -> None:
        """Joins `before`. With the caller's rights first, which a namespace of the host's needs (runc's sandboxes, a
        netns of the operator's); what belongs to the user namespace that is joined too is tried again from inside."""
        user = [(fd, flag) for fd, flag in self.before if flag == CLONE_NEWUSER]
        again = []
        for fd, flag in self.before:
            if flag == CLONE_NEWUSER:
                continue
            try:
                setns(fd, flag)
            except KernelError as error:
                if error.errno != errno.EPERM or not user:
                    raise
                again.append((fd, flag))
        join(user)
        join(again)

    def close(self) -> None:
        for fd, _ in (*self.before, *self.inside):
            os.close(fd)
        self.before, self.inside = [], []


def _open(kind: str, path: str) -> int:
    what = f"join {kind} namespace {path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise RuntimeFailure.of(error, step="namespaces", what=what, code="invalid_argument") from None
    try:
        if fstatfs_type(fd) != NSFS_MAGIC or namespace_type(fd) != FLAGS[kind]:
            raise RuntimeFailure(
                f"{what}: that is no {kind} namespace",
                step="namespaces",
                hint="linux.namespaces[].path must be like /proc/PID/ns/… or a bind mount of it",
                code="invalid_argument",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def join(fds: Iterable[tuple[int, int]]) -> None:
    """setns(2) into each."""
    for fd, flag in fds:
        setns(fd, flag)
