"""`ocirun`'s command line around a container's life: flags, exit codes, files, and the words that callers match on.

Each of these was tried on runc first (OCID_RUNTIME=runc); what only newer ones or ours do is marked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import OCIRUN, Bundles, bundles
from tests.support import SOON_S, eventually, needs

REFERENCE = Path(OCIRUN).name == "runc"
ours = pytest.mark.skipif(REFERENCE, reason="the reference on this machine is older, or does less")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["state", "x"], 1, "container does not exist"),
        (["start", "x"], 1, "container does not exist"),
        (["kill", "x"], 1, "container does not exist"),
        (["delete", "x"], 1, "container does not exist"),
        (["pause", "x"], 1, "container does not exist"),
        (["resume", "x"], 1, "container does not exist"),
        (["ps", "x"], 1, "container does not exist"),
        (["exec", "x", "true"], 255, "exec failed: container does not exist"),
        (["exec", "x"], 255, "exec failed: container does not exist"),
        (["state", ""], 1, "container id cannot be empty"),
        (["state", "a/b"], 1, "invalid container ID format"),
        (["create", "-b", "/nowhere", "x"], 1, "create failed"),
        (["run", "x", "-b", "/nowhere"], 1, "no such file or directory"),
        (["list", "-f", "xml"], 1, "invalid format option"),
        (["state"], 1, '"state" requires exactly 1 argument(s)'),
        (["delete", "a", "b"], 1, '"delete" requires exactly 1 argument(s)'),
        (["kill"], 1, '"kill" requires a minimum of 1 argument(s)'),
        (["exec"], 1, '"exec" requires a minimum of 1 argument(s)'),
        (["list", "a"], 1, '"list" requires exactly 0 argument(s)'),
        (["nonsense"], 3, "No help topic for 'nonsense'"),
        (["--log", "/nowhere/log", "list"], 1, "/nowhere/log: no such file or directory"),
    ],
)
def test_failures_have_their_code_and_their_words(home: Bundles, words: list[str], code: int, said: str) -> None:
    result = home.ocirun(*words)
    assert result.code == code, result
    assert said in (result.error.replace('\\"', '"')), result
    assert not home.root.exists() or os.listdir(home.root) == []


def test_flags_may_follow_the_container(home: Bundles) -> None:
    home.ocirun("delete", "unknown", "--force").ok()
    one = home.make()
    one.write()
    home.ocirun("create", one.id, "--bundle", str(one.path), "--pid-file=" + str(home.directory / "pid")).ok()
    assert int((home.directory / "pid").read_text()) == one.pid()
    home.ocirun("kill", one.id, "KILL", "--all").ok()
    home.ocirun("delete", one.id, "-f=1").ok()
    one.gone()
    # But not those of a command, and not the options of ps.
    one.up()
    assert one.exec("echo", "-d", "--tty").ok() == "-d --tty\n"
    assert str(one.pid()) in home.ocirun("ps", one.id, "-e", "-o", "pid,comm").ok()


def test_create_start_and_the_rest_in_every_state(home: Bundles) -> None:
    one = home.make()
    one.create().ok()
    one.create().failed("container with given ID already exists", code=1)
    assert one.status() == "created"
    one.exec("true").ok()
    home.ocirun("pause", one.id).ok()
    assert one.status() == "paused"
    home.ocirun("pause", one.id).failed("container not running", code=1)
    one.start().failed("cannot start a container in the paused state", code=1)
    home.ocirun("resume", one.id).ok()
    home.ocirun("resume", one.id).failed("container not paused", code=1)
    one.start().ok()
    one.start().failed("cannot start an already running container", code=1)
    one.delete(force=False).failed(f"cannot delete container {one.id} that is not stopped: running", code=1)
    one.run().failed("already exists", code=1)
    assert one.status() == "running", "a run that was refused has taken the container of another away"
    home.ocirun("kill", one.id, "0").ok()
    home.ocirun("pause", one.id).ok()
    one.exec("true").failed("exec failed: cannot exec in a paused container", code=255)
    home.ocirun("resume", one.id).ok()
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    for words, said in (
        (("kill", one.id), "container not running"),
        (("start", one.id), "cannot start a container that has stopped"),
        (("pause", one.id), "container not running"),
        (("resume", one.id), "container not paused"),
    ):
        home.ocirun(*words).failed(said, code=1)
    one.exec("true").failed("exec failed: cannot exec in a stopped container", code=255)
    home.ocirun("kill", "--all", one.id, "KILL").ok()
    assert home.ocirun("ps", one.id).ok().split()[:2] == ["UID", "PID"]
    one.delete(force=False).ok()
    one.gone()


@pytest.mark.parametrize("state", ["created", "running", "paused", "stopped", "stopped before start"])
def test_delete_force_takes_a_container_in_any_state(home: Bundles, state: str) -> None:
    one = home.make()
    one.create().ok()
    if state in ("running", "paused", "stopped"):
        one.start().ok()
    if state == "paused":
        home.ocirun("pause", one.id).ok()
    if state.startswith("stopped"):
        home.ocirun("kill", one.id, "KILL").ok()
        one.becomes("stopped")
    one.delete().ok()
    one.gone()
    home.ocirun("state", one.id).failed("container does not exist")


def test_list_and_state_as_tools_read_them(home: Bundles) -> None:
    one, two = home.make(), home.make()
    one.config["annotations"] = {"org.example.key": "value"}
    one.up()
    two.create().ok()
    lines = home.ocirun("list").ok().splitlines()
    assert lines[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    # Cut by columns, as scripts do: each begins where its title does.
    starts = [lines[0].index(title) for title in lines[0].split()]
    for line in lines[1:]:
        assert all(line[start - 1] == " " and line[start] != " " for start in starts[1:]), lines
    assert [line.split()[-1] for line in lines[1:]] == ["root", "root"]
    assert home.ocirun("list", "--quiet").ok().split() == [one.id, two.id]
    entries = json.loads(home.ocirun("list", "-f", "json").ok())
    assert [(entry["id"], entry["status"], entry["owner"]) for entry in entries] == [
        (one.id, "running", "root"),
        (two.id, "created", "root"),
    ]
    said = home.ocirun("state", one.id).ok()
    found = json.loads(said)
    assert found["bundle"] == str(one.path) and found["rootfs"] == str(one.rootfs) and found["owner"] == ""
    assert found["annotations"] == {"org.example.key": "value"} and found["ociVersion"].startswith(
        "1.0.2-dev" if REFERENCE else "1.3.0"
    )
    assert said.startswith('{\n  "ociVersion": ') and found["created"].endswith("Z")
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    assert one.state()["pid"] == 0


def test_state_json_has_what_tools_read(home: Bundles) -> None:
    other = home.make().up()
    one = home.make()
    one.config["hostname"] = "name"
    one.linux["namespaces"][2]["path"] = f"/proc/{other.pid()}/ns/net"
    one.create().ok()
    document = json.loads((home.root / one.id / "state.json").read_text())
    pid = one.pid()
    assert document["id"] == one.id and document["init_process_pid"] == pid
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert document["init_process_start"] == int(fields[19])
    assert document["rootless"] is False and "external_descriptors" in document and "intel_rdt_path" in document
    assert document["created"] == one.state()["created"]
    assert document["namespace_paths"].items() >= {
        f"NEW{key}": f"/proc/{pid}/ns/{name}"
        for key, name in (("NS", "mnt"), ("PID", "pid"), ("NET", "net"), ("IPC", "ipc"), ("UTS", "uts"),
                          ("USER", "user"), ("CGROUP", "cgroup"))
    }.items()  # fmt: skip
    for directory in document["cgroup_paths"].values():
        assert str(pid) in Path(directory, "cgroup.procs").read_text().split()
    config = document["config"]
    assert config["rootfs"] == str(one.rootfs) and f"bundle={one.path}" in config["labels"]
    assert config["hostname"] == "name" and config["readonlyfs"] is False and config["no_new_keyring"] is False
    assert config["cgroups"]["path"] == f"/{home.cgroup}/{one.id}" and config["version"]
    found = {entry["type"]: entry["path"] for entry in config["namespaces"]}
    assert found["NEWNET"] == f"/proc/{other.pid()}/ns/net" and found["NEWNS"] == ""


def test_ps_takes_the_options_of_ps(home: Bundles) -> None:
    one = home.make().up()
    pid = one.pid()
    assert json.loads(home.ocirun("ps", "-f", "json", one.id).ok()) == [pid]
    lines = home.ocirun("ps", one.id).ok().splitlines()
    assert len(lines) == 2 and lines[0].split()[:3] == ["UID", "PID", "PPID"] and lines[1].split()[1] == str(pid)
    assert home.ocirun("ps", one.id, "-o", "pid,cmd").ok().split() == ["PID", "CMD", str(pid), "sleep", "1000"]
    home.ocirun("ps", one.id, "-o", "cmd").failed("couldn't find PID field in ps output", code=1)
    home.ocirun("ps", "--format", "xml", one.id).failed("invalid format option", code=1)


def test_a_failure_is_the_last_line_of_the_log(home: Bundles) -> None:
    log = home.directory / "log"
    one = home.make("no-such")
    one.write()
    for words, said in (
        (("state", "x"), "container does not exist"),
        (("create", "-b", str(one.path), one.id), "create failed: unable to start container process: exec: "),
        (("exec", "x", "true"), "exec failed: container does not exist"),
    ):
        result = home.ocirun("--log", str(log), "--log-format", "json", *words)
        assert result.code != 0
        entry = json.loads(log.read_text().splitlines()[-1])
        assert entry["level"] == "error" and said in entry["msg"] and len(entry["time"]) >= 20
    home.ocirun("--log", str(log), "--log-format=text", "state", "x").failed("container does not exist")
    assert 'level=error msg="container does not exist"' in log.read_text().splitlines()[-1]
    empty = home.directory / "empty"
    home.ocirun("--log", str(empty), "list").ok()
    assert empty.read_bytes() == b""  # there, for a caller that opens it whatever happened


@pytest.mark.parametrize("verb", ["create", "run", "exec"])
def test_nothing_of_ours_remains_beside_a_detached_container(home: Bundles, verb: str) -> None:
    one = home.make()
    one.write()
    pid_file = home.directory / "pid"
    if verb == "create":
        one.create("--pid-file", str(pid_file)).ok()
    else:
        one.run("--detach", "--pid-file", str(pid_file)).ok()
    pids = [int(pid_file.read_text())]
    if verb == "exec":
        one.exec("sleep", "1000", flags=("-d", "--pid-file", str(pid_file))).ok()
        pids.append(int(pid_file.read_text()))
    assert sorted(home.processes()) == sorted(pids)
    for pid in pids:
        assert os.getpgid(pid) == pid and os.getsid(pid) == pid


def test_run_keep_leaves_a_stopped_container(home: Bundles) -> None:
    one = home.sh("exit 3")
    assert one.run("--keep").code == 3
    assert one.status() == "stopped"
    one.delete(force=False).ok()
    assert one.run().code == 3
    one.gone()


@pytest.mark.parametrize("subreaper", [True, False])
def test_run_takes_in_orphans_unless_told_not_to(home: Bundles, subreaper: bool) -> None:
    """Outside of a PID namespace, a process that loses its parent is taken in by who runs it, or by init."""
    one = home.sh("(sleep 1000 & echo $! > /tmp/pid); echo done; sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    one.write()
    flags = [] if subreaper else ["--no-subreaper"]
    child = home.popen("run", *flags, "--bundle", str(one.path), one.id, stdout=subprocess.DEVNULL)
    orphan = int(eventually(lambda: (one.rootfs / "tmp/pid").exists() and (one.rootfs / "tmp/pid").read_text()))

    def parent() -> int:
        return int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])

    eventually(lambda: (parent() == child.pid) is subreaper and parent() != one.pid())
    home.ocirun("kill", "--all", one.id, "KILL").ok()
    assert child.wait(SOON_S) == 137
    one.gone()


@ours
def test_kill_ends_all_of_a_container_without_a_pid_namespace(home: Bundles) -> None:
    one = home.sh("sleep 1000 & sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    one.up()
    eventually(lambda: len(home.processes(one.id)) == 2)
    home.ocirun("kill", one.id, "KILL").ok()
    eventually(lambda: not home.processes(one.id))
    one.becomes("stopped")


@ours
def test_the_rest_can_be_killed_when_the_init_is_gone(home: Bundles) -> None:
    one = home.sh("sleep 1000 & sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    one.up()
    eventually(lambda: len(home.processes(one.id)) == 2)
    os.kill(one.pid(), signal.SIGKILL)
    one.becomes("stopped")
    assert len(home.processes(one.id)) == 1
    home.ocirun("kill", one.id, "TERM").failed("container not running")
    home.ocirun("kill", one.id, "KILL").ok()
    eventually(lambda: not home.processes(one.id))
    home.ocirun("kill", one.id, "KILL").failed("container not running")


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT"])
def test_a_created_container_can_be_told_to_go(home: Bundles, name: str) -> None:
    one = home.make()
    one.create().ok()
    home.ocirun("kill", one.id, name).ok()
    one.becomes("stopped")
    one.start().failed("cannot start a container that has stopped")
    one.delete(force=False).ok()
    one.gone()


def test_signals_by_every_name(home: Bundles) -> None:
    traps = 'for s in HUP USR1 USR2 TERM; do trap "echo $s >> /tmp/got" $s; done'
    one = home.sh(f"{traps}; : > /tmp/got; while :; do sleep 0.01; done").up()
    eventually((one.rootfs / "tmp/got").exists)
    for number, name in enumerate(("HUP", "SIGUSR1", "usr2", "15", "sigterm"), 1):
        home.ocirun("kill", one.id, name).ok()
        eventually(lambda n=number: len((one.rootfs / "tmp/got").read_text().split()) == n)  # type: ignore[misc]
    assert (one.rootfs / "tmp/got").read_text().split() == ["HUP", "USR1", "USR2", "TERM", "TERM"]
    home.ocirun("kill", one.id, "NOTHING").failed("unknown signal")


def test_a_terminal_and_its_socket_go_together(home: Bundles) -> None:
    one = home.make("true")
    words = "cannot use console socket if runc will not detach or allocate tty"
    one.create("--console-socket", "/x").failed(words)
    one.run("--console-socket", "/x").failed(words)
    one.run("--detach", "--console-socket", "/x").failed(words)
    one.process["terminal"] = True
    one.run("--console-socket", "/x").failed(words)
    one.create().failed("cannot allocate tty if runc will detach without setting console socket")
    one.gone()


def test_half_created_containers(home: Bundles) -> None:
    (home.root / "half").mkdir(parents=True)
    home.ocirun("state", "half").failed("container does not exist", code=1)
    assert "half" not in home.ocirun("list").ok()
    home.ocirun("delete", "--force", "half").ok()
    assert not (home.root / "half").exists()
