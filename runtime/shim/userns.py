"""A pod's user namespace: made with the pod's other namespaces in it, so that they are its own, and what it owns.

    helper ── clone3(NEWUSER | NEWNET | NEWIPC | NEWUTS) ──▶ keeper     waits; its namespaces are what it is for
       │ ── uid_map, gid_map ─────────────────────────────▶ │
       │ pins NAMESPACE/user, joins the others              │
       │ ── end of the pipe ──────────────────────────────▶ ends

The helper stays in the host's user namespace: what it mounts and pins is the host's. Refuses nothing that was not
refused before: mappings were validated by whoever asked. Invariant: no process is left in the namespaces but the
pod's own, and they are gone with their pins.
"""

from __future__ import annotations

import os
import stat

from runtime.linux.namespace import loopback_up
from runtime.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUSER, CLONE_NEWUTS, clone3, setns
from runtime.newborn import write_mappings
from runtime.spec_namespaces import IdMapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from runtime.shim.protocol import PodMessage


def enter_owned(pod: PodMessage, pin: Callable[[str, str], None]) -> None:
    """Makes the namespaces of `pod` and joins all but the user namespace, which `pin(source, kind)` keeps. Raises
    OSError, RuntimeFailure."""
    wanted = {
        CLONE_NEWNET: ("net", pod.new_netns),
        CLONE_NEWIPC: ("ipc", pod.private_ipc),
        CLONE_NEWUTS: ("uts", pod.private_uts),
    }
    own = {flag: kind for flag, (kind, private) in wanted.items() if private}
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = clone3(CLONE_NEWUSER | sum(own))
    if pid == 0:
        try:
            os.close(writer)
            os.read(reader, 1)  # until the helper is done with us, or has been killed
        finally:
            os._exit(0)
    try:
        write_mappings(pid, _lines(pod.uids), _lines(pod.gids))
        pin(f"/proc/{pid}/ns/user", "user")
        for flag, kind in own.items():
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, flag)
            finally:
                os.close(fd)
        if pod.new_netns:
            loopback_up()
    finally:
        for fd in (reader, writer, pidfd):
            os.close(fd)
        os.waitpid(pid, 0)


def _lines(mappings: Iterable[Sequence[int]]) -> tuple[IdMapping, ...]:
    return tuple(IdMapping(container, host, size) for container, host, size in mappings)


def root_of(pod: PodMessage) -> tuple[int, int]:
    """The uid and gid that the pod's root is on the host; its own where there is no user namespace."""
    return _host_id(pod.uids), _host_id(pod.gids)


def _host_id(mappings: Iterable[Sequence[int]]) -> int:
    return next((host - container for container, host, size in mappings if container <= 0 < container + size), 0)


def give_pipes(pod: PodMessage, fds: Iterable[int]) -> None:
    """Pipes and sockets among `fds` become the pod's root's: a process in the user namespace could otherwise not open
    its own /dev/stdout. Anything else, such as /dev/null, is the host's (threats S20)."""
    uid, gid = root_of(pod)
    for fd in fds:
        kind = os.fstat(fd).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            os.fchown(fd, uid, gid)
