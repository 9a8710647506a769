"""Statistics, events and limits of pods on the real kernel, through gRPC on the daemon's socket."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import connected, container
from conformance.daemons import remove_cgroup
from cri.api import api_pb2 as pb
from runtime.cgroups.hierarchy import detect
from tests.e2e import Node, borrowed, lent, seasoned, stocked
from tests.fakes.registry import FakeRegistry
from tests.support import SOON_S, eventually, needs

MIB = 1 << 20


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    needs("root", "overlay", "busybox")
    with stocked() as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, registry: FakeRegistry) -> Iterator[Node]:
    with seasoned(tmp_path_factory.mktemp("n") / "n", registry, limits="stats_s = 1") as made:
        yield made


@pytest.fixture
def here(shared: Node) -> Iterator[Node]:
    with borrowed(shared) as made:
        yield made
    remove_cgroup(f"{shared.tag}p")


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
    remove_cgroup(f"{ended.tag}p")


def _pod(here: Node, *, network: bool = False) -> tuple[str, Any, str]:
    """A pod as a kubelet makes it, with a cgroup of its own: id, configuration, cgroup."""
    config = here.pod_config(network=network)
    config.linux.cgroup_parent = f"/{here.tag}p/{config.metadata.name}"
    return here.client.run_pod(config), config, config.linux.cgroup_parent


def _run(here: Node, pod: str, config: Any, name: str, script: str) -> str:
    one = here.client.create(pod, container(name, here.image, ["sh", "-c", script]), config)
    here.client.start(one)
    return str(one)


def _pod_stats(here: Node, pod: str) -> Any:
    return here.client.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats


def _file(cgroup: str, *names: str) -> str:
    """The first of these files that there is in any hierarchy."""
    paths = [Path(f"{place.mount}{cgroup}/{name}") for name in names for place in detect()]
    return next(path for path in paths if path.exists()).read_text().strip()


def test_a_pods_figures_are_its_cgroups_and_its_interfaces(here: Node) -> None:
    before = here.held()
    pod, config, _ = _pod(here, network=True)
    one = _run(here, pod, config, "one", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000")
    two = _run(here, pod, config, "two", "exec sleep 1000")
    address = here.client.pod_status(pod).network.ip
    before_ping = _pod_stats(here, pod).linux.network.default_interface
    namespace = os.stat("/proc/self/ns/net").st_ino
    gateway = address.rsplit(".", 1)[0] + ".1"
    code, output, _ = here.client.exec_sync(one, ["ping", "-c", "3", "-s", "1000", gateway])
    assert code == 0, output
    linux = _pod_stats(here, pod).linux
    assert {item.attributes.id for item in linux.containers} == {one, two}
    assert linux.memory.working_set_bytes.value > 0 and linux.cpu.usage_nano_cores.value > 0
    assert linux.process.process_count.value == 2
    # What containers have used is the pod's use: with a little of who set them up, and never less.
    assert linux.cpu.usage_core_nano_seconds.value >= sum(
        item.cpu.usage_core_nano_seconds.value for item in linux.containers
    )
    eth0 = linux.network.default_interface
    assert eth0.name == "eth0" and not linux.network.interfaces
    assert eth0.tx_bytes.value - before_ping.tx_bytes.value >= 3000
    assert eth0.rx_bytes.value - before_ping.rx_bytes.value >= 3000
    assert (eth0.rx_errors.value, eth0.tx_errors.value) == (0, 0)
    assert here.process is not None
    for task in Path(f"/proc/{here.process.pid}/task").iterdir():
        assert (task / "ns" / "net").stat().st_ino == namespace, "a thread of the daemon is in the pod's network"
    if Path("/proc/pressure/io").exists():
        assert linux.io.HasField("psi") and linux.cpu.psi.HasField("Some") and linux.memory.psi.HasField("Full")
    (listed,) = here.client.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest()).stats
    assert listed.attributes.id == pod and len(listed.linux.containers) == 2
    here.drop(pod)
    here.adds_nothing(before)


def test_a_pods_processes_are_not_its_threads(here: Node) -> None:
    pod, config, _ = _pod(here)
    one = _run(here, pod, config, "one", "exec sleep 1000")
    program = "import sys, threading; [threading.Thread(target=sys.stdin.read).start() for _ in range(5)]; print()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as threads:
        try:
            assert threads.stdout is not None and threads.stdout.readline() == b"\n"
            for place in detect():
                procs = Path(f"{place.mount}{_cgroup(here, one)}/cgroup.procs")
                if procs.exists():
                    procs.write_text(str(threads.pid))
            assert int(_file(_cgroup(here, one), "pids.current")) == 7
            assert _pod_stats(here, pod).linux.process.process_count.value == 2
        finally:
            threads.kill()
    here.drop(pod)


def _cgroup(here: Node, one: str) -> str:
    return str(here.client.info(one)["runtimeSpec"]["linux"]["cgroupsPath"])


def test_metrics_of_descriptors_sockets_limits_and_inodes(here: Node) -> None:
    pod, config, _ = _pod(here)
    one = _run(here, pod, config, "one", "exec 7</dev/null; nc -l -p 8080 & exec sleep 1000")

    def metrics() -> dict[str, int]:
        request = pb.ListPodSandboxMetricsRequest()
        listed = here.client.runtime.ListPodSandboxMetrics(request).pod_metrics
        (found,) = (item for of in listed for item in of.container_metrics if item.container_id == one)
        return {item.name: item.value.value for item in found.metrics if item.label_values[-1] not in ("cpu",)}

    # sleep with 0, 1, 2 and 7; nc with those, and the socket that it listens on.
    found = eventually(lambda: (known := metrics())["container_sockets"] == 1 and known)
    assert isinstance(found, dict)
    assert found["container_processes"] == 2 and found["container_file_descriptors"] == 9
    info = json.loads(
        here.client.runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=one, verbose=True)).info["info"]
    )
    assert found["container_ulimits_soft"] == resource.prlimit(info["pid"], resource.RLIMIT_NOFILE)[0]
    disk = os.statvfs(here.root)
    assert found["container_fs_inodes_total"] == disk.f_files
    assert 0 < found["container_fs_inodes_free"] < disk.f_files
    assert found["container_fs_limit_bytes"] == disk.f_blocks * disk.f_frsize
    here.drop(pod)


def test_what_is_described_comes_with_the_first_answer(here: Node) -> None:
    """critest wants a sample of each metric that is described, of a container with limits that has just begun."""
    pod, config, _ = _pod(here, network=True)
    wanted = container("one", here.image, ["sh", "-c", "echo hi > /file; sync; exec sleep 1000"])
    resources = wanted.linux.resources
    resources.cpu_period, resources.cpu_quota, resources.cpu_shares = 100_000, 20_000, 1024
    resources.memory_limit_in_bytes = resources.memory_swap_limit_in_bytes = 64 * MIB
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    described = here.client.runtime.ListMetricDescriptors(pb.ListMetricDescriptorsRequest()).descriptors
    (listed,) = here.client.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()).pod_metrics
    found = [*listed.metrics, *(item for of in listed.container_metrics for item in of.metrics)]
    labels = {item.name: len(item.label_values) for item in found}
    lacking = {item.name for item in described if labels.get(item.name) != len(item.label_keys)}
    # Whether anything has reached a disk by now is up to the machine.
    assert {name for name in lacking if not name.startswith(("container_fs_", "container_blkio_"))} == set()
    assert labels.keys() <= {item.name for item in described}
    here.drop(pod)


def test_metrics_of_tasks_by_state_and_of_their_load(here: Node) -> None:
    """One that is stopped, one that runs for ever, and shells that wait for them."""
    pod, config, _ = _pod(here)
    script = "sleep 1000 & kill -STOP $!; sh -c 'while :; do :; done' & wait"
    one = _run(here, pod, config, "one", script)

    def states() -> dict[str, int]:
        request = pb.ListPodSandboxMetricsRequest()
        (found,) = here.client.runtime.ListPodSandboxMetrics(request).pod_metrics[0].container_metrics
        assert found.container_id == one
        loads = {item.name: item.value.value for item in found.metrics if "_load_" in item.name}
        tasks = [item for item in found.metrics if item.name == "container_tasks_state"]
        return {item.label_values[-1]: item.value.value for item in tasks} | loads

    found = eventually(lambda: (known := states()) and known["stopped"] == known["running"] == 1 and known)
    assert isinstance(found, dict)
    assert (found["sleeping"], found["uninterruptible"], found["container_cpu_load_d_average_10s"]) == (1, 0, 0)
    before = found["container_cpu_load_average_10s"]
    assert 0 <= before <= 3000, "thousandths of the tasks that may have run when it was looked at first"
    if before != 1000:  # none or two did: the mean comes nearer to the one that always does
        eventually(lambda: abs(states()["container_cpu_load_average_10s"] - 1000) < abs(before - 1000))
    here.drop(pod)


def test_o42_lists_of_statistics_are_whole_while_everything_comes_and_goes(here: Node) -> None:
    stays, config, _ = _pod(here)
    one = _run(here, stays, config, "stays", "exec sleep 1000")
    ended = threading.Event()
    failures: list[Exception] = []

    def churn() -> None:
        try:
            with connected(here.socket) as client:
                while not ended.is_set():
                    pod_config = here.pod_config()
                    pod_config.linux.cgroup_parent = f"/{here.tag}p/{pod_config.metadata.name}"
                    pod = client.run_pod(pod_config)
                    brief = client.create(pod, container("brief", here.image, ["sleep", "1000"]), pod_config)
                    client.start(brief)
                    client.stop_pod(pod)
                    client.remove_pod(pod)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    sizes = set()
    try:
        for _ in range(60):
            stats = here.client.list_stats()
            pods = here.client.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest()).stats
            metrics = here.client.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest()).pod_metrics
            assert one in {item.attributes.id for item in stats}
            assert stays in {item.attributes.id for item in pods} & {item.pod_sandbox_id for item in metrics}
            sizes.add(len(stats))
    finally:
        ended.set()
        thread.join()
    assert not failures, failures
    assert sizes == {1, 2}, "the other pod was never seen coming and going"
    here.drop(stays)


def test_o55_events_of_real_containers_come_in_order_and_none_is_lost(alone: Node) -> None:
    stream = alone.client.runtime.GetContainerEvents(pb.GetEventsRequest())
    stream.initial_metadata()  # from here on, nothing is missed
    pod, config, _ = _pod(alone)
    quick = [_run(alone, pod, config, f"quick{number}", f"exit {number}") for number in range(5)]
    for one in quick:
        alone.client.wait_exit(one)
        alone.client.remove(one)
    alone.drop(pod)
    seen: dict[str, list[Any]] = {}
    for event in stream:
        seen.setdefault(event.container_id, []).append(event)
        if event.container_id == pod and event.container_event_type == pb.CONTAINER_DELETED_EVENT:
            break
    stream.cancel()
    life = [
        pb.CONTAINER_CREATED_EVENT,
        pb.CONTAINER_STARTED_EVENT,
        pb.CONTAINER_STOPPED_EVENT,
        pb.CONTAINER_DELETED_EVENT,
    ]
    assert seen.keys() == {pod, *quick}
    assert {id_: [event.container_event_type for event in events] for id_, events in seen.items()} == dict.fromkeys(
        seen, life
    )
    for number, one in enumerate(quick):
        (status,) = [item for item in seen[one][2].containers_statuses if item.id == one]
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, number)
    idle = alone.client.runtime.GetContainerEvents(pb.GetEventsRequest())
    idle.initial_metadata()
    assert alone.process is not None
    alone.process.terminate()
    with pytest.raises(grpc.RpcError, match="stopping") as caught:
        next(iter(idle))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    alone.process.wait(SOON_S)  # a reader does not hold up the end


def test_limits_of_a_pod_are_in_force_as_a_whole_or_not_at_all(alone: Node) -> None:
    pod, config, cgroup = _pod(alone)

    def update(**fields: Any) -> None:
        resources = pb.LinuxContainerResources(**fields)
        request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=resources)
        alone.client.runtime.UpdatePodSandboxResources(request)

    def limits() -> tuple[str, str]:
        return _file(cgroup, "memory.limit_in_bytes", "memory.max"), _file(cgroup, "cpu.shares", "cpu.weight")

    one = _run(alone, pod, config, "one", "exec sleep 1000")
    cpus = _file("", "cpuset.effective_cpus", "cpuset.cpus.effective")  # v1 takes none away that a container may use
    update(memory_limit_in_bytes=256 * MIB, cpu_shares=512, cpuset_cpus=cpus)
    memory, shares = limits()
    assert memory == str(256 * MIB) and shares in ("512", "59")
    assert _file(cgroup, "cpuset.cpus") == cpus
    # The last of these cannot be: no machine has such a processor.
    with pytest.raises(grpc.RpcError, match="cpus"):
        update(memory_limit_in_bytes=128 * MIB, cpu_shares=1024, cpuset_cpus="4000")
    assert limits() == (memory, shares)
    with pytest.raises(grpc.RpcError, match="memory") as caught:
        update(memory_limit_in_bytes=4096)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError, match=r"resources\.oom_score_adj") as caught:
        update(cpu_shares=1024, oom_score_adj=500)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert limits() == (memory, shares) and alone.client.status(one).state == pb.CONTAINER_RUNNING
    alone.end()
    alone.start()
    update(cpu_shares=2048)
    assert limits()[0] == memory and limits()[1] != shares
    alone.drop(pod)


def test_limits_of_a_container_are_in_force_as_a_whole_or_not_at_all(here: Node) -> None:
    pod, config, _ = _pod(here)
    wanted = container("one", here.image, ["sleep", "1000"])
    wanted.linux.resources.hugepage_limits.add(page_size="2MB", limit=8 * MIB)
    one = here.client.create(pod, wanted, config)
    here.client.start(one)
    request = pb.ContainerStatusRequest(container_id=one, verbose=True)
    cgroup = json.loads(here.client.runtime.ContainerStatus(request).info["info"])["cgroup"]

    def update(**fields: Any) -> None:
        resources = pb.LinuxContainerResources(**fields)
        here.client.runtime.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=one, linux=resources)
        )

    def limits() -> list[str]:
        files = (
            ("memory.limit_in_bytes", "memory.max"),
            ("memory.memsw.limit_in_bytes", "memory.swap.max"),
            ("cpu.cfs_quota_us", "cpu.max"),
            ("cpu.cfs_period_us", "cpu.max"),
            ("cpu.shares", "cpu.weight"),
            ("cpuset.cpus",),
            ("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"),
        )
        return [_file(cgroup, *names) for names in files]

    before = limits()
    pages = [pb.HugepageLimit(page_size="2MB", limit=2 * MIB)]
    update(
        memory_limit_in_bytes=64 * MIB,
        memory_swap_limit_in_bytes=96 * MIB,
        cpu_period=50_000,
        cpu_quota=25_000,
        cpu_shares=256,
        cpuset_cpus="0",
        hugepage_limits=pages,
    )
    after = limits()
    assert after[0] == str(64 * MIB) and after[1] in (str(96 * MIB), str(32 * MIB))
    assert after[2].split()[0] == "25000" and after[3].split()[-1] == "50000"
    assert after[5:] == ["0", str(2 * MIB)]
    assert all(old != new for old, new in zip(before[:5], after[:5], strict=True))
    with pytest.raises(grpc.RpcError, match="cpus"):
        update(memory_limit_in_bytes=32 * MIB, cpu_quota=10_000, cpuset_cpus="4000")
    assert limits() == after
    shown = here.client.status(one).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota, shown.cpuset_cpus) == (64 * MIB, 25_000, "0")
    here.drop(pod)


def test_o56_an_oom_is_told_with_its_reason_in_the_event(here: Node) -> None:
    stream = here.client.runtime.GetContainerEvents(pb.GetEventsRequest())
    stream.initial_metadata()
    pod, config, _ = _pod(here)
    greedy = container("greedy", here.image, ["sh", "-c", "tail /dev/zero"])
    # And no swap, which it would fill first where there is some.
    greedy.linux.resources.memory_limit_in_bytes = greedy.linux.resources.memory_swap_limit_in_bytes = 16 * MIB
    one = here.client.create(pod, greedy, config)
    here.client.start(one)
    stopped = next(
        event
        for event in stream
        if event.container_id == one and event.container_event_type == pb.CONTAINER_STOPPED_EVENT
    )
    stream.cancel()
    (status,) = stopped.containers_statuses
    assert (status.reason, status.exit_code != 0) == ("OOMKilled", True)
    here.drop(pod)
