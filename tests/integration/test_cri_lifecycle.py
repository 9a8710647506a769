"""The CRI server with real parts on the real kernel, through gRPC on its socket: whole lives of pods and containers."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from cri.api import api_pb2_grpc
from runtime.linux.process import is_running, start_time
from tests import warm
from tests.e2e import Node, borrowed, lent, messages, node, seasoned, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import SOON_S, eventually, needs


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with seasoned(tmp_path_factory.mktemp("n") / "n", registry) as made:
        yield made


@pytest.fixture
def here(shared: Node) -> Iterator[Node]:
    with borrowed(shared) as made:
        yield made


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with seasoned(tmp_path_factory.mktemp("n") / "n", registry) as made:
        made.end()
        yield made


@pytest.fixture
def alone(ended: Node) -> Iterator[Node]:
    """Another, for whoever ends the daemon."""
    with lent(ended) as made:
        yield made


@pytest.fixture
def handled(alone: Node) -> Iterator[Path]:
    """Where a test names handlers, for the next daemon that it starts; later ones know nothing of them. A binary's own
    root stays, empty, as its cache does."""
    (alone.directory / "conf.d").mkdir()
    yield alone.directory / "conf.d" / "handlers.toml"
    alone.end()
    (alone.directory / "conf.d" / "handlers.toml").unlink()
    for directory in (alone.directory / "conf.d", *(alone.state / "handlers").iterdir(), alone.state / "handlers"):
        directory.rmdir()


@pytest.fixture
def image(registry: FakeRegistry) -> str:
    return f"{registry.name}/busybox:1"


def test_pods_live_and_leave_nothing(here: Node, image: str) -> None:
    before = here.held()
    config = here.pod_config(network=True)
    config.hostname = "asked-for"  # not the pod's name, which is what it has without a word
    pod = here.client.run_pod(config)
    address = here.client.pod_status(pod).network.ip
    assert address.startswith("10.")
    one = here.client.create(pod, container("one", image, ["sleep", "1000"]), config)
    assert here.client.status(one).state == pb.CONTAINER_CREATED
    here.client.start(one)
    two = here.client.create(pod, container("two", image, ["sh", "-c", "echo out; echo err >&2; exit 7"]), config)
    here.client.start(two)
    assert here.client.wait_exit(two) == 7
    status = here.client.status(two)
    assert (status.reason, status.created_at < status.started_at <= status.finished_at) == ("Error", True)
    log = Path(config.log_directory) / "two.log"
    assert (messages(log), messages(log, "stderr")) == (["out"], ["err"])
    assert here.client.exec_sync(one, ["hostname"])[:2] == (0, f"{config.hostname}\n".encode())
    assert address.encode() in here.client.exec_sync(one, ["ip", "addr"])[1]
    assert here.client.exec_sync(one, ["sh", "-c", "echo no >&2; exit 4"]) == (4, b"", b"no\n")
    stats = here.client.stats(one)
    assert stats.memory.working_set_bytes.value > 0 and stats.cpu.usage_core_nano_seconds.value > 0
    here.client.stop(one, 5)
    assert here.client.status(one).exit_code in (143, 137)
    here.client.remove(one)
    here.drop(pod)
    here.adds_nothing(before)


def test_a_command_that_does_not_exist_is_the_callers_error(here: Node, image: str) -> None:
    before = here.held()
    config = here.pod_config()
    pod = here.client.run_pod(config)
    with pytest.raises(grpc.RpcError, match='"/no/such/program".* no such file or directory') as caught:
        here.client.create(pod, container("bad", image, ["/no/such/program"]), config)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert here.client.list_containers() == []
    good = here.client.create(pod, container("bad", image, ["true"]), config)
    here.client.start(good)
    assert here.client.wait_exit(good) == 0
    here.drop(pod)
    here.adds_nothing(before)


def test_a_program_that_the_kernel_refuses_ends_with_the_cause(here: Node, image: str) -> None:
    """It is there and may be executed, so only execve finds out: at the start, and by then there is a container."""
    config = here.pod_config()
    pod = here.client.run_pod(config)
    script = here.directory / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    odd = container("odd", image, ["/script"])
    odd.mounts.add(container_path="/script", host_path=str(script), readonly=True)
    one = here.client.create(pod, odd, config)
    with pytest.raises(grpc.RpcError, match="/script"):
        here.client.start(one)
    status = here.client.status(one)
    assert (status.state, status.reason, status.exit_code != 0) == (pb.CONTAINER_EXITED, "StartError", True)
    assert "/script" in status.message
    here.client.remove(one)
    here.drop(pod)


def test_o14_o18_exits_while_the_daemon_is_dead_are_known_afterwards(alone: Node, image: str) -> None:
    config = alone.pod_config()
    pod = alone.client.run_pod(config)
    gate = alone.directory / "gate"
    gate.mkdir()
    made = {}
    for code in (0, 1, 42):
        one = container(f"c{code}", image, ["sh", "-c", f"while [ ! -e /gate/go ]; do sleep 0.05; done; exit {code}"])
        one.mounts.add(container_path="/gate", host_path=str(gate), readonly=True)
        made[code] = alone.client.create(pod, one, config)
        alone.client.start(made[code])
    stays = alone.client.create(pod, container("stays", image, ["sleep", "1000"]), config)
    alone.client.start(stays)
    pids = {alone.client.status(one).id: _pid(alone, one) for one in (*made.values(), stays)}
    alone.end(9)
    (gate / "go").touch()
    for code in made:
        eventually(lambda code=code: not Path(f"/proc/{pids[made[code]]}").exists(), what=f"exit {code}")
    for _ in range(2):
        alone.start()
        for code, one in made.items():
            status = alone.client.status(one)
            assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, code)
            assert status.reason == ("Completed" if code == 0 else "Error")
        assert alone.client.status(stays).state == pb.CONTAINER_RUNNING and _pid(alone, stays) == pids[stays]
        assert alone.client.pod_status(pod).state == pb.SANDBOX_READY
        alone.end(9)
    alone.start()
    assert alone.client.exec_sync(stays, ["echo", "still here"])[1] == b"still here\n"
    # What ends after the restart is told by events, too.
    alone.client.stop(stays, 0)
    assert alone.client.status(stays).exit_code == 137


def _pid(here: Node, one: str) -> int:
    request = pb.ContainerStatusRequest(container_id=one, verbose=True)
    return int(json.loads(here.client.runtime.ContainerStatus(request).info["info"])["pid"])


def test_o13_a_killed_shim_takes_its_containers_along_and_says_so(here: Node, image: str) -> None:
    before = here.held()
    pod, one, _ = here.run(image, ["sleep", "1000"])
    pid = _pid(here, one)
    ticks = start_time(pid)
    os.kill(here.shim(pod), 9)
    eventually(lambda: here.client.status(one).state == pb.CONTAINER_EXITED, what="the end is noticed")
    status = here.client.status(one)
    assert status.exit_code == 255 and status.reason == "ContainerStatusUnknown"
    assert not is_running(pid, ticks)
    assert here.client.pod_status(pod).state == pb.SANDBOX_NOTREADY
    here.drop(pod)
    here.adds_nothing(before)


def test_o20_a_stopped_shim_delays_neither_start_nor_list_and_can_be_stopped(alone: Node, image: str) -> None:
    before = alone.held()
    hung, inside, _ = alone.run(image, ["sleep", "1000"])
    fine, other, _ = alone.run(image, ["sleep", "1000"])
    shim = alone.shim(hung)
    ticks = start_time(shim)
    alone.end(9)
    os.kill(shim, 19)
    try:
        alone.start()
        assert {pod.id for pod in alone.client.list_pods()} == {hung, fine}
        assert alone.client.exec_sync(other, ["true"])[0] == 0
        assert alone.client.status(inside).state == pb.CONTAINER_RUNNING
        alone.drop(hung)
    finally:
        if is_running(shim, ticks):
            os.kill(shim, 18)
    alone.drop(fine)
    assert not is_running(shim, ticks)
    assert {line for line in alone.held() - before if not line.startswith("process ")} == set()


def test_o20_sighup_ends_nothing(here: Node, image: str) -> None:
    assert here.process is not None
    here.process.send_signal(1)
    assert here.client.version()[0] == "ocid"
    assert here.process.poll() is None


def test_sigusr1_tells_what_is_under_way(here: Node, image: str) -> None:
    assert here.process is not None
    pod, _, _ = here.run(image, ["sleep", "1000"])
    here.process.send_signal(10)
    eventually(lambda: f"({pod[:13]}): shim {here.shim(pod)}, ready True: main=" in here.log.read_text())
    assert here.process.poll() is None


def test_o54_a_second_stop_with_less_patience_wins(here: Node, image: str) -> None:
    pod, one, _ = here.run(image, ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    eventually(lambda: _ignores_term(_pid(here, one)))
    patient = here.client.runtime.StopContainer.future(pb.StopContainerRequest(container_id=one, timeout=600))
    eventually(lambda: not patient.done())
    here.client.stop(one, 1)
    assert patient.result(timeout=SOON_S) is not None
    assert here.client.status(one).exit_code == 137


def test_o54_hanging_up_does_not_end_the_stop(here: Node, image: str) -> None:
    pod, one, _ = here.run(image, ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    eventually(lambda: _ignores_term(_pid(here, one)))
    request = pb.StopContainerRequest(container_id=one, timeout=1)
    with pytest.raises(grpc.RpcError) as caught:
        here.client.runtime.StopContainer(request, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: here.client.status(one).state == pb.CONTAINER_EXITED)


def _ignores_term(pid: int) -> bool:
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> 14 & 1)


def test_a_pid_namespace_of_the_pod_and_another_containers(here: Node, image: str) -> None:
    config = here.pod_config()
    config.linux.security_context.namespace_options.pid = pb.POD
    pod = here.client.run_pod(config)
    shared = container("shared", image, ["sleep", "1234"])
    shared.linux.security_context.namespace_options.pid = pb.POD
    one = here.client.create(pod, shared, config)
    here.client.start(one)
    peer = container("peer", image, ["sleep", "1000"])
    peer.linux.security_context.namespace_options.pid = pb.POD
    two = here.client.create(pod, peer, config)
    here.client.start(two)
    assert b"sleep 1234" in here.client.exec_sync(two, ["ps"])[1]
    alone = container("alone", image, ["sleep", "1000"])
    three = here.client.create(pod, alone, config)
    here.client.start(three)
    assert b"sleep 1234" not in here.client.exec_sync(three, ["ps"])[1]
    debug = container("debug", image, ["sleep", "1000"])
    debug.linux.security_context.namespace_options.pid = pb.TARGET
    debug.linux.security_context.namespace_options.target_id = three
    four = here.client.create(pod, debug, config)
    here.client.start(four)
    assert os.readlink(f"/proc/{_pid(here, four)}/ns/pid") == os.readlink(f"/proc/{_pid(here, three)}/ns/pid")


def test_limits_are_in_force_and_can_be_changed(here: Node, image: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    limited = container("limited", image, ["sleep", "1000"])
    limited.linux.resources.memory_limit_in_bytes = 64 << 20
    one = here.client.create(pod, limited, config)
    here.client.start(one)
    assert here.client.stats(one).memory.available_bytes.value <= 64 << 20
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20, cpu_quota=20000, cpu_period=100000)
    request = pb.UpdateContainerResourcesRequest(container_id=one, linux=resources)
    here.client.runtime.UpdateContainerResources(request)
    assert here.client.stats(one).memory.available_bytes.value <= 32 << 20
    said = here.client.status(one).resources.linux
    assert (said.memory_limit_in_bytes, said.cpu_quota) == (32 << 20, 20000)


def test_o56_oom_is_told(here: Node, image: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    hog = container("hog", image, ["sh", "-c", "x=x; while :; do x=$x$x; done"])
    hog.linux.resources.memory_limit_in_bytes = 16 << 20
    one = here.client.create(pod, hog, config)
    here.client.start(one)
    assert here.client.wait_exit(one) == 137
    assert here.client.status(one).reason == "OOMKilled"


def test_the_log_is_reopened(here: Node, image: str) -> None:
    pod, one, log = here.run(image, ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"])
    eventually(lambda: len(messages(log)) > 3)
    old = log.with_suffix(".1")
    log.rename(old)
    here.client.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=one))
    eventually(lambda: len(messages(log)) > 3)
    here.client.stop(one)
    both = [int(word) for word in messages(old) + messages(log)]
    assert both == list(range(1, len(both) + 1))


def test_s51_exec_output_is_bounded_and_the_command_goes_on(tmp_path: Path, registry: FakeRegistry, image: str) -> None:
    with node(tmp_path / "n", limits="exec_output_bytes = 65536") as here:
        here.client.pull(image)
        _, one, _ = here.run(image, ["sleep", "1000"])
        script = "head -c 1000000 /dev/zero; echo why >&2; exit 3"
        code, output, errors = here.client.exec_sync(one, ["sh", "-c", script])
        assert (code, len(output), errors) == (3, 65536 - 4, b"why\n")
        with pytest.raises(grpc.RpcError, match=r"not done within 1 s"):
            here.client.exec_sync(one, ["cat", "/dev/zero"], timeout_s=1)


def test_as_much_output_as_the_default_keeps_is_an_answer_that_a_kubelet_takes(here: Node, image: str) -> None:
    """Which is one of 16 MiB (its remote runtime's maxMsgSize)."""
    _, one, _ = here.run(image, ["sleep", "1000"])
    script = "head -c 20000000 /dev/zero & head -c 20000000 /dev/zero >&2; wait"
    request = pb.ExecSyncRequest(container_id=one, cmd=["sh", "-c", script])
    with grpc.insecure_channel(f"unix:{here.socket}", [("grpc.max_receive_message_length", 16 << 20)]) as channel:
        answer = api_pb2_grpc.RuntimeServiceStub(channel).ExecSync(request, timeout=60)
    assert answer.exit_code == 0 and len(answer.stdout) + len(answer.stderr) == 16_000_000
    assert len(answer.stderr) == 2_000_000


def test_exec_that_takes_too_long_is_killed(here: Node, image: str) -> None:
    _, one, _ = here.run(image, ["sleep", "1000"])
    with pytest.raises(grpc.RpcError, match="not done within 1 s, it was killed") as caught:
        here.client.exec_sync(one, ["sh", "-c", "sleep 300 & sleep 301"], timeout_s=1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert b"sleep 30" not in here.client.exec_sync(one, ["ps"])[1]


def test_exec_with_as_much_time_as_there_are_seconds(here: Node, image: str) -> None:
    _, one, _ = here.run(image, ["sleep", "1000"])
    assert here.client.exec_sync(one, ["sh", "-c", "exit 3"], timeout_s=2**63 - 1)[0] == 3


def test_arguments_that_no_command_may_have_are_the_callers_mistake(here: Node, image: str) -> None:
    _, one, _ = here.run(image, ["sleep", "1000"])
    with pytest.raises(grpc.RpcError, match=r"exec /bin/echo: argument list too long \(E2BIG\)") as caught:
        here.client.exec_sync(one, ["echo", "x" * (1 << 18)])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_s24_nothing_of_it_can_be_entered_by_others(tmp_path: Path, registry: FakeRegistry, image: str) -> None:
    (tmp_path / "n" / "root").mkdir(parents=True, mode=0o777)
    (tmp_path / "n" / "state").mkdir(mode=0o777)
    for name in ("root", "state"):
        (tmp_path / "n" / name).chmod(0o777)
    with node(tmp_path / "n") as here:
        here.end()
        here.start(umask=0)
        here.client.pull(image)
        here.run(image, ["sleep", "1000"])
        modes = {path: path.stat().st_mode & 0o7777 for path in (here.root, here.state, here.state / "pods")}
        modes[here.state / "bundles"] = (here.state / "bundles").stat().st_mode & 0o7777
        assert set(modes.values()) == {0o700}
        assert here.socket.stat().st_mode & 0o777 == 0o600 and here.socket.stat().st_uid == 0
        assert (here.root / "ocid.db").stat().st_mode & 0o777 == 0o600


def test_a_second_daemon_is_refused(here: Node) -> None:
    result = subprocess.run([*here.words, "serve"], capture_output=True, text=True, timeout=SOON_S, check=False)
    assert result.returncode != 0 and f"another ocid serves {here.socket}" in result.stderr
    assert "Traceback" not in result.stderr
    assert here.client.version()[0] == "ocid"


def test_a_command_that_waited_for_a_starting_daemon_goes_through_it(here: Node) -> None:
    """While a daemon recovers it has the lock, and no socket yet."""
    hidden = here.socket.with_name("hidden.sock")
    here.socket.rename(hidden)
    try:
        command = warm.Command([*here.words, "ps"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: _waits(command.pid, here))
    finally:
        hidden.rename(here.socket)
    out, error = command.communicate(timeout=SOON_S / 2)  # half of what it would wait for the lock
    assert (command.returncode, error) == (0, b"") and out.startswith(b"ID ")


def test_a_daemon_waits_for_a_command_that_is_there(alone: Node) -> None:
    alone.end()
    lock = os.open(alone.root / "lock", os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(alone.start)
        try:
            eventually(lambda: alone.process is not None and _waits(alone.process.pid, alone))
        finally:
            os.close(lock)
        starting.result(SOON_S)
    assert alone.client.version()[0] == "ocid"


def _waits(pid: int, node: Node) -> bool:
    """Whether the process has the root's lock open."""
    held = f"/proc/{pid}/fd"
    try:
        return str(node.root / "lock") in {os.readlink(f"{held}/{name}") for name in os.listdir(held)}
    except OSError:
        return False


@pytest.mark.parametrize("handler", ["runc"])
def test_a_runc_compatible_binary_runs_pods_as_the_native_one_does(
    alone: Node, handled: Path, image: str, handler: str
) -> None:
    needs(handler)
    handled.write_text(f'[runtime.handlers]\n{handler} = "/usr/sbin/{handler}"\n')
    alone.end()
    alone.start()
    before = {line for line in alone.held() if not line.startswith("process ")}
    config = alone.pod_config(network=True)
    pod = alone.client.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config, runtime_handler=handler))
    pod_id = pod.pod_sandbox_id
    assert alone.client.pod_status(pod_id).runtime_handler == handler
    one = alone.client.create(pod_id, container("one", image, ["sh", "-c", "echo hello; sleep 1000"]), config)
    alone.client.start(one)
    # crun 1.8, Debian's, takes no later one, and does not run on a hybrid like this.
    assert json.loads((alone.state / "bundles" / one / "config.json").read_bytes())["ociVersion"] == "1.0.2"
    log = Path(config.log_directory) / "one.log"
    eventually(lambda: messages(log) == ["hello"])
    assert alone.client.exec_sync(one, ["sh", "-c", "hostname; exit 3"])[:2] == (3, f"{config.hostname}\n".encode())
    alone.end(9)
    alone.start()
    assert alone.client.status(one).state == pb.CONTAINER_RUNNING
    alone.client.stop(one, 0)
    assert alone.client.status(one).exit_code == 137
    alone.client.remove(one)
    alone.drop(pod_id)
    left = {line for line in alone.held() if not line.startswith("process ")} - before
    assert {line for line in left if f"{alone.state}/handlers" not in line} == set()
    assert not list((alone.state / "handlers" / f"usr-sbin-{handler}").iterdir())


def test_a_binary_that_is_not_there_leaves_nothing(alone: Node, handled: Path, image: str) -> None:
    handled.write_text('[runtime.handlers]\nlost = "/no/such/binary"\n')
    alone.end()
    alone.start()
    config = alone.pod_config()
    pod = alone.client.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config, runtime_handler="lost"))
    with pytest.raises(grpc.RpcError, match="step create: run /no/such/binary: .*ENOENT"):
        alone.client.create(pod.pod_sandbox_id, container("one", image, ["true"]), config)
    assert not list((alone.state / "bundles").iterdir())
    assert not [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{alone.state}/bundles" in line
    ]
    alone.drop(pod.pod_sandbox_id)


