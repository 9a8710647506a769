"""The talk between the caller of create (or exec), the init it makes, and a later start. One file, both directions.

    caller                            init                                   start (another process, later)
      |-- clone ------------------------>|
      |<- Child(pid) + pidfd ------------|   only from a process between (joined pid or user namespace)
      | writes uid_map, gid_map          |
      |-- Go --------------------------->|   namespaces, rootfs, mounts, devices
      |<- Console + pty fd --------------|   only with a terminal
      |<- Hooks -------------------------|   only with prestart or createRuntime hooks
      |-- Go --------------------------->|   pivot, masks, limits, cgroup, identity, command looked up
      |<- Listener(number of its fd) ----|   only when the seccomp profile notifies: the filter is in force now
      |-- Go --------------------------->|   its agent has the fd
      |<- Ready(warnings) ---------------|
      | writes state.json                |
      |-- Go --------------------------->|   create is over; waits on start.sock
      |                                  |<------------------------------ Start --|
      |                                  |-- Accepted --------------------------->|
      |                                  |   startContainer hooks, seccomp, execve
      |                                  |-- end of file: execve did it --------->|   or Failed(step, errno, …)

A caller that starts it itself, as `run` does, says Start instead of the last Go, on the channel that is there.
An exec has no start, and at most the first Go: it says Console and Ready if it has a terminal or warnings, and executes
unless the caller's end is closed; end of file tells the caller. Instead of any message the init may send Failed, and
exits; one that waited in machine code (runtime.shared_birth) says Refused. Until the last Go, end of file from the
caller makes the init exit: a killed caller leaves no half-made container (threats O37). A peer that only connects to
start.sock and closes asked whether anybody listens. Refuses an unexpected message by name. Invariant: sockets are
SOCK_SEQPACKET, so a message is whole or not there.
"""

from __future__ import annotations

import _socket  # the C module: socket itself costs 10 ms of imports
import os
import struct

from runtime.errors import RuntimeFailure
from runtime.fields import Fields, decode, encode
from runtime.linux.record import Record

MAX_MESSAGE = 64 << 10
_SUN_PATH = 108


class Message(Record):
    """What passes over a channel; `kind` is one of the names in the drawing."""

    kind: str
    pid: int = 0
    text: tuple[str, ...] = ()


class Closed(RuntimeFailure):
    """The peer ended without a word."""


class Channel:
    """One end. Owns its socket; fds received are CLOEXEC and the receiver's."""

    def __init__(self, take_socket: _socket.socket) -> None:
        self._socket = take_socket
        self.pid = 0  # of runtime.entering.Caller, who is asked to tell

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends, both CLOEXEC."""
        one, two = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)
        return cls(one), cls(two)

    def fileno(self) -> int:
        return self._socket.fileno()

    def filenos(self) -> set[int]:
        """Of runtime.entering.Caller."""
        return {self._socket.fileno()}

    def close(self) -> None:
        self._socket.close()

    def send(self, kind: str, *, pid: int = 0, text: tuple[str, ...] = (), fds: tuple[int, ...] = ()) -> None:
        """Sends a message, and `fds` with it."""
        self._send(encode({"kind": kind, "pid": pid, "text": text}), fds)

    def fail(self, failure: RuntimeFailure) -> None:
        """Sends Failed by write(2), which a seccomp filter forbids last. A peer that is gone hears nothing."""
        body = encode({"kind": "Failed", "failure": failure.to_json()})
        if len(body) > MAX_MESSAGE:
            failure.message = f"{failure.message[:2048]} … {failure.message[-2048:]}"  # the cause is at the end
            body = encode({"kind": "Failed", "failure": failure.to_json()})
        try:
            os.write(self._socket.fileno(), body)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def offer(self, listener: int) -> None:
        """Sends Listener: where the peer finds the seccomp listener among this process's fds; waits for its Go.
        By write(2) and read(2) alone, and by number: SCM_RIGHTS takes sendmsg(2), which may be what is notified."""
        os.write(self._socket.fileno(), encode({"kind": "Listener", "text": (str(listener),)}))
        if not os.read(self._socket.fileno(), 1):
            raise Closed("the other process ended without a word")

    def expects(self, warnings: tuple[str, ...], *, always: bool) -> bool:
        """Says Ready with the warnings, if there are any, or else `always`. False once the peer has closed its end."""
        if warnings or always:
            self.send("Ready", text=warnings)
        try:
            return bool(self._socket.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False

    def _send(self, body: bytes, fds: tuple[int, ...]) -> None:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        self._socket.sendmsg([body], rights, _socket.MSG_NOSIGNAL)

    def receive(self, *expected: str) -> tuple[Message, list[int]]:
        """The next message, which must be one of `expected`, and its fds. Failed is raised; so is Closed."""
        message, fds = self._receive()
        if message.kind not in expected:
            for fd in fds:
                os.close(fd)
            raise RuntimeFailure(f"expected {' or '.join(expected)} from the other process, got {message.kind}")
        return message, fds

    def _receive(self) -> tuple[Message, list[int]]:
        try:
            body, ancillary, flags, _ = self._socket.recvmsg(
                MAX_MESSAGE + 4096, _socket.CMSG_SPACE(16), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            raise Closed("the other process ended without a word") from None
        fds: list[int] = []
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds.extend(struct.unpack(f"={len(data) // 4}i", data[: len(data) // 4 * 4]))
        try:
            if not body:
                raise Closed("the other process ended without a word")
            if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
                raise RuntimeFailure("a message of the other process is too long")
            fields = Fields(decode(body, "message"), "message")
            if fields.str("kind") == "Failed":
                raise RuntimeFailure.from_json(fields.raw("failure"))
            if fields.str("kind") == "Refused":
                from runtime import refused  # for starts that fail

                raise refused.failure(fields.strs("text"))
            return Message(fields.str("kind"), fields.int("pid"), fields.strs("text")), fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise


def listen(directory: str, name: str) -> _socket.socket:
    """A listening socket `directory`/`name`, 0600, made in a directory that nobody else can enter."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        with Reachable(directory, name) as path:
            sock.bind(path)
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def until_executed(channel: Channel) -> None:
    """Returns once execve has closed the init's end. Raises RuntimeFailure with the step that failed before."""
    try:
        channel.receive()
    except Closed:
        pass


def accept(listener: _socket.socket) -> Channel:
    """Waits for a peer that says Start, and tells it Accepted. Whoever connects and says nothing is passed over."""
    while True:
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # typeshed leaves it out
        channel = Channel(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd))
        try:
            channel.receive("Start")
            channel.send("Accepted")
            return channel
        except (RuntimeFailure, OSError):
            channel.close()


def connect(directory: str, name: str) -> Channel | None:
    """A channel to who listens at `directory`/`name`; None when nobody does any more."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        with Reachable(directory, name) as path:
            sock.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return Channel(sock)


class Reachable:
    """A path that fits sun_path: through the directory's fd when the real one is too long (unix(7))."""

    def __init__(self, directory: str, name: str) -> None:
        self._path, self._fd = f"{directory}/{name}", -1
        if len(os.fsencode(self._path)) >= _SUN_PATH:
            self._fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._path = f"/proc/self/fd/{self._fd}/{name}"

    def __enter__(self) -> str:
        return self._path

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
