"""The fields of `process`, looked at in the kernel: schedulers, priorities, personality, and what a caller hands on."""

from __future__ import annotations

import array
import ctypes
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.linux.process import become
from tests.bundles import OCIRUN, Bundle, Bundles, bundles
from tests.support import SOON_S, eventually, needs

ours = pytest.mark.skipif(Path(OCIRUN).name == "runc", reason="the reference on this machine is older, or does less")
_IOPRIO_GET = {"x86_64": 252, "aarch64": 31}[os.uname().machine]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------------- the kernel


@ours
@pytest.mark.parametrize(
    ("scheduler", "policy", "nice", "priority"),
    [
        ({"policy": "SCHED_OTHER", "nice": 7}, os.SCHED_OTHER, 7, 0),
        ({"policy": "SCHED_BATCH", "nice": 19}, os.SCHED_BATCH, 19, 0),
        ({"policy": "SCHED_IDLE"}, os.SCHED_IDLE, 0, 0),
        ({"policy": "SCHED_FIFO", "priority": 5}, os.SCHED_FIFO, 0, 5),
        (
            {"policy": "SCHED_RR", "priority": 3, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
            os.SCHED_RR | os.SCHED_RESET_ON_FORK,
            0,
            3,
        ),
    ],
)
def test_a_scheduler(home: Bundles, scheduler: dict[str, object], policy: int, nice: int, priority: int) -> None:
    one = home.make()
    one.process["scheduler"] = scheduler
    if priority and Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists():  # only with RT_GROUP_SCHED
        one.linux["resources"] = {"cpu": {"realtimeRuntime": 1000, "realtimePeriod": 1_000_000}}
        parent = Path("/sys/fs/cgroup/cpu", home.cgroup)
        parent.mkdir()
        (parent / "cpu.rt_runtime_us").write_text("2000")
    one.up()
    pid = one.pid()
    assert os.sched_getscheduler(pid) == policy
    assert os.sched_getparam(pid).sched_priority == priority
    assert os.getpriority(os.PRIO_PROCESS, pid) == nice
    one.exec("sleep", "1000", flags=("-d", "--pid-file", str(home.directory / "pid"))).ok()
    assert os.sched_getscheduler(int((home.directory / "pid").read_text())) == policy  # it is config.json's process


@ours
def test_a_deadline_scheduler(home: Bundles) -> None:
    one = home.make()
    one.process["scheduler"] = {
        "policy": "SCHED_DEADLINE",
        "runtime": 1_000_000,
        "deadline": 10_000_000,
        "period": 20_000_000,
        "flags": ["SCHED_FLAG_RESET_ON_FORK"],
    }
    one.up()
    text = Path(f"/proc/{one.pid()}/sched").read_text()
    found = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in text.splitlines() if ":" in line}
    assert (found["policy"], found["dl.runtime"][:6] != "") == ("6", True), found


@ours
def test_a_scheduler_that_cannot_be_is_said(home: Bundles) -> None:
    one = home.make("true")
    one.process["scheduler"] = {"policy": "SCHED_DEADLINE", "runtime": 10, "deadline": 5, "period": 1}
    assert "process.scheduler: sched_setattr policy 6: EINVAL" in one.run().failed("hint: ")
    one.gone()


def io_priority(pid: int) -> tuple[int, int]:
    value = ctypes.CDLL(None).syscall(_IOPRIO_GET, 1, pid)
    return value >> 13, value & 0x1FFF


@ours
@pytest.mark.parametrize(
    ("name", "priority", "expected"),
    [("IOPRIO_CLASS_BE", 6, (2, 6)), ("IOPRIO_CLASS_RT", 1, (1, 1)), ("IOPRIO_CLASS_IDLE", 0, (3, 0))],
)
def test_io_priority(home: Bundles, name: str, priority: int, expected: tuple[int, int]) -> None:
    one = home.make()
    one.process["ioPriority"] = {"class": name, "priority": priority}
    one.up()
    assert io_priority(one.pid()) == expected


@ours
def test_an_init_before_the_command(home: Bundles) -> None:
    """The annotation `ocid.init`: PID 1 is small, reaps, and ends as the command does. The command does not wait for it
    to name itself."""
    one = home.make()
    one.config["annotations"] = {"ocid.init": "true"}
    named = "for i in $(seq 1000); do grep -q '^ocid-init$' /proc/1/comm && break; done"
    one.process["args"] = ["sh", "-c", f"{named}; cat /proc/1/comm; ls -l /proc/1/exe; echo $$; exit 7"]
    result = one.run()
    name, link, pid = result.text.splitlines()
    assert (result.code, name, pid) == (7, "ocid-init", "2") and "memfd:ocid-init" in link


