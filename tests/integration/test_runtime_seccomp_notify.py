"""SCMP_ACT_NOTIFY: the listener reaches its agent with the right words, the agent decides, without it nothing runs."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import Bundle, Bundles, bundles
from tests.probes import answers, asking
from tests.seccomp_agent import Agent, let_go, refuse
from tests.support import eventually, needs

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers below are x86_64's")
GETPPID, GETPID, MKDIR = 110, 39, 83


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def notifying(path: object, *names: str, **fields: object) -> dict[str, Any]:
    rules = [{"names": list(names), "action": "SCMP_ACT_NOTIFY"}]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules, "listenerPath": str(path), **fields}


def test_the_agent_gets_the_state_and_decides(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", lambda _pid, _call, args: (4000 + args[0], 0, 0)) as agent:
        one = asking(home.make(), [(GETPPID, 7), (GETPID,)])
        one.config["annotations"] = {"org.example": "of the container"}
        one.linux["seccomp"] = notifying(agent.path, "getppid", listenerMetadata="what only the agent knows")
        one.create().ok()
        pid = one.pid()
        eventually(lambda: len(agent.states) == 1)  # the agent knows of it before it is started
        assert agent.seen == []
        one.start().ok()
        one.becomes("stopped")
        assert agent.seen == [GETPPID]
    (sent,) = agent.states
    assert sent["ociVersion"] == sent["state"]["ociVersion"] and sent["fds"] == ["seccompFd"] and sent["pid"] == pid
    assert sent["metadata"] == "what only the agent knows"
    state = sent["state"]
    assert state["id"] == one.id and state["pid"] == pid and state["bundle"] == str(one.path)
    assert state["status"] == "creating" and state["annotations"] == {"org.example": "of the container"}
    assert len(agent.fds) == 1


def test_what_the_agent_says_is_what_the_call_returns(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", lambda _pid, _call, args: (4000 + args[0], 0, 0)) as agent:
        one = asking(home.make(), [(GETPPID, 7), (GETPID,)])
        one.linux["seccomp"] = notifying(agent.path, "getppid")
        assert answers(one.run()) == [4007, 1]
    assert "metadata" not in agent.states[0]
    with Agent(tmp_path / "other", refuse(errno.EXDEV)) as agent:
        two = home.make("mkdir", "/tmp/x")
        two.linux["seccomp"] = notifying(agent.path, "mkdir", "mkdirat")
        two.run().failed("Invalid cross-device link")
        assert agent.seen == [MKDIR]


@pytest.mark.parametrize("no_new_privileges", [True, False])
@pytest.mark.parametrize("names", [("execve", "execveat"), ("read", "close"), ("sendmsg", "recvmsg", "accept4")])
def test_calls_that_the_runtime_makes_itself_may_be_notified(
    home: Bundles, tmp_path: Path, names: tuple[str, ...], no_new_privileges: bool
) -> None:
    with Agent(tmp_path / "agent", let_go) as agent:
        one = home.make("echo", "done")
        one.process["noNewPrivileges"] = no_new_privileges
        one.linux["seccomp"] = notifying(agent.path, *names)
        assert one.run().ok() == "done\n"
        assert agent.seen


def test_an_exec_has_a_listener_of_its_own(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", lambda *_: (4321, 0, 0)) as agent:
        one = asking(home.make(), [(GETPPID,)])
        script = one.process["args"]
        one.process["args"] = ["sleep", "1000"]
        one.linux["seccomp"] = notifying(agent.path, "getppid", listenerMetadata="m")
        one.up()
        assert answers(one.exec(*script)) == [4321]
        first, second = agent.states
        assert first["pid"] == second["state"]["pid"] == one.pid() != second["pid"]
        assert second["state"]["status"] == "running" and second["state"]["id"] == one.id and second["metadata"] == "m"


def test_in_a_user_namespace(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", lambda *_: (4321, 0, 0)) as agent:
        one = asking(home.make().user_namespace(), [(GETPPID,)])
        script = one.process["args"]
        one.process["args"] = ["sleep", "1000"]
        one.linux["seccomp"] = notifying(agent.path, "getppid")
        one.up()
        assert answers(one.exec(*script)) == [4321]
        assert len(agent.states) == 2


def test_flags_of_a_listener(home: Bundles, tmp_path: Path) -> None:
    flags = ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]
    with Agent(tmp_path / "agent", lambda *_: (77, 0, 0)) as agent:
        one = asking(home.make(), [(GETPPID,)])
        one.linux["seccomp"] = notifying(agent.path, "getppid", flags=flags)
        assert answers(one.run()) == [77]


def test_no_fd_of_it_reaches_the_container(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", let_go) as agent:
        one = home.make("ls", "-l", "/proc/self/fd")
        one.linux["seccomp"] = notifying(agent.path, "getppid")
        said = one.run().ok()
        assert "seccomp" not in said and "socket" not in said


def _nothing_ran(one: Bundle) -> None:
    assert not (one.rootfs / "tmp/ran").exists()
    one.gone()


def test_without_an_agent_nothing_runs(home: Bundles, tmp_path: Path) -> None:
    one = home.make("touch", "/tmp/ran")
    one.linux["seccomp"] = notifying(tmp_path / "missing", "mkdir")
    one.run().failed("failed to connect with seccomp agent")
    _nothing_ran(one)
    (tmp_path / "file").write_text("")
    one.linux["seccomp"] = notifying(tmp_path / "file", "mkdir")
    one.run().failed("seccomp")
    _nothing_ran(one)
    deaf = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deaf.bind(str(tmp_path / "deaf"))  # and nobody listens
    one.linux["seccomp"] = notifying(tmp_path / "deaf", "mkdir")
    one.run().failed("failed to connect with seccomp agent")
    deaf.close()
    _nothing_ran(one)


def test_an_agent_that_went_away_stops_an_exec(home: Bundles, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", let_go) as agent:
        one = home.make()
        one.linux["seccomp"] = notifying(agent.path, "mkdir")
        one.up()
    one.exec("touch", "/tmp/ran").failed("failed to connect with seccomp agent")
    assert not (one.rootfs / "tmp/ran").exists()
    eventually(lambda: len(home.processes(one.id)) == 1, what="the refused exec to end")
    # Who was confined by it stays so: there is nobody to say yes (seccomp_unotify(2)).
    assert one.status() == "running"


def test_a_listener_of_nobody_is_ignored(home: Bundles, tmp_path: Path) -> None:
    one = home.make("echo", "done")
    one.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": str(tmp_path / "missing")}
    assert one.run().ok() == "done\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY cannot be used as default action"),
        (
            {"syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_NOTIFY"}]},
            "SCMP_ACT_NOTIFY cannot be used for the write syscall",
        ),
        ({"listenerPath": ""}, "seccomp listenerPath is not set"),
    ],
)
def test_what_cannot_be_notified(home: Bundles, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with Agent(tmp_path / "agent", let_go) as agent:
        one = home.make("touch", "/tmp/ran")
        one.linux["seccomp"] = {**notifying(agent.path, "mkdir"), **change}
        one.run().failed(words)
        _nothing_ran(one)
        assert agent.states == []
