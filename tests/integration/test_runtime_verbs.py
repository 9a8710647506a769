"""ocirun's commands as callers of runc use them: effects, exit codes, files, and the words that they match on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import OCIRUN, Bundles, bundles
from tests.support import SOON_S, eventually, needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def test_a_container_goes_through_its_states(home: Bundles) -> None:
    one = home.sh("trap 'exit 7' TERM; echo up > /tmp/up; while :; do sleep 0.01; done")
    one.create("--pid-file", str(home.directory / "pid")).ok()
    state = one.state()
    assert state["status"] == "created" and state["id"] == one.id and state["bundle"] == str(one.path)
    assert state["pid"] == int((home.directory / "pid").read_text())
    assert state["rootfs"] == str(one.rootfs) and re.match(r"\d{4}-\d\d-\d\dT.*Z$", state["created"])
    assert not (one.rootfs / "tmp/up").exists(), "it ran before start"
    one.start().ok()
    assert one.status() == "running"
    eventually((one.rootfs / "tmp/up").exists)
    home.ocirun("kill", one.id).ok()
    one.becomes("stopped")
    assert one.state()["pid"] == 0
    one.delete(force=False).ok()
    one.gone()
    home.ocirun("state", one.id).failed("container does not exist")


def test_words_that_callers_of_runc_match_on(home: Bundles) -> None:
    one = home.make().up()
    one.create().failed(f"container with id exists: {one.id}")
    one.start().failed("cannot start an already running container")
    one.delete(force=False).failed("that is not stopped")
    home.ocirun("resume", one.id).failed("container not paused")
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    home.ocirun("kill", one.id).failed("container not running")
    one.start().failed("cannot start a container that has stopped")
    one.exec("true").failed("cannot exec in a stopped container")
    one.delete(force=False).ok()
    for command in ("start", "kill", "delete", "state", "ps", "pause", "resume"):
        home.ocirun(command, "unknown").failed("container does not exist")
    home.ocirun("exec", "unknown", "true").failed("container does not exist")
    home.ocirun("delete", "--force", "unknown").ok()


def test_a_command_that_is_not_there(home: Bundles) -> None:
    one = home.make("no-such")
    said = one.run().failed('exec: "no-such": executable file not found in $PATH')
    assert "unable to start container process" in said
    one.gone()
    one.process["args"] = ["/bin/nothing"]
    one.run().failed("no such file or directory")
    one.process["args"] = ["/etc"]
    one.run().failed("is a directory")
    one.process["args"] = ["/etc/passwd"]
    one.create().failed("permission denied")
    one.gone()


def test_what_execve_refuses_reaches_the_caller_of_start(home: Bundles) -> None:
    one = home.make("/broken")
    (one.rootfs / "broken").write_bytes(b"\x7fELF but no program at all")
    (one.rootfs / "broken").chmod(0o755)
    one.create().ok()
    said = one.start().failed("ENOEXEC")
    assert "/broken" in said and "hint" in said
    one.becomes("stopped")
    one.delete(force=False).ok()
    one.gone()
    (one.rootfs / "broken").write_text("#!/no/such/interpreter\n")
    one.run().failed("interpreter")
    one.gone()


def test_run_passes_on_code_and_signal(home: Bundles) -> None:
    assert home.sh("exit 42").run().code == 42
    assert home.sh("kill -9 $$").run().code in (137, 0)  # pid 1 of a namespace takes no signal from within
    one = home.sh("trap 'exit 9' USR1; echo ready; while :; do sleep 0.01; done")
    one.write()
    reader, writer = os.pipe()
    child = home.popen("run", "--bundle", str(one.path), one.id, stdout=writer)
    os.close(writer)
    assert os.read(reader, 10) == b"ready\n"
    child.send_signal(signal.SIGUSR1)
    assert child.wait(SOON_S) == 9
    os.close(reader)
    one.gone()
    two = home.make("sleep", "1000")
    two.write()
    child = home.popen("run", "--bundle", str(two.path), two.id)
    eventually(lambda: home.ocirun("state", two.id).code == 0 and two.status() == "running")
    home.ocirun("kill", two.id, "9").ok()
    assert child.wait(SOON_S) == 137
    two.gone()


def test_run_detached_and_keep(home: Bundles) -> None:
    one = home.make()
    one.run("--detach").ok()
    assert one.status() == "running"
    two = home.make("true")
    two.run("--keep").ok()
    assert two.status() == "stopped"
    listed = json.loads(home.ocirun("list", "--format", "json").ok())
    assert {(entry["id"], entry["status"]) for entry in listed} == {(one.id, "running"), (two.id, "stopped")}
    assert home.ocirun("list", "-q").ok().split() == [one.id, two.id]
    table = home.ocirun("list").ok().splitlines()
    assert table[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"] and len(table) == 3


def test_exec_joins_everything(home: Bundles) -> None:
    one = home.make().up()
    pid = one.pid()
    result = one.exec("sh", "-c", "for n in mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$n; done; exit 5")
    assert result.code == 5
    assert result.text.split() == [
        os.readlink(f"/proc/{pid}/ns/{n}") for n in ("mnt", "pid", "net", "ipc", "uts", "cgroup")
    ]
    assert one.exec("sh", "-c", "kill -TERM $$").code == 143
    assert (
        one.exec("sh", "-c", "echo $A $B; pwd", flags=("--cwd", "/tmp", "-e", "A=1", "--env", "B=2")).ok()
        == "1 2\n/tmp\n"
    )
    pids = json.loads(home.ocirun("ps", "--format", "json", one.id).ok())
    assert pids == [pid]
    assert str(pid) in home.ocirun("ps", one.id).ok()
    process = home.directory / "process.json"
    process.write_text(json.dumps({"args": ["cat", "/proc/self/cgroup"], "cwd": "/"}))
    inside = one.exec(flags=("--process", str(process))).ok()
    assert "/" in inside and ".." not in inside, "not in the cgroups of the container"
    one.exec("nothing").failed('exec: "nothing": executable file not found in $PATH')
    one.exec().failed("process args cannot be empty")


def test_exec_detached_with_pid_file(home: Bundles) -> None:
    one = home.make().up()
    file = home.directory / "pid"
    one.exec("sleep", "999", flags=("--detach", "--pid-file", str(file))).ok()
    assert Path(f"/proc/{file.read_text()}/cmdline").read_bytes() == b"sleep\x00999\x00"
    assert len(json.loads(home.ocirun("ps", "-f", "json", one.id).ok())) == 2
    home.ocirun("kill", "--all", one.id, "KILL").ok()
    one.becomes("stopped")
    eventually(lambda: not home.processes(one.id))


def test_pause_and_resume(home: Bundles) -> None:
    one = home.sh("i=0; while :; do i=$((i+1)); echo $i > /tmp/n; done").up()
    count = one.rootfs / "tmp/n"
    eventually(count.exists)
    home.ocirun("pause", one.id).ok()
    assert one.status() == "paused"
    before = count.read_text()
    home.ocirun("pause", one.id).failed("container not running")
    one.exec("true").failed("cannot exec in a paused container")
    assert count.read_text() == before
    home.ocirun("resume", one.id).ok()
    eventually(lambda: count.read_text() not in (before, ""))
    home.ocirun("pause", one.id).ok()
    home.ocirun("kill", one.id, "KILL").ok()  # a frozen container can be killed (threats O61)
    one.becomes("stopped")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("process.args", [], "process.args"),
        ("process.args", "true", "process.args: expected array"),
        ("process.cwd", "tmp", "process.cwd"),
        ("process.user", {"uid": "0"}, 'process.user.uid: expected integer, got "0"'),
        ("process.user", {"uid": -1}, "process.user.uid: expected integer from 0"),
        ("process.user", {"uid": 1 << 31}, "process.user.uid: expected integer from 0"),
        ("root.path", 5, "root.path: expected string, got 5"),
        ("root.path", "nothing", "root.path"),
        ("mounts", {}, "mounts: expected array"),
        ("linux.namespaces", [], "linux.namespaces"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "mount"}], "linux.namespaces[1].type"),
        ("linux.resources", {"memory": {"limit": "1G"}}, 'linux.resources.memory.limit: expected integer, got "1G"'),
        ("linux.sysctl", {"kernel.core_pattern": "x"}, "not in a separate kernel namespace"),
        ("ociVersion", "2.0", "ociVersion"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(home: Bundles, path: str, value: object, words: str) -> None:
    one = home.make("true")
    *above, last = path.split(".")
    where = one.config
    for part in above:
        where = where[part]
    where[last] = value
    one.run().failed(words)
    one.gone()


def test_no_config_and_broken_config(home: Bundles) -> None:
    one = home.make("true")
    said = home.ocirun("run", "--bundle", str(one.path), one.id).failed("config.json")
    assert "no such file or directory" in said
    for raw in (b"", b"{", b"[]", b'{"ociVersion": "1.0.2", "ociVersion": "1.0.2"}', b"\xff"):
        (one.path / "config.json").write_bytes(raw)
        home.ocirun("run", "--bundle", str(one.path), one.id).failed("ocirun run failed: ")
    os.unlink(one.path / "config.json")
    os.mkfifo(one.path / "config.json")
    home.ocirun("run", "--bundle", str(one.path), one.id).failed("regular file")
    one.gone()


def test_failures_go_to_the_log(home: Bundles) -> None:
    log = home.directory / "log.json"
    home.ocirun("--log", str(log), "--log-format", "json", "state", "unknown").failed("container does not exist")
    entry = json.loads(log.read_text())
    assert entry["level"] == "error" and entry["msg"] == "container does not exist" and entry["time"].endswith("Z")
    plain = home.directory / "log.txt"
    home.ocirun("--log", str(plain), "start", "unknown").failed("container does not exist")
    assert re.match(r'time="[^"]+" level=error msg="container does not exist"\n$', plain.read_text())


def test_misuse_goes_to_the_log_too(home: Bundles) -> None:
    log = home.directory / "log.json"
    for words, said in ((("run", "--frob", "x"), "flag provided but not defined: -frob"), (("frob",), "No help topic")):
        home.ocirun("--log", str(log), "--log-format", "json", *words).failed(said, code=3 if words[0] == "frob" else 1)
        assert said in json.loads(log.read_text().splitlines()[-1])["msg"]


def test_json_without_a_file_is_for_stderr(home: Bundles) -> None:
    for words in (("state", "unknown"), ("run", "--frob", "x")):
        result = home.ocirun("--log-format", "json", *words)
        entry = json.loads(result.error)
        assert result.code == 1 and entry["level"] == "error" and set(entry) == {"level", "msg", "time"}


def test_misuse_is_said_in_one_line(home: Bundles) -> None:
    home.ocirun("nonsense").failed("No help topic for 'nonsense'", code=3)
    home.ocirun("--nonsense").failed("flag provided but not defined: -nonsense")
    home.ocirun("kill", "x", "SIGNOTHING").failed("unknown signal")
    home.ocirun("--log-format", "xml", "list").failed("--log-format")
    home.ocirun("create").failed('"create" requires exactly 1 argument(s)')
    home.ocirun("exec", "x").failed("container does not exist", code=255)
    assert "usage: ocirun" in home.ocirun("--help").ok()
    assert "--pid-file" in home.ocirun("create", "--help").ok()
    assert home.ocirun("--version").ok().startswith("ocirun version ")


def _receive_master(listener: socket.socket) -> int:
    connection, _ = listener.accept()
    with connection:
        _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
        return int(struct.unpack("i", ancillary[0][2])[0])


def _read_all(master: int) -> bytes:
    said = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            return said
        if not piece:
            return said
        said += piece


def test_console_socket(home: Bundles) -> None:
    one = home.sh("tty; test -t 0 && test -t 1 && stat -c %t:%T /dev/console; stty size; read x; echo got $x")
    one.process["terminal"] = True
    one.process["consoleSize"] = {"height": 11, "width": 77}
    one.create().failed("console socket")
    one.gone()
    path = home.directory / "console"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        one.create("--console-socket", str(path)).ok()
        master = _receive_master(listener)
        one.start().ok()
        os.write(master, b"hello\n")
        said = _read_all(master).replace(b"\r", b"")
        os.close(master)
        assert said.startswith(b"/dev/pts/0\n") or b"/dev/pts/0\n" in said
        assert b"88:0\n" in said and b"11 77\n" in said and b"got hello\n" in said
        one.becomes("stopped")
        two = home.make().up()
        two.exec("sh", "-c", "tty; test -t 2 && echo yes", flags=("-t", "-d", "--console-socket", str(path))).ok()
        master = _receive_master(listener)
        said = _read_all(master).replace(b"\r", b"")
        os.close(master)
        assert said == b"/dev/pts/0\nyes\n"
    two.exec("true", flags=("-t", "-d")).failed("console socket")


def test_a_console_socket_that_is_not_there(home: Bundles) -> None:
    one = home.make()
    one.process["terminal"] = True
    one.create("--console-socket", "/nowhere/socket").failed("console socket /nowhere/socket")
    one.gone()


def test_preserve_fds(home: Bundles) -> None:
    one = home.sh("ls /proc/self/fd | tr '\\n' ' '; cat <&3; cat <&4")
    files = []
    for name in ("a", "b", "c"):
        (home.directory / name).write_text(name)
        files.append(os.open(home.directory / name, os.O_RDONLY))
    moved = [os.dup2(fd, number, inheritable=True) for fd, number in zip(files, (103, 104, 105), strict=True)]
    try:
        wrapped = ["bash", "-c", 'exec 3<&103 4<&104 5<&105; exec "$0" "$@"']
        one.write()
        words = [OCIRUN, "--root", str(home.root), "run", "--preserve-fds", "2", "--bundle", str(one.path), one.id]
        with open(home.directory / "out", "wb+") as out:
            code = subprocess.run(
                [*wrapped, *words], pass_fds=moved, stdout=out, stdin=subprocess.DEVNULL, check=False
            ).returncode
            out.seek(0)
            said = out.read()
    finally:
        for fd in (*files, *moved):
            os.close(fd)
    assert code == 0 and said.endswith(b"ab")
    # 5 was not asked for; the last one listed is ls's own.
    assert said.split()[:5] == [b"0", b"1", b"2", b"3", b"4"] and b"103" not in said


def test_update_changes_limits_as_a_whole(home: Bundles) -> None:
    one = home.make().up()

    def limits() -> set[str]:
        names = ("memory.limit_in_bytes", "memory.max", "pids.max")
        files = (Path(top) / name for top in home.cgroups(one.id) for name in names)
        return {file.read_text().strip() for file in files if file.exists()}

    home.ocirun("update", "--memory", "64m", "--pids-limit", "77", one.id).ok()
    assert {str(64 << 20), "77"} <= limits()
    wanted = home.directory / "resources.json"
    wanted.write_text('{"pids": {"limit": 55}}')
    home.ocirun("update", "-r", str(wanted), one.id).ok()
    assert {str(64 << 20), "55"} <= limits()
    wanted.write_text('{"pids": {"limit": 44}, "memory": {"limit": "1G"}}')
    home.ocirun("update", "-r", str(wanted), one.id).failed('resources.memory.limit: expected integer, got "1G"')
    home.ocirun("update", one.id).ok()  # as with runc: nothing is asked, and nothing changes
    home.ocirun("update", "--memory", "much", one.id).failed("--memory: 'much' is no number")
    assert {str(64 << 20), "55"} <= limits()


def test_events(home: Bundles) -> None:
    one = home.make().up()
    event = json.loads(home.ocirun("events", "--stats", one.id).ok())
    assert (event["type"], event["id"]) == ("stats", one.id)
    assert event["data"]["pids"]["current"] == 1 and event["data"]["memory"]["usage"]["usage"] > 0
    home.ocirun("events", "--interval", "0s", one.id).failed("duration interval must be greater than 0")
    with home.popen("events", "--interval", "50ms", one.id, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert json.loads(child.stdout.readline())["type"] == "stats"
        home.ocirun("kill", one.id, "KILL").ok()
        child.stdout.read()
        assert child.wait(SOON_S) == 0
    one.becomes("stopped")
    home.ocirun("events", "--stats", one.id).failed("is not running")


def test_spec_is_one_that_runs(home: Bundles) -> None:
    one = home.make()
    home.ocirun("spec", "--bundle", str(one.path)).ok()
    home.ocirun("spec", "--bundle", str(one.path)).failed("Remove it first")
    one.config = json.loads((one.path / "config.json").read_text())
    one.process.update(terminal=False, args=["cat", "/proc/self/status"])
    one.linux["cgroupsPath"] = f"/{home.cgroup}/{one.id}"
    one.config["mounts"] = [entry for entry in one.config["mounts"] if entry["destination"] != "/dev/pts"]
    assert "CapInh:\t0000000000000000" in one.run().ok()


def test_features_name_what_is_there(home: Bundles) -> None:
    found = json.loads(home.ocirun("features").ok())
    assert {"ro", "rro", "rbind", "rshared"} <= set(found["mountOptions"])
    assert "SCMP_ACT_ERRNO" in found["linux"]["seccomp"]["actions"]
    assert {"user", "time", "cgroup"} <= set(found["linux"]["namespaces"]) and "CAP_BPF" in found["linux"][
        "capabilities"
    ]


def test_run_releases_its_own_init_and_leaves_no_socket(home: Bundles) -> None:
    one = home.make("sleep", "1000")
    one.write()
    home.ocirun("run", "--detach", "--bundle", str(one.path), one.id).ok()
    assert one.status() == "running"
    assert not (home.root / one.id / "start.sock").exists()
    one.start().failed("cannot start an already running container")
    missing = home.make("no-such-command")
    missing.run().failed("executable file not found")
    missing.gone()


def test_bundles_whose_test_and_clean_up_fail_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_words: str) -> None:
        raise LookupError("not deleted")

    with pytest.raises(ValueError, match="of the test"), bundles(tmp_path) as opened:
        opened.make("sleep", "1000").up()
        assert opened.cgroups() and opened.processes()
        monkeypatch.setattr(opened, "ocirun", refuse)
        raise ValueError("of the test")
    left = opened.cgroups(), opened.processes(), opened.mounts()
    assert left == ([], [], []) and not list(Path("/sys/fs/cgroup").glob(f"*/{opened.cgroup}"))
