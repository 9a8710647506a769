"""Limits of containers and pods on cgroup v2, as a kubelet asks for them there; what v1 has too is in
tests/integration/test_cri_stats.py, which runs on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conformance.cri_client import container
from conformance.daemons import remove_cgroup
from cri.api import api_pb2 as pb
from tests.e2e import Node, seasoned
from tests.fakes.registry import FakeRegistry
from tests.support import eventually
from tests.vm.images import busybox

MIB = 1 << 20
# Takes memory in a child, and says whether it is still there afterwards.
GREEDY = "(x=x; while :; do x=$x$x; done); echo on; exec sleep 1000"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with FakeRegistry() as registry:
        registry.add("busybox", "1", busybox())
        with seasoned(tmp_path_factory.mktemp("n"), registry, limits="stats_s = 1") as made:
            yield made
            remove_cgroup(f"{made.tag}p")


class Pod:
    """A pod with a cgroup of its own, as a kubelet's has."""

    def __init__(self, made: Node) -> None:
        self.node = made
        self.config = made.pod_config()
        self.config.linux.cgroup_parent = f"/{made.tag}p/{self.config.metadata.name}"
        self.id = made.client.run_pod(self.config)

    def run(self, script: str, unified: dict[str, str] | None = None, **limits: Any) -> str:
        one = container("main", self.node.image, ["sh", "-c", script])
        one.linux.resources.CopyFrom(pb.LinuxContainerResources(unified=unified, **limits))
        id_ = self.node.client.create(self.id, one, self.config)
        self.node.client.start(id_)
        return str(id_)

    def update(self, one: str = "", **limits: Any) -> None:
        """Of a container, or of the pod itself."""
        resources, runtime = pb.LinuxContainerResources(**limits), self.node.client.runtime
        if one:
            runtime.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=one, linux=resources))
        else:
            request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=self.id, resources=resources)
            runtime.UpdatePodSandboxResources(request)

    def files(self, *names: str, one: str = "") -> list[str]:
        path = self.config.linux.cgroup_parent
        if one:
            path = self.node.client.info(one)["runtimeSpec"]["linux"]["cgroupsPath"]
        return [Path(f"/sys/fs/cgroup{path}/{name}").read_text().strip() for name in names]


@pytest.fixture
def pod(bench: Node) -> Iterator[Pod]:
    before = bench.held()
    made = Pod(bench)
    yield made
    bench.drop(made.id)
    bench.settles(before)


def test_files_by_their_own_names_are_written_and_changed_or_refused_as_a_whole(pod: Pod) -> None:
    names = ("memory.high", "memory.min", "memory.swap.max", "memory.oom.group", "pids.max")
    first = dict(zip(names, map(str, (48 * MIB, MIB, 0, 1, 77)), strict=True))
    one = pod.run("exec sleep 1000", first, memory_limit_in_bytes=64 * MIB)
    assert pod.files(*names, one=one) == list(first.values())
    pod.update(one, memory_limit_in_bytes=96 * MIB, unified={"memory.high": str(80 * MIB), "pids.max": "88"})
    after = [str(80 * MIB), *list(first.values())[1:4], "88"]
    assert pod.files(*names, one=one) == after and pod.files("memory.max", one=one) == [str(96 * MIB)]
    for unified, words in (({"pids.max": "99", "memory.high": "much"}, "memory.high"), ({"no.such": "1"}, "no.such")):
        with pytest.raises(grpc.RpcError) as caught:
            pod.update(one, memory_limit_in_bytes=64 * MIB, unified=unified)
        assert words in str(caught.value.details())
        assert pod.files(*names, one=one) == after and pod.files("memory.max", one=one) == [str(96 * MIB)]


def test_swap_is_what_both_have_less_memory(pod: Pod) -> None:
    one = pod.run("exec sleep 1000", memory_limit_in_bytes=32 * MIB, memory_swap_limit_in_bytes=48 * MIB)
    assert pod.files("memory.max", "memory.swap.max", one=one) == [str(32 * MIB), str(16 * MIB)]
    pod.update(one, memory_limit_in_bytes=32 * MIB, memory_swap_limit_in_bytes=32 * MIB)
    assert pod.files("memory.swap.max", one=one) == ["0"]


def test_a_pods_files_are_written_as_a_whole_or_not_at_all(pod: Pod) -> None:
    pod.run("exec sleep 1000")
    pages = [pb.HugepageLimit(page_size="2MB", limit=4 * MIB)]
    pod.update(memory_limit_in_bytes=256 * MIB, unified={"memory.high": str(200 * MIB)}, hugepage_limits=pages)
    names = ("memory.max", "memory.high", "hugetlb.2MB.max")
    wanted = [str(256 * MIB), str(200 * MIB), str(4 * MIB)]
    assert pod.files(*names) == wanted
    with pytest.raises(grpc.RpcError, match="memory"):
        pod.update(hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=0)], unified={"memory.high": "much"})
    assert pod.files(*names) == wanted


@pytest.mark.parametrize("together", [False, True])
def test_o56_who_dies_for_want_of_memory_dies_alone_or_with_all_of_his_container(pod: Pod, together: bool) -> None:
    unified = {"memory.oom.group": str(int(together)), "memory.swap.max": "0"}
    one = pod.run(GREEDY, unified, memory_limit_in_bytes=24 * MIB)
    if together:
        assert pod.node.client.wait_exit(one) == 137
        assert pod.node.client.status(one).reason == "OOMKilled"
    else:
        log = Path(pod.node.client.status(one).log_path)
        eventually(lambda: " on" in log.read_text(), what="the container to outlive its child")
        assert pod.node.client.status(one).state == pb.CONTAINER_RUNNING
        assert pod.node.client.exec_sync(one, ["true"])[0] == 0


def test_a_limit_of_processes_holds(pod: Pod) -> None:
    one = pod.run("exec sleep 1000", {"pids.max": "4"})
    code, _, said = pod.node.client.exec_sync(one, ["sh", "-c", "for i in 1 2 3 4 5; do sleep 9 & done; wait"])
    assert code != 0 and b"fork" in said
    request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)
    assert pod.node.client.runtime.PodSandboxStats(request).stats.linux.process.process_count.value >= 1


def test_figures_have_the_pressure_and_what_swap_is_left(pod: Pod) -> None:
    one = pod.run("while :; do :; done", memory_limit_in_bytes=32 * MIB, memory_swap_limit_in_bytes=48 * MIB)

    def stats() -> Any:
        return pod.node.client.stats(one)

    eventually(lambda: stats().cpu.usage_nano_cores.value > 0, what="a window of the processor's use")
    found = stats()
    assert found.swap.swap_available_bytes.value == 16 * MIB - found.swap.swap_usage_bytes.value
    assert 0 < found.memory.working_set_bytes.value <= 32 * MIB
    told = pod.files("cpu.pressure", one=one)[0]
    total = int(told.splitlines()[0].rpartition("total=")[2])
    # Others' wait for a processor is the container's own, and only grows.
    assert found.cpu.psi.HasField("Some") and found.cpu.psi.Some.Total <= total
    assert found.memory.psi.HasField("Full") and found.io.psi.HasField("Some")
