"""The shim's core without root: helpers, locks, adopted processes, exits told in order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import RuntimeFailure
from runtime.fields import decode
from runtime.linux.process import process_state, set_child_subreaper
from runtime.linux.sockets import connect_unix, listen_unix, recv_frame, send_frame
from runtime.shim import lingering, protocol
from runtime.shim.channel import Channel, pair, receive, send
from runtime.shim.handover import Handover
from runtime.shim.helper import become_helper
from runtime.shim.lingering import IDLE, linger
from runtime.shim.pipes import Pipes
from runtime.shim.protocol import ContainerMessage, Facts, IdMessage
from runtime.shim.reaper import exit_code
from runtime.shim.resident import Resident
from runtime.tree import kill_children
from tests.support import SOON_S

Script = Callable[[Channel, Path], None]


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """The residents of these tests run in this process: orphans of their helpers must come to it, and a helper that
    ends after its resident has stopped is waited for here."""
    if "grpc" in sys.modules:  # of earlier tests: its threads may hold locks that a forked helper waits for
        pytest.fail(
            "these tests fork and want a process without gRPC's threads: run this file alone, as hack/check does"
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)}
    interrupt = signal.getsignal(signal.SIGINT)
    set_child_subreaper(True)
    yield
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    set_child_subreaper(False)
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGINT, interrupt)


def work(script: Script, directory: Path) -> Any:
    """A helper that does `script`; what it fails with is left in a file."""

    def run(_resident: Resident, _connection: int, end: Any) -> None:
        try:
            become_helper(end.fileno())
            script(Channel(end), directory)
        except BaseException as error:
            (directory / "failed").write_text(repr(error))
        finally:
            os._exit(0)

    return run


def killer(pid: int) -> Any:
    """As runtime.shim.helper.kill_command, for a process without a tree."""

    def run(_resident: Resident, _connection: int, end: Any) -> None:
        become_helper(end.fileno())
        os.kill(pid, signal.SIGKILL)
        os._exit(0)

    return run


def run(tmp_path: Path, *scripts: Script) -> Resident:
    """A resident whose first helper runs the first script; those of connections run the second."""
    nothing = work(lambda _channel, _directory: None, tmp_path)
    serve = work(scripts[1], tmp_path) if len(scripts) > 1 else nothing
    resident = Resident(serve, lambda _id, _handler: nothing, killer, lambda _id: nothing)
    resident.run(work(scripts[0], tmp_path), os.open("/dev/null", os.O_RDONLY))
    resident.close()
    failed = tmp_path / "failed"
    assert not failed.exists(), failed.read_text()
    return resident


def orphan(action: Callable[[], int]) -> int:
    """The pid of a process that does `action`, exits with its result, and whose parent is gone."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid == 0:
            os._exit(action())
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.waitpid(middle, 0)
    return int(os.read(reader, 20))


def listen(channel: Channel, directory: Path) -> None:
    name = Path("/proc/self/comm").read_bytes().strip()  # the test's own process keeps its name
    with listen_unix(directory / "shim.sock") as listener:
        listener.setblocking(False)
        channel.ask("listen", name, b"", fds=[listener.fileno()])


def adopt(channel: Channel, directory: Path, pid: int, pipes: Pipes | None = None) -> None:
    facts = Facts("c")
    facts.pid, facts.created_ns = pid, time.time_ns()
    ours = {} if pipes is None else pipes.ours
    told = {
        "facts": facts.to_json(),
        "bundle": str(directory),
        "handler": "",
        "log_path": str(directory / "log"),
        "shares_pids": False,
        "restart": "",
        "message": {},
        "stdin_once": False,
        "oom": 0,
        "fds": list(ours),
    }
    assert channel.ask("adopt", told, fds=ours.values()) is True


def message(directory: Path) -> ContainerMessage:
    return ContainerMessage("c", str(directory), "", "", [], 0, str(directory / "log"), False, False, False, "")


