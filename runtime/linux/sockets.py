"""Unix sockets: framed messages with fds, and who is at the other end.

Refuses to interpret a message. Invariant: a frame is at most MAX_FRAME bytes, received fds are CLOEXEC, and a path
longer than sun_path is reached through its directory's fd.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from _socket import socket as Socket
    from pathlib import Path

MAX_FRAME = 32 << 20
MAX_FDS = 16
_HEADER = struct.Struct("=I")


class FrameError(ConnectionError):
    """The peer closed in the middle of a frame, or announced one that is too large."""


def send_frame(sock: Socket, payload: bytes, fds: tuple[int, ...] = ()) -> None:
    """Sends one frame: a 4-byte length, then `payload`; `fds` travel with the first byte (SCM_RIGHTS)."""
    if len(payload) > MAX_FRAME:
        raise FrameError(f"frame of {len(payload)} bytes, at most {MAX_FRAME}")
    data = _HEADER.pack(len(payload)) + payload
    sent = 0
    if fds:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        sent = sock.sendmsg([data], rights)
    if sent < len(data):  # an empty send would fail when the peer has answered and closed already
        sock.sendall(memoryview(data)[sent:])


def recv_frame(sock: Socket, *, want_fds: bool = False) -> tuple[bytes, list[int]] | None:
    """The next frame and its fds (CLOEXEC, the caller's); None at a clean end. Raises FrameError."""
    fds: list[int] = []
    try:
        head = _recv_exactly(sock, _HEADER.size, fds if want_fds else None)
        if head is None:
            return None
        (length,) = _HEADER.unpack(head)
        if length > MAX_FRAME:
            raise FrameError(f"frame of {length} bytes, at most {MAX_FRAME}")
        body = _recv_exactly(sock, length, fds if want_fds else None) if length else b""
        if body is None:
            raise FrameError("connection closed inside a frame")
        return body, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _recv_exactly(sock: Socket, count: int, fds: list[int] | None) -> bytes | None:
    pieces: list[bytes] = []
    left = count
    while left:
        if fds is None:
            piece = sock.recv(min(left, 1 << 20))
        else:
            room = _socket.CMSG_SPACE(MAX_FDS * 4)
            piece, ancillary, _, _ = sock.recvmsg(min(left, 1 << 20), room, _socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    fds.extend(struct.unpack_from(f"{len(data) // 4}i", data))
        if not piece:
            if left == count and not pieces:
                return None
            raise FrameError("connection closed inside a frame")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def peer_uid(sock: Socket) -> int:
    """SO_PEERCRED's uid."""
    return int(struct.unpack("=iII", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1])


def _short(path: str | Path) -> tuple[str, int]:
    if len(os.fsencode(path)) < 108:
        return os.fspath(path), -1
    fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{os.path.basename(path)}", fd


def listen_unix(path: str | Path, *, backlog: int = 64, mode: int = 0o600) -> socket.socket:
    """A listening stream socket at `path`; a stale file there is replaced (threats O58)."""
    import socket  # 6 ms of enums, for those who open sockets

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    name, fd = _short(path)
    try:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(name)
        finally:
            os.umask(before)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    return sock


def connect_unix(path: str | Path, timeout: float | None = None) -> socket.socket:
    """A stream connection to `path`; `timeout` in seconds stays set on the socket."""
    import socket  # 6 ms of enums, for those who open sockets

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    name, fd = _short(path)
    try:
        sock.settimeout(timeout)
        sock.connect(name)
    except BaseException:
        sock.close()
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    return sock
