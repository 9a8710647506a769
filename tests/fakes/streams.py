"""cri.interfaces.Streams with this machine's processes for containers: real pipes, real terminals, no root.

`exec_stream` runs the words of `process`; `attach` joins the fds to `attached`, a command; `connect` connects here.
`closed` waits for all of them to have ended. Commands that are left are killed by `close`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence

from cri.interfaces import ContainerError, ExecStream, Sandbox
from runtime.linux.sockets import recv_frame, send_frame
from tests.support import SOON_S


class ProcessStreams:
    """The fake."""

    def __init__(self, attached: Sequence[str] = ("cat",)) -> None:
        self.attached = attached
        self.processes: list[subprocess.Popen[bytes]] = []
        self.sizes: list[list[int]] = []
        self._threads: list[threading.Thread] = []

    def exec_stream(
        self,
        sandbox: Sandbox,
        container_id: str,
        process: Mapping[str, object],
        fds: Sequence[int] = (),
        *,
        terminal: bool = False,
    ) -> ExecStream:
        words = process["args"]
        assert isinstance(words, list)
        master, slave = os.openpty() if terminal else (-1, -1)
        stdio = (slave, slave, slave) if terminal else fds
        if terminal:
            words = ["setsid", "--ctty", "--wait", *words]
        try:
            child = subprocess.Popen(words, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2])
        except OSError as error:
            if terminal:
                os.close(master)
            raise ContainerError(f"exec in container {container_id}: {error}") from error
        finally:
            if terminal:
                os.close(slave)
        ours, theirs = socket.socketpair()
        self._watch(lambda: self._tell(child, ours))
        self.processes.append(child)
        return ExecStream(child.pid, theirs.detach(), master)

    @staticmethod
    def _tell(child: subprocess.Popen[bytes], control: socket.socket) -> None:
        code = child.wait()
        with control:
            try:
                send_frame(control, json.dumps({"ok": {"exit_code": code if code >= 0 else 128 - code}}).encode())
            except OSError:
                pass  # nobody waits for it any more

    def attach(self, sandbox: Sandbox, container_id: str, fds: Sequence[int], *, stdin: bool, terminal: bool) -> int:
        words = list(fds)
        first = words.pop(0) if stdin else subprocess.DEVNULL
        child = subprocess.Popen(
            self.attached, stdin=first, stdout=words[0], stderr=words[1] if words[1:] else words[0]
        )
        self.processes.append(child)
        ours, theirs = socket.socketpair()
        self._watch(lambda: self._follow(child, ours))
        return theirs.detach()

    def _follow(self, child: subprocess.Popen[bytes], control: socket.socket) -> None:
        with control:
            try:
                while (received := recv_frame(control)) is not None:
                    self.sizes.append(json.loads(received[0])["resize"])
            except OSError:
                pass
        child.kill()
        child.wait()

    def connect(self, sandbox: Sandbox, port: int) -> int:
        try:
            return socket.create_connection(("127.0.0.1", port), 5).detach()
        except OSError as error:
            raise ContainerError(f"connect to port {port}: {error}", code="unavailable") from error

    def _watch(self, work: object) -> None:
        thread = threading.Thread(target=work, daemon=True)  # type: ignore[arg-type]  # a lambda of ours
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        for child in self.processes:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
        for thread in self._threads:
            thread.join(SOON_S)
