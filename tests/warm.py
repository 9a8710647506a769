"""`ocid` without waiting for its imports, where it does not go on from a dump (docs/decisions/0027): a process that has
done them once forks one for each such command of a test.

    test ── words, environment, directory, umask; stdin, stdout, stderr, a socket ──▶ server ── fork ──▶ ocid
    test ◀────── on that socket: the pid, and once it has ended the status of wait(2) ────── server

Such a start is mostly imports, 0.15 s of them, and a session has hundreds. Here it is `cri.cli.main.main` with the
words, environment, directory, umask and files that the installed command would have had. What differs is who waits for
it, and its command line, which is the server's: commands on a terminal, and those that a shell runs, are started in
earnest, as are all of conformance/, and all that go on from the dump.

Invariant: the server has one thread, and opened nothing that a command could find. It ends with its last client.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cri.cli import addresses
from cri.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
_PACKET = 1 << 20
_server: socket.socket | None = None


# -------------------------------------------------------------------------------------------------------- for tests


@contextmanager
def serving() -> Iterator[None]:
    """The server, for a session: before the first test looks at what is on the machine."""
    global _server
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()
        _server = ours
        try:
            yield
        finally:
            _server = None
            ours.shutdown(socket.SHUT_RDWR)
            process.wait()


def is_resumed(words: Sequence[str]) -> bool:
    """Whether that command goes on from a dump, unless it comes to an image that it has to fetch."""
    command = next((word for word in words[1:] if word in COMMANDS), "")
    plays = command == "pod" and "play" in words
    return bool(command) and command not in addresses.COMMANDS and not plays and _is_launcher(words[0])


@functools.cache
def _is_launcher(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


class Command(subprocess.Popen[Any]):
    """`ocid` with words, as subprocess.Popen has it; of its options those that change what is started are refused."""

    _told: socket.socket | None

    def _execute_child(  # type: ignore[override]  # 15 more follow, of which none is for us
        self,
        args: Sequence[str],
        executable: None,
        preexec_fn: None,
        close_fds: bool,
        pass_fds: Sequence[int],
        cwd: str | None,
        env: dict[str, str] | None,
        *rest: Any,
    ) -> None:
        self._told = None
        if is_resumed(args):
            more = (executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            super()._execute_child(args, *more)  # type: ignore[misc]
            return
        startup, flags, shell, stdin, to_stdin, from_stdout, stdout, from_stderr, stderr, *rest = rest
        restore_signals, gid, gids, uid, umask, new_session, *_ = rest
        assert not (executable or preexec_fn or pass_fds or shell or gids) and (gid, uid) == (None, None), args
        request = {
            "words": [*args],
            "environment": dict(os.environ) if env is None else env,
            "directory": os.fspath(cwd or os.getcwd()),
            "umask": umask,
            "new_session": new_session,
        }
        ours, theirs = socket.socketpair()
        self._told = ours
        with theirs:
            fds = [number if one == -1 else one for number, one in enumerate((stdin, stdout, stderr))]
            assert _server is not None, "tests.warm.serving has not been entered"
            socket.send_fds(_server, [json.dumps(request).encode()], [*fds, theirs.fileno()])
        self.pid = int.from_bytes(ours.recv(4, socket.MSG_WAITALL), "little")
        assert self.pid, "the server of tests.warm is gone"
        self._child_created = True
        self._close_pipe_fds(stdin, to_stdin, from_stdout, stdout, from_stderr, stderr)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """waitpid(2), perhaps of somebody else's child."""
        if self._told is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        with self._told:
            status = self._told.recv(4, socket.MSG_WAITALL)
        assert len(status) == 4, "the server of tests.warm is gone"
        return self.pid, int.from_bytes(status, "little")

    def _internal_poll(self, _deadstate: int | None = None, **more: Any) -> int | None:
        if self._told is None:
            return super()._internal_poll(_deadstate, **more)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            with self._waitpid_lock:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
        return self.returncode


def run(
    words: Sequence[str], *, input: bytes | None = None, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """subprocess.run, with what it says captured."""
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with Command(words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            out, error = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.wait(), out, error)


# ------------------------------------------------------------------------------------------------------- the server


def _serve(clients: socket.socket) -> dict[str, Any] | None:
    """Until there is no client any more. In a fork: what it is to do."""
    told: dict[int, socket.socket] = {}
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = select.select([clients, ended], [], [])[0]
        if ended in ready:
            ended.recv(4096)
            _reap(told)
        if clients not in ready:
            continue
        packet, fds, _, _ = socket.recv_fds(clients, _PACKET, 4)
        if not packet:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (clients, ended, wake, *told.values()):
                one.detach()
            for number in range(3):
                os.dup2(fds[number], number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            found: dict[str, Any] = json.loads(packet)
            return found
        told[pid] = socket.socket(fileno=fds.pop())
        for fd in fds:
            os.close(fd)
        told[pid].sendall(pid.to_bytes(4, "little"))


def _reap(told: dict[int, socket.socket]) -> None:
    while told:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with told.pop(pid) as one:
            try:
                one.sendall(status.to_bytes(4, "little"))
            except BrokenPipeError:
                pass  # nobody waits for it


def _become(request: dict[str, Any]) -> None:
    """This process as whoever asked wants it."""
    from runtime.linux import failpoint
    from runtime.linux.process import set_comm

    if request["new_session"]:
        os.setsid()
    if request["umask"] >= 0:
        os.umask(request["umask"])
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    failpoint._ARMED.update(failpoint._armed())
    sys.argv = request["words"]
    set_comm("ocid")


def main() -> int:
    clients = socket.socket(fileno=int(sys.argv[1]))
    gc.set_threshold(50_000)
    from cri.cli.main import main as ocid

    # What commands import when they come to it is here, too, as far as most of them do.
    for name in (
        *(f"cri.cli.{command}" for command in COMMANDS),
        "cri.daemon",
        "aiohttp",
        "cri.api.api_pb2_grpc",
        "tomllib",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1
    request = _serve(clients)
    if request is None:
        return 0
    _become(request)
    return ocid()


if __name__ == "__main__":
    sys.exit(main())
