"""kill -9 of the daemon, of the zygote, of both, and of a shim: what runs goes on, what ended is told as it was, and
what is taken down afterwards leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.cri_client import container
from conformance.daemons import retire
from conformance.leaks import CGROUPS, Machine
from cri.api import api_pb2 as pb
from runtime.linux.process import pidfd_open, process_state
from tests.e2e import Node, lent, messages, node, retired, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import SOON_S, eventually, needs

COUNT = "i=0; while :; do echo $i; i=$((i+1)); usleep 5000; done"
# Ends with the code in /wait/NAME, once that is there.
ON_COMMAND = "while [ ! -s /wait/code ]; do usleep 2000; done; exit $(cat /wait/code)"


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with stocked() as made:
        yield made


@contextlib.contextmanager
def used(directory: Path, registry: FakeRegistry) -> Iterator[Node]:
    """A node that has an image and has run a pod."""
    needs("root", "overlay")
    with node(directory, limits="recovery_s = 0.5") as made:
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        pod, one, _ = made.run(made.image, ["true"], network=True)
        made.client.wait_exit(one)
        made.drop(pod)
        yield made


@pytest.fixture(scope="module")
def at_rest(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with used(tmp_path_factory.mktemp("n"), registry) as made:
        made.end()
        retire(made.state)
        yield made


@pytest.fixture
def clean(at_rest: Node) -> Iterator[Node]:
    """That of those who end more of it than its daemon: each has a zygote of its own."""
    try:
        with lent(at_rest) as made:
            yield made
    finally:
        retire(at_rest.state)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with used(tmp_path_factory.mktemp("n"), registry) as made:
        made.end()
        yield made


@pytest.fixture
def kept(shared: Node) -> Iterator[Node]:
    """That of several tests, for who ends no more than its daemon."""
    with lent(shared) as made:
        yield made


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone or a zombie."""
    handle = pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], 10)
    finally:
        os.close(handle)


def identity(pid: int) -> tuple[int, str]:
    """A process, told apart from a later one with its pid."""
    return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def pid_of(served: Node, one: str) -> int:
    status = served.client.runtime.ContainerStatus(
        pb.ContainerStatusRequest(container_id=one, verbose=True), timeout=SOON_S
    )
    return int(json.loads(status.info["info"])["pid"])


def test_what_is_to_be_started_again_is_so_without_a_daemon(kept: Node) -> None:
    """`ocid run --restart`: its shim does it, and a daemon that comes back knows."""
    config = kept.pod_config()
    pod = kept.client.run_pod(config)
    wanted = container("main", kept.image, ["sh", "-c", "echo up; exec sleep 1000"])
    wanted.annotations["ocid.restart"] = "always"
    one = kept.client.create(pod, wanted, config)
    kept.client.start(one)
    log = Path(config.log_directory) / "main.log"
    first = pid_of(kept, one)
    kept.end(signal.SIGKILL)
    kill(first)
    eventually(lambda: len(messages(log)) == 2, what="the next run")
    kept.start()
    second = pid_of(kept, one)
    assert second not in (0, first) and kept.client.status(one).state == pb.CONTAINER_RUNNING
    kill(second)
    eventually(lambda: pid_of(kept, one) not in (0, second), what="one more run, beside a daemon")
    kept.client.stop(one)
    assert kept.client.status(one).state == pb.CONTAINER_EXITED and len(messages(log)) == 3
    kept.drop(pod)


@pytest.mark.parametrize("what", ["daemon", "zygote", "both"])
def test_kill_9_and_containers_run_on(clean: Node, what: str) -> None:
    config = clean.pod_config(network=True)
    pod = clean.client.run_pod(config)
    one = clean.client.create(pod, container("main", clean.image, ["sh", "-c", COUNT]), config)
    clean.client.start(one)
    log = Path(config.log_directory) / "main.log"
    eventually(lambda: len(messages(log)) > 3)
    process = identity(pid_of(clean, one))
    status, address = clean.client.status(one), clean.client.pod_status(pod).network.ip
    if what in ("daemon", "both"):
        clean.end(signal.SIGKILL)
    if what in ("zygote", "both"):
        kill(clean.zygote)
    seen = len(messages(log))
    eventually(lambda: len(messages(log)) > seen + 5, what="the log goes on")
    if clean.process is None:
        clean.start()
    assert identity(pid_of(clean, one)) == process
    again = clean.client.status(one)
    assert (again.state, again.started_at, again.created_at) == (
        pb.CONTAINER_RUNNING,
        status.started_at,
        status.created_at,
    )
    assert clean.client.pod_status(pod).network.ip == address
    assert clean.client.pod_status(pod).state == pb.SANDBOX_READY
    assert clean.client.exec_sync(one, ["hostname"])[:2] == (0, f"{config.hostname}\n".encode())
    numbers = [int(line) for line in messages(log)]
    assert numbers == list(range(len(numbers))), "no line is lost or doubled"
    fresh, other, _ = clean.run(clean.image, ["sh", "-c", "exit 4"], network=True)
    assert clean.client.wait_exit(other) == 4
    clean.drop(fresh)
    clean.client.stop(one)
    assert clean.client.status(one).exit_code == 137
    clean.client.remove(one)
    clean.drop(pod)