@ours
def test_no_command_without_its_init(home: Bundles) -> None:
    """A filter keeps PID 1 from being made: the start says so, and the command has not run."""
    one = home.make()
    one.config["annotations"] = {"ocid.init": "true"}
    forbidden = {"names": ["memfd_create"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    one.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [forbidden]}
    one.process["args"] = ["sh", "-c", "echo ran"]
    result = one.run()
    result.failed("put an init before the command")
    assert result.text == ""
    one.gone()


@ours
@pytest.mark.parametrize(("value", "words"), [("yes", 'expected "true" or "false"'), ("true", "no PID namespace")])
def test_an_init_that_cannot_be_is_said(home: Bundles, value: str, words: str) -> None:
    one = home.make()
    one.config["annotations"] = {"ocid.init": value}
    if value == "true":
        one.linux["namespaces"] = [kind for kind in one.linux["namespaces"] if kind["type"] != "pid"]
    one.run().failed(words)
    one.gone()


@ours
def test_personality_of_the_container_and_its_execs(home: Bundles) -> None:
    one = home.sh("uname -m > /tmp/machine; sleep 1000")
    (one.rootfs / "bin/uname").symlink_to("busybox")
    one.linux["personality"] = {"domain": "LINUX32"}
    one.up()
    eventually(lambda: (one.rootfs / "tmp/machine").exists() and (one.rootfs / "tmp/machine").read_text())
    assert (one.rootfs / "tmp/machine").read_text() != os.uname().machine + "\n"
    assert int(Path(f"/proc/{one.pid()}/personality").read_text(), 16) == 0x0008
    assert one.exec("uname", "-m").ok() == (one.rootfs / "tmp/machine").read_text()
    one.delete().ok()
    one.linux["personality"] = {"domain": "LINUX32", "flags": ["ADDR_NO_RANDOMIZE"]}
    one.run().failed("linux.personality.flags")


def test_groups_umask_and_limits(home: Bundles) -> None:
    one = home.make()
    one.process["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027}
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]
    one.up()
    for pid in (one.pid(), _exec_detached(one)):
        status = dict(
            line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == ["1000"] * 4 and status["Gid"].split() == ["1001"] * 4
        assert set(status["Groups"].split()) == {"5", "7"}
        if pid == one.pid() or Path(OCIRUN).name != "runc":  # the reference gives an exec its own
            assert status["Umask"] == "0027"
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max open files            100                  200" in limits


def test_few_files_are_enough_to_start(home: Bundles) -> None:
    """The interpreter has more open than the command may have."""
    one = home.sh("ulimit -Sn; ulimit -Hn; sleep 1000")
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20}]
    assert one.up().exec("sh", "-c", "ulimit -Sn; ulimit -Hn").ok().split() == ["10", "20"]
    for pid in (one.pid(), _exec_detached(one)):
        assert "Max open files            10                   20" in Path(f"/proc/{pid}/limits").read_text()


def test_s05_without_capabilities_in_the_config_there_are_none(home: Bundles) -> None:
    one = home.make()
    del one.process["capabilities"]
    one.up()
    for pid in (one.pid(), _exec_detached(one)):
        text = Path(f"/proc/{pid}/status").read_text()
        assert [line.split()[1] for line in text.splitlines() if line.startswith("Cap")] == ["0" * 16] * 5


def _exec_detached(one: Bundle) -> int:
    file = one.path / "exec.pid"
    one.exec("sleep", "1000", flags=("--detach", "--pid-file", str(file))).ok()
    return int(file.read_text())


@pytest.mark.parametrize("field", ["apparmorProfile", "selinuxLabel"])
def test_a_label_that_the_kernel_has_no_use_for_is_refused(home: Bundles, field: str) -> None:
    if Path("/sys/module/apparmor/parameters/enabled").exists() or Path("/sys/fs/selinux/enforce").exists():
        pytest.skip("this kernel has one of them: hack/vm is where those are tested")
    words = "apparmor failed to apply profile" if field == "apparmorProfile" else "selinux is disabled or not supported"
    one = home.make()
    one.process[field] = "some-profile"
    one.create().failed(words)
    one.gone()
    one.process.pop(field)
    one.up()
    flag = "--apparmor" if field == "apparmorProfile" else "--process-label"
    one.exec("true", flags=(flag, "x")).failed(words, code=255)
    assert json_pids(one) == [one.pid()]


