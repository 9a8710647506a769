"""Commands in running containers: bounded, timed, many at once, leaving nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.linux.sockets import recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.commands import DRAIN, run_to_end
from runtime.shim.model import ContainerError, ExecResult, ExecSpec
from tests.seccomp_agent import Agent, refuse
from tests.shims import Home, Lab, Pod, kill, lab, process
from tests.support import SOON_S, eventually, needs

HANDLERS = ["native", "runc"]


@pytest.fixture(params=HANDLERS)
def pods(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox", "overlay", *(["runc"] if request.param == "runc" else []))
    with lab(tmp_path, request.param, shared=home) as opened:
        yield opened


@pytest.fixture
def running(pods: Lab) -> tuple[Pod, str]:
    pod = pods.pod()
    return pod, pod.run("c", ["sleep", "10000"])


def inside(pod: Pod, container: str) -> list[str]:
    """Command lines of what runs in the container, its init excepted."""
    own = pod.facts(container).pid
    namespace = os.stat(f"/proc/{own}/ns/pid").st_ino
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(entry) != own and os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                found.append(Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def memory(pid: int) -> int:
    """Private memory in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1])
    raise AssertionError("no Private_Dirty")


def test_a_command_gives_its_output_and_its_code(running: tuple[Pod, str]) -> None:
    pod, container = running
    result = pod.exec(container, ["sh", "-c", "echo out; echo err >&2; hostname; exit 3"])
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\nshimtest\n", b"err\n")
    assert not result.timed_out and not result.truncated
    assert pod.exec(container, ["sh", "-c", "kill -9 $$"]).exit_code == 137
    assert pod.exec(container, ["cat"]).stdout == b""  # its stdin is /dev/null
    assert pod.exec(container, ["printf", r"\377\000\200"]).stdout == b"\xff\0\x80"


def test_a_command_that_does_not_exist_is_named(running: tuple[Pod, str]) -> None:
    pod, container = running
    with pytest.raises(ContainerError, match="no-such-command"):
        pod.exec(container, ["no-such-command"])
    with pytest.raises(ContainerError) as caught:
        pod.exec("unknown", ["true"])
    assert caught.value.code == "not_found"
    assert pod.exec(container, ["true"]).exit_code == 0


def test_a_process_object_of_the_wrong_shape_is_refused(running: tuple[Pod, str]) -> None:
    pod, container = running
    with pytest.raises(ContainerError):
        pod.shims.exec_sync(pod.sandbox, container, ExecSpec({"args": "true", "cwd": "/"}))


def test_a_timeout_kills_the_whole_tree(running: tuple[Pod, str]) -> None:
    pod, container = running
    script = (
        "trap '' TERM; sleep 4321 & (sleep 4321 & sleep 4321) & setsid sleep 4321 & sh -c 'sleep 4321; true' ; true"
    )
    begun = time.monotonic()
    result = pod.exec(container, ["sh", "-c", script], timeout_s=0.5)
    assert result.timed_out
    assert 0.5 <= time.monotonic() - begun < SOON_S
    eventually(lambda: not [line for line in inside(pod, container) if "4321" in line], what="the tree to be gone")
    assert pod.facts(container).finished_ns == 0


def test_output_before_a_timeout_is_kept(running: tuple[Pod, str]) -> None:
    pod, container = running
    result = pod.exec(container, ["sh", "-c", "echo early; sleep 4321"], timeout_s=0.5)
    assert result.timed_out and result.stdout == b"early\n"


def test_s51_output_is_bounded_and_the_command_runs_on(running: tuple[Pod, str]) -> None:
    pod, container = running
    script = "head -c 3000000 /dev/zero; head -c 5000 /dev/zero >&2; exit 5"
    result = pod.exec(container, ["sh", "-c", script], output_limit=1 << 20)
    assert (len(result.stdout), len(result.stderr), result.exit_code, result.truncated) == (1 << 20, 5000, 5, True)
    exact = pod.exec(container, ["head", "-c", "1048576", "/dev/zero"], output_limit=1 << 20)
    assert len(exact.stdout) == 1 << 20 and not exact.truncated


