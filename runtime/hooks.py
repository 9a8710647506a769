"""OCI hooks: programs of the operator that run at fixed points, with the container's state as JSON on their stdin.

Refuses to let a hook outlive its timeout, or its output grow without end. Invariant: hooks run in order, one after
the other, with no fd of ours but stdin, stdout and stderr, and the first that fails ends the list (runtime-spec).
"""

from __future__ import annotations

import os
import select
import time

from runtime.errors import RuntimeFailure
from runtime.linux.process import clone3, close_range, execveat, pidfd_send_signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.spec_hooks import Hook

_AT_FDCWD = -100
_SIGKILL = 9
_OUTPUT_LIMIT = 16 << 10


def run(
    hooks: Iterable[Hook], state: bytes, step: str, directory: str = "", env: Iterable[bytes] | None = None
) -> None:
    """Runs every hook of one point, in `directory` if it is there. `env` is the environment of those that name none;
    None: the caller's. Raises RuntimeFailure, naming the hook."""
    default = [key + b"=" + value for key, value in os.environb.items()] if env is None else list(env)
    for hook in hooks:
        _run(hook, state, step, directory, default)


def run_all(hooks: Iterable[Hook], state: bytes, step: str, directory: str) -> list[str]:
    """Runs every hook, whatever became of those before it; the failures, in sentences."""
    failures = []
    for hook in hooks:
        try:
            run((hook,), state, step, directory)
        except (RuntimeFailure, OSError) as error:
            failures.append(str(error))
    return failures


def _run(hook: Hook, state: bytes, step: str, directory: str, env: list[bytes]) -> None:
    # A memfd is stdin of unlimited size that needs nobody to write it while the hook does not read.
    stdin = os.memfd_create("state", os.MFD_CLOEXEC)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(stdin, state)
        os.lseek(stdin, 0, os.SEEK_SET)
        pid, pidfd = clone3(0)
        if pid == 0:
            _execute(hook, stdin, writer, directory, env)
        os.close(writer)
        writer = -1
        try:
            said, in_time = _wait(pidfd, reader, hook.timeout)
            if not in_time:
                _kill(pid, pidfd)
            status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        finally:
            os.close(pidfd)
    finally:
        for fd in (stdin, reader, writer):
            if fd >= 0:
                os.close(fd)
    problem = ""
    if not in_time:
        problem = f"hook ran past specified timeout of {hook.timeout:.1f}s, and was killed"
    elif status is not None and status.si_code != os.CLD_EXITED:
        problem = f"killed by signal {status.si_status}"
    elif status is None or status.si_status:
        problem = f"exit status {status.si_status if status else 'unknown'}"
    if problem:
        words = said.decode("utf-8", "replace").strip()
        sentence = f"error running {hook.where}: {hook.path}: {problem}"
        raise RuntimeFailure(f"{sentence}: {words}" if words else sentence, step=step)


def _kill(pid: int, pidfd: int) -> None:
    """The hook with what it started: they are its process group, unless they made one of their own."""
    pidfd_send_signal(pidfd, _SIGKILL)
    try:
        os.killpg(pid, _SIGKILL)  # nobody has waited for it: the number is still its
    except ProcessLookupError:
        pass  # it had not come to its setsid


def _execute(hook: Hook, stdin: int, output: int, directory: str, env: list[bytes]) -> None:
    try:
        from runtime.process import reset_signals

        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        close_range(3)
        if directory and os.path.isdir(directory):
            os.chdir(directory)
        reset_signals()
        argv = [os.fsencode(arg) for arg in (hook.args or (hook.path,))]
        named = env if hook.env is None else [os.fsencode(entry) for entry in hook.env]
        execveat(_AT_FDCWD, hook.path, argv, named)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(127)


def _wait(pidfd: int, reader: int, timeout: int) -> tuple[bytes, bool]:
    """What the hook said, bounded, and whether it ended in time. Children that keep the pipe are not waited for."""
    deadline = time.monotonic() + timeout if timeout else None
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(reader, select.POLLIN)
    said = b""
    while True:
        left = None if deadline is None else max(0, (deadline - time.monotonic()) * 1000)
        ready = dict(poll.poll(left))
        if not ready:
            return said, False
        if reader in ready:
            piece = os.read(reader, 4096)
            said = (said + piece)[-_OUTPUT_LIMIT:]
            if not piece:
                poll.unregister(reader)
        elif pidfd in ready:
            return said, True
