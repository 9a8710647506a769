"""The clone that becomes a container's init: by the caller itself, or by a process between that goes ahead.

    caller --clone3(new namespaces)--> init                                       as a rule; with CLONE_PARENT if asked
    caller --clone3--> between --clone3(new namespaces, CLONE_PARENT)--> init     the init is the caller's child as well

A process between is made where the init must find itself in namespaces that no process enters alone: a PID namespace
to join (only children are in it), a user namespace (its own rights are other ones then), and a new time namespace,
whose offsets can be set only as long as nobody is in it (time_namespaces(7)). Refuses to leave one behind: it ends with
the clone, and is waited for. Invariant: the namespaces of the caller stay as they are.
"""

from __future__ import annotations

import errno
import os

from runtime.errors import RuntimeFailure
from runtime.linux.process import (
    CLONE_NEWCGROUP,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_PARENT,
    clone3,
    pidfd_open,
    unshare,
)
from runtime.namespaces import new_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from runtime.cgroups.manager import Gate
    from runtime.namespaces import Joins
    from runtime.spec import Spec
    from runtime.spec_namespaces import TimeOffset
    from runtime.sync import Channel


def clone_init(
    spec: Spec,
    joins: Joins,
    gate: Gate,
    mine: Channel,
    its: Channel,
    main: Callable[[], NoReturn],
    *,
    sibling: bool = False,
) -> tuple[int, int]:
    """(pid, pidfd) of a new child of the caller, or of its parent if it is to be a `sibling` and takes no process
    between, which runs `main` and talks on `its`. Raises RuntimeFailure."""
    # The cgroup namespace is made by the init, once it is in its cgroup: that becomes the namespace's root.
    flags = new_flags(spec.namespaces) & ~CLONE_NEWCGROUP
    if not joins.before and not flags & CLONE_NEWTIME:
        try:
            pid, pidfd = clone3(flags | (CLONE_PARENT if sibling else 0), cgroup_fd=gate.cgroup_fd)
        except OSError as error:
            raise RuntimeFailure.of(error, step="clone", what="make the namespaces") from None
        if pid == 0:
            mine.close()
            main()
        return pid, pidfd
    between, between_fd = clone3(0)
    if between == 0:
        mine.close()
        _between(spec.time_offsets, joins, flags, gate, its, main)
    os.close(between_fd)
    try:
        # `its` is open here until then: Child comes over it.
        message, fds = mine.receive("Child")
        return message.pid, fds[0] if fds else pidfd_open(message.pid)
    finally:
        os.waitpid(between, 0)


def _between(
    offsets: tuple[TimeOffset, ...], joins: Joins, flags: int, gate: Gate, its: Channel, main: Callable[[], NoReturn]
) -> NoReturn:
    """Joins and makes what its child must find itself in, clones that as the caller's child, and ends."""
    what = "join namespaces"
    try:
        joins.join_before()
        what = "make the namespaces"
        if flags & CLONE_NEWTIME:
            # In one call: the user namespace is made first and owns the other.
            unshare(flags & (CLONE_NEWUSER | CLONE_NEWTIME))
            flags &= ~(CLONE_NEWUSER | CLONE_NEWTIME)
            _set_clocks(offsets)
        pid, pidfd = clone3(flags | CLONE_PARENT, cgroup_fd=gate.cgroup_fd)
        if pid == 0:
            main()
        its.send("Child", pid=pid, fds=(pidfd,))
    except BaseException as error:
        its.fail(RuntimeFailure.of(error, step="namespaces", what=what if isinstance(error, OSError) else ""))
        os._exit(1)
    os._exit(0)


def _set_clocks(offsets: tuple[TimeOffset, ...]) -> None:
    if not offsets:
        return
    lines = "".join(f"{offset.clock} {offset.seconds} {offset.nanoseconds}\n" for offset in offsets)
    fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, lines.encode())
    except OSError as error:
        raise RuntimeFailure.of(
            error,
            what=f"linux.timeOffsets: set {', '.join(lines.splitlines())}",
            code="invalid_argument" if error.errno == errno.ERANGE else "internal",
        ) from None
    finally:
        os.close(fd)