def test_s51_endless_output_ends_with_the_timeout_and_memory_comes_back(running: tuple[Pod, str]) -> None:
    pod, container = running
    before = memory(pod.sandbox.pid)
    result = pod.exec(container, ["cat", "/dev/zero"], timeout_s=1.0, output_limit=8 << 20)
    assert result.timed_out and result.truncated and len(result.stdout) == 8 << 20
    eventually(lambda: memory(pod.sandbox.pid) < before + 2048, what="memory to come back")


def test_s52_a_background_child_that_holds_stdout_delays_by_a_short_drain_only(running: tuple[Pod, str]) -> None:
    pod, container = running
    took: dict[str, list[float]] = {"echo hi": [], "sleep 4321 & echo hi": []}
    for script in [*took] * 3:
        begun = time.monotonic()
        result = pod.exec(container, ["sh", "-c", script])
        assert result.stdout == b"hi\n" and result.exit_code == 0
        took[script].append(time.monotonic() - begun)
    plain, held = took.values()
    assert min(held) < max(plain) + 4 * DRAIN
    directory = f"/proc/{pod.sandbox.pid}/fd"
    fds = len(os.listdir(directory))
    pod.exec(container, ["sh", "-c", "sleep 4321 & echo hi"])
    eventually(lambda: len(os.listdir(directory)) <= fds, what="fds to be closed")


def test_o30_execs_run_side_by_side(running: tuple[Pod, str]) -> None:
    pod, container = running
    count = 24
    with ThreadPoolExecutor(count) as pool:

        def one(number: int) -> bytes:
            background = "sleep 4321 & " if number % 2 else ""
            script = f"{background}: > /at{number}; until [ -e /go ]; do sleep 0.1; done; echo {number}"
            return pod.exec(container, ["sh", "-c", script]).stdout

        answers = pool.map(one, range(count))
        try:
            upper = pod.bundle("c") / "upper"
            eventually(lambda: len(list(upper.glob("at*"))) == count, SOON_S, "all of them to run at once")
            pod.exec(container, ["sh", "-c", ": > /go"])
            assert list(answers) == [b"%d\n" % number for number in range(count)]
        finally:
            pod.shims.signal(pod.sandbox, container, signal.SIGKILL)
    assert pod.ended(container).signal == 9  # though children of execs held their streams


def test_o31_execs_leave_no_zombies(running: tuple[Pod, str]) -> None:
    pod, container = running
    for number in range(20):
        pod.exec(container, ["sh", "-c", "(sleep 0.01 &); true"], timeout_s=5)
        if number % 5 == 0:
            assert pod.exec(container, ["sleep", "4321"], timeout_s=0.05).timed_out
    own = {pod.facts(container).pid}

    def children() -> set[int]:
        shim = pod.sandbox.pid
        return {int(pid) for pid in Path(f"/proc/{shim}/task/{shim}/children").read_text().split()} - own

    eventually(lambda: not children(), what="all to be reaped")


def test_o32_execs_leave_no_memory_and_no_fds(running: tuple[Pod, str]) -> None:
    pod, container = running
    shim = pod.sandbox.pid
    for _ in range(10):
        pod.exec(container, ["true"])
    before, fds = memory(shim), len(os.listdir(f"/proc/{shim}/fd"))
    for _ in range(60):
        pod.exec(container, ["true"])
    assert memory(shim) <= before + 256
    eventually(lambda: len(os.listdir(f"/proc/{shim}/fd")) <= fds, what="fds to be closed")


def test_an_exec_dies_with_its_caller(running: tuple[Pod, str]) -> None:
    """Nobody would read the answer: a daemon that is killed leaves no probe behind."""
    pod, container = running
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(pod.directory / "shim.sock"))
        message = protocol.ExecMessage(container, process(["sleep", "4321"]), 0.0, 1000)
        send_frame(caller, protocol.request("exec", message), (0, 1, 2))
        eventually(lambda: any("4321" in line for line in inside(pod, container)))
    eventually(lambda: not any("4321" in line for line in inside(pod, container)), what="the exec to be killed")


