"""A dress rehearsal in the zygote: a shim with one container that does nothing, from start to stop, and what comes
before a command enters a container.

Why: a forked process pays for every page it writes to, and the first use of almost anything in the interpreter writes
to many: method caches, inline caches of byte code, types that are made on demand. Done once before the fork, these
pages stay shared. Refuses to be missed: whatever fails here is reported and costs memory, no function. Invariant:
nothing of it is left in the process, on disk or in the mount table.
"""

from __future__ import annotations

import os
import time

from runtime import exec
from runtime.cgroups.hierarchy import own_directories
from runtime.linux import signals, template
from runtime.linux.files import remove_tree
from runtime.linux.process import CLONE_PARENT, clone3, set_child_subreaper, start_time
from runtime.linux.sockets import connect_unix, listen_unix
from runtime.linux.warm_code import Warmed
from runtime.shim import protocol
from runtime.shim.channel import Channel
from runtime.shim.handover import Handover
from runtime.shim.helper import become_helper, kill_command, kill_rest, start_again
from runtime.shim.lingering import IDLE
from runtime.shim.pipes import Pipes
from runtime.shim.protocol import ContainerMessage, ExecMessage, Facts
from runtime.shim.resident import Resident
from runtime.spec_process import parse_process
from runtime.state import SPEC_VERSION, State, reserve, save

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from typing import NoReturn

    from runtime.shim.resident import Work

_PATIENCE = 10.0
_PROCESS = {
    "terminal": False,
    "user": {"uid": 0, "gid": 0, "additionalGids": [1]},
    "args": ["/bin/sh", "-c", "true"],
    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=rehearsal", "KUBERNETES_PORT=tcp://127.0.0.1:443"],
    "cwd": "/",
    "capabilities": {kind: ["CAP_CHOWN", "CAP_KILL"] for kind in ("bounding", "effective", "permitted")},
    "noNewPrivileges": True,
    "oomScoreAdj": 0,
}
# The interpreter specialises byte code after as many calls, if it cannot be told that it is warm; one less is 80 KiB
# more in each shim at rest.
_COLD_ROUNDS = 8
_ROUNDS = 2  # what the first one makes is found by the second, as in a shim


def rehearse(state: str) -> None:
    """Runs it a few times in a directory of its own below `state`. Raises OSError and RuntimeFailure."""
    with Warmed() as is_warm:
        _rehearse(state, _ROUNDS if is_warm else _COLD_ROUNDS)


def _rehearse(state: str, rounds: int) -> None:
    directory = f"{state}/.rehearsal"
    set_child_subreaper(True)  # as a shim is: the parent of what its helpers leave
    template.rehearse(rounds)
    try:
        for _ in range(rounds):
            os.makedirs(directory, mode=0o700, exist_ok=True)
            resident = Resident(_served, kill_rest, kill_command, start_again)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            try:
                # A helper that fails half-way must not leave the zygote waiting for an "end" that never comes.
                resident.run(_one_container(directory), null, only_first=True)
                _command(directory)
            finally:
                resident.close()
                remove_tree(directory)
    finally:
        remove_tree(directory)
        _reap()
        set_child_subreaper(False)
        for number in (signals.SIGCHLD, signals.SIGTERM, signals.SIGHUP, signals.SIGINT):
            signals.handle(number, None)


def _reap() -> None:
    """Those that became this process's children when their parents ended: all of them are about to end, too."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _served(_resident: Resident, connection: int, end: Socket) -> NoReturn:
    """The helper of a connection: it hands it over to the shim as a subscriber's, and a command to be answered for."""
    try:
        become_helper(connection, end.fileno())
        channel = Channel(end)
        channel.tell("subscribe", b"subscribed", fds=[connection])
        handover = Handover(channel, connection, watched=True)
        handover.pid = _orphan(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
        handover.expects((), always=True)
    finally:
        os._exit(0)


def _one_container(directory: str) -> Work:
    """The helper of the rehearsal: its container is a process that writes a line and ends."""

    def work(_resident: Resident, _connection: int, end: Socket) -> NoReturn:
        try:
            become_helper(end.fileno())
            _live(Channel(end), directory)
        finally:
            os._exit(0)

    return work


def _live(channel: Channel, directory: str) -> None:
    with listen_unix(f"{directory}/shim.sock") as listener:
        listener.setblocking(False)
        channel.ask("listen", b"ocid-zygote", b"", fds=[listener.fileno()])
    with connect_unix(f"{directory}/shim.sock", _PATIENCE) as subscriber:
        heard = b""
        while b"exit_code" not in heard:
            heard += subscriber.recv(64) or b"exit_code"
        _contain(channel, directory)
    channel.tell(IDLE)
    with connect_unix(f"{directory}/shim.sock", _PATIENCE):
        for fd in channel.take()[1]:
            os.close(fd)
    channel.ask("stop", True)
    channel.ask("end")


def _contain(channel: Channel, directory: str) -> None:
    """One container from adopted to forgotten."""
    channel.ask("lock", "c")
    message = ContainerMessage("c", directory, "", "", [], 0, f"{directory}/log", False, False, False, "")
    pipes = Pipes(message)
    pid = _orphan(pipes.child[1])
    facts = Facts("c")
    facts.pid, facts.created_ns = pid, time.time_ns()
    told = {
        "facts": facts.to_json(),
        "bundle": directory,
        "handler": "",
        "log_path": message.log_path,
        "shares_pids": False,
        "restart": "",
        "message": {},
        "stdin_once": False,
        "oom": 0,
        "fds": list(pipes.ours),
    }
    channel.ask("adopt", told, fds=pipes.ours.values())
    pipes.close()
    channel.ask("started", "c", time.time_ns())
    channel.ask("told", "c")
    channel.ask("facts", "c")
    channel.ask("forget", "c")


def _command(directory: str) -> None:
    """What a helper does for a command in a container, from its request to the clone, for this process as the init."""
    root = f"{directory}/runtime"
    # A container's cgroups are never the root of a hierarchy, where this process may be.
    own = {name: path for name, path in own_directories().items() if not os.path.ismount(path)}
    facts = State("c", os.getpid(), start_time(os.getpid()), "", directory, "/", SPEC_VERSION, tuple(own.items()))
    reserve(root, facts.id)
    save(root, facts)
    message = ExecMessage(facts.id, _PROCESS, 1.0, 1)
    _, body = protocol.parse_request(protocol.request("exec", message))
    process = parse_process(protocol.parse(ExecMessage, body).process, "process")
    exec.rehearse(exec.ExecRequest(root, facts.id, process, disposable=True))


def _orphan(stdout: int) -> int:
    """A process whose parent is the shim, as a container's init is."""
    pid, pidfd = clone3(CLONE_PARENT)
    if pid == 0:
        os.write(stdout, b"line\nline")
        os._exit(0)
    os.close(pidfd)
    return pid
