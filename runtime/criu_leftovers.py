"""What a criu that was killed leaves on those who live on, taken away from outside.

    the container's network   closed but to criu: a chain CRIU that INPUT and OUTPUT jump to (iptables), or a table
                              inet CRIU-… (nft); in a network that is joined, for everybody else there as well
    its connections           in repair mode (TCP_REPAIR of tcp(7)): nothing is sent, and nothing answered

Refuses the network that the caller himself is in: what criu locks there are single connections, by rules without names.
Invariant: what is removed bears criu's name, and is looked for in the container's network by a process of its own; what
is not there, or cannot be removed, is no failure: the call that this follows has failed already.
"""

from __future__ import annotations

import os
import select
import socket

from runtime.linux.process import CLONE_NEWNET, clone3, end_child, pidfd_getfd, pidfd_open, setns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TCP_REPAIR, _REPAIR_ON, _REPAIR_OFF = 19, 1, 0  # linux/tcp.h
_DEADLINE_MS = 20_000
_MOST = 16  # jumps to one chain: each dump that was broken off may have left one
_MAX_TABLES = 1 << 16


def unlock(network: str) -> None:
    """Opens a network (the path of its namespace) that a criu has closed. There is none, or it is ours: nothing."""
    try:
        namespace = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        here = os.stat("/proc/self/ns/net")
        if os.path.samestat(os.fstat(namespace), here):
            return
        pid, pidfd = clone3(0)
        if pid == 0:
            _unlock_inside(namespace)
    finally:
        os.close(namespace)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_DEADLINE_MS)
    end_child(pid, pidfd)


def _unlock_inside(namespace: int) -> None:
    """The process that enters; does not return."""
    try:
        setns(namespace, CLONE_NEWNET)
        for program in ("iptables", "ip6tables"):
            for chain in ("INPUT", "OUTPUT"):
                for _ in range(_MOST):
                    if not _run(program, "-w", "5", "-D", chain, "-j", "CRIU"):
                        break
            if _run(program, "-w", "5", "-F", "CRIU"):
                _run(program, "-w", "5", "-X", "CRIU")
        for name in _tables():
            _run("nft", "delete", "table", "inet", name)
    finally:
        os._exit(0)


def _run(*words: str, output: int = -1) -> bool:
    """Whether the program was there and ended well."""
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2) if number != 1 or output < 0
    ]
    if output >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, output, 1))
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        pid = os.posix_spawnp(words[0], words, {"PATH": path}, file_actions=actions)
    except OSError:
        return False
    return not os.waitpid(pid, 0)[1]


def _tables() -> list[str]:
    """The tables of nft's that are criu's."""
    listing = os.memfd_create("tables", os.MFD_CLOEXEC)
    _run("nft", "list", "tables", output=listing)
    lines = os.pread(listing, _MAX_TABLES, 0).decode(errors="replace").splitlines()
    return [line.removeprefix("table inet ") for line in lines if line.startswith("table inet CRIU-")]


def mend_connections(pids: Iterable[int]) -> None:
    """Takes the connections of these processes out of repair mode."""
    seen: set[str] = set()
    for pid in pids:
        try:
            pidfd = pidfd_open(pid)
        except OSError:
            continue
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                name = os.readlink(f"/proc/{pid}/fd/{number}")
                if name.startswith("socket:") and name not in seen:
                    seen.add(name)
                    _mend(pidfd_getfd(pidfd, int(number)))
        except OSError:
            continue  # it has ended, or we may not look into it
        finally:
            os.close(pidfd)


def _mend(take_fd: int) -> None:
    with socket.socket(fileno=take_fd) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.proto != socket.IPPROTO_TCP:
            return
        if one.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == _REPAIR_ON:
            one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF)