def json_pids(one: Bundle) -> list[int]:
    return [int(word) for word in one.home.ocirun("ps", "-f", "json", one.id).ok().strip("[]\n").split(",")]


# ------------------------------------------------------------------------------------------------ what is handed on


def handing_on(
    home: Bundles, words: list[str], fds: dict[int, int], env: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """`ocirun` with `fds` ({number: fd}) open, and variables of its environment that may name its own pid as $$."""
    moves = " ".join(f"{number}<&{fd}" for number, fd in fds.items())
    script = f'exec {moves}; {env} exec "$@"'
    output = home.directory / "handing-on"
    with open(output, "wb") as out:
        done = subprocess.run(
            ["bash", "-c", script, "bash", *home.command(*words)],
            pass_fds=tuple(fds.values()), stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False, timeout=SOON_S,
        )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, output.read_bytes())


@contextmanager
def files(home: Bundles, *names: str) -> Iterator[list[int]]:
    """Open files that hold their names, at numbers far away from those of anything else."""
    opened = []
    try:
        for index, name in enumerate(names):
            (home.directory / name).write_text(name)
            fd = os.open(home.directory / name, os.O_RDONLY)
            opened.append(os.dup2(fd, 900 + index))
            os.close(fd)
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


# Without a pipe, whose ends the shell would have open too.
# Without a pipe, whose ends the shell would have open too; copies that it keeps of its own are from 10 on.
SHOW = "ls /proc/$$/fd > /tmp/fds; echo $(cat /tmp/fds); env | grep LISTEN; cat <&3; cat <&4 2>/dev/null; true"


def numbers(line: bytes) -> set[int]:
    return {int(word) for word in line.split() if int(word) < 10}


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_s08_preserved_descriptors_and_no_others(home: Bundles, verb: str) -> None:
    one = home.sh(SHOW) if verb == "run" else home.make().up()
    one.write()
    with files(home, "a", "b", "c") as (a, b, c):
        words = ["run", "--preserve-fds", "2", "--bundle", str(one.path), one.id]
        if verb == "exec":
            words = ["exec", "--preserve-fds=2", one.id, "sh", "-c", SHOW]
        done = handing_on(home, words, {3: a, 4: b, 5: c, 9: c})
    assert done.returncode == 0, done
    assert numbers(done.stdout.splitlines()[0]) == {0, 1, 2, 3, 4}
    assert done.stdout.endswith(b"\nab")


@pytest.mark.parametrize("verb", ["run", "create", pytest.param("exec", marks=ours)])
@pytest.mark.parametrize("have", [0, 1])
def test_s08_a_descriptor_that_is_not_there_is_never_one_of_ours(home: Bundles, verb: str, have: int) -> None:
    """Promised to the process and not open, its number would be that of the next file that the runtime opens."""
    if Path(OCIRUN).name == "runc":
        pytest.skip("the reference has files of its own at these numbers, and does not notice")
    one = home.sh(SHOW) if verb != "exec" else home.make().up()
    one.write()
    with files(home, "a") as (a,):
        words = [verb, "--preserve-fds", "2", "--bundle", str(one.path), one.id]
        if verb == "exec":
            words = [verb, "--preserve-fds", "2", one.id, "sh", "-c", SHOW]
        done = handing_on(home, words, {3: a} if have else {900: a})
    assert done.returncode == (255 if verb == "exec" else 1)
    assert b"unable to stat preserved-fd %d (of 2)" % have in done.stdout, done
    if verb != "exec":
        one.gone()


