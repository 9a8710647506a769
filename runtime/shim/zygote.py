"""The process that shims are forked from: everything imported once, the garbage collector's view frozen, one thread.

    daemon ── posix_spawn ──▶ starter ── fork ──▶ zygote       the starter ends, so init (or a subreaper) adopts it
    zygote ── clone3(CLONE_PARENT) ──▶ shim                    a shim is the zygote's sibling: init's child at once

Three roles, by sys.argv[1]: `zygote STATE` serves STATE/zygote.sock; `direct` serves a single request on fd 3 as a
shim would (`ocid run` without a daemon). Refuses peers other than root, and a second zygote for one state directory
(flock). Invariant: neither role has threads, and each fork of the zygote closes every fd that is not its own.
"""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import sys

from runtime.errors import RuntimeFailure
from runtime.linux.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, malloc_trim, mallopt
from runtime.linux.process import (
    CLONE_PARENT,
    clone3,
    close_range,
    set_child_subreaper,
    set_comm,
)
from runtime.linux.sockets import FrameError, listen_unix, peer_uid, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.cgroup import leave_daemon
from runtime.shim.handler import bring_up, kill_rest, serve
from runtime.shim.rehearsal import rehearse
from runtime.shim.resident import Resident, report
from runtime.shim.sweep import Sweeper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_PATIENCE = 2.0  # seconds for a connected peer to say what it wants
_CONNECTION = 3  # the fd on which a direct process is given its request
_OOM_SCORE = "-999"  # kubelet's for node-critical daemons: killed after all pods (threats S68)


def main(argv: list[str]) -> int:
    """Runs a role. Exit code 0 for the zygote also when another one serves already."""
    if len(argv) == 3 and argv[1] == "zygote":
        return _zygote(argv[2])
    if len(argv) == 2 and argv[1] == "direct":
        return _direct()
    os.write(2, b"usage: zygote STATE | direct\n")
    return 2


# ---------------------------------------------------------------------------------------------------------- zygote


def _zygote(state: str) -> int:
    """Detaches, says on fd 1 that it serves (or why not), and serves until it is told to quit."""
    close_range(3)
    lock = os.open(f"{state}/zygote.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fork():
        os._exit(0)
    _detach("ocid-zygote")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(1, b"taken")
        return 0
    leave_daemon(always=True)
    _protect_from_oom()
    listener = listen_unix(f"{state}/zygote.sock")
    os.write(1, b"ready")
    _to_null(0, 1)
    try:
        rehearse(state)
    except (OSError, RuntimeFailure) as error:
        report("rehearse", error)
    _give_memory_back()
    gc.collect()
    gc.freeze()  # the collector never writes to these pages, so they stay shared with every shim
    return _serve(listener, state)


def _serve(listener: socket.socket, state: str) -> int:
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                if peer_uid(connection) != 0:
                    continue
                connection.settimeout(_PATIENCE)
                if not _handle(connection):
                    os.unlink(f"{state}/zygote.sock")
                    return 0
            except (OSError, FrameError) as error:
                report("serve a request", error)


def _handle(connection: socket.socket) -> bool:
    """One request; False after "quit"."""
    received = recv_frame(connection)
    if received is None:
        return True
    try:
        name, body = protocol.parse_request(received[0])
        if name == "hello":
            send_frame(connection, protocol.reply({"pid": os.getpid(), "version": os.environ.get("OCID_VERSION", "")}))
        elif name == "quit":
            send_frame(connection, protocol.reply({}))
            return False
        else:
            pid, pidfd = clone3(CLONE_PARENT)
            if pid == 0:
                _in_child(connection, name, body)
            os.close(pidfd)
    except RuntimeFailure as error:
        send_frame(connection, protocol.failure(error))
    return True


def _in_child(connection: socket.socket, name: str, body: object) -> NoReturn:
    """In a fork of the zygote: does what was asked for and never returns."""
    code = 1
    try:
        os.dup2(connection.fileno(), _CONNECTION, inheritable=False)
        connection.detach()
        close_range(_CONNECTION + 1)
        _answer(socket.socket(fileno=_CONNECTION), name, body)
        code = 0
    except BaseException as error:
        report(name, error)
    finally:
        os._exit(code)


# ---------------------------------------------------------------------------------------------------------- direct


def _direct() -> int:
    """The one request comes on fd 3; a shim that starts is a child of init from the beginning."""
    if os.fork():
        os._exit(0)
    close_range(_CONNECTION + 1)
    connection = socket.socket(fileno=_CONNECTION)
    connection.set_inheritable(False)
    _to_null(0, 1)
    leave_daemon(always=False)
    _protect_from_oom()
    received = recv_frame(connection)
    if received is None:
        return 1
    _give_memory_back()
    gc.freeze()
    name, body = protocol.parse_request(received[0])
    _answer(connection, name, body)
    return 0


# ------------------------------------------------------------------------------------------------------------ both


def _answer(connection: socket.socket, name: str, body: object) -> None:
    """Becomes a shim, or sweeps; answers on `connection`, which this takes."""
    try:
        if name == "start":
            _become_shim(protocol.parse(protocol.PodMessage, body), connection)
            return
        if name != "sweep":
            raise RuntimeFailure(f"unknown operation {name!r:.40}", code="invalid_argument")
        _detach("ocid-sweep")
        reply = protocol.reply(Sweeper(protocol.parse(protocol.SweepMessage, body)).run())
    except (OSError, RuntimeFailure) as error:
        reply = protocol.failure(error)
    with connection:
        send_frame(connection, reply)


def _become_shim(pod: protocol.PodMessage, connection: socket.socket) -> None:
    """This process as the shim of `pod`, until the pod is stopped. Raises OSError before it is one."""
    _detach(f"shim {pod.id}")
    set_child_subreaper(True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(f"{pod.directory}/shim.log", flags, 0o600)
    os.dup2(log, 2, inheritable=False)
    os.close(log)
    Resident(pod, serve, kill_rest).run(bring_up, connection.detach())


def _detach(name: str) -> None:
    """A session and a process group of its own, out of everybody's way; the terminal's signals are nobody's."""
    try:
        os.setsid()
    except PermissionError:  # leads one already
        pass
    os.chdir("/")
    os.umask(0o077)
    set_comm(name)


def _to_null(*fds: int) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def _give_memory_back() -> None:
    """Large buffers (log chunks, output of execs) are mapped and unmapped, never kept: glibc would raise the limit for
    that with the first of them, and an idle shim would hold megabytes."""
    mallopt(M_MMAP_THRESHOLD, 1 << 16)
    mallopt(M_TRIM_THRESHOLD, 1 << 17)
    malloc_trim()


def _protect_from_oom() -> None:
    """As far as this machine lets us: without CAP_SYS_RESOURCE lowering it is refused."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(_OOM_SCORE)
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv))