def test_o42_stats_while_containers_come_and_go(here: Node, image: str) -> None:
    config = here.pod_config()
    pod = here.client.run_pod(config)
    stays = here.client.create(pod, container("stays", image, ["sleep", "1000"]), config)
    here.client.start(stays)
    for number in range(10):
        one = here.client.create(pod, container(f"c{number}", image, ["sleep", "1000"]), config)
        starting = here.client.runtime.StartContainer.future(pb.StartContainerRequest(container_id=one))
        seen = {item.attributes.id for item in here.client.list_stats()}
        starting.result()
        removing = here.client.runtime.RemoveContainer.future(pb.RemoveContainerRequest(container_id=one))
        while not removing.done():
            seen = {item.attributes.id for item in here.client.list_stats()}
            assert stays in seen
        removing.result()


def test_eight_callers_at_once(here: Node, image: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = here.held()
    configs = [here.pod_config(network=True) for _ in range(24)]

    def whole_life(config: pb.PodSandboxConfig) -> str:
        pod = here.client.run_pod(config)
        one = here.client.create(pod, container("main", image, ["sleep", "1000"]), config)
        here.client.start(one)
        here.client.exec_sync(one, ["true"])
        address = str(here.client.pod_status(pod).network.ip)
        here.drop(pod)
        return address

    with ThreadPoolExecutor(8) as pool:
        addresses = list(pool.map(whole_life, configs))
    assert all(addresses)
    here.adds_nothing(before)