def test_an_exec_ends_with_its_container(running: tuple[Pod, str]) -> None:
    pod, container = running
    results = []
    thread = threading.Thread(target=lambda: results.append(pod.exec(container, ["sleep", "4321"])))
    thread.start()
    eventually(lambda: any("4321" in line for line in inside(pod, container)))
    pod.shims.signal(pod.sandbox, container, signal.SIGKILL)
    thread.join(SOON_S)
    assert results[0].exit_code == 137


def test_an_exec_ends_with_its_container_when_the_shim_is_dead_too(running: tuple[Pod, str]) -> None:
    pod, container = running
    results: list[object] = []

    def run() -> None:
        try:
            results.append(pod.exec(container, ["sleep", "4321"]).exit_code)
        except ContainerError as error:  # who had its status is dead: it is not known
            results.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: any("4321" in line for line in inside(pod, container)))
    kill(pod.sandbox)
    assert pod.shims.reconnect(pod.sandbox) is None
    with pytest.raises(ContainerError, match="is gone") as caught:
        pod.exec(container, ["true"])
    assert caught.value.code == "unavailable"
    assert [facts.exit_code for facts in pod.shims.lost(pod.sandbox)] == [255]
    thread.join(SOON_S)
    assert results in ([137], ["unavailable"])


def test_streams_go_straight_to_the_command(running: tuple[Pod, str]) -> None:
    pod, container = running
    stdin_read, stdin = os.pipe()
    stdout, stdout_write = os.pipe()
    stream = pod.shims.exec_stream(
        pod.sandbox, container, process(["sh", "-c", "cat; exit 4"]), [stdin_read, stdout_write, stdout_write]
    )
    os.close(stdin_read)
    os.close(stdout_write)
    data = os.urandom(300_000)
    writer = threading.Thread(target=lambda: (os.write(stdin, data), os.close(stdin)))
    writer.start()
    with open(stdout, "rb") as file:
        assert file.read() == data
    writer.join()
    with socket.socket(fileno=stream.control) as control:
        control.settimeout(SOON_S)
        received = recv_frame(control)
        assert received is not None and protocol.parse_reply(received[0]) == {"exit_code": 4}
        assert recv_frame(control) is None


@pytest.mark.parametrize("terminal", [False, True])
def test_a_session_that_is_open_holds_no_process_but_its_command(running: tuple[Pod, str], terminal: bool) -> None:
    pod, container = running
    own, shim = pod.facts(container).pid, pod.sandbox.pid
    reader, writer = os.pipe()
    fds = () if terminal else (reader, writer, writer)
    command = process(["sh", "-c", "echo up; cat"], terminal=terminal)
    stream = pod.shims.exec_stream(pod.sandbox, container, command, fds, terminal=terminal)
    assert os.read(stream.console if terminal else reader, 2) == b"up"
    children = Path(f"/proc/{shim}/task/{shim}/children")
    eventually(lambda: {int(pid) for pid in children.read_text().split()} == {own, stream.pid}, what="helpers to end")
    for fd in (reader, writer, *([stream.console] if terminal else [])):
        os.close(fd)
    pod.shims.signal(pod.sandbox, container, signal.SIGKILL)
    with socket.socket(fileno=stream.control) as control:
        control.settimeout(SOON_S)
        received = recv_frame(control)
        assert received is not None and "exit_code" in protocol.parse_reply(received[0])


