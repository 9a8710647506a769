"""A helper that has made a container waits for a moment for the start of it, which mostly follows at once.

    helper                             shim
      │ ── idle ───────────────────────▶ │ its locks are free; the next connection is handed to it
      │ ◀─ serve + connection ────────── │
      │ ── decline + connection ───────▶ │ it asks for something else: another helper is forked for that
      │ ── leave ──────────────────────▶ │ nobody came
      │ ◀─ left ──────────────────────── │ or the "serve" that was on its way

A fork of the shim, and every page that a start writes to, are saved; the pages of a create are in this process already.
Refuses all but a start: what it saw of the shim's memory is from before the container. Invariant: a connection that it
was handed is served or handed back, and then, or after PATIENCE, it ends: until then the container's process is its
child and not the shim's, which learns of an exit only when it is.
"""

from __future__ import annotations

import _socket

from runtime.linux.sockets import peer_uid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.channel import Channel

IDLE = "idle"  # what the shim is told first
PATIENCE = 1.0  # seconds
_MOMENT = 0.1  # seconds
_START = b'["start",'
_HEADER = 4  # of a frame: runtime.linux.sockets


def linger(channel: Channel, serve: Callable[[int], object]) -> None:
    """After IDLE was told: calls `serve` with the connection of a start, if one comes in time; `serve` owns the fd."""
    channel.set_timeout(PATIENCE)
    try:
        name, fds = channel.take()
    except TimeoutError:
        channel.set_timeout(None)
        channel.tell("leave")
        name, fds = channel.take()
    channel.set_timeout(None)
    if name == "serve":
        if _asks_for_start(fds[0]):
            serve(fds[0])
        else:
            channel.tell("decline", fds=fds)


def _asks_for_start(connection: int) -> bool:
    """A look at the request, which stays to be read: it follows the connection at once."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, connection)
    sock.settimeout(_MOMENT)
    try:
        head = sock.recv(_HEADER + len(_START), _socket.MSG_PEEK)
        return head[_HEADER:] == _START and peer_uid(sock) == 0
    except OSError:
        return False
    finally:
        sock.settimeout(None)
        sock.detach()
