"""exec, attach and port-forward as a user tries them: through SPDY and WebSocket, with and without a terminal, with
bytes both ways, exit codes, window sizes, and a client that goes away."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import select
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator

from conformance.clients.terminal import Terminal
from conformance.crictl.steps import PAGE_PATH, WAIT_S, Scenario, check, eventually
from conformance.crictl.tool import CheckFailed

_MANY = 8 << 20


def exec_piped(it: Scenario) -> None:
    data = os.urandom(_MANY)
    for transport in it.transports:
        done = it.crictl.piped(data, "exec", "-i", "--transport", transport, it.container, "sha256sum")
        wanted = hashlib.sha256(data).hexdigest()
        check(done.stdout.split()[:1] == [wanted.encode()], f"{transport}: sha256sum of input prints {done.stdout!r}")
        done = it.crictl.piped(data, "exec", "-i", "--transport", transport, it.container, "cat")
        check(done.stdout == data, f"{transport}: cat gives {len(done.stdout)} of {len(data)} bytes: {done.stderr!r}")


def exec_code(it: Scenario) -> None:
    for transport in it.transports:
        script = "echo out; echo err >&2; exit 7"
        done = it.crictl.run("exec", "--transport", transport, it.container, "sh", "-c", script)
        check(done.stdout == "out\n" and "err\n" in done.stderr, f"{transport}: {done.stdout!r}, {done.stderr!r}")
        check("exit code 7" in done.stderr or "exit status 7" in done.stderr, f"{transport}: code 7 is {done.stderr!r}")
        check(done.returncode != 0, f"{transport}: crictl succeeds")
        text = it.crictl.fails("exec", "--transport", transport, it.container, "/no/such/command")
        check("/no/such/command" in text, f"{transport}: a missing command is {text!r}")


def exec_terminal(it: Scenario) -> None:
    for transport in it.transports:
        command = it.crictl.command("exec", "-it", "--transport", transport, it.container, "sh")
        with Terminal(command, it.directory, os.environ, 31, 97) as terminal:
            terminal.type("stty size; echo $((6*7))\n")
            terminal.until("31 97")
            terminal.until("42")
            terminal.resize(20, 60)
            # The command's own signal for it may come any time: asked until it is so.
            terminal.type("until stty size | grep '20 60'; do :; done; exit 5\n")
            terminal.until("20 60")
            code = terminal.end()
            check(code != 0, f"{transport}: exit 5 of a terminal's shell ends crictl with {code}")


def exec_hangup(it: Scenario) -> None:
    """A client that is killed: the command at its terminal hears the hangup, where the runtime has one for it."""
    if not it.hangs_up:
        return
    command = it.crictl.command("exec", "-it", it.container, "sleep", "98765")
    with Terminal(command, it.directory, os.environ):
        eventually(lambda: _sleeps(it), "the command runs")
    eventually(lambda: not _sleeps(it), "the command ends with its terminal")


def _sleeps(it: Scenario) -> bool:
    return "98765" in it.crictl.ok("exec", "-s", it.container, "ps")


def attach(it: Scenario) -> None:
    for transport in it.transports:
        name = f"talker-{transport}"
        file = it.directory / f"{name}.json"
        file.write_text(
            json.dumps(
                {
                    "metadata": {"name": name},
                    "image": {"image": it.image},
                    "command": ["sh", "-c", 'while read line; do echo "said $line"; done; echo over; sleep 0.1'],
                    "log_path": f"{name}.log",
                    "stdin": True,
                    "stdin_once": True,
                }
            )
        )
        container = it.crictl.ok("create", it.pod, file, it.pod_file)
        it.crictl.ok("start", container)
        done = it.crictl.piped(b"one\ntwo\n", "attach", "-i", "--transport", transport, container)
        check(
            done.stdout == b"said one\nsaid two\nover\n", f"{transport}: attach prints {done.stdout!r} {done.stderr!r}"
        )
        log = (it.logs / f"{name}.log").read_text()
        check("said two" in log and "over" in log, f"the log has {log!r}")
        # Removing it in the moment of its end is a race that containerd loses.
        eventually(functools.partial(_has_ended, it, container), "the container has ended")
        it.crictl.ok("rm", container)


def _has_ended(it: Scenario, container: str) -> bool:
    return "CONTAINER_EXITED" in it.crictl.ok("inspect", container)


def port_forward(it: Scenario) -> None:
    for transport in it.transports:
        with _forwarded(it, transport, 80) as port:
            for _ in range(3):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{PAGE_PATH}", timeout=WAIT_S) as reply:
                    check(
                        reply.status == 200 and reply.read(), f"{transport}: GET through the port gives {reply.status}"
                    )
            with socket.create_connection(("127.0.0.1", port), WAIT_S) as half:
                half.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
                half.shutdown(socket.SHUT_WR)
                check(b"200 OK" in half.makefile("rb").read(), f"{transport}: nothing comes after a half-close")
        with _forwarded(it, transport, 4) as port, socket.create_connection(("127.0.0.1", port), WAIT_S) as closed:
            closed.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                check(closed.recv(1) == b"", f"{transport}: a port that nobody listens on gives bytes")


@contextlib.contextmanager
def _forwarded(it: Scenario, transport: str, port: int) -> Iterator[int]:
    """The local port."""
    command = it.crictl.command("port-forward", "--transport", transport, it.pod, f":{port}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield _local_port(process)
        finally:
            process.kill()


def _local_port(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    said = b""
    while select.select([process.stdout], [], [], WAIT_S)[0]:
        piece = os.read(process.stdout.fileno(), 4096)
        said += piece
        if found := re.search(rb"127\.0\.0\.1:(\d+) -> ", said):
            return int(found[1])
        if not piece:
            break
    raise CheckFailed(f"crictl port-forward says {said!r}")


STEPS: tuple[Callable[[Scenario], None], ...] = (
    exec_piped,
    exec_code,
    exec_terminal,
    exec_hangup,
    attach,
    port_forward,
)
