"""A runc-compatible binary as a runtime handler: runc, crun, youki, runsc under the same shim.

The binary is posix_spawned and waited for; its pid file names the process, its JSON log the failure. The root
filesystem is mounted at BUNDLE/rootfs on the host, as such binaries expect, and unmounted at delete. Refuses a shell
and PATH. Invariant: the state of its containers is under ROOT, so `runc --root ROOT list` shows them.
"""

from __future__ import annotations

import os
import select
import socket

from runtime.errors import RuntimeFailure
from runtime.fields import decode, encode
from runtime.linux import signals
from runtime.linux.files import AT_FDCWD, open_beneath, read_bounded
from runtime.linux.mount import move_mount
from runtime.linux.process import pidfd_open
from runtime.shim.engine import SILENT, Made, cgroups_path_of, config_of, names_unit, root_mount
from runtime.shim.protocol import CheckpointMessage, ContainerMessage, RestoreMessage
from runtime.shim.reaper import exit_code
from runtime.shim.sandbox import unmount
from runtime.tree import kill_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from runtime.entering import Caller
    from runtime.shim.engine import LastWords

_DEADLINE = 60.0  # seconds that one call of the binary may take
_CONSOLE_DEADLINE = 10.0
_LOG_LIMIT = 1 << 20


class ExternalEngine:
    """One binary; `root` is its own directory for state, `scratch` ours for pid files, logs and console sockets."""

    def __init__(self, binary: str, root: str, scratch: str) -> None:
        self._binary = binary
        self._root = root
        self._scratch = scratch
        self._calls = 0

    def create(self, message: ContainerMessage, stdio: Sequence[int], last_words: LastWords = SILENT) -> Made:
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        mount_rootfs(message)
        try:
            words = ["create", "--bundle", message.bundle]
            driver = ["--systemd-cgroup"] if names_unit(cgroups_path_of(config_of(message.bundle))) else []
            return self._make([*driver, *words], [message.id], stdio, terminal=message.terminal)
        except BaseException:
            try:
                self.delete(message.id)
            except RuntimeFailure:
                pass  # what failed first is what to tell: a binary that is not there, for one
            finally:
                unmount(f"{message.bundle}/rootfs")
            raise

    def start(self, container_id: str) -> None:
        self._call(["start", container_id])

    def kill(self, container_id: str, number: int, everyone: bool) -> None:
        try:
            self._call(["kill", *(["--all"] if everyone else []), container_id, str(number)])
        except RuntimeFailure as error:
            if not _says_gone(error):
                raise

    def delete(self, container_id: str) -> None:
        try:
            self._call(["delete", "--force", container_id])
        except RuntimeFailure as error:
            if not _says_gone(error):
                raise

    def execute(self, container_id: str, process: dict[str, Any], stdio: Sequence[int], caller: Caller) -> Made:
        path = self._file("process.json")
        with open(path, "wb") as file:
            file.write(encode(process))
        try:
            words = ["exec", "--detach", "--process", path]
            return self._make(words, [container_id], stdio, terminal=bool(process.get("terminal")))
        finally:
            os.unlink(path)

    def update(self, container_id: str, resources: dict[str, Any]) -> None:
        path = self._file("resources.json")
        with open(path, "wb") as file:
            file.write(encode(resources))
        try:
            self._call(["update", "--resources", path, container_id])
        finally:
            os.unlink(path)

    def pause(self, container_id: str) -> None:
        self._call(["pause", container_id])

    def resume(self, container_id: str) -> None:
        try:
            self._call(["resume", container_id])
        except RuntimeFailure as error:
            if "not paused" not in str(error):
                raise

    def checkpoint(self, message: CheckpointMessage) -> None:
        words = ["checkpoint", "--leave-running", "--image-path", message.images, "--work-path", message.work]
        self._call([*words, "--tcp-established", "--file-locks", message.id], seconds=message.seconds)

    def restore(self, message: ContainerMessage, images: RestoreMessage, stdio: Sequence[int]) -> Made:
        raise RuntimeFailure(
            f"restore: not by {self._binary}, which compares nothing of the images with config.json; natively only",
            code="failed_precondition",
        )

    def _file(self, kind: str) -> str:
        """A path for a scratch file; helpers work side by side, each has its pid."""
        self._calls += 1
        return f"{self._scratch}/{os.getpid()}.{self._calls}.{kind}"

    def _make(self, words: list[str], container: list[str], stdio: Sequence[int], *, terminal: bool) -> Made:
        """A call that leaves a process behind: its pid from a pid file, its terminal over a console socket."""
        pid_file, console_path = self._file("pid"), self._file("tty")
        console = None
        directory = os.open(self._scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            words = [*words, "--pid-file", pid_file]
            if terminal:
                # sun_path holds 107 bytes, for the binary as for us: the directory is reached through its fd.
                short = f"/proc/{os.getpid()}/fd/{directory}/{os.path.basename(console_path)}"
                console = _listen(short)
                words += ["--console-socket", short]
            self._call([*words, *container], stdio)
            pid = int(read_bounded(AT_FDCWD, pid_file, 32))
            return Made(pid, -1 if console is None else _receive_master(console))
        finally:
            os.close(directory)
            if console is not None:
                console.close()
            for path in (pid_file, console_path):
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass

    def _call(self, words: list[str], stdio: Sequence[int] = (), seconds: float = _DEADLINE) -> None:
        """Runs the binary to its end, or for `seconds`: then it is killed, and what it has started (a criu). Raises
        RuntimeFailure with what it logged."""
        log = self._file("log")
        argv = [self._binary, "--root", self._root, "--log", log, "--log-format", "json", *words]
        try:
            pid = self._spawn(argv, _verb(words), stdio)
            pidfd = pidfd_open(pid)
            late = not select.select([pidfd], [], [], seconds)[0]
            if late:
                kill_tree(pid)
            os.close(pidfd)
            code, number = exit_code(os.waitpid(pid, 0)[1])
            if late:
                raise RuntimeFailure(
                    f"{_verb(words)}: {self._binary} did not end within {seconds:g} s, and was killed",
                    step=_verb(words),
                    code="deadline",
                )
            if code:
                raise _failure(words, log, code, number)
        finally:
            try:
                os.unlink(log)
            except FileNotFoundError:
                pass

    def _spawn(self, argv: list[str], step: str, stdio: Sequence[int]) -> int:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        # All above 2, so that no dup2 lands on an fd that a later one still needs: ours are, 0 to 2 are taken.
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio or (null, null, null))]
        try:
            return os.posix_spawn(
                self._binary,
                argv,
                _environment(),
                file_actions=actions,
                setpgroup=0,
                setsigdef=[signals.SIGPIPE, signals.SIGXFSZ],
            )
        except OSError as error:
            raise RuntimeFailure.of(error, step=step, what=f"run {self._binary}") from error
        finally:
            os.close(null)