def test_a_shim_of_an_older_daemon_collects_the_output_itself() -> None:
    """Shims outlive the daemon that started them, and its upgrade."""
    ours, theirs = socket.socketpair()

    def shim() -> None:
        received = recv_frame(theirs, want_fds=True)
        assert received is not None and len(received[1]) == 3
        send_frame(theirs, protocol.reply({"exit_code": 3, "timed_out": False, "truncated": True}))
        send_frame(theirs, b"out")
        send_frame(theirs, b"err")
        for fd in received[1]:
            os.close(fd)

    thread = threading.Thread(target=shim)
    thread.start()
    with ours, theirs:
        result = run_to_end(ours, "c", ExecSpec(process(["true"])))
        thread.join()
    assert result == ExecResult(3, b"out", b"err", timed_out=False, truncated=True)


def test_a_stream_with_a_terminal_gives_its_master(running: tuple[Pod, str]) -> None:
    pod, container = running
    stream = pod.shims.exec_stream(pod.sandbox, container, process(["sh"], terminal=True), terminal=True)
    os.write(stream.console, b"tty && exit 3 || test -t 0 && exit 3\n")
    with socket.socket(fileno=stream.control) as control:
        control.settimeout(SOON_S)
        received = recv_frame(control)
        assert received is not None and protocol.parse_reply(received[0]) == {"exit_code": 3}
    os.close(stream.console)
    with pytest.raises(ContainerError, match="stdin, stdout and stderr"):
        pod.shims.exec_stream(pod.sandbox, container, process(["true"]), [0])


def test_closing_the_master_hangs_up_the_command_at_the_terminal(running: tuple[Pod, str]) -> None:
    pod, container = running
    command = process(["sh", "-c", "echo ready; exec sleep 10000"], terminal=True)
    stream = pod.shims.exec_stream(pod.sandbox, container, command, terminal=True)
    assert os.read(stream.console, 100) == b"ready\r\n"
    os.close(stream.console)
    with socket.socket(fileno=stream.control) as control:
        control.settimeout(SOON_S)
        received = recv_frame(control)
        assert received is not None and protocol.parse_reply(received[0]) == {"exit_code": 128 + signal.SIGHUP}


def test_a_connection_is_made_in_the_network_of_the_pod_and_the_shim_stays_where_it_is(
    pods: Lab, tmp_path: Path
) -> None:
    netns = tmp_path / "netns"
    netns.touch()
    subprocess.run(["unshare", f"--net={netns}", "ip", "link", "set", "lo", "up"], check=True)
    try:
        pod = pods.pod(netns=netns)
        with pytest.raises(ContainerError, match="ECONNREFUSED") as caught:
            pod.shims.connect(pod.sandbox, 7)
        assert caught.value.code == "unavailable"
        listen = (
            "import socket; s = socket.create_server(('127.0.0.1', 7)); print(flush=True); s.accept()[0].send(b'yes')"
        )
        words = ["nsenter", f"--net={netns}", sys.executable, "-c", listen]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as listener:
            assert listener.stdout is not None and listener.stdout.readline() == b"\n"
            with pytest.raises(ConnectionRefusedError):  # the port is the pod's, and not ours
                socket.create_connection(("127.0.0.1", 7), 5)
            with socket.socket(fileno=pod.shims.connect(pod.sandbox, 7)) as inside:
                inside.settimeout(SOON_S)
                assert inside.recv(10) == b"yes"
        assert os.readlink(f"/proc/{pod.sandbox.pid}/ns/net") == os.readlink("/proc/self/ns/net")
    finally:
        subprocess.run(["umount", str(netns)], check=True)


def test_a_filter_that_notifies_confines_and_asks_in_an_exec_too(pods: Lab, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", refuse(errno.EXDEV)) as agent:
        rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules, "listenerPath": str(agent.path)}
        pod = pods.pod()
        container = pod.run("c", ["sleep", "10000"], linux={"seccomp": profile})
        assert len(agent.states) == 1 and agent.states[0]["pid"] == pod.facts(container).pid
        for number in (2, 3):
            result = pod.exec(container, ["/bin/busybox", "mkdir", "/tmp/x"])
            assert result.exit_code == 1 and b"Invalid cross-device link" in result.stderr
            assert len(agent.states) == number
        assert inside(pod, container) == []
