"""A runc-compatible binary as a runtime handler: runc, crun, youki, runsc under the same shim.

The binary is posix_spawned and waited for like any child, never blocking the loop; its pid file names the process, its
JSON log the failure. The root filesystem is mounted at BUNDLE/rootfs on the host, as such binaries expect, and
unmounted at delete. Refuses a shell and PATH. Invariant: the state of its containers is under ROOT, so
`runc --root ROOT list` shows them.
"""

from __future__ import annotations

import os
import socket

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux import signals
from runtime.linux.files import AT_FDCWD, open_beneath, read_bounded
from runtime.linux.mount import move_mount
from runtime.shim.engine import Made, facts_of, root_mount
from runtime.shim.loop import READ, Loop, Promise, Task
from runtime.shim.protocol import ContainerMessage
from runtime.shim.reaper import exit_code
from runtime.shim.sandbox import unmount
from runtime.shim.worker import Workers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEADLINE = 60.0  # seconds that one call of the binary may take
_CONSOLE_DEADLINE = 10.0
_LOG_LIMIT = 1 << 20


class ExternalEngine:
    """One binary; `root` is its own directory for state, `scratch` ours for pid files, logs and console sockets."""

    def __init__(self, workers: Workers, binary: str, root: str, scratch: str) -> None:
        self._workers = workers
        self._loop = workers.loop
        self._reaper = workers.reaper
        self._binary = binary
        self._root = root
        self._scratch = scratch
        self._calls = 0

    def create(self, message: ContainerMessage, stdio: tuple[int, ...]) -> Task[Made]:
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        yield from self._workers.run("mount", lambda: mount_rootfs(message))
        try:
            words = ["create", "--bundle", message.bundle]
            made = yield from self._make(words, [message.id], stdio, terminal=message.terminal)
            answer = yield from self._workers.run("look", lambda: (facts_of(made.pid, message.bundle), -1))
        except BaseException:
            yield from self.delete(message.id)
            unmount(f"{message.bundle}/rootfs")
            raise
        made.facts.update(answer.value)  # type: ignore[call-overload]  # an object: facts_of gave a dict
        return made

    def start(self, container_id: str) -> Task[None]:
        yield from self._call(["start", container_id])

    def kill(self, container_id: str, number: int, everyone: bool) -> Task[None]:
        try:
            yield from self._call(["kill", *(["--all"] if everyone else []), container_id, str(number)])
        except RuntimeFailure as error:
            if not _says_gone(error):
                raise

    def delete(self, container_id: str) -> Task[None]:
        try:
            yield from self._call(["delete", "--force", container_id])
        except RuntimeFailure as error:
            if not _says_gone(error):
                raise

    def execute(self, container_id: str, process: dict[str, Any], stdio: tuple[int, ...]) -> Task[Made]:
        path = f"{self._scratch}/process.{self._next()}.json"
        with open(path, "wb") as file:
            file.write(encode(process))
        try:
            words = ["exec", "--detach", "--process", path]
            return (yield from self._make(words, [container_id], stdio, terminal=bool(process.get("terminal"))))
        finally:
            os.unlink(path)

    def update(self, container_id: str, resources: dict[str, Any]) -> Task[None]:
        path = f"{self._scratch}/resources.{self._next()}.json"
        with open(path, "wb") as file:
            file.write(encode(resources))
        try:
            yield from self._call(["update", "--resources", path, container_id])
        finally:
            os.unlink(path)

    def _next(self) -> int:
        self._calls += 1
        return self._calls

    def _make(self, arguments: list[str], words: list[str], stdio: tuple[int, ...], *, terminal: bool) -> Task[Made]:
        """A call that leaves a process behind: its pid from a pid file, its terminal over a console socket."""
        stem = f"{self._scratch}/{self._next()}"
        pid_file, console_path, console = f"{stem}.pid", f"{stem}.tty", None
        self._reaper.hold()  # the new process may end before its pid file is read
        try:
            arguments = [*arguments, "--pid-file", pid_file]
            if terminal:
                console = ConsoleSocket(self._loop, console_path)
                arguments += ["--console-socket", console_path]
            yield from self._call([*arguments, *words], stdio)
            pid = int(read_bounded(AT_FDCWD, pid_file, 32))
            master = -1 if console is None else (yield console.master)
            return Made(pid, master, self._reaper.expect(pid), {})
        finally:
            self._reaper.release()
            if console is not None:
                console.close()
            for path in (pid_file, console_path):
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass

    def _call(self, words: list[str], stdio: tuple[int, ...] = ()) -> Task[None]:
        """Runs the binary to its end. Raises RuntimeFailure with what it logged."""
        log = f"{self._scratch}/{self._next()}.log"
        argv = [self._binary, "--root", self._root, "--log", log, "--log-format", "json", *words]
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            fds = stdio or (null, null, null)
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(_apart(fds))]
            try:
                pid = os.posix_spawn(
                    self._binary,
                    argv,
                    _environment(),
                    file_actions=actions,
                    setpgroup=0,
                    setsigdef=[signals.SIGPIPE, signals.SIGXFSZ],
                )
            except OSError as error:
                raise RuntimeFailure.of(error, step=words[0], what=f"run {self._binary}") from error
            finally:
                _close_apart(actions, fds)
            ended = self._reaper.expect(pid)
            timer = self._loop.after(_DEADLINE, lambda: os.kill(pid, signals.SIGKILL))
            status = yield ended
            timer.cancel()
            code, number = exit_code(status)
            if code:
                raise _failure(words, log, code, number)
        finally:
            os.close(null)
            try:
                os.unlink(log)
            except FileNotFoundError:
                pass


