"""Between a shim and the helpers that it forks: one question, one answer, and fds with the questions.

    helper                                  shim
      │ ── lock ID ────────────────────────▶ │ … once nobody else works on ID
      │ ◀─ {facts} or None ───────────────── │
      │    makes the process                 │
      │ ── adopt {…} + pipes, log, pty ────▶ │ from now on it reads, logs, and waits for the pid
      │ ◀─ True ──────────────────────────── │
      │    answers the daemon, ends ───────▶ │ EOF: what it had locked is free

A SEQPACKET socketpair keeps messages whole; marshal encodes them, since both ends are one program in one process image
(docs.python.org/3/library/marshal: not for strangers). Refuses nothing: a helper is the shim itself, forked. Invariant:
received fds are CLOEXEC and belong to the receiver.
"""

from __future__ import annotations

import array
import marshal
import os
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_PEEK,
    MSG_TRUNC,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    SOL_SOCKET,
)
from _socket import socketpair as _socketpair

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Iterable
    from typing import Any

_FDS = CMSG_SPACE(16 * 4)
_peeked = bytearray(1)


def pair() -> tuple[Socket, Socket]:
    """Both ends, CLOEXEC. `_socket` itself: the module socket would make enums of every constant."""
    return _socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)


def send(end: Socket, message: Any, fds: Iterable[int] = ()) -> None:
    """One message. Raises OSError when the other end is gone."""
    rights = array.array("i", fds)
    ancillary = [(SOL_SOCKET, SCM_RIGHTS, rights)] if rights else []
    end.sendmsg([marshal.dumps(message)], ancillary)


def receive(end: Socket) -> tuple[Any, list[int]] | None:
    """The next message and its fds; None when the other end is gone."""
    # Its length first (recv(2), MSG_TRUNC): room for the longest would be mapped, faulted in and unmapped each time.
    size = end.recv_into(_peeked, 0, MSG_PEEK | MSG_TRUNC)
    data, ancillary, _, _ = end.recvmsg(size, _FDS, MSG_CMSG_CLOEXEC) if size else (b"", [], 0, None)
    if not data:
        return None
    fds: list[int] = []
    for level, kind, rights in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds.extend(array.array("i", rights))
    return marshal.loads(data), fds


class Channel:
    """The helper's end."""

    def __init__(self, end: Socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def ask(self, name: str, *arguments: object, fds: Iterable[int] = ()) -> Any:
        """The shim's answer; `fds` stay ours. Raises RuntimeFailure when the shim is gone."""
        try:
            send(self._end, (name, *arguments), fds)
            received = receive(self._end)
        except ConnectionError:
            received = None
        if received is None:
            raise RuntimeFailure(f"the shim ended before it answered {name!r}", code="unavailable")
        for fd in received[1]:
            os.close(fd)
        return received[0]

    def tell(self, name: str, *arguments: object, fds: Iterable[int] = ()) -> None:
        """What the shim does not answer; `fds` stay ours. Raises RuntimeFailure when the shim is gone."""
        try:
            send(self._end, (name, *arguments), fds)
        except ConnectionError:
            raise RuntimeFailure(f"the shim ended before it heard {name!r}", code="unavailable") from None

    def take(self) -> tuple[str, list[int]]:
        """What the shim says next, by name, and the fds with it, which are ours. ("", []) when it is gone."""
        try:
            received = receive(self._end)
        except ConnectionError:
            return "", []
        return ("", []) if received is None else received

    def hear(self) -> Any:
        """What the shim says of itself, after an answer that said that it will; None when it is gone."""
        try:
            received = receive(self._end)
        except ConnectionError:
            return None
        return None if received is None else received[0]

    def set_timeout(self, seconds: float | None) -> None:
        """`ask` raises TimeoutError after so long without an answer."""
        self._end.settimeout(seconds)
