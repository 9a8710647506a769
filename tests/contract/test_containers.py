"""What cri.interfaces promises of Sandboxes and Containers, on the fake and on real shims.

Commands are words that both understand: `sh -c` scripts of echo, sleep and exit only.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from cri.interfaces import (
    Checkpoints,
    ContainerError,
    ContainerFacts,
    Containers,
    ContainerSpec,
    ExecSpec,
    FsMount,
    Sandbox,
    Sandboxes,
    SandboxSpec,
    Streams,
)
from runtime.linux.sockets import recv_frame
from tests.fakes.containers import MemoryContainers
from tests.shims import Lab, process
from tests.support import SOON_S, eventually, needs


class Both(Sandboxes, Containers, Streams, Checkpoints, Protocol):
    """Shims is all four."""


class Ground:
    """The part under test, and how to describe a container to it."""

    def __init__(self, part: Both, directory: Path, lab: Lab | None) -> None:
        self.part = part
        self._directory = directory
        self._lab = lab
        self._made: list[Sandbox] = []

    def sandbox(self) -> SandboxSpec:
        directory = self._directory / f"pod-{secrets.token_hex(4)}"
        directory.mkdir(mode=0o700)
        return SandboxSpec(directory.name, directory, "contract", None, shm_bytes=1 << 20)

    def start(self) -> Sandbox:
        sandbox = self.part.start(self.sandbox())
        self._made.append(sandbox)
        return sandbox

    def spec(self, sandbox: Sandbox, script: str, **changes: object) -> ContainerSpec:
        name = f"c{secrets.token_hex(4)}"
        if self._lab is None:
            bundle = sandbox.directory / name
            bundle.mkdir()
            (bundle / "config.json").write_text(json.dumps({"process": process(["sh", "-c", script])}))
            log = sandbox.directory / f"{name}.log"
            return ContainerSpec(name, bundle, FsMount("overlay", "overlay"), log, **changes)  # type: ignore[arg-type]
        pod = self._lab.adopt(sandbox)
        return pod.spec(name, ["sh", "-c", script], **changes)  # type: ignore[arg-type]

    def run(self, sandbox: Sandbox, script: str, **changes: object) -> ContainerSpec:
        spec = self.spec(sandbox, script, **changes)
        self.part.create(sandbox, spec)
        self.part.start_container(sandbox, spec.id)
        return spec

    def facts(self, sandbox: Sandbox, container: str) -> ContainerFacts:
        found = {facts.id: facts for facts in self.part.reconnect(sandbox) or ()}
        return found[container]

    def ended(self, sandbox: Sandbox, container: str) -> ContainerFacts:
        eventually(lambda: self.facts(sandbox, container).finished_ns, what="the container to end")
        return self.facts(sandbox, container)

    def close(self) -> None:
        for sandbox in self._made:
            self.part.stop(sandbox)


@pytest.fixture(params=["memory", "shims"])
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    if request.param == "memory":
        yield Ground(MemoryContainers(), tmp_path, None)
        return
    needs("root", "busybox", "overlay")
    lab = Lab(tmp_path, "native", shared=request.getfixturevalue("home"))
    ground = Ground(lab.shims, tmp_path / "pods", lab)
    try:
        yield ground
    finally:
        ground.close()
        lab.close()


def refused(code: str) -> object:
    class Refused:
        def __enter__(self) -> None:
            return None

        def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> bool:
            assert isinstance(error, ContainerError), error
            assert error.code == code, error
            assert str(error) and "\n" not in str(error)
            return True

    return Refused()


def test_a_started_pod_has_a_process_and_no_containers(ground: Ground) -> None:
    sandbox = ground.start()
    assert sandbox.pid > 0 and sandbox.started_ticks > 0
    assert list(ground.part.reconnect(sandbox) or ()) == []


def test_a_stopped_pod_is_gone_and_stop_is_idempotent(ground: Ground) -> None:
    sandbox = ground.start()
    ground.run(sandbox, "sleep 1000")
    ground.part.stop(sandbox)
    assert ground.part.reconnect(sandbox) is None
    ground.part.stop(sandbox)
    with refused("unavailable"):  # type: ignore[attr-defined]
        ground.part.create(sandbox, ground.spec(sandbox, "exit 0"))


def test_a_container_is_created_started_and_ends_with_its_code(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.spec(sandbox, "echo hello; exit 3")
    created = ground.part.create(sandbox, spec)
    assert created.pid > 0 and created.created_ns > 0
    assert (created.id, created.started_ns, created.finished_ns, created.exit_code) == (spec.id, 0, 0, -1)
    started = ground.part.start_container(sandbox, spec.id)
    assert started.started_ns > 0 and started.pid == created.pid
    ended = ground.ended(sandbox, spec.id)
    assert (ended.exit_code, ended.signal, ended.oom_killed) == (3, 0, False)
    assert ended.finished_ns >= ended.started_ns
    assert spec.log_path is not None
    assert spec.log_path.read_bytes().endswith(b" stdout F hello\n")


def test_an_id_is_used_once_until_it_is_deleted(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "exit 0")
    with refused("already_exists"):  # type: ignore[attr-defined]
        ground.part.create(sandbox, spec)
    ground.part.delete(sandbox, spec.id)
    ground.part.create(sandbox, spec)


def test_a_second_start_is_refused(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    with refused("failed_precondition"):  # type: ignore[attr-defined]
        ground.part.start_container(sandbox, spec.id)


def test_unknown_containers(ground: Ground) -> None:
    sandbox = ground.start()
    with refused("not_found"):  # type: ignore[attr-defined]
        ground.part.start_container(sandbox, "none")
    with refused("not_found"):  # type: ignore[attr-defined]
        ground.part.exec_sync(sandbox, "none", ExecSpec(process(["true"])))
    with refused("not_found"):  # type: ignore[attr-defined]
        ground.part.reopen_log(sandbox, "none")
    with refused("not_found"):  # type: ignore[attr-defined]
        ground.part.update(sandbox, "none", {})
    ground.part.signal(sandbox, "none", 15)
    ground.part.delete(sandbox, "none")


def test_a_signal_ends_a_container_and_later_ones_do_nothing(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    ground.part.signal(sandbox, spec.id, 9)
    ended = ground.ended(sandbox, spec.id)
    assert (ended.exit_code, ended.signal) == (137, 9)
    ground.part.signal(sandbox, spec.id, 15)
    ground.part.signal(sandbox, spec.id, 9, everyone=True)
    assert ground.facts(sandbox, spec.id) == ended


def test_delete_kills_forgets_and_is_idempotent(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    ground.part.delete(sandbox, spec.id)
    assert list(ground.part.reconnect(sandbox) or ()) == []
    ground.part.delete(sandbox, spec.id)


def test_exec_gives_code_and_output(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    result = ground.part.exec_sync(sandbox, spec.id, ExecSpec(process(["sh", "-c", "echo out; echo err >&2; exit 5"])))
    assert (result.exit_code, result.stdout, result.stderr) == (5, b"out\n", b"err\n")
    assert not result.timed_out and not result.truncated


def test_exec_is_bounded_in_time_and_size(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    patient = ExecSpec(process(["sh", "-c", "exit 6"]), timeout_s=10 * 365 * 86400.0)
    assert ground.part.exec_sync(sandbox, spec.id, patient).exit_code == 6
    slow = ExecSpec(process(["sh", "-c", "sleep 1000"]), timeout_s=0.2)
    assert ground.part.exec_sync(sandbox, spec.id, slow).timed_out
    large = ground.part.exec_sync(sandbox, spec.id, ExecSpec(process(["sh", "-c", "echo 0123456789"]), output_limit=4))
    assert large.stdout == b"0123" and large.truncated


def test_exec_needs_a_running_container(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.spec(sandbox, "exit 0")
    ground.part.create(sandbox, spec)
    with refused("failed_precondition"):  # type: ignore[attr-defined]
        ground.part.exec_sync(sandbox, spec.id, ExecSpec(process(["true"])))
    ground.part.start_container(sandbox, spec.id)
    ground.ended(sandbox, spec.id)
    with refused("failed_precondition"):  # type: ignore[attr-defined]
        ground.part.exec_sync(sandbox, spec.id, ExecSpec(process(["true"])))


def test_events_tell_of_exits_from_now_on_and_end_with_the_pod(ground: Ground) -> None:
    sandbox = ground.start()
    earlier = ground.run(sandbox, "exit 1")
    ground.ended(sandbox, earlier.id)
    fd = ground.part.events(sandbox)
    assert not os.get_inheritable(fd)
    with socket.socket(fileno=fd) as stream:
        stream.settimeout(SOON_S)
        spec = ground.run(sandbox, "exit 7")
        received = recv_frame(stream)
        assert received is not None
        event = json.loads(received[0])
        assert event["event"] == "exit"
        assert ContainerFacts(**event["facts"]) == ground.facts(sandbox, spec.id)
        assert event["facts"]["exit_code"] == 7
        ground.part.stop(sandbox)
        assert recv_frame(stream) is None


def test_who_rejoins_hears_what_was_and_what_comes_and_none_of_a_pod_that_is_gone(ground: Ground) -> None:
    sandbox = ground.start()
    earlier = ground.run(sandbox, "exit 1")
    ground.ended(sandbox, earlier.id)
    running = ground.run(sandbox, "sleep 1000")
    rejoined = ground.part.rejoin(sandbox)
    assert rejoined is not None
    fd, facts = rejoined
    assert not os.get_inheritable(fd)
    with socket.socket(fileno=fd) as stream:
        stream.settimeout(SOON_S)
        assert {one.id: (bool(one.finished_ns), one.exit_code) for one in facts} == {
            earlier.id: (True, 1),
            running.id: (False, -1),
        }
        ground.part.signal(sandbox, running.id, signal.SIGKILL)
        received = recv_frame(stream)
        assert received is not None
        event = json.loads(received[0])
        assert (event["event"], event["facts"]["id"], event["facts"]["signal"]) == ("exit", running.id, signal.SIGKILL)
        ground.part.stop(sandbox)
        assert recv_frame(stream) is None
    assert ground.part.rejoin(sandbox) is None


def test_a_log_can_be_rotated(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "echo one; sleep 1000")
    assert spec.log_path is not None
    log = spec.log_path
    eventually(lambda: log.stat().st_size)
    log.rename(log.with_suffix(".1"))
    ground.part.reopen_log(sandbox, spec.id)
    assert log.exists()


def test_attach_copies_output_and_ends_with_it(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.spec(sandbox, "echo out; echo err >&2")
    ground.part.create(sandbox, spec)
    (out, out_write), (err, err_write) = os.pipe(), os.pipe()
    control = ground.part.attach(sandbox, spec.id, [out_write, err_write], stdin=False, terminal=False)
    os.close(out_write)
    os.close(err_write)
    ground.part.start_container(sandbox, spec.id)
    with socket.socket(fileno=control) as over, open(out, "rb") as stdout, open(err, "rb") as stderr:
        over.settimeout(SOON_S)
        assert over.recv(1) == b""
        assert (stdout.read(), stderr.read()) == (b"out\n", b"err\n")


def test_a_command_on_fds_writes_to_them_and_its_code_comes_by_the_control_fd(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    (out, out_write), (err, err_write) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    command = process(["sh", "-c", "echo to out; echo to err >&2; exit 3"])
    stream = ground.part.exec_stream(sandbox, spec.id, command, [null, out_write, err_write])
    for fd in (null, out_write, err_write):
        os.close(fd)
    with open(out, "rb") as stdout, open(err, "rb") as stderr:
        assert (stdout.read(), stderr.read()) == (b"to out\n", b"to err\n")
    assert stream.console == -1 and _code(stream.control) == 3


def test_a_command_on_a_terminal_gives_its_master(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    stream = ground.part.exec_stream(
        sandbox, spec.id, process(["sh", "-c", "echo shown; exit 2"], terminal=True), terminal=True
    )
    assert os.isatty(stream.console) and not os.get_inheritable(stream.console)
    assert _code(stream.control) == 2
    assert os.read(stream.console, 100) == b"shown\r\n"
    os.close(stream.console)


def test_a_command_on_fds_needs_a_running_container_and_all_three(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "exit 0")
    ground.ended(sandbox, spec.id)
    with pytest.raises(ContainerError) as caught:
        ground.part.exec_stream(sandbox, spec.id, process(["true"]), [0, 1, 2])
    assert caught.value.code == "failed_precondition"
    running = ground.run(sandbox, "sleep 1000")
    with pytest.raises(ContainerError) as caught:
        ground.part.exec_stream(sandbox, running.id, process(["true"]), [0])
    assert caught.value.code == "invalid_argument"


def _code(control: int) -> object:
    with socket.socket(fileno=control) as end:
        end.settimeout(SOON_S)
        received = recv_frame(end)
        assert received is not None and recv_frame(end) is None
        return json.loads(received[0])["ok"]["exit_code"]


def test_a_connection_is_made_to_a_port_of_the_pod(ground: Ground) -> None:
    sandbox = ground.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the pod has the host's network
        port = listener.getsockname()[1]
        fd = ground.part.connect(sandbox, port)
        with socket.socket(fileno=fd) as near, listener.accept()[0] as far:
            assert not near.get_inheritable()
            near.sendall(b"in")
            assert far.recv(10) == b"in"
    with pytest.raises(ContainerError) as caught:
        ground.part.connect(sandbox, port)
    assert caught.value.code == "unavailable"


def test_calls_may_come_from_several_threads(ground: Ground) -> None:
    sandboxes = [ground.start() for _ in range(2)]
    codes: dict[str, int] = {}
    failures: list[BaseException] = []

    def work(sandbox: Sandbox, number: int) -> None:
        try:
            spec = ground.run(sandbox, f"exit {number}")
            codes[spec.id] = ground.ended(sandbox, spec.id).exit_code - number
            ground.part.delete(sandbox, spec.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(sandboxes[number % 2], number)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert list(codes.values()) == [0] * 6


def test_a_paused_container_stands_still_until_it_is_resumed(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    ground.part.resume(sandbox, spec.id)  # runs already
    ground.part.pause(sandbox, spec.id)
    with refused("failed_precondition"):  # type: ignore[attr-defined]
        ground.part.pause(sandbox, spec.id)
    ground.part.resume(sandbox, spec.id)
    ground.part.pause(sandbox, spec.id)
    ground.part.delete(sandbox, spec.id)  # frozen or not
    ground.part.resume(sandbox, spec.id)
    with refused("not_found"):  # type: ignore[attr-defined]
        ground.part.pause(sandbox, spec.id)
    created = ground.spec(sandbox, "true")
    ground.part.create(sandbox, created)
    with refused("failed_precondition"):  # type: ignore[attr-defined]
        ground.part.pause(sandbox, created.id)
    ground.part.stop(sandbox)
    ground.part.resume(sandbox, created.id)


def test_update_takes_limits(ground: Ground) -> None:
    sandbox = ground.start()
    spec = ground.run(sandbox, "sleep 1000")
    ground.part.update(sandbox, spec.id, {"pids": {"limit": 100}})


def names(specs: Sequence[ContainerSpec]) -> set[str]:
    return {spec.id for spec in specs}


def test_all_containers_are_listed(ground: Ground) -> None:
    sandbox = ground.start()
    specs = [ground.run(sandbox, "sleep 1000"), ground.run(sandbox, "exit 0"), ground.spec(sandbox, "exit 0")]
    ground.part.create(sandbox, specs[2])
    assert {facts.id for facts in ground.part.reconnect(sandbox) or ()} == names(specs)