class ConsoleSocket:
    """Receives a pty's master as runc sends it: one message with one fd in SCM_RIGHTS."""

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self.master: Promise[int] = Promise()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # sun_path holds 107 bytes: the directory is reached through its fd.
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        finally:
            os.close(directory)
        self._socket.listen(1)
        self._socket.setblocking(False)
        loop.watch(self._socket.fileno(), READ, self._accept)
        self._timer = loop.after(
            _CONSOLE_DEADLINE,
            lambda: self.master.fail(
                RuntimeFailure("receive the terminal: the runtime binary sent none", step="terminal")
            ),
        )

    def _accept(self, _events: int) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(1.0)
            _, fds, _, _ = socket.recv_fds(connection, 4096, 4, socket.MSG_CMSG_CLOEXEC)
            for extra in fds[1:]:
                os.close(extra)
            if fds and not self.master.done:
                self.master.resolve(fds[0])
            elif fds:
                os.close(fds[0])

    def close(self) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()


def mount_rootfs(message: ContainerMessage) -> tuple[object, int]:
    """Mounts the container's root filesystem at BUNDLE/rootfs, in a worker. Raises RuntimeFailure."""
    rootfs, target = root_mount(message), f"{message.bundle}/rootfs"
    if rootfs is None:
        return {}, -1
    try:
        os.makedirs(target, mode=0o700, exist_ok=True)
        bundle = os.open(message.bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        place = open_beneath(bundle, "rootfs", os.O_PATH | os.O_DIRECTORY)
        move_mount(rootfs.make(), place)
    except OSError as error:
        raise RuntimeFailure.of(error, step="rootfs", what=f"mount the root filesystem on {target}") from error
    return {}, -1


def _environment() -> dict[str, str]:
    """What a runtime binary may see of our environment: nothing of the daemon's secrets."""
    return {
        name: os.environ[name] for name in ("PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS") if name in os.environ
    }


def _apart(fds: tuple[int, ...]) -> list[int]:
    """The fds as copies above 2, so that dup2 of one never lands on another that is still needed."""
    return [fd if fd > 2 else os.dup(fd) for fd in fds]


def _close_apart(actions: list[tuple[int, int, int]], fds: tuple[int, ...]) -> None:
    for _, fd, number in actions:
        if fd != fds[number]:
            os.close(fd)


def _says_gone(error: RuntimeFailure) -> bool:
    """Runtimes have no code for "there is no such process or container": they say it in words."""
    text = str(error).lower()
    return any(
        words in text
        for words in (
            "does not exist",
            "not running",
            "already finished",
            "no such process",
            "process not found",
            "already dead",
        )
    )


def _failure(words: list[str], log: str, code: int, number: int) -> RuntimeFailure:
    said = []
    try:
        for line in read_bounded(AT_FDCWD, log, _LOG_LIMIT).splitlines():
            try:
                entry = decode(line, log)
            except RuntimeFailure:
                continue
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                said.append(str(entry.get("msg", "")).strip())
    except OSError:
        pass
    end = f"killed by signal {number}" if number else f"exit code {code}"
    hint = f"it took more than {_DEADLINE:.0f} s" if number == signals.SIGKILL else ""
    return RuntimeFailure(f"{words[0]}: {said[-1] if said else end}", step=words[0], hint=hint)
