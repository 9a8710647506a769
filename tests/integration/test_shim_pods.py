"""Pods: what a shim makes and undoes, who it listens to, and what it survives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cgroups.hierarchy import detect
from runtime.linux.mount import mountinfo
from runtime.linux.process import is_running, start_time
from runtime.shim.cgroup import NAME, SPARE, ZYGOTE, processes
from runtime.shim.client import Shims
from runtime.shim.model import ContainerError, Sandbox, SandboxSpec, ShimUnresponsive
from runtime.tree import children
from tests.shims import Home, Lab, Pod, kill, lab
from tests.support import SOON_S, eventually, needs


@pytest.fixture
def pods(home: Home, tmp_path: Path) -> Iterator[Lab]:
    needs("root", "busybox")
    with lab(tmp_path, shared=home) as opened:
        yield opened


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Lab]:
    """With a zygote of its own, for whoever replaces it or opens its directory to others."""
    needs("root", "busybox")
    with lab(tmp_path) as opened:
        yield opened


def namespace(pid: int | str, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def enter(path: Path, kind: str, code: str) -> str:
    """What a Python expression gives inside a pinned namespace."""
    program = (
        "import os, sys, socket; sys.path.insert(0, sys.argv[3]); from runtime.linux.process import setns; "
        "setns(os.open(sys.argv[1], os.O_RDONLY)); print(eval(sys.argv[2]))"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program, str(path), code, root]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_pod_has_namespaces_a_name_and_a_shm_of_its_own(pods: Lab) -> None:
    pod = pods.pod(hostname="web-0", shm_bytes=4 << 20, sysctls={"kernel.msgmax": "9000"})
    pins = pod.directory / "ns"
    assert (pins / "ipc").stat().st_ino != namespace("self", "ipc")
    assert (pins / "uts").stat().st_ino != namespace("self", "uts")
    assert enter(pins / "uts", "uts", "socket.gethostname()") == "web-0"
    assert enter(pins / "ipc", "ipc", "open('/proc/sys/kernel/msgmax').read().strip()") == "9000"
    assert Path("/proc/sys/kernel/msgmax").read_text().strip() != "9000"
    shm = next(point for point in mountinfo() if point.target == f"{pod.directory}/shm")
    assert shm.fstype == "tmpfs" and {"nosuid", "nodev", "noexec"} <= set(shm.options.split(","))
    assert "size=4096k" in shm.super_options
    assert (pod.directory / "shm").stat().st_mode & 0o7777 == 0o1777
    assert is_running(pod.sandbox.pid, pod.sandbox.started_ticks)
    assert pod.sandbox.pause_pid == 0
    directory = pod.directory
    pod.stop()
    assert sorted(path.name for path in directory.iterdir()) == []


def test_a_pod_may_have_the_hosts_namespaces(pods: Lab) -> None:
    pod = pods.pod(private_ipc=False, private_uts=False, shm_bytes=0)
    assert list((pod.directory / "ns").iterdir()) == []
    assert not (pod.directory / "shm").exists()


def test_a_pod_joins_a_network_namespace_for_its_sysctls(pods: Lab) -> None:
    pin = pods.directory / "netns"
    pin.touch()
    subprocess.run(["unshare", f"--net={pin}", "true"], check=True)
    try:
        key = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
        before = Path(key).read_text()
        pods.pod(netns=pin, sysctls={"net.ipv4.ip_unprivileged_port_start": "7"})
        assert enter(pin, "net", f"open('{key}').read().strip()") == "7"
        assert Path(key).read_text() == before
    finally:
        subprocess.run(["umount", str(pin)], check=True)


def test_a_shared_pid_namespace_has_a_pause_that_reaps_and_holds_nothing(pods: Lab) -> None:
    pod = pods.pod(shared_pid=True)
    pause = pod.sandbox.pause_pid
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pause}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert status["Uid"].split() == ["65534"] * 4 and status["Gid"].split() == ["65534"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert os.listdir(f"/proc/{pause}/fd") == []
    assert os.listdir(f"/proc/{pause}/root") == []
    assert (pod.directory / "ns/pid").stat().st_ino == namespace(pause, "pid")
    # An orphan in the namespace becomes its child and is waited for.
    subprocess.run(["nsenter", f"--pid={pod.directory}/ns/pid", "sh", "-c", "true & exit"], check=True)
    eventually(lambda: Path(f"/proc/{pause}/task/{pause}/children").read_text() == "")
    pod.stop()
    assert not Path(f"/proc/{pause}").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sysctls": {"kernel.core_pattern": "x"}}, "kernel.core_pattern"),
        ({"sysctls": {"kernel.msgmax": "1\n2"}}, "printable"),
        ({"sysctls": {"kernel.msgmax": "no number"}}, "EINVAL"),
        ({"sysctls": {"kernel.shm_no_such": "1"}}, "ENOENT"),
        ({"netns": Path("/proc/self/no-such-netns")}, "ENOENT"),
        ({"netns": Path("/proc/self/ns/ipc")}, "EINVAL"),
        ({"hostname": "x" * 70}, "EINVAL"),
    ],
)
def test_o08_a_pod_that_cannot_be_made_leaves_nothing(pods: Lab, changes: dict[str, object], words: str) -> None:
    pod = pods.pod(start=False)
    with pytest.raises(ContainerError, match=words):
        pod.start(**changes)
    assert pods.machine.mounts() == []
    assert [path.name for path in pod.directory.iterdir() if path.name != "shim.log"] == []
    pod.start()  # and the same pod works once the cause is gone


def test_o08_an_unmountable_shm_undoes_the_pins(pods: Lab) -> None:
    pod = pods.pod(start=False)
    pod.directory.mkdir()
    (pod.directory / "shm").write_text("in the way")
    with pytest.raises(ContainerError, match="step shm"):
        pod.start()
    assert pods.machine.mounts() == []
    pod.start()


def test_s50_sockets_are_files_of_root_alone(pods: Lab) -> None:
    pod = pods.pod()
    for path in (pods.state / "zygote.sock", pod.directory / "shim.sock"):
        assert path.stat().st_mode & 0o777 == 0o600
    inodes = {
        os.readlink(f"/proc/{pid}/fd/{fd}")
        for pid in (pods.zygote(), pod.sandbox.pid)
        for fd in os.listdir(f"/proc/{pid}/fd")
    }
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if f"socket:[{words[6]}]" in inodes and len(words) > 7:
            assert not words[7].startswith("@"), line


def test_s50_only_root_is_heard(alone: Lab) -> None:
    pod = alone.pod()
    for path in (alone.state / "zygote.sock", pod.directory / "shim.sock"):
        for directory in (path, *path.parents):
            if directory.owner() == "root" and directory.is_relative_to(alone.state.parent):
                os.chmod(directory, 0o777)  # so that only SO_PEERCRED stands in the way
        program = (
            "import os, socket, sys; s = socket.socket(socket.AF_UNIX); fd = os.open(os.path.dirname(sys.argv[1]), "
            "os.O_PATH); os.setuid(1000); s.connect(f'/proc/self/fd/{fd}/' + os.path.basename(sys.argv[1]));"
            "s.sendall(b'\\x0b\\0\\0\\0[\"list\", {}]'); print(s.recv(10))"
        )
        run = subprocess.run([sys.executable, "-c", program, str(path)], check=False, capture_output=True, text=True)
        assert run.stdout.strip() in ("b''", ""), run
        assert run.stdout.strip() == "b''" or "ConnectionReset" in run.stderr or "BrokenPipe" in run.stderr, run
    assert alone.shims.reconnect(pod.sandbox) == []


def test_shims_are_inits_children_with_sessions_of_their_own(pods: Lab) -> None:
    pod = pods.pod()
    for pid in (pods.zygote(), pod.sandbox.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent, group, session = int(fields[1]), int(fields[2]), int(fields[3])
        assert parent == 1
        assert (group, session) == (pid, pid) or pid == pods.zygote()
        assert session not in (os.getsid(0), 0)
    links = [os.readlink(f"/proc/{pod.sandbox.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pod.sandbox.pid}/fd")]
    strange = [
        link for link in links if not link.startswith(("/dev/null", "anon_inode:[eventpoll]", "pipe:", "socket:"))
    ]
    assert strange == [f"{pod.directory}/shim.log"]
    assert Path(f"/proc/{pod.sandbox.pid}/cwd").readlink() == Path("/")


def test_s01_zygote_shim_and_pause_run_from_a_sealed_interpreter(pods: Lab) -> None:
    pod = pods.pod(shared_pid=True)
    for pid in (pods.zygote(), pod.sandbox.pid, pod.sandbox.pause_pid):
        for flags in (os.O_WRONLY, os.O_RDWR):
            with pytest.raises(OSError) as caught:
                os.close(os.open(f"/proc/{pid}/exe", flags))
            assert caught.value.errno in (errno.EROFS, errno.EPERM, errno.ETXTBSY)
        assert os.stat(f"/proc/{pid}/exe").st_dev != os.stat(sys.executable).st_dev
        assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1] == b"-IS"


def test_o21_shims_are_in_a_cgroup_of_their_own_that_goes_with_them(pods: Lab) -> None:
    pod = pods.pod()
    for line in Path(f"/proc/{pod.sandbox.pid}/cgroup").read_text().splitlines():
        assert line.endswith(":/ocid.shims"), line


def daemon(state: Path, script: str) -> subprocess.Popen[str]:
    """A process that does `script` with `shims` and `spec(name)`, in a session and process group of its own."""
    program = (
        "import sys, json, signal; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from runtime.shim.client import Shims; from runtime.shim.model import *\n"
        "state = Path(sys.argv[1]); shims = Shims(state)\n"
        "def spec(name):\n"
        "    directory = state / name; directory.mkdir(mode=0o700)\n"
        "    return SandboxSpec(name, directory, 'h', None, shm_bytes=1 << 20)\n"
    )
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", program + script, str(state), root],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_o21_kill_9_of_the_daemon_its_group_and_the_zygote_leaves_the_pods(tmp_path: Path) -> None:
    needs("root")
    state = tmp_path / "state"
    state.mkdir()
    script = "s = shims.start(spec('a'))\nprint(json.dumps([s.pid, s.started_ticks]), flush=True); signal.pause()\n"
    with daemon(state, script) as process:
        assert process.stdout is not None
        pid, ticks = json.loads(process.stdout.readline())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shims = Shims(state)
    sandbox = Sandbox("a", state / "a", pid, ticks)
    try:
        assert is_running(pid, ticks)
        assert shims.reconnect(sandbox) == []
        zygote = shims._launcher._hello()[1]
        _kill_wholly(zygote)
        assert shims.reconnect(sandbox) == []
        directory = state / "b"
        directory.mkdir()
        second = shims.start(SandboxSpec("b", directory, "h", None))  # a new zygote, over the old one's socket
        shims.stop(second)
    finally:
        shims.stop(sandbox)
        shims.end_zygote()


def test_two_daemons_that_start_at_once_share_one_zygote(tmp_path: Path) -> None:
    needs("root")
    state = tmp_path / "state"
    state.mkdir()
    script = "s = shims.start(spec(sys.argv[3] if len(sys.argv) > 3 else 'x%d' % __import__('os').getpid()))\n"
    script += "print(shims._launcher._hello()[1], flush=True); shims.stop(s)\n"
    running = [daemon(state, script) for _ in range(4)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1
    Shims(state).end_zygote()


def test_a_zygote_of_other_code_is_replaced_and_its_shims_stay(alone: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = alone.pod()
    old = alone.zygote()
    monkeypatch.setattr("runtime.shim.launcher.version", lambda: "another")
    alone.restarted()
    second = alone.pod()
    assert alone.zygote() != old
    eventually(lambda: not Path(f"/proc/{old}/exe").exists(), what="the old zygote to end")
    assert alone.shims.reconnect(pod.sandbox) == [] and alone.shims.reconnect(second.sandbox) == []


def test_nobody_of_a_zygote_that_was_asked_to_quit_is_in_the_shims_cgroup(tmp_path: Path) -> None:
    """Whoever lingers there keeps the cgroup from being removed with its last user. Others may be in it meanwhile."""
    needs("root")
    shims = Shims(tmp_path)
    for _ in range(3):
        shims.prepare()
        assert _in_shims_cgroup(tmp_path)
        shims.end_zygote()
        assert not _in_shims_cgroup(tmp_path)


def _in_shims_cgroup(state: Path) -> list[str]:
    """Processes there that were forked from the zygote of `state`, itself included."""
    files = [Path(hierarchy.mount, NAME, "cgroup.procs") for hierarchy in detect()]
    pids = {pid for file in files if file.exists() for pid in file.read_text().split()}
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(state) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def test_direct_mode_has_no_zygote(tmp_path: Path) -> None:
    needs("root")
    with lab(tmp_path, direct=True) as pods:
        pod = pods.pod()
        assert not (pods.state / "zygote.sock").exists()
        assert Path(f"/proc/{pod.sandbox.pid}/stat").read_text().rpartition(")")[2].split()[1] == "1"
        assert pods.shims.reconnect(pod.sandbox) == []
        with pytest.raises(ContainerError, match="EINVAL"):
            pods.pod(start=False).start(hostname="x" * 70)


def test_signals_do_not_end_a_shim(pods: Lab) -> None:
    pod = pods.pod()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        os.kill(pod.sandbox.pid, number)
        assert pods.shims.reconnect(pod.sandbox) == []


def test_o13_a_shim_that_was_killed_is_gone_and_stop_cleans_up(pods: Lab) -> None:
    pod = pods.pod(shared_pid=True)
    sandbox = pod.sandbox
    pause = start_time(sandbox.pause_pid)
    kill(sandbox)
    assert pods.shims.reconnect(sandbox) is None
    assert is_running(sandbox.pause_pid, pause)
    with pytest.raises(ContainerError, match="is gone"):
        pods.shims.events(sandbox)
    pods.shims.stop(sandbox)
    assert not is_running(sandbox.pause_pid, pause)
    assert pods.machine.mounts() == []
    pods.shims.stop(sandbox)  # idempotent


def test_o05_a_reused_pid_is_not_the_shim(pods: Lab) -> None:
    pod = pods.pod()
    other = Sandbox(pod.id, pod.directory, os.getpid(), start_time(os.getpid()) + 1)
    kill(pod.sandbox)
    assert pods.shims.reconnect(other) is None
    pods.shims.stop(other)  # must not signal this very process


def test_o20_a_shim_that_hangs_is_unresponsive_not_dead_and_stop_ends_it(
    pods: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = pods.pod()
    os.kill(pod.sandbox.pid, signal.SIGSTOP)
    monkeypatch.setattr("runtime.shim.client.RECONNECT_TIMEOUT", 0.2)
    with pytest.raises(ShimUnresponsive, match="does not answer"):
        pods.shims.reconnect(pod.sandbox)
    assert is_running(pod.sandbox.pid, pod.sandbox.started_ticks)
    monkeypatch.setattr("runtime.shim.client._CALL_TIMEOUT", 0.5)
    with contextlib.suppress(ContainerError):
        pods.shims.stop(pod.sandbox)
    assert not is_running(pod.sandbox.pid, pod.sandbox.started_ticks)


def test_o58_a_stale_socket_is_replaced(pods: Lab) -> None:
    pod = pods.pod(start=False)
    pod.directory.mkdir(mode=0o700)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(pod.directory / "shim.sock"))
    stale.close()
    pod.start()
    assert pods.shims.reconnect(pod.sandbox) == []


def test_garbage_on_the_socket_harms_nobody(pods: Lab) -> None:
    pod = pods.pod()
    for data in (b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x03\0\0\0abc", b"\x10\0\0\0half", b'\x0a\0\0\0["none",{}]'):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(pod.directory / "shim.sock"))
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                peer.recv(1000)
    assert pods.shims.reconnect(pod.sandbox) == []


@pytest.fixture
def subscribed(pods: Lab) -> Iterator[tuple[Pod, int]]:
    """A pod whose events somebody hears, and the helper that took that request, which expects a create."""
    pod = pods.pod()
    events = pods.shims.events(pod.sandbox)
    eventually(lambda: len(children(pod.sandbox.pid)) == 1, what="one helper")
    yield pod, children(pod.sandbox.pid).pop()
    os.close(events)


def test_who_subscribed_to_a_new_pod_makes_and_starts_its_container_and_becomes_its_first_command(
    subscribed: tuple[Pod, int],
) -> None:
    pod, helper = subscribed
    began = start_time(helper)
    container = pod.create("c", ["sleep", "1000"])
    pod.shims.start_container(pod.sandbox, container)
    (pid,) = children(pod.sandbox.pid) - {helper}
    assert is_running(helper, began) and not children(helper)
    assert pod.exec(container, ["echo", "there"]).stdout == b"there\n"
    eventually(lambda: not is_running(helper, began), what="the helper to be the command")
    assert pod.facts(container).pid == pid
    events = pod.shims.events(pod.sandbox)  # of a pod that has one already: nothing is expected
    eventually(lambda: children(pod.sandbox.pid) == {pid}, what="no helper to be left")
    os.close(events)


def test_a_container_that_ends_before_its_first_command_is_told_at_once_and_refuses_that(
    subscribed: tuple[Pod, int],
) -> None:
    """While the helper waits, which knows nothing of that but what it asks."""
    pod, helper = subscribed
    began = start_time(helper)
    container = pod.run("c", ["true"])
    eventually((pod.bundle("c") / "exit.json").exists, what="its exit to be told")
    assert is_running(helper, began)
    with pytest.raises(ContainerError, match="it has ended"):
        pod.exec(container, ["true"])
    eventually(lambda: not is_running(helper, began), what="the helper to end")


def test_a_container_that_is_unknown_is_so_to_who_has_waited(subscribed: tuple[Pod, int]) -> None:
    pod, _ = subscribed
    pod.run("c", ["sleep", "1000"])
    with pytest.raises(ContainerError, match="container other is unknown"):
        pod.exec("other", ["true"])


def test_who_subscribed_does_nothing_else(subscribed: tuple[Pod, int]) -> None:
    """What it knows is from before: others are forked for that, as for all that comes after."""
    pod, helper = subscribed
    assert pod.shims.reconnect(pod.sandbox) == []
    eventually(lambda: not children(pod.sandbox.pid), what="it to end")
    pod.create("c", ["sleep", "1000"])
    assert len(children(pod.sandbox.pid) - {helper}) == 2, "the container, and the helper that made it"


def test_a_pod_is_stopped_while_a_create_is_expected(subscribed: tuple[Pod, int]) -> None:
    pod, helper = subscribed
    began = start_time(helper)
    pod.stop()
    eventually(lambda: not is_running(helper, began), what="the helper to end")


@pytest.mark.parametrize("shared", [False, True])
def test_a_lab_whose_test_and_clean_up_fail_leaves_nothing(
    shared: bool, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_sandbox: object) -> None:
        raise LookupError("not stopped")

    ours = home if shared else None
    with pytest.raises(ValueError, match="of the test"), lab(tmp_path, shared=ours) as opened:
        opened.pod().run("c", ["sleep", "1000"])
        assert opened.machine.cgroups() and opened.machine.processes()
        monkeypatch.setattr(opened.shims, "stop", refuse)
        raise ValueError("of the test")
    # The shared zygote's next spare has no name of its own in its first moment.
    eventually(lambda: opened.machine.processes() == [], what="what the lab had started to end")
    assert (opened.machine.cgroups(), opened.machine.mounts()) == ([], [])
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{opened.machine.cgroup}"))


def _spares(state: Path) -> list[int]:
    """Those that run: a killed one may be a zombie of somebody else's."""
    found = []
    for pid in processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if Path(f"/proc/{pid}/comm").read_text() == f"{SPARE}\n" and os.fsencode(state) in words:
                found.append(pid)
    return sorted(found)