def test_o14_exits_while_the_daemon_is_down_are_exact(kept: Node, tmp_path: Path) -> None:
    """Code and time of each, though nobody listened."""
    config = kept.pod_config()
    pod = kept.client.run_pod(config)
    ids = {}
    for code in (0, 1, 7, 42, 255):
        place = tmp_path / str(code)
        place.mkdir()
        wanted = container(f"c{code}", kept.image, ["sh", "-c", ON_COMMAND])
        wanted.mounts.add(host_path=str(place), container_path="/wait")
        ids[code] = kept.client.create(pod, wanted, config)
        kept.client.start(ids[code])
    pids = {code: pid_of(kept, one) for code, one in ids.items()}
    kept.end(signal.SIGKILL)
    ended = {}
    for code, pid in pids.items():
        handle = pidfd_open(pid)
        began = time.time_ns()
        (tmp_path / str(code) / "code").write_text(f"{code}\n")
        assert select.select([handle], [], [], 10)[0]
        os.close(handle)
        ended[code] = (began, time.time_ns())
    # Long after: what is told must not be the time of asking.
    eventually(lambda: all(not Path(f"/proc/{pid}").exists() for pid in pids.values()), what="all are reaped")
    kept.start()
    for code, one in ids.items():
        status = kept.client.status(one)
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, code)
        assert status.reason == ("Error" if code else "Completed")
        slack_ns = 250_000_000  # the shim is told by the kernel, but may have to wait for a CPU
        assert ended[code][0] <= status.finished_at <= ended[code][1] + slack_ns
    kept.drop(pod)


def test_o18_a_container_that_ended_well_stays_so(kept: Node) -> None:
    pod, one, _ = kept.run(kept.image, ["true"])
    assert kept.client.wait_exit(one) == 0
    first = kept.client.status(one)
    for _ in range(3):
        kept.end(signal.SIGKILL)
        kept.start()
        now = kept.client.status(one)
        assert now == first
    kept.drop(pod)


def test_o13_kill_9_of_a_shim(kept: Node) -> None:
    """Nobody could log or reap them any more: within moments nothing of the pod runs, it is not ready, and its
    containers have ended with a code that is not 0."""
    pod, one, _ = kept.run(kept.image, ["sleep", "1000"], network=True)
    pid = pid_of(kept, one)
    kill(kept.shim(pod))
    eventually(lambda: kept.client.status(one).state == pb.CONTAINER_EXITED, what="its end is told")
    status = kept.client.status(one)
    assert status.exit_code != 0 and status.message
    eventually(lambda: not Path(f"/proc/{pid}").exists() or process_state(pid) == "Z", what="the process is gone")
    assert kept.client.pod_status(pod).state == pb.SANDBOX_NOTREADY
    other, works, _ = kept.run(kept.image, ["true"])
    assert kept.client.wait_exit(works) == 0
    kept.drop(other)
    kept.drop(pod)


def test_o13_kill_9_of_a_shim_while_the_daemon_is_down(kept: Node) -> None:
    pod, one, _ = kept.run(kept.image, ["sleep", "1000"])
    pid, shim = pid_of(kept, one), kept.shim(pod)
    kept.end(signal.SIGKILL)
    kill(shim)
    kept.start()
    status = eventually(
        lambda: status if (status := kept.client.status(one)).state == pb.CONTAINER_EXITED else None, what="its end"
    )
    assert status.exit_code != 0
    assert not Path(f"/proc/{pid}").exists() or process_state(pid) == "Z"
    kept.drop(pod)


def test_stop_and_remove_after_everything_was_killed(clean: Node) -> None:
    """Daemon, zygote and shim at once, then the taking down of it all."""
    pod, one, _ = clean.run(clean.image, ["sleep", "1000"], network=True)
    shim = clean.shim(pod)
    clean.end(signal.SIGKILL)
    kill(clean.zygote)
    kill(shim)
    clean.start()
    clean.client.stop(one)
    clean.client.remove(one)
    clean.drop(pod)


