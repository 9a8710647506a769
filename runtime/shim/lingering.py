"""A helper waits for a moment for what mostly follows its own request at once: after a pod's start a subscription to
its events, after that the create of a container, if it has none, after a create the start, and after that a command; or
the pod's end, which `ocid run` without a daemon asks for when it is back.

    helper                             shim
      │ ── idle ───────────────────────▶ │ its locks are free; the next connection is handed to it
      │ ◀─ serve + connection ────────── │
      │ ── decline + connection ───────▶ │ it asks for something else: another helper is forked for that
      │ ── leave ──────────────────────▶ │ nobody came
      │ ◀─ left ──────────────────────── │ or the "serve" that was on its way

A fork of the shim, and every page that both requests write to, are saved.
Refuses all but those: what it saw of the shim's memory is from before. Invariant: a connection that it was handed is
served or handed back, and then, or PATIENCE after the last of them, it ends: until then a container's process may be
its child (in a pod with a PID namespace, runtime.cloning), and the shim learns of an exit only once it is its own.
"""

from __future__ import annotations

import _socket
import os

from runtime.linux.sockets import peer_uid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.shim.channel import Channel

IDLE = "idle"  # what the shim is told first
PATIENCE = 1.0  # seconds
_MOMENT = 0.1  # seconds
_OTHERS = 1  # requests that may come between: who watches a container attaches to it before its start
_BREATH = 0.002  # seconds
_HEADER, _NAME = 4, 32  # bytes of a frame (runtime.linux.sockets) that come first, and that tell the operation


def linger(
    channel: Channel,
    wanted: tuple[str, ...],
    serve: Callable[[int], tuple[str, ...]],
    make_ready: Callable[[], object] | None = None,
) -> tuple[str, ...]:
    """After IDLE was told: calls `serve` with the connection of a `wanted` operation, if one comes in time. `serve`
    owns the fd; what it returns is returned, or (). `make_ready` is called while nobody comes, but not at once: the
    answer to the request before is on its way, and those who pass it on need the processor."""
    others = 0
    while True:
        came = None
        if make_ready is not None:
            came = _take(channel, _BREATH)
            if came is None:
                make_ready()
                make_ready = None
        came = came or _take(channel, PATIENCE)
        channel.set_timeout(None)
        if came is None:
            channel.tell("leave")
            came = channel.take()
        name, fds = came
        if name != "serve":
            return ()
        if _asks_for(wanted, fds[0]):
            return serve(fds[0])
        channel.tell("decline", fds=fds)
        others += 1
        if others > _OTHERS:
            return ()  # who says that it is idle stays for what it is handed then
        channel.tell(IDLE)
        os.close(fds[0])


def _take(channel: Channel, seconds: float) -> tuple[str, list[int]] | None:
    channel.set_timeout(seconds)
    try:
        return channel.take()
    except TimeoutError:
        return None


def _asks_for(wanted: tuple[str, ...], connection: int) -> bool:
    """A look at the request, which stays to be read: it follows the connection at once."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, connection)
    sock.settimeout(_MOMENT)
    try:
        head = sock.recv(_HEADER + _NAME, _socket.MSG_PEEK)[_HEADER:]
        begins = [begin % name.encode() for name in wanted for begin in (b'["%s",', b'["timed",["%s",')]
        return head.startswith(tuple(begins)) and peer_uid(sock) == 0
    except OSError:
        return False
    finally:
        sock.settimeout(None)
        sock.detach()