def _pair(pods: Lab) -> tuple[int, int] | None:
    """The spare shim, an orphan by now, and its helper, once both are there."""
    for pid in (spares := _spares(pods.state)):
        with contextlib.suppress(OSError):
            for child in children(pid) & set(spares):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/comm").read_text() != f"{ZYGOTE}\n":  # to ask the zygote would take the spare
                    return pid, child
    return None


@pytest.mark.parametrize("which", [0, 1], ids=["shim", "helper"])
def test_a_spare_shim_that_is_killed_is_replaced(tmp_path: Path, which: int) -> None:
    needs("root")
    with lab(tmp_path) as pods:
        pods.pod()
        before = eventually(lambda: _pair(pods), what="a shim and its helper to wait")
        os.kill(before[which], signal.SIGKILL)
        eventually(lambda: (now := _pair(pods)) and not set(now) & set(before), what="others to wait")
        assert pods.shims.reconnect(pods.pod().sandbox) == []


def test_the_spare_shim_ends_with_its_zygote(tmp_path: Path) -> None:
    needs("root")
    with lab(tmp_path) as pods:
        pods.pod()
        eventually(lambda: len(_spares(pods.state)) == 2, what="a shim and its helper to wait")
        os.kill(pods.zygote(), signal.SIGKILL)
        eventually(lambda: not _spares(pods.state), what="them to end")


