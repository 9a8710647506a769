"""The daemon's side of the unpack workers: at most `size` processes, and `patient` ones more for work that waits for
the network; spawned when needed, ended when idle.

It refuses to fork: workers are posix_spawn'ed, since the daemon has threads. Invariant: a worker is idle, or has one
request; a worker that failed to answer is never used again, and every one that was started is waited for.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from runtime.linux.sockets import FrameError, recv_frame, send_frame
from snapshotter import protocol
from snapshotter.model import SnapshotError

# -I: neither PYTHON* variables nor the working directory decide what a root process imports. -S, and no virtual
# environment: to look at where packages may be takes as long as all that a worker imports; it is told where they are.
_MAIN = "import sys; sys.path += sys.argv[1:]; from snapshotter.worker import main; main()"
_OURS = str(Path(__file__).parent.parent)
_PACKAGES = ("isal", "zstandard", "cryptography")


@functools.cache
def _command() -> list[str]:
    interpreter: str = sys._base_executable  # type: ignore[attr-defined]  # no stub knows it
    found = (find_spec(name) for name in _PACKAGES)
    homes = {str(Path(spec.origin).parent.parent) for spec in found if spec is not None and spec.origin}
    return [interpreter, "-IS", "-c", _MAIN, _OURS, *sorted(homes)]


class _Worker:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = _command()
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                self.pid = os.posix_spawn(
                    arguments[0],
                    arguments,
                    os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), (os.POSIX_SPAWN_DUP2, null, 1)],
                    setsigmask=[],
                    setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD],
                )
            except BaseException:
                ours.close()
                raise
            finally:
                os.close(null)
        self.socket = ours
        self.idle_since = 0.0
        self.hung_up = False

    def ask(self, request: protocol.Unpack | protocol.Finish, fds: tuple[int, ...]) -> protocol.Done | protocol.Failed:
        send_frame(self.socket, protocol.encode_request(request), fds)
        message = recv_frame(self.socket)
        if message is None:
            raise FrameError("closed")
        return protocol.decode_reply(message[0])

    def hang_up(self) -> None:
        """Ends the conversation from another thread: whoever waits for the reply is told so. With the pool's lock."""
        self.hung_up = True
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # over already
            return

    def end(self) -> int:
        """Ends the process and waits for it; returns its wait status as an exit code."""
        self.socket.close()
        try:
            os.kill(self.pid, signal.SIGKILL)  # not waited for yet, so the pid is nobody else's
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except (ProcessLookupError, ChildProcessError):  # somebody who waits for every child was faster
            return 0


class Pool:
    """`ask` from any thread; it waits for a free worker. With `size` 0 the work is done in the calling thread. What a
    slow line holds up takes none of the `size` workers away from others (threats R14)."""

    def __init__(self, size: int, idle_s: float, patient: int = 0) -> None:
        self._size = size
        self._free = {False: size, True: patient}
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, object] = {}  # and whose work it is
        self._cancelled: set[object] = set()
        self._starting = 0
        self._closed = False
        self._reaper: threading.Thread | None = None

    def ask(
        self, owner: object, request: protocol.Unpack | protocol.Finish, *fds: int, patient: bool = False
    ) -> protocol.Done:
        """Has a worker do `request`; `patient` is one that may wait for long. Raises what it raises: UnpackError,
        OSError; SnapshotError when the worker died, `owner` was cancelled or the pool closed meanwhile."""
        if self._size == 0:
            from snapshotter.worker import work  # the daemon itself never needs it

            return work(request, list(fds))
        worker = self._take(owner, patient)
        try:
            reply = worker.ask(request, fds)
        except BaseException as error:
            status = self._drop(worker, patient)
            self._raise_if_over(owner)
            if isinstance(error, ConnectionError):
                words = f"signal {signal.Signals(-status).name}" if status < 0 else f"code {status}"
                raise SnapshotError(
                    f"unpack worker {worker.pid} ended with {words} in the middle of a layer"
                ) from error
            raise
        self._give_back(worker, patient)
        if isinstance(reply, protocol.Failed):
            reply.raise_()
        assert isinstance(reply, protocol.Done)
        return reply

    def cancel(self, owner: object) -> None:
        """Ends what is done for `owner`, with the worker that does it, and refuses to do more."""
        with self._changed:
            self._cancelled.add(owner)
            for worker, whose in self._busy.items():
                if whose is owner:
                    worker.hang_up()
            self._changed.notify_all()

    def forget(self, owner: object) -> None:
        """`owner` asks no more."""
        with self._changed:
            self._cancelled.discard(owner)

    def processes(self) -> list[int]:
        """The pids of the workers."""
        with self._changed:
            return [worker.pid for worker in (*self._idle, *self._busy)]

    def close(self) -> None:
        """Ends every worker, busy or not; their requests fail with SnapshotError. Idempotent."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.hang_up()
            self._changed.notify_all()
            reaper = self._reaper
        for worker in idle:
            worker.end()
        if reaper is not None:
            reaper.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and not self._starting)

    def _raise_if_over(self, owner: object) -> None:
        if self._closed:
            raise SnapshotError("the snapshotter was closed")
        if owner in self._cancelled:
            raise SnapshotError("unpacking was cancelled")

    def _take(self, owner: object, patient: bool) -> _Worker:
        with self._changed:
            while not self._free[patient]:
                self._raise_if_over(owner)
                self._changed.wait()
            self._raise_if_over(owner)
            self._free[patient] -= 1
            if self._idle:
                worker = self._idle.pop()
                self._busy[worker] = owner
                return worker
            self._starting += 1
        started: _Worker | None = None
        try:
            started = _Worker()
        finally:
            with self._changed:
                self._starting -= 1
                if started is None:
                    self._free[patient] += 1
                else:
                    self._busy[started] = owner
                    if self._closed or owner in self._cancelled:
                        started.hang_up()
                self._changed.notify_all()
        return started

    def _drop(self, worker: _Worker, patient: bool) -> int:
        status = worker.end()
        with self._changed:
            self._busy.pop(worker, None)
            self._free[patient] += 1
            self._changed.notify_all()
        return status

    def _give_back(self, worker: _Worker, patient: bool) -> None:
        with self._changed:
            # It may have answered in the moment in which it was told to end.
            if not self._closed and not worker.hung_up:
                self._busy.pop(worker, None)
                self._free[patient] += 1
                worker.idle_since = time.monotonic()
                self._idle.append(worker)
                self._changed.notify_all()
                if self._reaper is None:
                    self._reaper = threading.Thread(target=self._reap, name="unpack-reaper", daemon=True)
                    self._reaper.start()
                return
        self._drop(worker, patient)

    def _reap(self) -> None:
        """Ends workers that had nothing to do for `idle_s`; ends itself with the last of them."""
        while True:
            with self._changed:
                if self._closed or not (self._idle or self._busy or self._starting):
                    self._reaper = None
                    return
                if not self._idle:
                    self._changed.wait()
                    continue
                oldest = min(self._idle, key=lambda worker: worker.idle_since)
                left = oldest.idle_since + self._idle_s - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._idle.remove(oldest)
            oldest.end()