def test_messages_keep_their_fds_and_their_borders() -> None:
    ours, theirs = pair()
    with open("/dev/null", "rb") as null:
        send(ours, ("adopt", {"a": [1, None, b"x"]}), [null.fileno(), null.fileno()])
        send(ours, True)
    received = receive(theirs)
    assert received is not None
    assert received[0] == ("adopt", {"a": [1, None, b"x"]})
    assert len(received[1]) == 2 and not any(os.get_inheritable(fd) for fd in received[1])
    for fd in received[1]:
        os.close(fd)
    assert receive(theirs) == (True, [])
    ours.close()
    assert receive(theirs) is None
    theirs.close()


def test_a_first_helper_that_fails_ends_the_shim(tmp_path: Path) -> None:
    run(tmp_path, lambda _channel, _directory: None)
    assert not (tmp_path / "shim.sock").exists()


def test_o15_o22_an_exit_is_on_disk_and_its_output_in_the_log_before_it_is_told(tmp_path: Path) -> None:
    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        with connect_unix(directory / "shim.sock") as probe:
            channel.tell("subscribe", protocol.frame(b"first"), fds=[os.dup(probe.fileno())])
        pipes = Pipes(message(directory))
        pid = orphan(lambda: os.write(pipes.child[1], b"x" * 600_000 + b"\nlast") and 7)
        adopt(channel, directory, pid, pipes)
        pipes.close()
        channel.ask("told", "c")
        assert (directory / "log").stat().st_size > 600_000
        assert (directory / "log").read_bytes().endswith(b"last\n")
        assert json.loads((directory / "exit.json").read_bytes())["exit_code"] == 7
        assert channel.ask("facts", "c")["exit_code"] == 7
        channel.ask("forget", "c")
        assert channel.ask("facts", "c") is None
        channel.ask("end")

    run(tmp_path, script, lambda _channel, _directory: None)


def test_o16_a_process_that_ended_before_it_was_adopted_is_not_lost(tmp_path: Path) -> None:
    def script(channel: Channel, directory: Path) -> None:
        pid = orphan(lambda: 9)
        while Path(f"/proc/{pid}").exists():  # until the shim has waited for it, as for somebody unknown
            os.sched_yield()
        adopt(channel, directory, pid)
        channel.ask("told", "c")
        assert channel.ask("facts", "c")["exit_code"] == 9
        listen(channel, directory)
        channel.ask("end")

    run(tmp_path, script)


def test_o16_many_exits_in_one_moment_are_all_told_right(tmp_path: Path) -> None:
    def script(channel: Channel, directory: Path) -> None:
        reader, writer = os.pipe()
        pids = {}
        for number in range(60):

            def action(code: int = number) -> int:
                os.close(writer)
                os.read(reader, 1)
                return code

            pids[number] = orphan(action)
        for number, pid in pids.items():
            facts = Facts(f"c{number}")
            facts.pid = pid
            told = {
                "facts": facts.to_json(),
                "bundle": str(directory),
                "handler": "",
                "log_path": "",
                "shares_pids": False,
                "restart": "",
                "message": {},
                "stdin_once": False,
                "oom": 0,
                "fds": [],
            }
            channel.ask("adopt", told)
        os.close(writer)  # releases all of them
        for number in pids:
            channel.ask("told", f"c{number}")
            assert channel.ask("facts", f"c{number}")["exit_code"] == number
        listen(channel, directory)
        channel.ask("end")

    run(tmp_path, script)


def test_a_lock_is_free_again_when_its_helper_dies(tmp_path: Path) -> None:
    def holder(channel: Channel, directory: Path) -> None:
        assert channel.ask("lock", "c") is None
        (directory / "locked").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        connect_unix(directory / "shim.sock").close()
        while not (directory / "locked").exists():
            os.sched_yield()
        assert channel.ask("lock", "c") is None
        channel.ask("end")

    run(tmp_path, script, holder)


