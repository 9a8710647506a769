"""What containers write and read: logs, rotation, full disks, attach, terminals."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.linux.sockets import recv_frame, send_frame
from runtime.shim.model import ContainerError
from tests.shims import Home, Lab, Pod, lab
from tests.support import SOON_S, eventually, needs

HANDLERS = ["native", "runc"]


@pytest.fixture(params=HANDLERS)
def pods(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox", "overlay", *(["runc"] if request.param == "runc" else []))
    with lab(tmp_path, request.param, shared=home) as opened:
        yield opened


@pytest.fixture(params=HANDLERS)
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """With a zygote of its own, for whoever kills it."""
    needs("root", "busybox", "overlay", *(["runc"] if request.param == "runc" else []))
    with lab(tmp_path, request.param) as opened:
        yield opened


def reassembled(pod: Pod, name: str, stream: bytes = b"stdout") -> list[bytes]:
    lines, current = [], b""
    for found, tag, text in pod.entries(name):
        if found == stream:
            current += text
            if tag == b"F":
                lines.append(current)
                current = b""
    assert current == b""
    return lines


class Attached:
    """Pipes attached to a container, and the control fd."""

    def __init__(self, pod: Pod, container: str, *, stdin: bool = False, terminal: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        fds = []
        self.stdin = -1
        if stdin:
            reader, self.stdin = os.pipe()
            fds.append(reader)
        self.stdout, out = os.pipe()
        fds.append(out)
        self.stderr, err = os.pipe()
        fds += [] if terminal else [err]
        control = pod.shims.attach(pod.sandbox, container, fds, stdin=stdin, terminal=terminal)
        self.control = socket.socket(fileno=control)
        for fd in {*fds, out, err}:
            os.close(fd)

    def read(self, fd: int, wanted: bytes, seconds: float = SOON_S) -> bytes:
        """Reads until `wanted` was seen or the stream ends."""
        data, deadline = b"", time.monotonic() + seconds
        while wanted not in data or not wanted:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"only {data!r} within {seconds} s"
            piece = os.read(fd, 65536)
            if not piece:
                return data
            data += piece
        return data

    def close_stdin(self) -> None:
        os.close(self.stdin)
        self.stdin = -1

    def over(self, seconds: float = SOON_S) -> bool:
        """True once the shim has closed the control fd."""
        self.control.settimeout(seconds)
        return self.control.recv(1) == b""

    def close(self) -> None:
        self.control.close()
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)


def test_o22_the_log_is_whole_before_the_exit_is_visible(pods: Lab) -> None:
    pod = pods.pod()
    expected = [b"%d" % number for number in range(1, 100_001)]
    for number in range(3):
        container = pod.run(f"c{number}", ["seq", "1", "100000"])
        eventually(lambda name=container: pod.facts(name).finished_ns)  # type: ignore[misc]
        assert pod.lines(f"c{number}") == expected
        pods.shims.delete(pod.sandbox, container)


def test_o22_sigkill_loses_nothing_that_was_written(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh", "-c", "seq 1 20000; kill -9 $$; sleep 1"])
    eventually(lambda: pod.log("c").read_bytes().count(b"\n") == 20000)  # not `lines`: the last may be half written
    pods.shims.signal(pod.sandbox, container, signal.SIGKILL)
    pod.ended(container)
    assert pod.lines("c") == [b"%d" % number for number in range(1, 20001)]


def test_o23_a_last_line_without_newline_is_one_line(pods: Lab) -> None:
    pod = pods.pod()
    pod.ended(pod.run("c", ["printf", "abc"]))
    assert pod.entries("c") == [(b"stdout", b"F", b"abc")]


def test_o24_streams_are_not_mixed_and_bytes_stay(pods: Lab) -> None:
    pod = pods.pod()
    script = (
        "i=0; long=$(head -c 20000 /dev/zero | tr '\\0' x); "
        "while [ $i -lt 300 ]; do echo out$i; echo err$i >&2; echo $long; "
        "printf '\\377\\200\\001\\n' >&2; i=$((i+1)); done"
    )
    pod.ended(pod.run("c", ["sh", "-c", script]), 60)
    out, err = reassembled(pod, "c"), reassembled(pod, "c", b"stderr")
    assert out == [line for number in range(300) for line in (b"out%d" % number, b"x" * 20000)]
    assert err == [line for number in range(300) for line in (b"err%d" % number, b"\xff\x80\x01")]


def test_o25_the_daemon_is_not_needed_for_logs(alone: Lab) -> None:
    """Nothing of the daemon is alive here but this test, which holds no connection while the container writes."""
    pod = alone.pod()
    container = pod.run(
        "c",
        [
            "sh",
            "-c",
            "head -c 6000000 /dev/zero | tr '\\0' 'x' | fold -w 99 2>/dev/null || yes 0123456789 | head -n 60000",
        ],
    )
    os.kill(alone.zygote(), signal.SIGKILL)
    eventually((pod.bundle("c") / "exit.json").exists, 60, "the container to end")
    alone.restarted()
    assert pod.ended(container).exit_code == 0
    assert len(pod.lines("c")) >= 60_000


def test_o26_a_full_disk_neither_stops_the_container_nor_the_log_for_ever(pods: Lab) -> None:
    pod = pods.pod()
    small = pods.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", str(small)], check=True)
    try:
        spec = pod.spec(
            "c", ["sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; [ $i -lt 200000 ] || sleep 0.01; done"]
        )
        log = small / "log"
        spec = type(spec)(spec.id, spec.bundle, spec.rootfs, log, handler=spec.handler)
        pods.shims.create(pod.sandbox, spec)
        pods.shims.start_container(pod.sandbox, spec.id)
        eventually(lambda: os.statvfs(small).f_bavail == 0, what="the disk to fill")
        pid = pod.facts(spec.id).pid
        for _ in range(3):
            written = Path(f"/proc/{pid}/io").read_text()
            eventually(lambda seen=written: Path(f"/proc/{pid}/io").read_text() != seen)  # type: ignore[misc]
        eventually(lambda: log.read_bytes().endswith(b"\n"))  # and no line stays torn
        os.truncate(log, 0)
        eventually(lambda: log.stat().st_size > 100, what="the log to go on")
        pods.shims.signal(pod.sandbox, spec.id, signal.SIGKILL)
        facts = pod.ended(spec.id)
        assert "bytes of log were dropped: ENOSPC" in facts.message
        pods.shims.delete(pod.sandbox, spec.id)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_o27_rotation_under_load_loses_and_splits_nothing(pods: Lab) -> None:
    pod = pods.pod()
    # Long enough for some rotations on a machine that is busy with other things.
    container = pod.run("c", ["sh", "-c", "i=0; while [ $i -lt 120000 ]; do echo line $i; i=$((i+1)); done"])
    rotated = []
    while not pod.facts(container).finished_ns:
        new = pod.directory / f"c.log.{len(rotated)}"
        os.rename(pod.log("c"), new)
        rotated.append(new)
        pods.shims.reopen_log(pod.sandbox, container)
        assert pod.log("c").exists()
    raw = b"".join(path.read_bytes() for path in [*rotated, pod.log("c")])
    (pod.directory / "all.log").write_bytes(raw)
    assert pod.lines("all") == [b"line %d" % number for number in range(120000)]
    assert len(rotated) > 3
    pods.shims.reopen_log(pod.sandbox, container)  # after the end: harmless
    pod.log("c").unlink()
    pod.log("c").mkdir()
    with pytest.raises(ContainerError, match="open log"):
        pods.shims.reopen_log(pod.sandbox, container)


def test_a_container_without_a_log_is_read_and_dropped(pods: Lab) -> None:
    pod = pods.pod()
    assert pod.ended(pod.run("c", ["seq", "1", "300000"], log=False)).exit_code == 0


def test_o29_attached_stdin_reaches_the_container_and_its_end_too(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["cat"], stdin=True, stdin_once=True)
    attached = Attached(pod, container, stdin=True)
    os.write(attached.stdin, b"hello\n")
    assert attached.read(attached.stdout, b"hello\n") == b"hello\n"
    attached.close_stdin()
    assert pod.ended(container).exit_code == 0
    assert attached.read(attached.stdout, b"") == b""
    assert attached.over()
    assert pod.lines("c") == [b"hello"]
    attached.close()


def test_o29_without_stdin_once_the_next_attach_goes_on(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["cat"], stdin=True)
    for text in (b"one\n", b"two\n"):
        attached = Attached(pod, container, stdin=True)
        os.write(attached.stdin, text)
        assert attached.read(attached.stdout, text) == text
        attached.close_stdin()
        attached.close()
    assert pod.facts(container).finished_ns == 0
    assert pod.lines("c") == [b"one", b"two"]


def test_o29_stdin_once_ends_with_the_first_attach_however_that_ends(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["cat"], stdin=True, stdin_once=True)
    attached = Attached(pod, container, stdin=True)
    attached.close()
    assert pod.ended(container).exit_code == 0


def test_a_container_without_stdin_reads_an_end(pods: Lab) -> None:
    pod = pods.pod()
    assert pod.ended(pod.run("c", ["cat"])).exit_code == 0


def test_several_attached_get_both_streams_raw(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.create("c", ["sh", "-c", "echo out; echo err >&2; printf tail"])
    both = [Attached(pod, container), Attached(pod, container)]
    pods.shims.start_container(pod.sandbox, container)
    for attached in both:
        assert attached.read(attached.stdout, b"") == b"out\ntail"
        assert attached.read(attached.stderr, b"") == b"err\n"
        assert attached.over()
        attached.close()


def test_attach_after_the_end_is_over_at_once(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["true"])
    pod.ended(container)
    attached = Attached(pod, container)
    assert attached.over()
    attached.close()


def test_o30_slow_and_dead_readers_do_not_hold_up_the_log(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.create("c", ["sh", "-c", "yes 0123456789 | head -n 2000000"])
    slow, dead = Attached(pod, container), Attached(pod, container)
    os.close(dead.stdout)
    os.close(dead.stderr)
    dead.stdout = dead.stderr = -1
    pods.shims.start_container(pod.sandbox, container)
    assert pod.ended(container, 60).exit_code == 0
    assert pod.log("c").stat().st_size > 2_000_000 * 50
    slow.control.settimeout(SOON_S)
    told = recv_frame(slow.control)  # it fell too far behind, was let go, and is told so
    assert told is not None and "was let go" in json.loads(told[0])["error"]["message"]
    assert slow.over()
    slow.close()
    dead.close()


def test_without_a_log_an_attached_reader_gets_every_byte(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.create("c", ["sh", "-c", "yes 0123456789 | head -n 1000000"], log=False)
    attached = Attached(pod, container)
    pods.shims.start_container(pod.sandbox, container)
    eventually(lambda: select.select([attached.stdout], [], [], 0)[0])
    assert pod.facts(container).finished_ns == 0  # nobody reads yet: it waits
    assert attached.read(attached.stdout, b"", 60) == b"0123456789\n" * 1_000_000
    assert pod.ended(container).exit_code == 0
    attached.close()


def test_attach_to_a_file_and_from_a_file(pods: Lab, tmp_path: Path) -> None:
    """`ocid run -i IMAGE cat < in >> out`: regular files can be neither polled nor reopened for appending."""
    pod = pods.pod()
    (tmp_path / "in").write_bytes(b"x" * 300_000 + b"\n")
    (tmp_path / "out").write_bytes(b"before\n")
    container = pod.create("c", ["cat"], stdin=True, stdin_once=True)
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "ab") as target:
        control = pods.shims.attach(
            pod.sandbox, container, [source.fileno(), target.fileno()], stdin=True, terminal=False
        )
        pods.shims.start_container(pod.sandbox, container)
        assert pod.ended(container).exit_code == 0
    os.close(control)
    assert (tmp_path / "out").read_bytes() == b"before\n" + b"x" * 300_000 + b"\n"


def test_a_terminal_is_one_stream_that_can_be_resized(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sh"], terminal=True, stdin=True)
    attached = Attached(pod, container, stdin=True, terminal=True)
    send_frame(attached.control, json.dumps({"resize": [40, 123]}).encode())
    eventually(lambda: _size(attached) == b"40 123")
    os.write(attached.stdin, b"echo to-stderr >&2; exit 6\n")
    assert b"to-stderr" in attached.read(attached.stdout, b"to-stderr\r\n")
    assert pod.ended(container).exit_code == 6
    assert attached.over()
    attached.close()
    assert any(line.startswith(b"to-stderr") for line in pod.lines("c"))
    assert pod.lines("c", b"stderr") == []


def test_a_terminal_of_a_runtime_binary_in_a_directory_longer_than_a_sockets_path(tmp_path: Path) -> None:
    needs("root", "busybox", "overlay", "runc")
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    with lab(directory, "runc") as opened:
        pod = opened.pod()
        container = pod.run("c", ["sh", "-c", "test -t 0 && echo a terminal"], terminal=True)
        assert pod.ended(container).exit_code == 0
        assert pod.lines("c") == [b"a terminal\r"]
        assert os.listdir(pod.directory / "scratch") == []


def _size(attached: Attached) -> bytes:
    os.write(attached.stdin, b"echo size=`stty size`=\n")
    data = attached.read(attached.stdout, b"=\r\n")
    return data.rpartition(b"size=")[2].partition(b"=")[0]


def test_s53_attach_and_drop_leaves_nothing(pods: Lab) -> None:
    pod = pods.pod()
    container = pod.run("c", ["sleep", "1000"], stdin=True)
    directory = f"/proc/{pod.sandbox.pid}/fd"
    before = len(os.listdir(directory))
    for _ in range(50):
        Attached(pod, container, stdin=True).close()
    eventually(lambda: len(os.listdir(directory)) <= before, what="fds to be closed")


def test_o32_containers_leave_no_fd_in_the_shim(pods: Lab) -> None:
    pod = pods.pod()
    directory = f"/proc/{pod.sandbox.pid}/fd"
    before = len(os.listdir(directory))
    for number in range(3):
        for terminal in (False, True):
            container = pod.run(f"c{number}{terminal}", ["true"], terminal=terminal, stdin=True)
            pod.ended(container)
            pods.shims.delete(pod.sandbox, container)
    eventually(lambda: len(os.listdir(directory)) <= before, what="fds to be closed")
