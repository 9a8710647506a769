"""`ocid run` and what belongs to it, as a person at a terminal uses it: without a daemon, and through one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import termios
from pathlib import Path

import pytest

from conformance.leaks import CGROUPS
from tests.commands import COMMAND_S, Terminal, end, line, ocid, once, said, start
from tests.e2e import Node, busybox_layout
from tests.fakes.registry import FakeRegistry, build_image
from tests.support import eventually

pytestmark = pytest.mark.usefixtures("as_before")


# -------------------------------------------------------------------------------------------------------------- images


def test_images_pull_and_rmi(cli: Node, registry: FakeRegistry) -> None:
    """First of all, since the daemon's unpacker is still there from the first pull: ten idle seconds end it."""
    made = build_image([{"only": b"here"}])
    reference = registry.add("small", "1", made)
    assert said(cli, "pull", reference).strip() == made.config_digest
    listed = {one["id"]: one for one in json.loads(said(cli, "images", "--format", "json"))}
    assert listed[made.config_digest]["tags"] == [reference] and listed[made.config_digest]["size"] > 0
    assert reference in said(cli, "images")
    said(cli, "run", "-d", "--name", "user", cli.image, "sleep", "1000")
    used = ocid(cli, "rmi", cli.image)
    assert used.returncode == 1 and "is used by" in used.stderr
    said(cli, "rm", "-f", "user")
    said(cli, "tag", reference, "localhost/other:2")
    assert said(cli, "rmi", reference).strip() == reference  # a name of two
    assert ocid(cli, "rmi", reference).returncode == 1
    left = {one["id"]: one["tags"] for one in json.loads(said(cli, "images", "--format", "json"))}
    assert left[made.config_digest] == ["localhost/other:2"]
    said(cli, "tag", "localhost/other:2", reference)
    said(cli, "rmi", made.config_digest[:19])
    assert made.config_digest not in said(cli, "images", "--format", "json")
    unknown = ocid(cli, "pull", f"{registry.name}/nothing:1")
    assert unknown.returncode == 125 and "404" in unknown.stderr and len(unknown.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 7"], 7, ""),
        (["/etc/passwd"], 126, "permission denied"),
        (["nosuch"], 127, "not found"),
        (["/no/such"], 127, "no such file"),
    ],
)
def test_exit_codes(cli: Node, command: list[str], code: int, word: str) -> None:
    done = ocid(cli, "run", "--rm", cli.image, *command)
    assert done.returncode == code, done.stderr
    assert word in done.stderr and len(done.stderr.splitlines()) == bool(word), "one sentence, or none"


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["run", "busybox:1:2"], "malformed"),
        (["run", "--pull", "never", "nothing:1"], "nothing:1"),
        (["run", "-m", "lots", "IMAGE"], "-m"),
        (["run", "-v", "x", "IMAGE"], "-v"),
        (["run", "-v", "/no/such:/x", "IMAGE"], "/no/such"),
        (["run", "-u", "nosuch", "IMAGE"], "nosuch"),
        (["run", "--name", "a b", "IMAGE"], "--name"),
        (["run", "--rm", "-d", "IMAGE"], "--rm"),
        (["run", "--net", "nosuch", "IMAGE"], "nosuch"),
        (["run", "-p", "80:80", "--net", "host", "IMAGE"], "--net=host"),
        (["run", "-p", "80:80", "--net", "none", "IMAGE"], "--net=none"),
        (["run", "-p", "80", "registry.invalid/never/asked"], "-p: '80'"),
        (["run", "-m", "lots", "registry.invalid/never/asked"], "-m: 'lots'"),
        (["run"], "required: image;"),
        (["run", "--nosuch", "IMAGE"], "--nosuch; see ocid run --help"),
        (["ps", "--format", "xml"], "'xml' is neither of table, json, nor a template"),
        (["exec", "nosuch", "true"], "no container 'nosuch'"),
        (["kill", "-s", "USR9", "nosuch"], 'ocid kill: -s: unknown signal "USR9"'),
        (["load", "-i", "/no/such"], "open /no/such: ENOENT no such file or directory"),
        (["run", "oci:/no/such"], "open /no/such: ENOENT no such file or directory"),
        (["verify", "--policy", "/no/such", "IMAGE"], "ENOENT"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_words_are_one_sentence_and_125(cli: Node, words: list[str], word: str) -> None:
    done = ocid(cli, *(cli.image if one == "IMAGE" else one for one in words))
    assert done.returncode == 125
    assert word in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_the_options_have_wrong_is_told_before_anything_is_made(cli: Node, tmp_path: Path) -> None:
    """No parts are built for it, and no daemon is asked."""
    words = (
        cli.words[0],
        "--root",
        str(tmp_path / "root"),
        "--state",
        str(tmp_path / "state"),
        "run",
        "-m",
        "lots",
        "x",
    )
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 125 and done.stderr.startswith(b"ocid run: -m: 'lots'")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- streams


def test_output_and_errors_apart_and_whole(cli: Node) -> None:
    done = ocid(cli, "run", "--rm", cli.image, "sh", "-c", "seq 20000; echo wrong >&2")
    assert done.stdout.split() == [str(number) for number in range(1, 20001)]
    assert done.stderr == "wrong\n"


def test_interactive_takes_piped_input_to_its_end(cli: Node) -> None:
    data = os.urandom(300_000).hex().encode()
    assert once(cli, "-i", "IMAGE", "cat", stdin=data) == data.decode()
    assert once(cli, "IMAGE", "cat", stdin=b"not passed on") == ""


def test_terminal(cli: Node) -> None:
    """A prompt, a size that follows, ^C for the process and not for us, and the exit code."""
    terminal = Terminal([*cli.words, "run", "--rm", "-it", cli.image, "sh"])
    terminal.expect("# ")
    terminal.send(b"tty\n")
    terminal.expect("/dev/(pts/0|console)")
    termios.tcsetwinsize(terminal.fd, (33, 77))
    # The signal that tells of the size comes beside what is typed.
    terminal.send(b"until [ \"$(stty size)\" = '33 77' ]; do usleep 10000; done; echo re''sized\n")
    terminal.expect("resized")
    # The empty quotes tell what is printed from what is typed.
    terminal.send(b'sh -c \'trap "exit 3" INT; echo r""eady; while :; do usleep 10000; done\'\n')
    terminal.expect("ready\r\n")
    terminal.send(b"\x03")
    terminal.expect("# ")
    terminal.send(b'echo c""ode-$?\n')
    terminal.expect("code-3\r\n")
    terminal.send(b"exit 9\n")
    assert terminal.end() == 9


def test_terminal_for_output_alone_has_each_line_end_once(cli: Node) -> None:
    """The container's terminal has made a carriage return of it; ours makes no second one, and is put back."""
    said(cli, "run", "-d", "--name", "s", cli.image, "sleep", "1000")
    for words in (["run", "--rm", "-t", cli.image], ["exec", "-t", "s"]):
        command = [*cli.words, *words, "sh", "-c", "echo one; echo two"]
        terminal = Terminal(["/bin/sh", "-c", '"$@"; stty -a | tr " ;" "\\n" | grep opost', "sh", *command])
        terminal.expect("^one\r\ntwo\r\nopost\r\n")
        assert terminal.end() == 0
    said(cli, "rm", "-f", "s")


def test_terminal_needs_a_terminal(cli: Node) -> None:
    done = ocid(cli, "run", "--rm", "-it", cli.image, "sh")
    assert done.returncode == 125 and "not a terminal" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_process(cli: Node, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 5' {name}; echo ready; while :; do usleep 10000; done"
    process = start(cli, "run", "--rm", cli.image, "sh", "-c", script)
    assert line(process) == "ready"
    process.send_signal(number)
    code, rest = end(process)
    assert (code, rest) == (5, f"got {name}\n")


# ------------------------------------------------------------------------------------------------------------- options


def test_environment_user_directory_and_hostname(cli: Node) -> None:
    script = "echo $A-$B; id -u; id -g; pwd; hostname"
    words = ["-e", "A=one two", "-e", "B=", "-u", "1000:50", "-w", "/www", "--hostname", "here"]
    assert once(cli, *words, "IMAGE", "sh", "-c", script).splitlines() == ["one two-", "1000", "50", "/www", "here"]
    assert once(cli, "-u", "operator", "IMAGE", "id", "-u") == "1000\n"


def test_exec_replaces_the_entrypoint(cli: Node) -> None:
    assert once(cli, "--exec", "/bin/echo", "IMAGE", "just", "words") == "just words\n"


def test_volumes(cli: Node, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")
    assert once(cli, "-v", f"{tmp_path}:/data", "IMAGE", "sh", "-c", "cat /data/given; echo back > /data/made")
    assert (tmp_path / "made").read_text() == "back\n"
    done = ocid(cli, "run", "--rm", "-v", f"{tmp_path}:/data:ro", cli.image, "sh", "-c", "cat /data/given; >/data/no")
    assert done.returncode == 1 and "Read-only file system" in done.stderr and done.stdout == "from the host\n"
    assert not (tmp_path / "no").exists()


def test_read_only_root(cli: Node) -> None:
    done = ocid(cli, "run", "--rm", "--read-only", cli.image, "touch", "/new")
    assert done.returncode == 1 and "Read-only file system" in done.stderr


def test_the_default_filter_unless_privileged(cli: Node) -> None:
    # proc_pid_status(5): 2 is a filter, 0 none.
    asked = ("grep", "Seccomp:", "/proc/self/status")
    assert once(cli, "IMAGE", *asked).split() == ["Seccomp:", "2"]
    assert once(cli, "--privileged", "IMAGE", *asked).split() == ["Seccomp:", "0"]


def test_memory_limit_kills(cli: Node) -> None:
    script = "x=0123456789abcdef; while :; do x=$x$x; done"
    assert once(cli, "-m", "16m", "IMAGE", "sh", "-c", script, code=137) == ""


def test_cpus_are_in_the_cgroup(cli: Node) -> None:
    one = said(cli, "run", "-d", "--name", "half", "--cpus", "0.5", cli.image, "sleep", "1000").strip()
    found = [path.read_text().split() for path in CGROUPS.glob(f"{cli.tag}/{one}/cpu.max")]
    for quota in CGROUPS.glob(f"cpu/{cli.tag}/{one}/cpu.cfs_quota_us"):
        found.append([quota.read_text().strip(), quota.with_name("cpu.cfs_period_us").read_text().strip()])
    said(cli, "rm", "-f", "half")
    assert found == [["50000", "100000"]]


def test_network_of_its_own_of_the_host_and_none(cli: Node) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        assert once(cli, "--net=host", "IMAGE", "nc", "-w", "3", "127.0.0.1", port, "-e", "true") == ""
        once(cli, "IMAGE", "nc", "-w", "1", "127.0.0.1", port, "-e", "true", code=1)
    assert " eth0" in once(cli, "IMAGE", "ip", "-o", "-4", "addr")
    alone = once(cli, "--net=none", "IMAGE", "ip", "-o", "addr")
    assert "127.0.0.1/8" in alone and "eth0" not in alone


def test_where_a_published_container_is_reached(cli: Node) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said(cli, "run", "-d", "--name", "web", "-p", f"{port}:80", cli.image, "busybox", "httpd", "-f", "-p", "80")
    pod = json.loads(said(cli, "inspect", "web"))[0]["pod"]
    (address,) = pod["addresses"]
    assert [(one["container_port"], one["host_port"]) for one in pod["ports"]] == [(80, port)]

    def answers(host: str, at: int) -> bool:
        try:
            with socket.create_connection((host, at), COMMAND_S) as peer:
                peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return peer.recv(16).startswith(b"HTTP/1")
        except ConnectionRefusedError:  # it does not listen yet
            return False

    eventually(lambda: answers(address, 80))
    eventually(lambda: answers("127.0.0.1", port))
    said(cli, "rm", "-f", "web")


def test_image_from_a_layout(cli: Node) -> None:
    assert (
        said(cli, "run", "--rm", f"oci:{busybox_layout()}:busybox:1", "echo", "from a directory")
        == "from a directory\n"
    )
    names = [tag for one in json.loads(said(cli, "images", "--format", "json")) for tag in one["tags"]]
    for name in set(names) - {cli.image}:
        said(cli, "rmi", name)


# ------------------------------------------------------------------------------------------------------ life of another


def test_detached_life(cli: Node) -> None:
    """run -d, ps, logs, exec, exec -it, stop, wait, ps -a, inspect, rm."""
    script = "trap 'echo bye; exit 3' TERM; echo serving; while :; do usleep 10000; done"
    one = said(cli, "run", "-d", "--name", "web", cli.image, "sh", "-c", script).strip()
    assert re.fullmatch("[0-9a-f]{64}", one)
    taken = ocid(cli, "run", "--rm", "--name", "web", cli.image, "true")
    assert taken.returncode == 125 and "the name web is taken" in taken.stderr
    table = said(cli, "ps").splitlines()
    assert table[0].split()[:3] == ["ID", "NAME", "IMAGE"] and "web" in table[1] and one[:12] in table[1]
    shown = json.loads(said(cli, "ps", "--format", "json"))
    assert [(item["id"], item["name"], item["state"]) for item in shown] == [(one, "web", "running")]
    eventually(lambda: said(cli, "logs", "web") == "serving\n")
    follower = start(cli, "logs", "-f", "web")
    assert line(follower) == "serving"
    assert said(cli, "exec", "web", "hostname") == "web\n"
    assert said(cli, "exec", "-i", "-e", "A=b", "web", "sh", "-c", "echo $A; cat", stdin=b"in") == "b\nin"
    assert ocid(cli, "exec", "web", "sh", "-c", "exit 6").returncode == 6
    missing = ocid(cli, "exec", "web", "nosuch")
    assert missing.returncode == 127 and "nosuch" in missing.stderr
    assert ocid(cli, "exec", "web", "/etc").returncode == 126
    running = ocid(cli, "rm", "web")
    assert running.returncode == 1 and "is running" in running.stderr
    terminal = Terminal([*cli.words, "exec", "-it", one[:12], "sh"])
    terminal.expect("# ")
    terminal.send(b"tty; exit 4\n")
    terminal.expect("/dev/")
    assert terminal.end() == 4
    said(cli, "stop", "--time", "5", "web")
    assert end(follower) == (0, "bye\n")
    assert said(cli, "wait", "web") == "3\n"
    assert "web" not in said(cli, "ps")
    assert json.loads(said(cli, "ps", "-a", "--format", "json"))[0]["state"] == "exited"
    details = json.loads(said(cli, "inspect", "web"))[0]["status"]
    assert details["exitCode"] == 3 and details["id"] == one
    assert said(cli, "rm", "web") == "web\n"
    gone = ocid(cli, "logs", "web")
    assert gone.returncode == 1 and "no container 'web'" in gone.stderr


def test_who_waits_keeps_nobody_out(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "w", cli.image, "sleep", "1000")
    waiter = start(cli, "wait", "w")
    # While it waits others come and go; it may be looking just now, so a command may have to try again.
    eventually(lambda: ocid(cli, "ps").returncode == 0)
    eventually(lambda: ocid(cli, "kill", "w").returncode == 0)
    assert end(waiter) == (0, "137\n")
    said(cli, "rm", "w")


def test_kill_and_rm_force(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "k", cli.image, "sleep", "1000")
    said(cli, "kill", "k")
    assert said(cli, "wait", "k") == "137\n"
    said(cli, "run", "-d", "--name", "l", cli.image, "sleep", "1000")
    said(cli, "rm", "-f", "k", "l")
    assert json.loads(said(cli, "ps", "-a", "--format", "json")) == []


def test_stats_info_version_and_config(cli: Node) -> None:
    said(cli, "run", "-d", "--name", "s", cli.image, "sleep", "1000")
    for words in (["stats"], ["info"], ["version"]):
        assert json.loads(said(cli, *words, "--format", "json"))
    assert "default_bridge" in said(cli, "config")
    said(cli, "rm", "-f", "s")


def test_one_name_that_is_wrong_keeps_no_other_from_its_turn(cli: Node) -> None:
    """rm, stop, wait and rmi: each failure is said, and the exit code is 1."""
    for name in ("a", "b"):
        said(cli, "run", "-d", "--name", name, cli.image, "sleep", "1000")
    for words, printed in (
        (["stop", "-t", "0"], "a\nb\n"),
        (["wait"], "137\n137\n"),
        (["rm"], "a\nb\n"),
    ):
        done = ocid(cli, *words, "no", "a", "none", "b")
        assert (done.returncode, done.stdout) == (1, printed), done.stderr
        assert "container 'no';" in done.stderr and "container 'none';" in done.stderr
    said(cli, "tag", cli.image, "localhost/other:1")
    done = ocid(cli, "rmi", "localhost/no:1", "localhost/other:1")
    assert (done.returncode, done.stdout) == (1, "localhost/other:1\n") and "'localhost/no:1'" in done.stderr


def test_a_command_that_cannot_be_executed_is_said_by_its_name(cli: Node) -> None:
    """As docker has it: 127 for what is not there, 126 for what is no program."""
    said(cli, "run", "-d", "--name", "x", cli.image, "sleep", "1000")
    for command, code, words in (("nosuch", 127, 'exec: "nosuch": executable file not found'), ("/etc", 126, '"/etc"')):
        done = ocid(cli, "exec", "x", command)
        assert done.returncode == code and done.stderr.startswith("ocid exec: ") and words in done.stderr, done.stderr
        assert "ocirun" not in done.stderr
    assert ocid(cli, "exec", "-w", "/nosuch", "x", "true").returncode == 125
    said(cli, "rm", "-f", "x")
