"""Files that a command hands to the daemon, opened: gRPC carries no fds, so there is a socket for them alone.

    command                                      daemon (STATE/files.sock, 0600)
      connect, one byte + fd (SCM_RIGHTS)    ──▶
                                             ◀── a ticket: 32 hex digits
      ocid.v1.Node/Load {"file": ticket, …}  ──▶ takes the fd, for that call
      close                                  ──▶ a ticket that nobody used is void

So the daemon reads what the command could open, wherever that lies: in another mount namespace, on a filesystem that
hides it from root. Refuses more than `_MOST` of them at once, and anything but one fd. Invariant: an fd that was handed
over is held by its connection or by one call, and closed with it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from cri.errors import InvalidArgument
from runtime.linux.sockets import connect_unix, listen_unix

_MOST = 64
_TICKET = 32
_FD = array.array("i").itemsize
_ANSWER_S = 10.0
FILES_SOCKET = "files.sock"


class Handover:
    """The daemon's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._peers: dict[socket.socket, str] = {}
        self._fds: dict[str, int] = {}

    def start(self) -> None:
        """Listens, on the running loop. Raises OSError."""
        self._socket = listen_unix(self._path)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def take(self, ticket: str) -> int:
        """The fd, the caller's from now on. Raises InvalidArgument."""
        fd = self._fds.pop(ticket, -1)
        if fd < 0:
            raise InvalidArgument("file: expected a ticket that was given for an open file")
        return fd

    def close(self) -> None:
        """Ends the listening and every connection."""
        for peer in tuple(self._peers):
            self._drop(peer)
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            peer, _ = self._socket.accept()
        except OSError:  # gone again, or no fd left: whoever connects is told by the closed socket
            return
        if len(self._peers) >= _MOST:
            peer.close()
            return
        peer.setblocking(False)
        self._peers[peer] = ""
        asyncio.get_running_loop().add_reader(peer, self._readable, peer)

    def _readable(self, peer: socket.socket) -> None:
        try:
            # Not recv_fds: it forgets about its flags (CPython 3.11), and the fd would be every child's.
            data, ancillary, _, _ = peer.recvmsg(1, socket.CMSG_SPACE(_FD), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % _FD])
        if data and len(fds) == 1 and not self._peers[peer]:
            ticket = os.urandom(_TICKET // 2).hex()
            self._peers[peer], self._fds[ticket] = ticket, fds[0]
            with contextlib.suppress(OSError):
                peer.send(ticket.encode())
            return
        for fd in fds:
            os.close(fd)
        self._drop(peer)

    def _drop(self, peer: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(peer)
        fd = self._fds.pop(self._peers.pop(peer), -1)
        if fd >= 0:
            os.close(fd)
        peer.close()


@contextlib.contextmanager
def handed_over(state: Path, fd: int) -> Iterator[str]:
    """The command's end: the ticket for `fd`, good for one call while the block lasts. Raises OSError."""
    with connect_unix(state / FILES_SOCKET, _ANSWER_S) as peer:
        peer.settimeout(_ANSWER_S)
        yield _ticket(peer, fd)


def _ticket(peer: socket.socket, fd: int) -> str:
    ticket = b""
    try:
        socket.send_fds(peer, [b"\0"], [fd])
        while len(ticket) < _TICKET:
            piece = peer.recv(_TICKET - len(ticket))
            if not piece:
                raise BrokenPipeError
            ticket += piece
    except (BrokenPipeError, ConnectionResetError):  # by when it closed: before our byte, before it read it, after
        raise ConnectionResetError("the daemon takes no more files now") from None
    return ticket.decode()
