"""Where the time of a pod's start, a container's create and an exec went: kept by shim, init and the command's process,
for who asks for it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runtime.entering import Inside
from runtime.errors import RuntimeFailure
from runtime.linux import progress
from runtime.linux.mount import FsMount
from runtime.linux.process import start_time
from runtime.linux.sockets import connect_unix, listen_unix, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.client import Shims
from runtime.shim.model import ContainerSpec, ExecSpec, Sandbox
from runtime.shim.protocol import Facts
from tests.costs import calls
from tests.shims import Home, Lab, lab, process
from tests.support import needs

if TYPE_CHECKING:
    from runtime.linux.progress import Phase


@pytest.fixture
def pods(home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox")
    with lab(tmp_path, shared=home) as opened:
        yield opened


def test_phases_of_a_pod_and_of_a_container_down_to_the_steps_of_its_init(pods: Lab) -> None:
    told: list[list[Phase]] = []
    pods.shims = Shims(pods.state, tell=told.append)
    before = time.time_ns()
    pod = pods.pod()
    (start,) = told
    container = pod.run("c", ["sleep", "1000"])
    after = time.time_ns()
    create = told[1]
    assert len(told) == 2, "a start of a container is not timed"
    assert [name for name, _, _, _ in start] == ["directory", "namespaces", "sysctls", "pin", "shm", "pause"]
    whole = {name: (since, end) for name, of, since, end in create if not of}
    assert list(whole) == ["parse", "prepare", "cgroup", "clone", "init", "record", "adopt"]
    steps = [(name, since, end) for name, of, since, end in create if of == "init"]
    names = [name for name, _, _ in steps]
    assert names[:2] == ["session", "keyring"] and names[-1] == "command" and {"mounts", "pivot"} <= set(names)
    assert "user namespace" not in names, "a step that was not taken took time"
    for phases in (start, create):
        for since, end in ((since, end) for _, _, since, end in phases):
            assert before <= since <= end <= after
    order = [stamp for _, since, end in steps for stamp in (since, end)]
    assert order == sorted(order)
    assert whole["init"][0] <= order[0] and order[-1] <= whole["init"][1]
    assert pod.facts(container).pid


STEPS = ["limits", "terminal", "cgroup", "cwd", "files", "identity", "command", "wait"]


def test_phases_of_an_exec_down_to_the_steps_of_its_process(pods: Lab) -> None:
    """Up to the last that it can tell of: execve ends who kept them."""
    pod = pods.pod()
    container = pod.run("c", ["sleep", "1000"])
    told: list[list[Phase]] = []
    shims = Shims(pods.state, tell=told.append)
    before = time.time_ns()
    spec = ExecSpec(process(["sh", "-c", "usleep 20000"]), 0.0, 1 << 16)
    assert shims.exec_sync(pod.sandbox, container, spec).exit_code == 0
    after = time.time_ns()
    (phases,) = told
    whole = {name: (since, end) for name, of, since, end in phases if not of}
    assert list(whole) == ["parse", "look up", "join", "process", "run", "drain"]
    steps = [(name, since, end) for name, of, since, end in phases if of == "process"]
    assert [name for name, _, _ in steps] == ["session", *STEPS]
    order = [stamp for _, since, end in steps for stamp in (since, end)]
    assert order == sorted(order) and before <= whole["parse"][0] and whole["drain"][1] <= after
    assert whole["join"][0] <= order[0] and order[-1] <= whole["process"][1]
    assert whole["run"][1] - whole["run"][0] >= 20_000_000, "the time that the command slept is in its run"


def test_phases_of_an_exec_at_a_terminal(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sleep", "1000"])
    told: list[list[Phase]] = []
    shims = Shims(pods.state, tell=told.append)
    stream = shims.exec_stream(pod.sandbox, container, process(["true"], terminal=True), terminal=True)
    with socket.socket(fileno=stream.control) as control:
        received = recv_frame(control)
        assert received is not None and protocol.parse_reply(received[0]) == {"exit_code": 0}
    os.close(stream.console)
    assert [name for name, of, _, _ in told[0] if of] == ["session", "console", *STEPS, "exec"]


def test_phases_of_a_command_on_the_callers_own_fds(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sleep", "1000"])
    told: list[list[Phase]] = []
    with open(os.devnull, "r+b") as null:
        fds = (null.fileno(),) * 3
        stream = Shims(pods.state, tell=told.append).exec_stream(pod.sandbox, container, process(["true"]), fds)
        plain = pods.shims.exec_stream(pod.sandbox, container, process(["true"]), fds)
    for one in (stream, plain):
        with socket.socket(fileno=one.control) as control:
            received = recv_frame(control)
            assert received is not None and protocol.parse_reply(received[0]) == {"exit_code": 0}
    assert [name for name, of, _, _ in told[0] if not of] == ["parse", "look up", "join", "process"]


def test_an_exec_that_nobody_asks_about_keeps_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step of a process costs then: an attribute and a look at another, no call of the kernel."""
    one = Inside.__new__(Inside)
    one._progress = None
    assert not calls(lambda: one._at("exec")) and not progress.kept()
    monkeypatch.setattr(time, "time_ns", None)
    assert progress.phase("parse") == "parse"


def test_who_does_not_ask_is_told_nothing(pods: Lab) -> None:
    pod = pods.pod()
    spec = pod.spec("c", ["true"])
    assert pods.shims.create(pod.sandbox, spec).pid
    answer = pods.shims.exec_sync(
        pod.sandbox, pod.run("d", ["sleep", "1000"]), ExecSpec(process(["true"]), 0.0, 1 << 16)
    )
    assert answer.exit_code == 0


def test_nothing_else_can_be_timed(pods: Lab) -> None:
    pod = pods.pod()
    for body in (["delete", {"id": "x"}], ["timed", ["create", {}]], "create", []):
        with connect_unix(pod.directory / "shim.sock", 5.0) as connection:
            send_frame(connection, protocol.encode(["timed", body]))
            received = recv_frame(connection)
            assert received is not None
            with pytest.raises(RuntimeFailure, match="only create, exec, stream can be timed here"):
                protocol.parse_reply(received[0])


def test_a_shim_from_before_there_were_phases_is_asked_plainly(tmp_path: Path) -> None:
    asked = []

    def old_shim(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                received = recv_frame(connection)
                assert received is not None
                asked.append(protocol.operation(received[0]))
                unknown = RuntimeFailure(f"unknown operation {asked[-1]!r}", code="invalid_argument")
                known = asked[-1] == "create"
                send_frame(connection, protocol.reply(Facts("c").to_json()) if known else protocol.failure(unknown))

    told: list[object] = []
    with listen_unix(tmp_path / "shim.sock") as listener:
        thread = threading.Thread(target=old_shim, args=(listener,))
        thread.start()
        sandbox = Sandbox("pod", tmp_path, os.getpid(), start_time(os.getpid()), 0)
        spec = ContainerSpec("c", tmp_path, FsMount("tmpfs", "tmpfs"), None)
        assert Shims(tmp_path, tell=told.append).create(sandbox, spec).id == "c"
        thread.join()
    assert asked == ["timed", "create"] and not told