@pytest.mark.parametrize("detach", [False, True])
def test_listen_fds_arrive_as_pid_1_expects_them(home: Bundles, detach: bool) -> None:
    one = home.sh("{ " + SHOW.replace("true", "cat <&5") + "; } > /tmp/out; : > /tmp/done")
    one.write()
    names = "LISTEN_FDNAMES=one:two" if Path(OCIRUN).name != "runc" else ""
    with files(home, "a", "b", "c") as (a, b, c):
        words = ["run", *(["-d"] if detach else []), "--preserve-fds=1", "--bundle", str(one.path), one.id]
        done = handing_on(home, words, {3: a, 4: b, 5: c, 6: c}, f"LISTEN_FDS=2 LISTEN_PID=$$ {names}")
    assert done.returncode == 0, done
    eventually((one.rootfs / "tmp/done").exists)
    first, *rest = (one.rootfs / "tmp/out").read_text().splitlines()
    assert numbers(first.encode()) == {0, 1, 2, 3, 4, 5}
    assert {"LISTEN_FDS=2", "LISTEN_PID=1"} <= set(rest) and rest[-1] == "abc"
    assert not names or names in rest


def test_listen_fds_of_somebody_else_are_left_alone(home: Bundles) -> None:
    one = home.sh("ls /proc/$$/fd > /tmp/fds; echo $(cat /tmp/fds); env")
    one.write()
    with files(home, "a") as (a,):
        done = handing_on(home, ["run", "--bundle", str(one.path), one.id], {3: a}, "LISTEN_FDS=1 LISTEN_PID=1")
    assert done.returncode == 0 and numbers(done.stdout.splitlines()[0]) == {0, 1, 2}, done
    assert b"LISTEN" not in done.stdout


def received_fd(listener: socket.socket) -> tuple[bytes, list[int]]:
    connection, _ = listener.accept()
    with connection:
        data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(40))
        found = array.array("i")
        for _, _, raw in ancillary:
            found.frombytes(raw)
        assert connection.recv(10) == b""
        return data, list(found)


@ours
def test_pidfd_socket_of_create_run_and_exec(home: Bundles) -> None:
    path = home.directory / "pidfd"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        one, two = home.make(), home.make()
        one.create("--pidfd-socket", str(path)).ok()
        two.run("--detach", "--pidfd-socket", str(path)).ok()
        file = home.directory / "pid"
        one.exec("sleep", "999", flags=("-d", "--pid-file", str(file), "--pidfd-socket", str(path))).ok()
        for word, pid in ((b"standard", one.pid()), (b"standard", two.pid()), (b"setns", int(file.read_text()))):
            said, fds = received_fd(listener)
            assert said == word and len(fds) == 1
            try:
                assert f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{fds[0]}").read_text()
                for number in os.listdir(f"/proc/{pid}/fd"):
                    link = os.readlink(f"/proc/{pid}/fd/{number}")
                    if int(number) > 2 and pid != one.pid():  # that one still waits for start
                        raise AssertionError(f"{number} -> {link} came along")
            finally:
                os.close(fds[0])
    one.start().ok()
    assert sorted(os.listdir(f"/proc/{one.pid()}/fd")) == ["0", "1", "2"]
    three = home.make()
    three.create("--pidfd-socket", "/nowhere/socket").failed("pidfd socket /nowhere/socket")
    three.gone()
    one.exec("true", flags=("--pidfd-socket", "/nowhere/socket")).failed("pidfd socket /nowhere/socket", code=255)
    assert json_pids(one) == [one.pid(), int(file.read_text())]


# ---------------------------------------------------------------------------------------------------- NOTIFY_SOCKET


