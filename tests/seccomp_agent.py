"""A seccomp agent for tests: takes listeners over a socket, and decides on the calls they tell of, in a thread.

The socket speaks runtime-spec's "The Container Process State"; the rest is seccomp_unotify(2).
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import SOON_S

RECV, SEND = 0xC0502100, 0xC0182101  # linux/seccomp.h: SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
Decide = Callable[[int, int, tuple[int, ...]], tuple[int, int, int]]


def refuse(number: int) -> Decide:
    """Every notified call fails with errno `number`."""
    return lambda _pid, _call, _args: (0, -number, 0)


def let_go(_pid: int, _call: int, _args: tuple[int, ...]) -> tuple[int, int, int]:
    """Every notified call goes on as if nobody had looked."""
    return 0, 0, CONTINUE


class Agent:
    """Listens at `path` while entered. `states` is what was sent, one for each connection; `seen` the calls."""

    def __init__(self, path: Path, decide: Decide) -> None:
        self.path = path
        self.states: list[dict[str, Any]] = []
        self.fds: list[int] = []
        self.seen: list[int] = []
        self._decide = decide
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Agent:
        self._socket.bind(str(self.path))
        self._socket.listen(8)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._stopped)
        self._thread.join(SOON_S)
        self._socket.close()
        for fd in (self._stop, *self.fds):
            os.close(fd)

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._stop, self._socket, *self._answering()], [], [], 10)
            if self._stop in ready:
                return
            if self._socket in ready:
                self._accept()
            for fd in set(ready) & set(self.fds):
                self._answer(fd)

    def _answering(self) -> list[int]:
        """Listeners of processes that are still there: one that is not reads as hung up for ever."""
        poll = select.poll()
        for fd in self.fds:
            poll.register(fd, select.POLLIN)
        gone = {fd for fd, events in poll.poll(0) if events & select.POLLHUP}
        return [fd for fd in self.fds if fd not in gone]

    def _accept(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(SOON_S)
            body, fds, _, _ = socket.recv_fds(connection, 65536, 4)
        self.states.append(json.loads(body))
        self.fds += fds

    def _answer(self, fd: int) -> None:
        call = bytearray(80)
        try:
            fcntl.ioctl(fd, RECV, call)
            key, pid, _flags, number, _arch, _ip, *args = struct.unpack("=QIIiIQ6Q", call)
            self.seen.append(number)
            value, error, flags = self._decide(pid, number, tuple(args))
            fcntl.ioctl(fd, SEND, struct.pack("=QqiI", key, value, error, flags))
        except OSError:
            return  # ENOENT: the process was killed meanwhile
