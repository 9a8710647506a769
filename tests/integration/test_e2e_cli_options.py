"""What fingers of docker's, podman's and nerdctl's users type: listings and their filters, logs, other users, and what
becomes of a run whose terminal or reader is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import termios
from pathlib import Path

import pytest

from tests.commands import COMMAND_S, Terminal, ocid, once, said
from tests.e2e import Node
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("as_before")


def _names(cli: Node, *words: str) -> list[str]:
    return said(cli, "ps", "--format", "{{.Names}}", *words).split()


def test_listings(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "first", "-l", "a=1", "--label", "b", cli.image, "sleep", "1000")
    said(cli, "run", "-d", "--name", "second", "-l", "a=2", cli.image, "true")
    eventually(lambda: _names(cli, "-f", "status=exited") == ["second"])
    assert _names(cli) == ["first"]
    assert _names(cli, "-a") == ["second", "first"]
    assert _names(cli, "-n", "1") == _names(cli, "-l") == ["second"]
    assert _names(cli, "-a", "-f", "label=a") == ["second", "first"]
    assert _names(cli, "-a", "-f", "label=a", "-f", "label=b") == ["first"]
    assert _names(cli, "-a", "-f", "label=a=2", "-f", "name=first") == []
    assert _names(cli, "-a", "-f", "name=irs", "-f", "name=seco") == ["second", "first"]
    assert _names(cli, "-f", f"ancestor={cli.image}") == ["first"]
    only = said(cli, "ps", "-q", "-f", "name=first").strip()
    assert len(only) == 64 and only in said(cli, "ps", "--no-trunc")
    assert "--filter: 'nosuch=1' is not KEY=VALUE" in ocid(cli, "ps", "-f", "nosuch=1").stderr
    repository = cli.image.rpartition(":")[0]
    assert said(cli, "images", repository) == said(cli, "images", "-a", cli.image) == said(cli, "images")
    assert cli.image in said(cli, "images", "-f", f"reference={repository}", "-f", "dangling=false")
    for words in ((f"{repository}:other",), ("-f", "dangling=true"), ("nosuch",)):
        assert said(cli, "images", "-q", *words) == ""
    assert "sha256:" in said(cli, "images", "--digests") and "sha256:" in said(cli, "images", "--no-trunc")
    said(cli, "rm", "-f", "first", "nosuch", "second")
    assert ocid(cli, "rm", "nosuch").returncode == 1
    said(cli, "rmi", "-f", "nosuch:1")


def test_logs_of_the_last_lines_and_of_a_time(cli: Node) -> None:
    """A line of 40,000 bytes is three pieces of the log, and one line."""
    long = "for i in 1 2 3; do echo line $i; done; head -c 40000 /dev/zero | tr '\\0' x; echo; echo end"
    said(cli, "run", "-d", "--name", "l", cli.image, "sh", "-c", long)
    said(cli, "wait", "l")
    whole = said(cli, "logs", "l")
    assert said(cli, "logs", "--tail", "all", "l") == said(cli, "logs", "-n", "99", "l") == whole
    assert said(cli, "logs", "-n", "2", "l") == "x" * 40000 + "\nend\n"
    assert said(cli, "logs", "-n", "0", "l") == ""
    assert said(cli, "logs", "--since", "1h", "l") == whole and said(cli, "logs", "--until", "1h", "l") == ""
    third = said(cli, "logs", "-t", "-n", "3", "l").split(" ", 1)[0]
    since = said(cli, "logs", "--since", third, "l")  # lines that came together have one time
    assert whole.endswith(since) and since.endswith(said(cli, "logs", "-n", "3", "l"))
    assert "neither a number of lines" in ocid(cli, "logs", "-n", "-1", "l").stderr
    said(cli, "rm", "l")


def test_exec_as_somebody_and_left_alone(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "e", cli.image, "sleep", "1000")
    said(cli, "exec", "e", "sh", "-c", "echo web:x:70:71::/:/bin/sh >> /etc/passwd; echo crew:x:72:web >> /etc/group")
    assert said(cli, "exec", "-u", "web", "e", "sh", "-c", "echo $(id -u) $(id -G)").strip() == "70 71 72"
    assert said(cli, "exec", "-u", "web:crew", "e", "sh", "-c", "echo $(id -u):$(id -g)").strip() == "70:72"
    assert said(cli, "exec", "-u", "5:6", "e", "id", "-G").strip() == "6"  # and not root's, which the container has
    assert "has no user 'nobody2'" in ocid(cli, "exec", "-u", "nobody2", "e", "true").stderr
    said(cli, "exec", "-d", "e", "sh", "-c", "echo $$ > /left; exec sleep 1000")
    eventually(lambda: ocid(cli, "exec", "e", "sh", "-c", "kill -0 $(cat /left)").returncode == 0)
    said(cli, "run", "-d", "--name", "f", cli.image, "sleep", "1000")
    several = ocid(cli, "kill", "e", "nosuch", "f")
    assert several.returncode == 1 and several.stderr.count("\n") == 1
    said(cli, "wait", "e", "f")
    said(cli, "rm", "e", "f")


def test_run_by_dockers_words(cli: Node, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("# none\nA=1\n B= 2 \n\nHERE\nNOT_HERE\n")
    words = ("--env-file", str(tmp_path / "env"), "-e", "A=9", "-h", "called", "--entrypoint", "/bin/sh")
    printed = once(cli, *words, "--network", "host", "IMAGE", "-c", 'echo "$A|$B|${NOT_HERE-unset}"; ls /sys/class/net')
    assert printed.splitlines()[0] == "9| 2 |unset"
    assert sorted(printed.split()[3:]) == sorted(name for _, name in socket.if_nameindex())
    assert once(cli, "-h", "called", "IMAGE", "hostname").strip() == "called"
    assert "no such file" in ocid(cli, "run", "--env-file", str(tmp_path / "no"), cli.image, "true").stderr
    assert "there are no named volumes" in ocid(cli, "run", "-v", "named:/x", cli.image, "true").stderr


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (["--rm"], "echo y; yes 0123456789012345678901234567890123456789 | head -c 1000000; exec sleep 1000"),
        (["--name", "loud"], "while echo y; do usleep 10000; done"),
    ],
)
def test_a_run_whose_output_nobody_reads_ends(cli: Node, words: list[str], script: str) -> None:
    """As `yes | head -1` does; before that it went on until its log had filled the disk. Once with more under way than
    all that is between can hold, and once with nothing."""
    reader, writer = os.pipe()
    command = [*cli.words, "run", *words, cli.image, "sh", "-c", script]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as run:
        os.close(writer)
        assert os.read(reader, 2) == b"y\n"
        os.close(reader)
        _, said_last = run.communicate(timeout=COMMAND_S)
    assert (run.returncode, said_last) == (128 + signal.SIGPIPE, b"")
    if "--rm" not in words:
        assert _names(cli, "-f", "status=exited") == ["loud"]
        said(cli, "rm", "loud")
    assert _names(cli, "-a") == []


def test_a_full_output_is_said(cli: Node) -> None:
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [*cli.words, "run", "--rm", cli.image, "echo", "x"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert run.returncode == 125 and b"write to standard output: ENOSPC" in run.stderr
    assert _names(cli, "-a") == []


def test_a_run_that_is_ended_gives_the_terminal_back(cli: Node) -> None:
    """It was raw when the command was killed by SIGTERM, and so the shell's after it."""
    terminal = Terminal([*cli.words, "run", "--rm", "-it", cli.image, "sh"])
    before = termios.tcgetattr(terminal.fd)[3]
    assert before & termios.ECHO
    terminal.expect("# ")
    assert not termios.tcgetattr(terminal.fd)[3] & termios.ECHO
    os.kill(terminal.pid, signal.SIGTERM)
    eventually(lambda: termios.tcgetattr(terminal.fd)[3] == before, COMMAND_S, "the terminal's mode")
    assert terminal.end() == 128 + signal.SIGTERM
    assert _names(cli, "-a") == []


def test_a_run_whose_terminal_hangs_up_goes_with_it(cli: Node) -> None:
    terminal = Terminal([*cli.words, "run", "--rm", "-it", cli.image, "sh"])
    terminal.expect("# ")
    os.close(terminal.fd)
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 128 + signal.SIGHUP
    assert json.loads(said(cli, "ps", "-a", "--format", "json")) == []