class Manager:
    """A service manager as NOTIFY_SOCKET finds it; `hear` takes messages, and closes the descriptors of barriers."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.heard: list[bytes] = []

    def hear(self, until: bytes, seconds: float = SOON_S) -> list[bytes]:
        while not any(message.startswith(until) for message in self.heard):
            assert select.select([self.socket], [], [], seconds)[0], f"only {self.heard} came"
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(40))
            self.heard.append(data)
            for _, _, raw in ancillary:
                for fd in array.array("i", raw):
                    os.close(fd)
        return self.heard


# busybox has nothing that sends to a datagram socket of a path, so the host's interpreter is mounted for it.
_SAY = (
    "import os, socket, sys\n"
    "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "for text in sys.argv[1:]:\n"
    "    s.sendto(text.encode().decode('unicode_escape').encode(), os.environ['NOTIFY_SOCKET'])\n"
)


def notifier(home: Bundles, script: str) -> Bundle:
    """A bundle that runs `script`, in which `say TEXT…` sends messages."""
    one = home.sh(script)
    for place in {"/usr", "/lib", "/lib64", sys.base_prefix}:
        if Path(place).is_dir():
            (one.rootfs / place.strip("/")).mkdir(parents=True, exist_ok=True)
            one.mount(place, "bind", place, "rbind", "ro")
    say = one.rootfs / "bin/say"
    say.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{_SAY}")
    say.chmod(0o755)
    return one


@pytest.mark.parametrize(("user", "namespace"), [(0, False), (1000, False), (1000, True)])
def test_notify_socket_of_a_detached_run(home: Bundles, user: int, namespace: bool) -> None:
    one = notifier(home, "say STATUS=begun FDSTORE=1 'MAINPID=1\\nREADY=1' || exit 5; sleep 1000")
    one.process["user"] = {"uid": user, "gid": user}
    if namespace:
        one.user_namespace()
    manager = Manager(home.directory / "manager")
    one.write()
    child = home.popen(
        "run", "-d", "--bundle", str(one.path), one.id, env={"NOTIFY_SOCKET": str(home.directory / "manager")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if Path(OCIRUN).name == "runc":  # takes READY only where a message begins
        child.kill()
        child.wait()
        pytest.skip("the reference reads only the first line of a message")
    manager.hear(b"BARRIER=1")
    assert child.wait(SOON_S) == 0
    assert manager.heard == [b"READY=1\n", b"MAINPID=%d\n" % one.pid(), b"BARRIER=1"]
    # Who has just said so is about to end.
    eventually(lambda: home.processes() == [one.pid()], what="nobody but the container to be left")
    manager.socket.close()


def test_notify_socket_of_create_and_start(home: Bundles) -> None:
    one = notifier(home, "echo $NOTIFY_SOCKET > /tmp/where; touch /run/notify/x; say READY=1; sleep 1000")
    manager = Manager(home.directory / "manager")
    env = {"NOTIFY_SOCKET": str(home.directory / "manager")}
    one.create(env=env).ok()
    child = home.popen("start", one.id, env=env)
    manager.hear(b"MAINPID=")
    if Path(OCIRUN).name != "runc":
        manager.hear(b"BARRIER")
    assert child.wait(SOON_S) == 0
    assert manager.heard[:2] == [b"READY=1\n", b"MAINPID=%d\n" % one.pid()]
    assert (one.rootfs / "tmp/where").read_text() == "/run/notify/notify.sock\n"
    assert one.exec("ls", "/run/notify").ok() == "notify.sock\n"
    manager.socket.close()


def test_notify_socket_of_an_attached_run_names_the_run_itself(home: Bundles) -> None:
    one = notifier(home, "say READY=1; until test -e /tmp/end; do sleep 0.01; done; exit 4")
    manager = Manager(home.directory / "manager")
    one.write()
    child = home.popen(
        "run", "--bundle", str(one.path), one.id, env={"NOTIFY_SOCKET": str(home.directory / "manager")},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert manager.hear(b"MAINPID=")[:2] == [b"READY=1\n", b"MAINPID=%d\n" % child.pid]
    (one.rootfs / "tmp/end").touch()
    assert child.wait(SOON_S) == 4
    manager.socket.close()
    one.gone()


@ours  # the reference looks whether /proc has the process, which is there while nobody has waited for it
def test_a_container_that_ends_without_a_word_holds_nobody_up(home: Bundles) -> None:
    one = home.make("true")
    manager = Manager(home.directory / "manager")
    assert one.run("-d", env={"NOTIFY_SOCKET": str(home.directory / "manager")}).code == 0
    assert not select.select([manager.socket], [], [], 0)[0]
    manager.socket.close()
    two = notifier(home, "say READY=1; exit 6")
    result = two.run(env={"NOTIFY_SOCKET": "/nowhere/manager"})
    assert result.code == 6, result  # a manager that is not there is not the container's fault


_KCMP = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
_KCMP_FS = 3  # linux/kcmp.h


def test_who_becomes_another_program_refuses_its_threads_no_new_ones() -> None:
    """The kernel does to those that share root and working directory with who is in execve(2); nobody does then."""

    def shared() -> bool:
        mine, its = threading.get_native_id(), thread.native_id
        return ctypes.CDLL(None, use_errno=True).syscall(_KCMP, mine, its, _KCMP_FS, 0, 0) == 0

    def body() -> None:
        assert shared()
        with pytest.raises(FileNotFoundError):
            become("/nowhere/program", ["program"])
        assert not shared()

    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    with ThreadPoolExecutor(1) as others:  # not this one, whose working directory tests to come may change
        others.submit(body).result()
    end.set()
    thread.join()