def _listen(path: str) -> socket.socket:
    """A console socket."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(path)
    listener.listen(1)
    return listener


def _receive_master(listener: socket.socket) -> int:
    """A pty's master as runc sends it: one message with one fd in SCM_RIGHTS; it waits in the socket by now."""
    listener.settimeout(_CONSOLE_DEADLINE)
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_CONSOLE_DEADLINE)
            _, fds, _, _ = socket.recv_fds(connection, 4096, 4, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        fds = []
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise RuntimeFailure("receive the terminal: the runtime binary sent none", step="terminal")
    return fds[0]


def mount_rootfs(message: ContainerMessage) -> None:
    """Mounts the container's root filesystem at BUNDLE/rootfs. Raises RuntimeFailure."""
    rootfs, target = root_mount(message), f"{message.bundle}/rootfs"
    if rootfs is None:
        return
    try:
        os.makedirs(target, mode=0o700, exist_ok=True)
        bundle = os.open(message.bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        place = open_beneath(bundle, "rootfs", os.O_PATH | os.O_DIRECTORY)
        mounted = rootfs.make()
        move_mount(mounted, place)
        for fd in (bundle, place, mounted):
            os.close(fd)
    except OSError as error:
        raise RuntimeFailure.of(error, step="rootfs", what=f"mount the root filesystem on {target}") from error


def _environment() -> dict[str, str]:
    """What a runtime binary may see of our environment: nothing of the daemon's secrets."""
    return {
        name: os.environ[name] for name in ("PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS") if name in os.environ
    }


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
    step, why = _verb(words), said[-1] if said else ""
    theirs = bool(why) and (step == "update" or _says_bad_command(why))
    return RuntimeFailure(f"{step}: {why or end}", step=step, code="invalid_argument" if theirs else "internal")


def _says_bad_command(words: str) -> bool:
    """Of runc and crun: what was to be executed is not there, or cannot be. (A limit that cannot be set is as much the
    caller's, and update does nothing else.)"""
    told = ("executable file", "no such file or directory", "permission denied", "is a directory", "exec format error")
    return ("exec: " in words or "executable file" in words) and any(phrase in words.lower() for phrase in told)


def _verb(words: list[str]) -> str:
    return next(word for word in words if not word.startswith("-"))
