"""Statistics of pods and containers: windows, sums, what is left out; on fakes, and figures as values."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from cri import metrics, usage
from cri.api import api_pb2 as pb
from cri.api import api_pb2_grpc
from cri.interfaces import InterfaceCounters
from cri.records import Container, Pod
from runtime.cgroups.stats import DeviceIo, HugePages, Pressure, Stall, Stats
from tests.fakes.node import IMAGE, Rig, connected_to, on_rig

S = 1_000_000_000
POD = Pod("p", "web", "default", "u", 0, "native", b"", 1, made_ns=2)


def test_a_pods_figures_in_the_cris_words() -> None:
    stalls = Pressure(Stall(77, 1.5, 0.25, 0.0), None)
    stats = Stats(
        5 * S,
        cpu_usage_ns=7,
        memory_usage=1000,
        memory_inactive_file=300,
        memory_limit=2000,
        memory_rss=50,
        pids=4,
        cpu_pressure=stalls,
        io_pressure=stalls,
    )
    interfaces = [InterfaceCounters(name, 1, 2, 3, 4, 5, 6, 7, 8) for name in ("net1", "eth0")]
    linux = usage.pod_stats(POD, stats, 9, 3, interfaces, [pb.ContainerStats()]).linux
    assert (linux.cpu.usage_core_nano_seconds.value, linux.cpu.usage_nano_cores.value) == (7, 9)
    memory = linux.memory
    assert (memory.usage_bytes.value, memory.working_set_bytes.value, memory.available_bytes.value) == (1000, 700, 1300)
    assert (linux.cpu.psi.Some.Total, linux.cpu.psi.Some.Avg10, linux.cpu.psi.HasField("Full")) == (77, 1.5, False)
    assert linux.io.psi.Some.Avg60 == 0.25 and not memory.HasField("psi")
    default = linux.network.default_interface
    assert (default.name, default.rx_bytes.value, default.tx_bytes.value) == ("eth0", 3, 4)
    assert (default.rx_errors.value, default.tx_errors.value) == (5, 6)
    assert [one.name for one in linux.network.interfaces] == ["net1"]
    assert linux.process.process_count.value == 3 and len(linux.containers) == 1
    for part in (linux.cpu, memory, linux.network, linux.process, linux.io):
        assert part.timestamp == 5 * S


def test_what_is_not_known_is_not_said() -> None:
    message = usage.pod_stats(POD, None, 0, 0, None, [])
    assert message.attributes.id == "p" and not message.HasField("linux")
    linux = usage.pod_stats(POD, Stats(1), 0, 0, None, []).linux
    assert not linux.HasField("network") and not linux.HasField("io") and not linux.memory.HasField("available_bytes")


def test_a_sum_has_a_limit_only_where_all_have_one() -> None:
    one, two = Stats(1, cpu_usage_ns=2, memory_usage=3, memory_limit=10), Stats(1, cpu_usage_ns=5, memory_usage=7)
    assert usage.total([one, one], 9) == Stats(9, cpu_usage_ns=4, memory_usage=6, memory_limit=20)
    assert usage.total([one, two], 9).memory_limit == -1 and usage.total([], 9) == Stats(9)


def test_cpu_is_a_mean_over_a_window_that_no_second_reader_shortens(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def rate(at: float, used: float) -> int:
            return rig.statistics._rate("x", 100 * S, Stats(int(at * S), cpu_usage_ns=int(used * S)))

        assert rate(104, 2) == S // 2  # since its beginning
        assert rate(104.001, 2.001) == S // 2  # too soon to say something new
        assert rate(114, 4) == 2 * S // 10
        assert rate(124, 3) == 0  # a counter that went back is no rate
        rig.statistics.forget("x")
        assert rate(200, 0) == 0 and rate(200.5, 0.5) == 0 and rate(201, 1) == S

    on_rig(tmp_path, body)


def test_pods_are_looked_at_whole_and_only_while_ready(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        read: dict[str, str] = {}

        def figures(groups: dict[str, str], full: bool) -> dict[str, Stats]:
            assert not full
            read.update(groups)
            return {id_: Stats(50 * S, cpu_usage_ns=10, memory_usage=100) for id_ in groups if id_ != gone}

        own = await rig.run_pod("own", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        shared = [
            await rig.run_pod(name, linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/shared")) for name in ("a", "b")
        ]
        plain = await rig.run_pod("plain", labels={"k": "v"})
        stopped = await rig.run_pod("stopped", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        await rig.stop_pod(stopped)
        one, two = await rig.run(plain, "one"), await rig.run(plain, "two")
        gone = await rig.run(plain, "gone")
        rig.statistics._read = figures  # type: ignore[method-assign,assignment]

        async def listed(**fields: Any) -> dict[str, pb.PodSandboxStats]:
            request = pb.ListPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(**fields))
            return {item.attributes.id: item for item in (await rig.call("ListPodSandboxStats", request)).stats}

        found = await listed()
        assert found.keys() == {own, *shared, plain}
        # A stopped pod's cgroup is the next one's: a kubelet's sandboxes of one pod share it.
        assert {id_: path for id_, path in read.items() if id_ in found} == {own: "/t/own"}
        assert found[own].linux.memory.usage_bytes.value == 100
        assert found[plain].linux.memory.usage_bytes.value == 200
        assert {item.attributes.id for item in found[plain].linux.containers} == {one, two}
        assert found[plain].linux.network.default_interface.name == "eth0"
        assert (await listed(label_selector={"k": "v"})).keys() == (await listed(id=plain[:12])).keys() == {plain}
        answer = await rig.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=stopped))
        assert answer.stats.attributes.metadata.name == "stopped" and not answer.stats.HasField("linux")
        assert own in rig.statistics._samples
        await rig.remove_pod(own)
        assert own not in rig.statistics._samples

    on_rig(tmp_path, body)


def test_o42_a_container_whose_cgroup_is_gone_already_is_named_and_has_no_figures(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one = await rig.run(pod, "one")
        (stats,) = (await rig.call("ListContainerStats", pb.ListContainerStatsRequest())).stats
        assert stats.attributes.id == one and stats.HasField("writable_layer")
        assert not stats.HasField("cpu") and not stats.HasField("memory")
        (shown,) = (await rig.call("ListPodSandboxStats", pb.ListPodSandboxStatsRequest())).stats
        assert shown.attributes.id == pod and not shown.linux.containers

    on_rig(tmp_path, body)


def test_stats_stream_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.stats.LOOK_ITEMS", 2)

    async def body(rig: Rig) -> None:
        pods = [await rig.run_pod(f"p{n}") for n in range(3)]
        made = [await rig.run(pod, "c", "sleep 1000") for pod in pods]
        async with connected_to(rig) as channel:
            stub = api_pb2_grpc.RuntimeServiceStub(channel)
            pieces = [piece async for piece in stub.StreamPodSandboxStats(pb.StreamPodSandboxStatsRequest())]
            assert [[one.attributes.id for one in piece.pod_sandbox_stats] for piece in pieces] == [pods[:2], pods[2:]]
            pieces = [piece async for piece in stub.StreamContainerStats(pb.StreamContainerStatsRequest())]
            assert [[one.attributes.id for one in piece.container_stats] for piece in pieces] == [made[:2], made[2:]]

    on_rig(tmp_path, body)


def test_a_list_of_many_holds_the_loop_for_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.stats.LOOK_ITEMS", 2)
    turns = ""

    async def others() -> None:
        nonlocal turns
        while True:
            turns += "."
            await asyncio.sleep(0)

    async def body(rig: Rig) -> None:
        worded = rig.statistics._container

        def counted(container: Container, stats: Stats | None) -> pb.ContainerStats:
            nonlocal turns
            turns += "c"
            return worded(container, stats)

        made = [await rig.run(await rig.run_pod(f"p{n}"), "c", "sleep 1000") for n in range(5)]
        rig.statistics._read = lambda groups, full=False: dict.fromkeys(groups, Stats(1))  # type: ignore[method-assign]
        rig.statistics._container = counted  # type: ignore[method-assign]
        task = asyncio.create_task(others())
        listed = (await rig.call("ListContainerStats", pb.ListContainerStatsRequest())).stats
        of_pods = (await rig.call("ListPodSandboxStats", pb.ListPodSandboxStatsRequest())).stats
        task.cancel()
        assert [one.attributes.id for one in listed] == made and len(of_pods) == 5
        assert turns.count("c") == 10 and "ccc" not in turns

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("quota", "periods", "comes"), [(0, 0, False), (0, 3, True), (50_000, 0, True), (-1, 0, False)]
)
def test_periods_come_where_a_quota_makes_the_kernel_count_them(quota: int, periods: int, comes: bool) -> None:
    limits = pb.LinuxContainerResources(cpu_quota=quota)
    facts = metrics.Facts(Stats(S, periods=periods, throttled_periods=2, throttled_ns=9 * S), limits=limits)
    found = {item.name: item.value.value for item in metrics.samples(facts, ("",) * 6) if "_cfs_" in item.name}
    names = ("periods", "throttled_periods", "throttled_seconds")
    assert found == (
        {f"container_cpu_cfs_{name}_total": value for name, value in zip(names, (periods, 2, 9), strict=True)}
        if comes
        else {}
    )


def test_a_pod_without_a_cgroup_of_its_own_has_metrics_of_its_interfaces_alone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        own = await rig.run_pod("own", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        plain = await rig.run_pod("plain")
        await rig.run(own), await rig.run(plain)
        rig.statistics._read = lambda groups, full=False: dict.fromkeys(groups, Stats(S))  # type: ignore[method-assign]
        listed = (await rig.call("ListPodSandboxMetrics", pb.ListPodSandboxMetricsRequest())).pod_metrics
        names = {item.pod_sandbox_id: {metric.name for metric in item.metrics} for item in listed}
        carried = {name for name in names[own] if name.startswith("container_network_")}
        assert names[plain] == carried and len(carried) == 8 and "container_memory_usage_bytes" in names[own]
        # What is left of a node of many pods without one, in the message that ordinary clients take.
        (of_plain,) = (item for item in listed if item.pod_sandbox_id == plain)
        assert {metric.name for metric in of_plain.container_metrics[0].metrics} >= names[own] - carried

    on_rig(tmp_path, body)


def test_a_container_that_does_not_run_has_a_layer_only() -> None:
    layer = pb.FilesystemUsage(timestamp=3)
    container = Container("c", "p", "c", 0, b"", 1)
    assert usage.container_stats(container, None, 0, layer).writable_layer == layer
    assert not usage.container_stats(container, None, 0, layer).HasField("cpu")


def test_metrics_have_cadvisors_names_and_the_labels_that_they_describe(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        before = time.time_ns()
        pod = await rig.run_pod("web", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/web"))
        limits = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(memory_limit_in_bytes=64 << 20))
        one = await rig.run(pod, "one", linux=limits)
        await rig.stop_pod(await rig.run_pod("stopped"))
        stats = Stats(
            50 * S,
            cpu_usage_ns=7 * S + 5,
            memory_usage=100,
            memory_active_file=21,
            memory_inactive_file=22,
            memory_kernel=23,
            memory_limit_hits=24,
            pids=3,
            memory_reservation=1 << 20,
            huge_pages=(HugePages("2MB", 4 << 20),),
            io=(DeviceIo(8, 0, 1, 4097, 3, 4, reads_merged=5, read_ns=7 * S + 1, queued=9),),
            cpu_pressure=Pressure(Stall(3_000_000), None),
        )
        rig.statistics._read = lambda groups, full: dict.fromkeys(groups, stats if full else None)  # type: ignore[method-assign,assignment]
        described = {family.name: [*metrics.BASE_LABELS, *family.labels] for family in metrics.FAMILIES}
        assert len(described) == len(metrics.FAMILIES)
        answer = await rig.call("ListMetricDescriptors", pb.ListMetricDescriptorsRequest())
        helps = {family.name: family.help for family in metrics.FAMILIES}
        assert all(described[item.name] == item.label_keys for item in answer.descriptors)
        assert all(helps[item.name] == item.help for item in answer.descriptors)
        if_there = {family.name for family in metrics.FAMILIES if family.there()}
        assert {item.name for item in answer.descriptors} == if_there
        (found,) = (await rig.call("ListPodSandboxMetrics", pb.ListPodSandboxMetricsRequest())).pod_metrics
        assert found.pod_sandbox_id == pod and [item.container_id for item in found.container_metrics] == [one]

        def values(items: Any) -> dict[tuple[str, str], int]:
            for item in items:
                assert len(item.label_values) == len(described[item.name])
            labels = len(metrics.BASE_LABELS)
            return {(item.name, ",".join(item.label_values[labels:])): item.value.value for item in items}

        own, of_one = values(found.metrics), values(found.container_metrics[0].metrics)
        assert own["container_network_receive_bytes_total", "eth0"] == 3
        assert own["container_network_transmit_packets_dropped_total", "eth0"] == 8
        assert ("container_spec_memory_limit_bytes", "") not in own
        assert of_one["container_cpu_usage_seconds_total", "total"] == 7
        assert of_one["container_spec_memory_limit_bytes", ""] == 64 << 20
        assert of_one["container_fs_writes_bytes_total", "8:0"] == 4097
        assert of_one["container_fs_reads_merged_total", "8:0"] == 5 and of_one["container_fs_io_current", "8:0"] == 9
        assert of_one["container_fs_read_seconds_total", "8:0"] == 7
        assert not [key for key in of_one if key[0] == "container_fs_write_seconds_total"], "not known, so not said"
        carried = "container_blkio_device_usage_total"
        assert (of_one[carried, "8:0,8,0,Read"], of_one[carried, "8:0,8,0,Write"]) == (1, 4097)
        names = ("total_active_file_bytes", "total_inactive_file_bytes", "kernel_usage", "failcnt")
        assert [of_one[f"container_memory_{name}", ""] for name in names] == [21, 22, 23, 24]
        assert of_one["container_pressure_cpu_waiting_seconds_total", ""] == 3
        assert ("container_pressure_cpu_stalled_seconds_total", "") not in of_one
        assert of_one["container_threads_max", ""] == 0 and of_one["container_threads", ""] == 3
        assert of_one["container_spec_memory_reservation_limit_bytes", ""] == 1 << 20
        assert of_one["container_hugetlb_usage_bytes", "2MB"] == 4 << 20
        assert ("container_hugetlb_max_usage_bytes", "2MB") not in of_one
        # What is read on the call has no time, as the CRI has it; what was measured before has its own.
        times = {item.name: item.timestamp for item in found.container_metrics[0].metrics}
        for name in ("container_fs_usage_bytes", "container_tasks_state"):
            assert before <= times[name] <= time.time_ns()
        assert times["container_memory_usage_bytes"] == times["container_cpu_usage_seconds_total"] == 0
        sample = found.container_metrics[0].metrics[0]
        kinds = {item.name: item.metric_type for item in (*found.metrics, *found.container_metrics[0].metrics)}
        assert kinds == {family.name: family.kind for family in metrics.FAMILIES if family.name in kinds}
        assert dict(zip(described[sample.name], sample.label_values, strict=True)) == {
            "container": "one",
            "id": rig.node.store.containers[one].cgroup,
            "image": IMAGE,
            "name": one,
            "namespace": "default",
            "pod": "web",
            "cpu": "total",
        }
        assert list(found.metrics[0].label_values) == ["", "/t/web", "", pod, "default", "web", "total"]
        async with connected_to(rig) as channel:
            stub = api_pb2_grpc.RuntimeServiceStub(channel)
            pieces = [piece async for piece in stub.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())]
        assert [item.pod_sandbox_id for piece in pieces for item in piece.pod_sandbox_metrics] == [pod]

    on_rig(tmp_path, body)
