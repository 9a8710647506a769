"""Starting processes for the daemon: the zygote where none answers, or single shims in direct mode, which go on from
ocirun's dump (docs/decisions/0030) or are interpreters of their own.

posix_spawn only: the daemon has threads. Refuses to trust a zygote of other code than ours: its version is compared
once, and an old one is asked to quit (its shims stay as they are); and to make a request once more that somebody may
have read. Invariant: at most one zygote serves a state directory; two that start at once agree by a lock, and both
callers end up connected.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import runtime
from runtime import sealed
from runtime.cli import SHIM
from runtime.errors import RuntimeFailure
from runtime.linux import dumped
from runtime.linux.libc import KernelError
from runtime.linux.process import pidfd_open
from runtime.linux.record import Record
from runtime.linux.sockets import connect_unix, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.cgroup import SPARE, ZYGOTE, processes, remove_if_empty
from runtime.shim.wire import ask

_START_TIMEOUT = 30.0
_HELLO_TIMEOUT = 5.0
_TRIES = 5
_DEFAULT_SIGNALS = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD]


class Launcher:
    """Takes requests (`start`, `sweep`) each of which makes a process of its own."""

    def __init__(self, state: Path, *, direct: bool) -> None:
        self._state = state
        self._direct = direct
        self._lock = threading.Lock()
        self._version = ""

    def ask(self, name: str, message: Record, timeout: float | None, *, timed: bool = False) -> Any:
        """One request to the zygote, or to an interpreter started for it, and its reply. Raises as wire.ask does,
        RuntimeFailure also where none can be started."""
        for left in reversed(range(_TRIES)):
            with self._spawn_direct() if self._direct else self._connect_zygote() as connection:
                try:
                    return ask(connection, name, message, timeout, timed=timed)
                except (ConnectionResetError, BrokenPipeError):
                    # Whoever listened was killed, and nobody has acted on the request: a socket is reset for what was
                    # sent to it and not read (unix_release_sock in the kernel's net/unix/af_unix.c).
                    if self._direct or not left:
                        raise
        raise AssertionError

    def prepare(self) -> None:
        """Starts the zygote where none serves, so that the first pod does not wait for it. Raises RuntimeFailure."""
        if not self._direct:
            self._connect_zygote().close()

    def end(self) -> None:
        """Asks the zygote to quit, waits until it has, and takes the shims' cgroup away where nobody else is in it;
        nobody there is fine."""
        with self._lock:
            self._end()
            self._version = ""
            self._see_out()
            remove_if_empty()

    def _connect_zygote(self) -> socket.socket:
        path = self._state / "zygote.sock"
        try:
            if self._version:
                return connect_unix(path, _START_TIMEOUT)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        with self._lock:
            wanted = version()
            if not self._version and self._hello()[0] not in ("", wanted):
                self._end()
            self._version = wanted
            deadline = time.monotonic() + _START_TIMEOUT
            while True:
                try:
                    return connect_unix(path, _START_TIMEOUT)
                except (FileNotFoundError, ConnectionRefusedError) as error:
                    if time.monotonic() > deadline:
                        raise RuntimeFailure(f"connect to the zygote at {path}: {error}", code="unavailable") from error
                self._spawn_zygote()

    def _hello(self) -> tuple[str, int]:
        """Version and pid of the zygote that serves; ("", 0) for none."""
        try:
            with connect_unix(self._state / "zygote.sock", _HELLO_TIMEOUT) as connection:
                send_frame(connection, protocol.request("hello"))
                received = recv_frame(connection)
                value = protocol.parse_reply(received[0]) if received else {}
                return str(value.get("version", "")) or "unknown", int(value.get("pid", 0))
        except (FileNotFoundError, ConnectionRefusedError):
            return "", 0

    def _end(self) -> None:
        try:
            with connect_unix(self._state / "zygote.sock", _HELLO_TIMEOUT) as connection:
                send_frame(connection, protocol.request("quit"))
                received = recv_frame(connection)
        except (FileNotFoundError, ConnectionError):
            return
        value = protocol.parse_reply(received[0]) if received else {}
        _wait_for(int(value.get("pid", 0)))

    def _see_out(self) -> None:
        """Waits for the forks of a zygote that is gone which were to answer: they are in the shims' cgroup, too."""
        deadline = time.monotonic() + _HELLO_TIMEOUT
        words = os.fsencode(f"zygote\0{self._state}\0")
        while time.monotonic() < deadline:
            left = [pid for pid in processes() if _answers(pid, words)]
            if not left:
                return
            for pid in left:
                _wait_for(pid)

    def _spawn_zygote(self) -> None:
        """Starts one and waits until it serves, or says that another one does."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        log = os.open(self._state / "zygote.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # By that a later daemon knows whether it is of the same code; a direct one is asked by nobody.
            environment = {**_environment(), "OCID_VERSION": version()}
            self._run(["zygote", str(self._state)], environment, {1: writer, 2: log})
        finally:
            os.close(writer)
            os.close(log)
        try:
            said = _read_within(reader, _START_TIMEOUT)
        finally:
            os.close(reader)
        if said == b"taken":  # it holds the lock and is about to listen, or is about to end
            select.select([], [], [], 0.005)
        elif said != b"ready":
            raise RuntimeFailure(
                "start the zygote: it ended before it served", code="unavailable", hint=f"see {self._state}/zygote.log"
            )

    def _spawn_direct(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        log = os.open(self._state / "zygote.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with theirs:
            try:
                self._run_direct({2: log, 3: theirs.fileno()})
            except BaseException:
                ours.close()
                raise
            finally:
                os.close(log)
        return ours

    def _run_direct(self, fds: dict[int, int]) -> None:
        """From ocirun's dump where this process goes on from one, and is no other than that was made of: an interpreter
        with these modules costs sixty milliseconds. It seals itself."""
        command = os.path.join(os.path.dirname(sys.executable), "ocirun")
        if dumped.is_resumed and os.access(command, os.X_OK):
            _spawn(command, [command, SHIM], _environment(), fds)
        else:
            self._run(["direct"], _environment(), fds)

    def _run(self, words: list[str], environment: dict[str, str], fds: dict[int, int]) -> None:
        """Spawns a sealed interpreter (threats S1)."""
        argv = sealed.command("runtime.shim.zygote", words)
        try:
            interpreter = sealed.interpreter_fd()
        except OSError as error:
            raise RuntimeFailure.of(error, what=f"seal a copy of {argv[0]}") from error
        # Above what file actions write to: it is still needed for the exec.
        low, interpreter = interpreter, fcntl.fcntl(interpreter, fcntl.F_DUPFD_CLOEXEC, 16)
        os.close(low)
        try:
            _spawn(f"/proc/self/fd/{interpreter}", argv, environment, fds)
        finally:
            os.close(interpreter)


def _spawn(program: str, argv: list[str], environment: dict[str, str], fds: dict[int, int]) -> None:
    """In a session of its own; and reaps the starter, which leaves an orphan and ends at once."""
    # Copies far above, so that no dup2 lands on an fd that is still needed: by a later one, or for the exec itself.
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    copies = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for number, fd in {0: null, 1: null, **fds}.items()}
    try:
        pid = os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in copies.items()],
            setsid=True,
            setsigmask=[],
            setsigdef=_DEFAULT_SIGNALS,
        )
    except OSError as error:
        raise RuntimeFailure.of(error, what=f"run {argv[0]}") from error
    finally:
        for fd in (null, *copies.values()):
            os.close(fd)
    os.waitpid(pid, 0)


def version() -> str:
    """A name for the code that a zygote would run: sizes and times of the runtime's modules."""
    top = Path(runtime.__file__).parent
    facts = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in top.rglob("*.py"))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _environment() -> dict[str, str]:
    """Nothing of the daemon's but what runtime binaries and tests of ours look for."""
    names = ("PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "OCID_FAILPOINTS")
    return {name: os.environ[name] for name in names if name in os.environ}


def _wait_for(pid: int) -> None:
    """Until that process has ended, as far as it exists and does so in time."""
    try:
        pidfd = pidfd_open(pid) if pid else -1
    except KernelError:
        return
    if pidfd >= 0:
        select.select([pidfd], [], [], _HELLO_TIMEOUT)
        os.close(pidfd)


def _answers(pid: int, words: bytes) -> bool:
    """Whether that is a zygote, or a fork of one that holds no pod, whose command line ends with `words`; one that has
    let go of its memory has none any more, and is in its cgroup until a moment later."""
    try:
        named = Path(f"/proc/{pid}/comm").read_text().rstrip("\n") in (ZYGOTE, SPARE)
        line = Path(f"/proc/{pid}/cmdline").read_bytes() if named else b"?"
    except OSError:
        return False
    return not line or line.endswith(words)


def _read_within(fd: int, seconds: float) -> bytes:
    ready, _, _ = select.select([fd], [], [], seconds)
    return os.read(fd, 100) if ready else b""