def test_stop_kills_other_helpers_however_stuck(tmp_path: Path) -> None:
    def stuck(channel: Channel, directory: Path) -> None:
        channel.ask("lock", "c")
        (directory / "stuck").touch()
        signal.pause()

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        connect_unix(directory / "shim.sock").close()
        while not (directory / "stuck").exists():
            os.sched_yield()
        assert channel.ask("stop", True) == (0, [])
        assert channel.ask("lock", "c") is None
        channel.ask("end")

    run(tmp_path, script, stuck)


def wait_for_ever() -> int:
    become_helper()  # a command's execve closes what it has of its helper
    signal.pause()
    return 0


def handing(act: Callable[[Handover], None], *, says_pid: bool = False, watched: bool = False) -> Script:
    """The script of a helper that hands a command over, for who is at `directory`/caller.sock."""

    def script(channel: Channel, directory: Path) -> None:
        with connect_unix(directory / "caller.sock") as connection:
            act(Handover(channel, connection.fileno(), says_pid=says_pid, watched=watched))

    return script


def answers(tmp_path: Path, script: Script, act: Callable[[socket.socket], None] = lambda _caller: None) -> list[Any]:
    """What the caller of a command hears from a shim with one helper, which does `script`; the caller does `act`."""
    heard: list[Any] = []

    def first(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        with listen_unix(directory / "caller.sock") as listener:
            connect_unix(directory / "shim.sock").close()
            caller, _ = listener.accept()
        act(caller)
        while (received := recv_frame(caller)) is not None:
            heard.append(decode(received[0]))
        (directory / "heard").write_text(json.dumps(heard))
        channel.ask("end")

    run(tmp_path, first, script)
    return list(json.loads((tmp_path / "heard").read_text()))


def test_a_command_that_was_handed_over_is_answered_for_by_the_shim(tmp_path: Path) -> None:
    def act(handover: Handover) -> None:
        handover.pid = orphan(lambda: 7)
        handover.expects((), always=True)

    assert answers(tmp_path, handing(act)) == [{"ok": {"exit_code": 7}}]


def test_o16_a_command_that_ended_before_it_was_handed_over_is_not_lost(tmp_path: Path) -> None:
    def act(handover: Handover) -> None:
        handover.pid = orphan(lambda: 7)
        while Path(f"/proc/{handover.pid}").exists():  # until the shim has waited for it
            os.sched_yield()
        handover.expects((), always=True)

    heard = answers(tmp_path, handing(act, says_pid=True))
    assert [*heard[0]["ok"], heard[1]] == ["pid", {"ok": {"exit_code": 7}}]


def test_a_command_that_fails_after_it_was_handed_over_is_answered_once(tmp_path: Path) -> None:
    def act(handover: Handover) -> None:
        handover.pid = orphan(lambda: 1)
        handover.expects((), always=True)
        handover.fail(RuntimeFailure("no such program", step="exec", code="not_found"))

    (heard,) = answers(tmp_path, handing(act, says_pid=True))
    assert heard["error"]["message"] == "no such program" and heard["error"]["step"] == "exec"


def test_a_caller_who_closes_its_sending_half_ends_the_command_and_hears_of_it(tmp_path: Path) -> None:
    def act(handover: Handover) -> None:
        handover.pid = orphan(wait_for_ever)
        handover.expects((), always=True)

    heard = answers(tmp_path, handing(act, watched=True), lambda caller: caller.shutdown(socket.SHUT_WR))
    assert heard == [{"ok": {"exit_code": 137}}]


def test_a_stop_ends_commands_that_are_about_to_execute(tmp_path: Path) -> None:
    """Before it was handed over or after: the process that becomes the command is killed."""

    def helper(channel: Channel, directory: Path) -> None:
        with connect_unix(directory / "caller.sock") as connection:
            handover = Handover(channel, connection.fileno())
            handover.pid = orphan(wait_for_ever)
            handover.expects((), always=True)
            (directory / "handed").write_text(str(handover.pid))
            signal.pause()

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        with listen_unix(directory / "caller.sock") as listener:
            connect_unix(directory / "shim.sock").close()
            caller, _ = listener.accept()
        handed = directory / "handed"
        while not handed.exists() or not handed.read_text():
            os.sched_yield()
        channel.ask("stop", True)
        assert recv_frame(caller) == (protocol.reply({"exit_code": 137}), [])
        while Path(f"/proc/{handed.read_text()}").exists():
            os.sched_yield()
        late, connection = orphan(wait_for_ever), os.open("/dev/null", os.O_RDONLY)
        channel.tell("hand_over", late, False, False, fds=[connection])
        while Path(f"/proc/{late}").exists():
            os.sched_yield()
        channel.tell("take_back")
        channel.ask("end")

    run(tmp_path, script, helper)


@pytest.mark.parametrize(
    ("request_", "is_wanted"),
    [
        (protocol.request("start", IdMessage("c")), True),
        (protocol.request("start", IdMessage("c"), timed=True), True),
        (protocol.request("list"), False),
        (protocol.request("list", timed=True), False),
        (b'["star', False),
    ],
)
def test_the_next_connection_goes_to_an_idle_helper_and_on_to_a_new_one_if_it_is_no_start(
    tmp_path: Path, request_: bytes, is_wanted: bool
) -> None:
    """And what it had locked is free."""

    def helper(channel: Channel, directory: Path) -> None:
        if (directory / "locked").exists():
            (directory / "forked").touch()
            return
        assert channel.ask("lock", "c") is None
        (directory / "locked").touch()
        channel.tell(IDLE)
        said = linger(channel, ("exec", "start"), lambda connection: (str(os.write(connection, b"served")),))
        assert said == ("6",)
        (directory / "ended").touch()

    def until(path: Path) -> None:
        while not path.exists():
            os.sched_yield()

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        connect_unix(directory / "shim.sock").close()
        until(directory / "locked")
        assert channel.ask("lock", "c") is None
        with connect_unix(directory / "shim.sock") as other:
            send_frame(other, request_)
            if is_wanted:
                assert other.recv(6) == b"served"
                until(directory / "ended")
                channel.ask("end")
                return
            until(directory / "forked")
            with contextlib.suppress(ConnectionResetError):  # by all that had it, who has declined among them
                assert other.recv(1) == b""
        # One other request may come between, and then it waits once more.
        heard = b""
        while not heard:
            with connect_unix(directory / "shim.sock") as other, contextlib.suppress(ConnectionError):
                send_frame(other, protocol.request("exec", None))
                heard = other.recv(6)
        assert heard == b"served"
        until(directory / "ended")
        channel.ask("end")

    run(tmp_path, script, helper)


def test_a_helper_that_waits_no_longer_is_handed_nothing(tmp_path: Path) -> None:
    """Also before it has ended: its word that it is idle would cost who comes next his answer."""

    def until(path: Path) -> None:
        while not path.exists():
            os.sched_yield()

    def helper(channel: Channel, directory: Path) -> None:
        if (directory / "first").exists():
            (directory / f"forked-{os.getpid()}").touch()
            return
        (directory / "first").touch()
        channel.tell(IDLE)
        assert linger(channel, ("start",), lambda _connection: ("served",)) == ()
        (directory / "ended").touch()
        until(directory / "done")

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        connect_unix(directory / "shim.sock").close()
        until(directory / "first")
        requests = 0
        while not (directory / "ended").exists():
            requests += 1
            with connect_unix(directory / "shim.sock") as other:
                send_frame(other, protocol.request("list"))
                while len(list(directory.glob("forked-*"))) < requests:
                    os.sched_yield()
        deadline = time.monotonic() + 20
        with connect_unix(directory / "shim.sock") as other:
            send_frame(other, protocol.request("list"))
            while len(list(directory.glob("forked-*"))) == requests and time.monotonic() < deadline:
                os.sched_yield()
        (directory / "done").touch()
        channel.ask("end")
        assert requests >= 2 and len(list(directory.glob("forked-*"))) == requests + 1

    run(tmp_path, script, helper)


def test_an_idle_helper_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "PATIENCE", 0.01)

    def helper(channel: Channel, directory: Path) -> None:
        channel.tell(IDLE)
        assert linger(channel, ("start",), lambda _connection: (str((directory / "served").touch()),)) == ()
        (directory / "ended").touch()

    def script(channel: Channel, directory: Path) -> None:
        listen(channel, directory)
        connect_unix(directory / "shim.sock").close()
        while not (directory / "ended").exists():
            os.sched_yield()
        assert not (directory / "served").exists()
        channel.ask("end")

    run(tmp_path, script, helper)


