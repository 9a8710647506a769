"""exec: who the second process is, what it shares with the container, how its end is told, and when it is refused."""

from __future__ import annotations

import json
import os
from typing import Any

from conformance.harness import kernel
from conformance.harness.box import Box, listen, receive_terminal
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually
from conformance.runtime.stdio import read_until

case = Group("exec").case


def process_file(box: Box, **process: Any) -> str:
    """A process.json with the least that one needs; its path."""
    path = box.path("process.json")
    path.write_text(json.dumps({"cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, **process}))
    return str(path)


@case()
def the_exit_code_is_passed_on(box: Box) -> None:
    one = box.bundle().up()
    for code in (0, 1, 42, 255):
        assert one.exec("sh", "-c", f"exit {code}").code == code


@case()
def a_signal_becomes_128_and_the_signal(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec("sh", "-c", "kill -TERM $$").code == 143
    assert one.exec("sh", "-c", "kill -KILL $$").code == 137


@case()
def stdin_stdout_and_stderr(box: Box) -> None:
    said = box.bundle().up().exec("sh", "-c", "cat; echo err >&2", input="in\n")
    assert (said.code, said.text, said.error) == (0, "in\n", "err\n")


@case()
def it_joins_every_namespace(box: Box) -> None:
    one = box.bundle().up()
    pid = one.pid()
    kinds = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
    links = [f"/proc/self/ns/{kind}" for kind in kinds]
    script = f"for l in {' '.join(links)}; do readlink $l; done"
    assert one.exec("sh", "-c", script).lines() == [kernel.namespace(pid, kind) for kind in kinds]


@case()
def it_is_in_the_container_s_cgroup(box: Box) -> None:
    one = box.bundle().without_namespace("cgroup").up()
    inside = one.exec("cat", "/proc/self/cgroup").lines()
    assert sorted(inside) == sorted(kernel.proc(one.pid(), "cgroup").splitlines())


@case()
def its_root_is_the_container_s(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec("sh", "-c", "echo hello > /tmp/x; ls /").lines() == sorted(os.listdir(one.rootfs))
    assert (one.rootfs / "tmp/x").read_text() == "hello\n"


@case()
def flags_of_the_runtime_end_at_the_id(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec("echo", "-e", "--cwd", "x").ok() == "--cwd x\n"


@case()
def the_environment_is_the_container_s_and_more(box: Box) -> None:
    one = box.bundle()
    one.process["env"] = ["PATH=/bin", "A=container"]
    one.up()
    said = one.exec("sh", "-c", "echo $A $B", flags=("--env", "B=exec"))
    assert said.ok() == "container exec\n"
    assert one.exec("sh", "-c", "echo $A", flags=("-e", "A=changed")).ok() == "changed\n"


@case()
def the_directory_is_the_container_s_or_the_flag_s(box: Box) -> None:
    one = box.bundle()
    one.process["cwd"] = "/etc"
    one.up()
    assert one.exec("pwd").ok() == "/etc\n"
    assert one.exec("pwd", flags=("--cwd", "/tmp")).ok() == "/tmp\n"


@case()
def the_user_is_the_container_s_or_the_flag_s(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 1001}
    one.up()
    assert one.exec("sh", "-c", "id -u; id -g").lines() == ["1000", "1001"]
    assert one.exec("sh", "-c", "id -u; id -g", flags=("--user", "5:6")).lines() == ["5", "6"]


@case()
def a_user_without_a_group(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec("id", "-u", flags=("-u", "7")).ok() == "7\n"


@case()
def a_user_that_is_no_number_is_refused(box: Box) -> None:
    one = box.bundle().up()
    for user in ("name", "1x", "-1", ""):
        if user:
            one.exec("true", flags=("--user", user)).failed()


@case()
def additional_gids(box: Box) -> None:
    one = box.bundle().up()
    said = one.exec("grep", "Groups", "/proc/self/status", flags=("-g", "5", "-g", "6"))
    assert said.ok().split()[1:] == ["5", "6"]


@case()
def capabilities_are_the_container_s(box: Box) -> None:
    one = box.bundle().up()
    said = one.exec("grep", "Cap", "/proc/self/status").lines()
    found = {line.split(":")[0][3:]: int(line.split()[1], 16) for line in said}
    assert found == {kind: kernel.caps(one.pid(), kind) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}


@case()
def a_further_capability(box: Box) -> None:
    one = box.bundle().up()
    said = one.exec("grep", "CapEff", "/proc/self/status", flags=("--cap", "CAP_NET_BIND_SERVICE")).ok()
    assert int(said.split()[1], 16) & (1 << 10)


@case()
def no_new_privs(box: Box) -> None:
    one = box.bundle()
    one.process["noNewPrivileges"] = False
    one.up()
    assert one.exec("grep", "NoNewPrivs", "/proc/self/status").ok().split()[1] == "0"
    assert one.exec("grep", "NoNewPrivs", "/proc/self/status", flags=("--no-new-privs",)).ok().split()[1] == "1"


@case()
def a_process_file(box: Box) -> None:
    one = box.bundle().up()
    script = "id -u; pwd; echo $A; grep NoNewPrivs /proc/self/status; exit 9"
    path = process_file(
        box,
        args=["sh", "-c", script],
        cwd="/etc",
        env=["PATH=/bin", "A=1"],
        user={"uid": 5, "gid": 5},
        noNewPrivileges=True,
    )
    said = one.exec(flags=("--process", path))
    assert said.code == 9 and said.text.split() == ["5", "/etc", "1", "NoNewPrivs:", "1"], said


@case()
def rlimits_of_a_process_file(box: Box) -> None:
    one = box.bundle().up()
    limits = [{"type": "RLIMIT_SIGPENDING", "soft": 55, "hard": 66}]
    path = process_file(box, args=["sh", "-c", "ulimit -Si; ulimit -Hi"], rlimits=limits)
    assert one.exec(flags=("-p", path)).lines() == ["55", "66"]


@case()
def rlimits_are_the_container_s(box: Box) -> None:
    one = box.bundle()
    one.process["rlimits"] = [{"type": "RLIMIT_SIGPENDING", "soft": 77, "hard": 88}]
    one.up()
    assert one.exec("sh", "-c", "ulimit -Si; ulimit -Hi").lines() == ["77", "88"]


@case()
def umask_is_the_container_s(box: Box) -> None:
    one = box.bundle()
    one.process["user"]["umask"] = 0o027
    one.up()
    assert one.exec("sh", "-c", "umask").ok() == "0027\n"


@case()
def a_process_file_that_is_missing(box: Box) -> None:
    box.bundle().up().exec(flags=("--process", str(box.path("missing")))).failed("no such file or directory")


@case()
def detached_with_a_pid_file(box: Box) -> None:
    one = box.bundle().up()
    file = box.path("pid")
    one.exec("sleep", "1000", flags=("--detach", "--pid-file", str(file))).ok()
    pid = int(file.read_text())
    eventually(lambda: kernel.proc(pid, "cmdline") == "sleep\x001000\x00", "execve")
    assert pid in box.call("ps", "--format", "json", one.id).json()
    assert kernel.namespace(pid, "mnt") == kernel.namespace(one.pid(), "mnt")


@case()
def detached_processes_end_with_the_container(box: Box) -> None:
    one = box.bundle().up()
    file = box.path("pid")
    one.exec("sleep", "1000", flags=("--detach", "--pid-file", str(file))).ok()
    one.stopped()
    eventually(lambda: not kernel.alive(int(file.read_text())), "the second process to end")


@case()
def a_command_that_is_not_in_the_path(box: Box) -> None:
    one = box.bundle().up()
    said = one.exec("nothing")
    said.failed('exec: "nothing": executable file not found in $PATH')
    assert said.code in (1, 127, 255), said


@case()
def a_command_by_path_that_is_missing(box: Box) -> None:
    box.bundle().up().exec("/bin/nothing").failed("/bin/nothing", "no such file or directory")


@case()
def a_command_that_is_not_executable(box: Box) -> None:
    box.bundle().up().exec("/etc/passwd").failed("/etc/passwd", "permission denied")


@case()
def no_command_at_all(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec().code != 0


@case()
def into_an_unknown_container(box: Box) -> None:
    box.call("exec", "unknown", "true").failed("container does not exist")


@case()
def into_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    one.exec("true").failed("cannot exec in a stopped container")


@case()
def into_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    assert one.exec("echo", "hello").ok() == "hello\n"
    assert one.status() == "created"


@case("freezer")
def into_a_paused_container(box: Box) -> None:
    one = box.bundle().up()
    box.call("pause", one.id).ok()
    one.exec("true").failed("cannot exec in a paused container")
    box.call("resume", one.id).ok()
    one.exec("true").ok()


@case("freezer")
def into_a_paused_container_when_told_to(box: Box) -> None:
    one = box.bundle().up()
    box.call("pause", one.id).ok()
    one.write()
    waiting = box.popen("exec", "--ignore-paused", one.id, "true")
    eventually(lambda: len(box.call("ps", "-f", "json", one.id).json()) > 1 or waiting.poll() is not None, "the exec")
    box.call("resume", one.id).ok()
    assert waiting.wait(20) == 0


@case()
def with_a_terminal_over_a_console_socket(box: Box) -> None:
    one = box.bundle().up()
    with listen(box.path("console")) as listener:
        flags = ("--tty", "--detach", "--console-socket", str(box.path("console")))
        one.exec("sh", "-c", "tty; stty size; sleep 1000", flags=flags).ok()
        master = receive_terminal(listener)
    read_until(master, "/dev/pts/0")
    os.close(master)


@case()
def with_the_terminal_of_the_caller(box: Box) -> None:
    one = box.bundle().up()
    master, slave = os.openpty()
    words = ("exec", "--tty", one.id, "sh", "-c", "test -t 0 && test -t 1 && echo both; exit 3")
    child = box.popen(*words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    read_until(master, "both")
    assert child.wait(20) == 3
    os.close(master)


@case()
def preserve_fds(box: Box) -> None:
    one = box.bundle().up()
    file = box.path("given")
    file.write_text("given\n")
    opened = os.open(file, os.O_RDONLY)
    flags = ("--preserve-fds", "1")
    said = one.exec("sh", "-c", "cat <&3", flags=flags, preexec_fn=lambda: os.dup2(opened, 3), close_fds=False)
    os.close(opened)
    assert said.ok() == "given\n"


@case()
def nothing_but_stdio_is_open(box: Box) -> None:
    one = box.bundle().up()
    # ls itself holds the directory that it reads.
    assert one.exec("ls", "/proc/self/fd").ok().split() == ["0", "1", "2", "3"]


@case("cgroup1")
def in_a_cgroup_below(box: Box) -> None:
    one = box.bundle().up()
    (one.controller("pids") / "below").mkdir()
    said = one.exec("cat", "/proc/self/cgroup", flags=("--cgroup", "pids:below")).ok()
    assert any(":pids:" in line and line.endswith("/below") for line in said.splitlines()), said


@case()
def in_a_cgroup_that_is_missing(box: Box) -> None:
    box.bundle().up().exec("true", flags=("--cgroup", "missing")).failed()


@case()
def several_at_once(box: Box) -> None:
    one = box.bundle().up()
    children = [box.popen("exec", one.id, "sh", "-c", f"exit {code}") for code in range(1, 7)]
    assert [child.wait(30) for child in children] == list(range(1, 7))


@case()
def a_child_that_stays_behind_does_not_hold_exec(box: Box) -> None:
    one = box.bundle().up()
    assert one.exec("sh", "-c", "sleep 1000 > /dev/null 2>&1 & exit 5").code == 5


@case()
def a_signal_to_exec_reaches_its_process(box: Box) -> None:
    one = box.bundle().up()
    script = "trap 'exit 8' TERM; echo > /tmp/up; while :; do sleep 0.01; done"
    child = box.popen("exec", one.id, "sh", "-c", script)
    one.written("tmp/up")
    child.terminate()
    assert child.wait(20) == 8
