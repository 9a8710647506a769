"""A seccomp listener's way to the agent that decides on notified calls: runtime-spec's "The Container Process State".

Refuses to start a process whose listener nobody has taken: it would wait for ever at its first notified call.
Invariant: one connection carries one state and one fd, is closed after it, and holds nobody up for longer than
PATIENCE_S.
"""

from __future__ import annotations

import _socket
import os
import stat
import struct

from runtime import state
from runtime.errors import RuntimeFailure
from runtime.fields import encode
from runtime.linux.process import pidfd_getfd
from runtime.sync import Reachable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state import State
    from runtime.sync import Message

PATIENCE_S = 10.0


def expect(path: str) -> None:
    """Raises RuntimeFailure unless a socket is at `path`: said before anything is made. Nobody is connected to yet, as
    a connection is for one state."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unreachable(error) from None
    if not stat.S_ISSOCK(mode):
        raise RuntimeFailure(
            f"linux.seccomp.listenerPath: {path} is no socket", step="seccomp", code="invalid_argument"
        )


def connect(path: str) -> _socket.socket:
    """A connection to the agent, the caller's. Raises RuntimeFailure."""
    agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        agent.settimeout(PATIENCE_S)
        directory, _, name = path.rpartition("/")
        with Reachable(directory, name) as reachable:
            agent.connect(reachable)
    except OSError as error:
        agent.close()
        raise _unreachable(error) from None
    return agent


def deliver(take_agent: _socket.socket, offer: Message, pidfd: int, facts: State, pid: int, status: str) -> None:
    """Takes the listener that process `pid` offers out of it, and sends it with the container process state.
    Raises RuntimeFailure; the connection is closed in any case."""
    listener = -1
    try:
        listener = pidfd_getfd(pidfd, int(offer.text[0]))
        document: dict[str, object] = {"ociVersion": facts.version, "fds": ["seccompFd"], "pid": pid}
        if facts.listener_metadata:
            document["metadata"] = facts.listener_metadata
        document["state"] = state.describe(facts, status)
        body = encode(document)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", listener))]
        sent = take_agent.sendmsg([body], rights, _socket.MSG_NOSIGNAL)
        if sent < len(body):
            take_agent.sendall(body[sent:])
    except OSError as error:
        what = f"send the seccomp listener to {facts.listener_path}"
        raise RuntimeFailure.of(error, step="seccomp", what=what, code="unavailable") from None
    finally:
        take_agent.close()
        if listener >= 0:
            os.close(listener)


def _unreachable(error: OSError) -> RuntimeFailure:
    what = "failed to connect with seccomp agent specified in the seccomp profile (linux.seccomp.listenerPath)"
    return RuntimeFailure.of(error, step="seccomp", what=what, code="unavailable")