def test_p11_a_helper_keeps_only_the_fds_it_is_given(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        keep = os.open("/dev/null", os.O_RDONLY)
        become_helper(keep)
        open_ = {int(name) for name in os.listdir("/proc/self/fd")}
        # The listing itself is one; it is the lowest free number.
        os._exit(0 if keep in open_ and len(open_ - {0, 1, 2, keep}) == 1 else 1)
    assert exit_code(os.waitpid(pid, 0)[1]) == (0, 0)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("status", "expected"), [(0, (0, 0)), (3 << 8, (3, 0)), (9, (137, 9)), (11 | 128, (139, 11))])
def test_exit_codes_of_signalled_deaths_are_128_and_the_signal(status: int, expected: tuple[int, int]) -> None:
    assert exit_code(status) == expected


def test_o55_a_subscriber_that_does_not_read_is_let_go(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()

    def helper(_resident: Resident, _connection: int, end: Any) -> None:
        try:
            become_helper(end.fileno(), theirs.fileno())
            channel = Channel(end)
            listen(channel, tmp_path)
            for _ in range(3):
                channel.tell("subscribe", b"x" * 200_000, fds=[theirs.fileno()])
            channel.ask("end")
        finally:
            os._exit(0)

    resident = Resident(helper, lambda _id, _handler: helper, killer, killer)  # type: ignore[arg-type,return-value]
    resident.run(helper, os.open("/dev/null", os.O_RDONLY))  # type: ignore[arg-type]
    assert len(resident._subscribers) == 3  # behind, but not too far
    resident._subscribers.tell("exit", _large_facts())
    assert len(resident._subscribers) == 0
    resident.close()
    ours.close()
    theirs.close()


def _large_facts() -> Facts:
    facts = Facts("c")
    facts.message = "x" * 300_000
    return facts


def test_nobody_of_a_killed_tree_runs_when_it_is_said_to_be_gone() -> None:
    """Each has memory that takes the kernel a while to give back: whoever only sent the signals would still see them.
    One is in a session of its own below its parent, and a child of the subreaper's only once that has ended."""
    heavy = "a = bytearray(200 << 20); a[::4096] = bytes(len(a[::4096]))"
    below = f"import os, time; os.setsid(); {heavy}; print(os.getpid(), flush=True); time.sleep(1000)"
    above = (
        f"import subprocess, sys, time; {heavy}; subprocess.Popen([sys.executable, '-c', {below!r}]); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", above], stdout=subprocess.PIPE) as top:
        assert top.stdout is not None
        inner = int(top.stdout.readline())
        kept = subprocess.Popen(["sleep", "1000"])
        try:
            kill_children(os.getpid(), kept.pid, SOON_S)
            states = [process_state(pid) for pid in (top.pid, inner) if Path(f"/proc/{pid}").exists()]
            assert set(states) <= {"Z"} and kept.poll() is None
        finally:
            kept.kill()
            kept.wait()
