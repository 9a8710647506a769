"""`ocid` as a person types it, for tests: nodes without a daemon and with one, and what a command says.

Refuses to wait for ever: a command that says nothing for COMMAND_S fails its test.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from conformance.leaks import Machine
from cri.marks import LOGS
from tests import warm
from tests.e2e import Node, discard, messages, node, retired
from tests.fakes.registry import FakeRegistry
from tests.support import SOON_S, eventually, needs

COMMAND_S = SOON_S


@contextmanager
def prepared(served: bool, directory: Path, registry: FakeRegistry, root: Path | None = None) -> Iterator[Node]:
    """A node with or without a daemon, which has the image and has run a container."""
    needs("root", "overlay")
    image = f"{registry.name}/busybox:1"
    if served:
        with node(directory, root=root) as made:
            made.image = image
            said(made, "run", "--rm", image, "true")
            yield made
        return
    made, before = Node(directory, root=root), Machine.now()
    made.image = image
    with ExitStack() as undo:
        undo.callback(retired, made, before)
        undo.push(lambda kind, *_: discard(made) if kind else None)
        try:
            said(made, "run", "--rm", image, "true")
            yield made
        finally:
            for one in json.loads(said(made, "ps", "-a", "--format", "json")):
                said(made, "rm", "-f", one["id"])


def ocid(cli: Node, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = warm.run([*cli.words, *words], input=stdin, timeout=COMMAND_S)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def said(cli: Node, *words: str, code: int = 0, stdin: bytes = b"") -> str:
    """What the command prints; it must end with `code`."""
    done = ocid(cli, *words, stdin=stdin)
    assert done.returncode == code, f"{words}: {done.returncode}, not {code}: {done.stderr}{done.stdout}"
    return done.stdout


def once(cli: Node, *words: str, code: int = 0, stdin: bytes = b"") -> str:
    """`ocid run --rm OPTIONS… IMAGE COMMAND…`, the image being written as "IMAGE"."""
    return said(cli, "run", "--rm", *(cli.image if word == "IMAGE" else word for word in words), code=code, stdin=stdin)


def logged(cli: Node) -> list[str]:
    """The lines that all of the node's containers have printed, from where their shims write them: to wait for one by
    `ocid logs` would cost a command for each look."""
    return [text for log in sorted((cli.root / LOGS).rglob("*.log")) for text in messages(log)]


def start(cli: Node, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    return warm.Command(
        [*cli.words, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    )


def line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], COMMAND_S)[0], "nothing is printed"
    return process.stdout.readline().decode().rstrip("\n")


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and the rest of the output."""
    try:
        out, _ = process.communicate(timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out.decode()


class Terminal:
    """A pty with a command on it."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = b""

    def expect(self, pattern: str) -> str:
        def found() -> re.Match[bytes] | None:
            if select.select([self.fd], [], [], 0.02)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:  # EIO: the other end is closed
                    pass
            return re.search(pattern.encode(), self.seen)

        match = eventually(found, COMMAND_S, f"{pattern!r} on the terminal")
        assert match is not None
        text = match[0].decode()
        self.seen = self.seen[match.end() :]
        return text

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def end(self) -> int:
        """The exit code; what is printed meanwhile is thrown away."""
        handle = os.pidfd_open(self.pid)
        try:
            while not select.select([handle], [], [], 0)[0]:
                if select.select([handle, self.fd], [], [], COMMAND_S)[0] == []:
                    os.kill(self.pid, signal.SIGKILL)
                try:
                    self.seen += os.read(self.fd, 4096) if select.select([self.fd], [], [], 0)[0] else b""
                except OSError:
                    select.select([handle], [], [], COMMAND_S)
        finally:
            os.close(handle)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