def test_stop_is_a_pause_of_the_daemon_alone(kept: Node) -> None:
    """SIGTERM ends no container either."""
    pod, one, log = kept.run(kept.image, ["sh", "-c", COUNT])
    process = identity(pid_of(kept, one))
    kept.end()
    seen = len(messages(log))
    eventually(lambda: len(messages(log)) > seen + 3)
    kept.start()
    assert identity(pid_of(kept, one)) == process
    kept.drop(pod)


def test_o20_sighup_is_harmless(kept: Node) -> None:
    assert kept.process is not None
    pod, one, _ = kept.run(kept.image, ["sleep", "1000"])
    kept.process.send_signal(signal.SIGHUP)
    eventually(lambda: "SIGHUP" in kept.log.read_text(), what="it is noted")
    assert kept.process.poll() is None
    assert kept.client.status(one).state == pb.CONTAINER_RUNNING
    kept.drop(pod)


def cgroups_of(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/cgroup").read_text().split())


def test_o21_shims_are_not_in_the_daemon_s_cgroup(clean: Node, tmp_path: Path) -> None:
    """A service manager kills everything in the daemon's cgroup; that must not reach shims, zygote or containers."""
    base = next(
        path for path in (CGROUPS / "systemd", CGROUPS / "unified", CGROUPS) if (path / "cgroup.procs").exists()
    )
    service = base / f"{clean.tag}.service"
    pod, one, _ = clean.run(clean.image, ["sleep", "1000"])
    clean.end()
    kill(clean.zygote)
    service.mkdir()
    try:
        own = next(
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if (line.startswith("0::") if base.name != "systemd" else ":name=systemd:" in line)
        )
        (service / "cgroup.procs").write_text(str(os.getpid()))
        try:
            clean.start(as_child=True)
        finally:
            (base / own.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        fresh, other, _ = clean.run(clean.image, ["sleep", "1000"])
        assert clean.process is not None
        members = {int(word) for word in (service / "cgroup.procs").read_text().split()}
        assert clean.process.pid in members
        spared = {clean.zygote, clean.shim(pod), clean.shim(fresh), pid_of(clean, one), pid_of(clean, other)}
        assert not members & spared
        before = {identity(pid) for pid in spared}
        clean.end(signal.SIGKILL)
        for pid in {int(word) for word in (service / "cgroup.procs").read_text().split()}:
            kill(pid)
        assert {identity(pid) for pid in spared} == before
    finally:
        eventually(lambda: not (service / "cgroup.procs").read_text().split(), what="the service's cgroup is empty")
        service.rmdir()
    clean.start()
    clean.drop(pod)
    clean.drop(fresh)


def test_s24_nobody_else_gets_into_the_directories(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the umask is, and though somebody made the directories before, open to all."""
    directory = tmp_path_factory.mktemp("modes")
    directory.chmod(0o755)
    made = Node(directory / "node")
    for path in (made.root, made.state):
        path.mkdir(mode=0o777)
        path.chmod(0o777)
    before = Machine.now()
    try:
        made.start(umask=0)
        for path in (made.root, made.state):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            for inner, directories, files in os.walk(path):
                for name in [*directories, *files]:
                    mode = (Path(inner) / name).lstat().st_mode
                    assert not mode & 0o022, f"{inner}/{name} can be written to by others: {mode:o}"
    finally:
        made.end()
        retired(made, before)


def test_s50_sockets_are_ours_alone(kept: Node) -> None:
    """None is abstract, which a pod on the host's network could reach; all are 0600 in directories that are 0700."""
    pod, one, _ = kept.run(kept.image, ["sleep", "1000"])
    code, seen, _ = kept.client.exec_sync(one, ["cat", "/proc/net/unix"])
    assert code == 0
    ours = [line for line in seen.decode().splitlines() if str(kept.directory) in line]
    assert ours, "a pod on the host's network sees the names"
    assert not [line for line in seen.decode().splitlines() if " @" in line and "ocid" in line]
    sockets = [path for path in kept.state.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
    assert {"ocid.sock", "zygote.sock", "shim.sock"} <= {path.name for path in sockets}
    for path in sockets:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600, path
        assert path.lstat().st_uid == 0
    assert stat.S_IMODE(kept.state.stat().st_mode) == 0o700
    pid = os.fork()
    if pid == 0:
        # Little but system calls here: the test's threads are not in this process.
        refused = 0
        for path in sockets:
            os.chdir(path.parent)
            os.setegid(65534)
            os.seteuid(65534)
            with socket.socket(socket.AF_UNIX) as probe:
                refused += probe.connect_ex(path.name) == errno.EACCES
            os.seteuid(0)
            os.setegid(0)
        os._exit(0 if refused == len(sockets) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    kept.drop(pod)