def _kill_wholly(pid: int) -> None:
    """SIGKILL, and waits until its fds are closed, too: those go after its memory."""
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    assert select.select([handle], [], [], SOON_S)[0]
    os.close(handle)


def test_a_pod_that_is_asked_for_once_the_zygote_is_killed_comes_up(tmp_path: Path) -> None:
    """Whoever is still at the listener serves it; the next is refused there, and starts a new zygote."""
    needs("root")
    with lab(tmp_path) as pods:
        pods.pod()
        for _ in range(3):
            _kill_wholly(pods.zygote())
            for pod in (pods.pod(), pods.pod()):
                assert pods.shims.reconnect(pod.sandbox) == []


def test_a_request_that_a_zygote_died_over_before_it_read_it_is_made_once_more(tmp_path: Path) -> None:
    needs("root")
    with lab(tmp_path) as pods:
        pods.pod()
        _kill_wholly(pods.zygote())
        eventually(lambda: not _spares(pods.state), what="its spare to end")
        path = pods.state / "zygote.sock"
        path.unlink()
        with socket.socket(socket.AF_UNIX) as dying:
            dying.bind(str(path))
            dying.listen()

            def die() -> None:
                assert select.select([dying], [], [], SOON_S)[0]
                path.unlink()
                dying.close()

            thread = threading.Thread(target=die)
            thread.start()
            pod = pods.pod()
            thread.join()
        assert path.exists() and pods.shims.reconnect(pod.sandbox) == []
