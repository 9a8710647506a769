"""NOTIFY_SOCKET (sd_notify(3)): a socket of the container's own, and what comes out of it for the service manager.

The container sees only a directory that is mounted read-only, with one socket in it; it never reaches the manager's.
Refuses to pass on anything but READY=1: what else a message may ask for (another main process, descriptors to keep) is
not for a container to say. Invariant: the manager hears READY=1 once, then the pid to watch, as its barrier confirms.

    <root>/<id>/notify/notify.sock   ->   /run/notify/notify.sock inside, which NOTIFY_SOCKET names there
"""

from __future__ import annotations

import os
import select

from runtime import mounts
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.state import NOTIFY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.spec import Spec

_SOCKET = "notify.sock"
_INSIDE = "/run/notify"
_MAX_MESSAGE = 4096
# How long the manager may take to see our message before we end and it asks whose it was (sd_notify_barrier(3)).
_BARRIER_S = 30.0


def into(spec: Spec, directory: str) -> Spec:
    """`spec` with the mount of the container's directory of state, and the variable that tells of it."""
    if spec.process is None:
        return spec
    options = ["bind", "nosuid", "noexec", "nodev", "ro"]
    entry = {"destination": _INSIDE, "type": "bind", "source": f"{directory}/{NOTIFY}", "options": options}
    mount = mounts.parse(Fields(entry, "NOTIFY_SOCKET"))
    process = spec.process.changed(env=(*spec.process.env, f"NOTIFY_SOCKET={_INSIDE}/{_SOCKET}"))
    return spec.changed(mounts=(*spec.mounts, mount), process=process)


class Notify:
    """The socket of one container, bound. `manager` is the address in NOTIFY_SOCKET: a path, or @ and a name. One that
    does not answer is only worth a warning."""

    def __init__(self, directory: str, manager: str, warn: Callable[[str], None]) -> None:
        import _socket

        self._warn = warn
        self._manager = "\0" + manager[1:] if manager.startswith("@") else manager
        self._type = _socket.socket
        self._kind = (_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        self._socket = self._type(*self._kind)
        self.ready = False
        try:
            at = os.open(f"{directory}/{NOTIFY}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                path = f"/proc/self/fd/{at}/{_SOCKET}"  # whatever the length of the real one
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass
                self._socket.bind(path)
                os.chmod(path, 0o777)  # any user of the container may be the one who says it
            finally:
                os.close(at)
        except OSError as error:
            self._socket.close()
            raise RuntimeFailure.of(error, what="bind the container's notify socket") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self, main_pid: int, *, ending: bool = False) -> bool:
        """Takes one message, and tells the manager when it says READY=1; who is `ending` then waits until the manager
        has seen it. True once it was said."""
        # Descriptors that come along are dropped by the kernel: there is no room for them.
        lines = self._socket.recv(_MAX_MESSAGE).split(b"\n")
        if b"READY=1" in lines and not self.ready:
            self.ready = True
            try:
                self._tell(main_pid, ending)
            except OSError as error:
                self._warn(f"tell NOTIFY_SOCKET {self._manager!r}: {os.strerror(error.errno or 0).lower()}")
        return self.ready

    def _tell(self, main_pid: int, ending: bool) -> None:
        import _socket
        import struct

        reader, writer = os.pipe2(os.O_CLOEXEC)
        client = self._type(*self._kind)
        try:
            client.connect(self._manager)
            client.send(b"READY=1\n")
            client.send(b"MAINPID=%d\n" % main_pid)
            if not ending:
                return
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", writer))]
            client.sendmsg([b"BARRIER=1"], rights)
            os.close(writer)
            writer = -1
            poll = select.poll()
            poll.register(reader, 0)  # the hang-up is the answer
            poll.poll(_BARRIER_S * 1000)
        finally:
            client.close()
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    def wait(self, pidfd: int, main_pid: int) -> None:
        """Until the container is ready, or has ended."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self.fileno() in ready:
                if self.receive(main_pid, ending=True):
                    return
            elif pidfd in ready:
                return
