"""What `ocid run` does for a container beyond its command: a PID 1 that reaps (--init), another run after its end
(--restart)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conformance.leaks import CGROUPS
from tests.commands import Terminal, end, line, logged, ocid, once, said, start
from tests.e2e import Node
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("as_before")


# ------------------------------------------------------------------------------------------------------------- --init


def test_init_is_pid_1_and_reaps(cli: Node) -> None:
    """An orphan that has ended is gone, where the command itself, as PID 1, would have kept a zombie."""
    # An orphan for whoever is PID 1; the command reaps nothing: it is no shell any more.
    script = "(sleep 0.05 & echo $!) ; exec cat"
    for words, zombie in ((["--init"], False), ([], True)):
        process = start(
            cli, "run", "--rm", "-i", "--name", "r", *words, cli.image, "sh", "-c", script, stdin=subprocess.PIPE
        )
        orphan = line(process)
        status = f"/proc/{orphan}/status"

        def state(path: str = status) -> str:
            told = ocid(cli, "exec", "r", "grep", "State", path)
            return told.stdout.split()[1] if told.returncode == 0 else "gone"

        eventually(lambda: state() in ("Z", "gone"), what="the orphan to end")  # noqa: B023 - called at once
        assert state() == ("Z" if zombie else "gone")
        assert said(cli, "exec", "r", "cat", "/proc/1/comm") == ("ocid-init\n" if words else "cat\n")
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert end(process)[0] == 0


@pytest.mark.parametrize("words", [["--init"], []])
def test_the_end_of_a_command_is_told_as_without(cli: Node, tmp_path: Path, words: list[str]) -> None:
    once(cli, *words, "IMAGE", "sh", "-c", "exit 7", code=7)
    missing = ocid(cli, "run", "--rm", *words, cli.image, "nosuch")
    assert (missing.returncode, "nosuch" in missing.stderr) == (127, True)
    assert ocid(cli, "run", "--rm", *words, cli.image, "/etc").returncode == 126
    # What only execve(2) finds out, when PID 1 is there already.
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = ocid(cli, "run", "--rm", "-v", f"{script}:/script:ro", *words, cli.image, "/script")
    assert done.returncode == 127 and "its interpreter" in done.stderr, done.stderr
    # Who kills itself: PID 1 of a namespace cannot, a command below one can.
    once(cli, *words, "IMAGE", "sh", "-c", "kill -9 $$; exit 3", code=137 if words else 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_init_passes_signals_on(cli: Node, number: signal.Signals) -> None:
    """Also to a command that has no handler: below PID 1 the default action is what happens."""
    process = start(cli, "run", "--rm", "--init", cli.image, "sh", "-c", "echo ready; exec sleep 1000")
    assert line(process) == "ready"
    process.send_signal(number)
    assert end(process)[0] == 128 + number


def test_init_on_a_terminal_has_the_command_in_the_foreground(cli: Node) -> None:
    terminal = Terminal([*cli.words, "run", "--rm", "--init", "-it", cli.image, "sh"])
    terminal.expect("# ")
    terminal.send(b"sh -c \"echo u''p; exec sleep 1000\"\n")
    terminal.expect("up")
    terminal.send(b"\x03")
    terminal.expect("# ")
    terminal.send(b"exit 4\n")
    assert terminal.end() == 4


def test_init_is_small_and_cannot_be_written_to(cli: Node) -> None:
    """Threats S1: /proc/1/exe leads to a sealed file without a name."""
    one = said(cli, "run", "-d", "--name", "s", "--init", cli.image, "sleep", "1000").strip()
    pid = int(said(cli, "inspect", "--format", "{{.info.pid}}", "s"))
    assert Path(f"/proc/{pid}/comm").read_text() == "ocid-init\n"
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    assert pages <= 16, f"{pages} pages are resident"
    assert sorted(Path(f"/proc/{pid}/fd").iterdir()) == [Path(f"/proc/{pid}/fd/{n}") for n in range(3)]
    refused = ocid(cli, "exec", "s", "sh", "-c", "echo >/proc/1/exe")
    assert refused.returncode != 0
    said(cli, "rm", "-f", one)


# ---------------------------------------------------------------------------------------------------------- --restart


def shown(cli: Node, name: str) -> dict[str, Any]:
    """What `ocid ps` says of a container."""
    found = [one for one in json.loads(said(cli, "ps", "-a", "--format", "json")) if one["name"] == name]
    assert len(found) == 1, found
    return dict(found[0])


def main_pid(cli: Node, name: str) -> int:
    """The process that runs now, 0 between two runs."""
    return int(said(cli, "inspect", "--format", "{{.info.pid}}", name))


def next_run(cli: Node, name: str, one: str, before: int) -> int:
    """The pid of a later run than that of `before`. Its cgroup is looked at first, which takes no command."""

    def others() -> set[str]:
        found: set[str] = set()
        for path in (*CGROUPS.glob(f"memory/{cli.tag}/{one}"), *CGROUPS.glob(f"{cli.tag}/{one}")):
            with contextlib.suppress(OSError):  # it goes with each run
                found.update((path / "cgroup.procs").read_text().split())
        return found - {str(before)}

    eventually(others, what="somebody else in the cgroup")
    eventually(lambda: main_pid(cli, name) not in (0, before), what="the next run")
    return main_pid(cli, name)


def test_on_failure_starts_the_same_container_so_often(cli: Node) -> None:
    """One id, one writable layer, one log; then the exit code of the last run."""
    script = "echo x >>/runs; wc -l </runs; exit 3"
    one = said(cli, "run", "-d", "--name", "f", "--restart", "on-failure:2", cli.image, "sh", "-c", script).strip()
    assert said(cli, "wait", "f") == "3\n"
    assert said(cli, "logs", "f").split() == ["1", "2", "3"]
    known = shown(cli, "f")
    assert (known["id"], known["state"], known["restarts"]) == (one, "exited", 2)
    said(cli, "rm", "f")


def test_a_success_is_no_failure(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "g", "--restart", "on-failure", cli.image, "echo", "once")
    assert said(cli, "wait", "g") == "0\n"
    assert (said(cli, "logs", "g"), shown(cli, "g")["restarts"]) == ("once\n", 0)
    said(cli, "rm", "g")


def test_always_goes_on_until_it_is_stopped(cli: Node) -> None:
    """The next run is as the first: its limits, its PID 1, its name; and what a stop ends is not started again."""
    words = ["--restart", "always", "--init", "-m", "64m"]
    one = said(cli, "run", "-d", "--name", "a", *words, cli.image, "sleep", "1000").strip()
    pid = main_pid(cli, "a")
    for count in (1, 2):
        os.kill(pid, signal.SIGKILL)
        pid = next_run(cli, "a", one, pid)
        known = shown(cli, "a")
        assert (known["state"], known["restarts"]) == ("running", count)
        assert said(cli, "exec", "a", "cat", "/proc/1/comm", "/etc/hostname") == "ocid-init\na\n"
        limits = [int(path.read_text()) for path in CGROUPS.glob(f"memory/{cli.tag}/{one}/memory.limit_in_bytes")]
        limits += [int(path.read_text()) for path in CGROUPS.glob(f"{cli.tag}/{one}/memory.max")]
        assert limits == [64 << 20]
    said(cli, "stop", "-t", "5", "a")
    assert (shown(cli, "a")["state"], said(cli, "wait", "a")) == ("exited", "143\n")
    assert shown(cli, "a")["restarts"] == 2
    said(cli, "rm", "a")


@pytest.mark.parametrize("words", [["stop"], ["kill"], ["kill", "-s", "TERM"], ["rm", "-f"]])
def test_what_ends_one_that_waits_for_its_next_run(cli: Node, words: list[str]) -> None:
    """It has failed often enough for a pause of seconds: nothing runs, and nothing is started again."""
    said(cli, "run", "-d", "--name", "w", "--restart", "always", cli.image, "sh", "-c", "echo run; exit 9")
    eventually(lambda: logged(cli).count("run") > 3, what="a third start after the first")
    eventually(lambda: shown(cli, "w")["restarts"] >= 3 and shown(cli, "w")["state"] == "restarting", what="a pause")
    said(cli, *words, "w")
    if words[0] == "rm":
        assert "w" not in said(cli, "ps", "-a", "-q")
        return
    known = shown(cli, "w")
    assert (known["state"], said(cli, "wait", "w")) == ("exited", "9\n")
    assert shown(cli, "w")["restarts"] == known["restarts"]
    said(cli, "rm", "w")


def test_a_kill_ends_one_that_runs(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "k", "--restart", "always", cli.image, "sleep", "1000")
    said(cli, "kill", "k")
    assert said(cli, "wait", "k") == "137\n"
    assert (shown(cli, "k")["state"], shown(cli, "k")["restarts"]) == ("exited", 0)
    said(cli, "rm", "k")


def test_what_cannot_be_started_at_all_is_not_started_again(cli: Node) -> None:
    before = cli.held()
    assert ocid(cli, "run", "-d", "--name", "n", "--restart", "always", cli.image, "nosuch").returncode == 127
    cli.settles(before)


def test_a_start_that_fails_later_is_the_end_and_says_why(cli: Node, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 4\n")
    script.chmod(0o755)
    name, volume = "l", f"{script}:/script"
    said(cli, "run", "-d", "--name", name, "--restart", "always", "-v", volume, cli.image, "/script")
    script.write_text("#!/no/such/interpreter\n")
    said(cli, "wait", name)
    assert shown(cli, name)["state"] == "exited"
    assert "start it again:" in said(cli, "inspect", "--format", "{{.status.message}}", name)
    said(cli, "rm", name)


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["-d", "--restart", "sometimes"], "--restart: 'sometimes' is not no, on-failure"),
        (["--restart", "always"], "needs --detach"),
    ],
)
def test_wrong_policies_are_refused(cli: Node, words: list[str], word: str) -> None:
    done = ocid(cli, "run", *words, cli.image, "true")
    assert done.returncode == 125 and word in done.stderr
