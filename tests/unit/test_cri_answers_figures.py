"""What pods and containers use, as answers tell it: each of these fails when its field is not filled, or filled with
another figure (docs/cri-fields.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.interfaces import InterfaceCounters
from runtime.cgroups.stats import Pressure, Stall, Stats
from tests.fakes.node import Rig, on_rig

S = 1_000_000_000


def test_every_figure_of_a_container_and_of_a_pod_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod(linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        one = await rig.run(pod)
        stalls = Pressure(some=Stall(7, 1.5, 2.5, 3.5), full=Stall(5, 0.5, 0.25, 0.125))
        figures = Stats(
            5_000_000_000,
            cpu_usage_ns=70,
            memory_usage=1000,
            memory_inactive_file=300,
            memory_limit=2000,
            memory_rss=50,
            page_faults=11,
            major_page_faults=12,
            swap_usage=13,
            swap_limit=100,
            cpu_pressure=stalls,
            memory_pressure=stalls,
            io_pressure=stalls,
        )
        rig.statistics._read = lambda groups, full=False: dict.fromkeys(groups, figures)  # type: ignore[method-assign]
        of_one = (await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=one))).stats
        of_pod = (await rig.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod))).stats.linux
        swap = of_one.swap
        assert (swap.timestamp, swap.swap_usage_bytes.value, swap.swap_available_bytes.value) == (5_000_000_000, 13, 87)
        for told in (of_one, of_pod):
            assert {told.cpu.timestamp, told.memory.timestamp, told.io.timestamp} == {5_000_000_000}
            assert told.cpu.usage_core_nano_seconds.value == 70
            memory = told.memory
            assert (memory.usage_bytes.value, memory.working_set_bytes.value) == (1000, 700)
            assert (memory.available_bytes.value, memory.rss_bytes.value) == (1300, 50)
            assert (memory.page_faults.value, memory.major_page_faults.value) == (11, 12)
            for psi in (told.cpu.psi, memory.psi, told.io.psi):
                assert (psi.Some.Total, psi.Some.Avg10, psi.Some.Avg60, psi.Some.Avg300) == (7, 1.5, 2.5, 3.5)
                assert (psi.Full.Total, psi.Full.Avg10, psi.Full.Avg60, psi.Full.Avg300) == (5, 0.5, 0.25, 0.125)

    on_rig(tmp_path, body)


def test_rates_and_processes_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod(linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        one = await rig.run(pod)
        born = {one: rig.node.store.containers[one].started_ns, pod: rig.node.store.pods[pod].created_ns}
        used = {one: 3, pod: 4}

        def read(groups: dict[str, str], full: bool = False) -> dict[str, Stats]:
            return {id_: Stats(born[id_] + 8 * S, cpu_usage_ns=used[id_] * S) for id_ in groups}

        rig.statistics._read = read  # type: ignore[method-assign,assignment]
        rig.statistics._pids = lambda id_: [1, 2, 3] if id_ == pod else [3]  # type: ignore[method-assign]
        told = (await rig.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod))).stats.linux
        assert told.cpu.usage_nano_cores.value == 4 * S // 8
        assert told.containers[0].cpu.usage_nano_cores.value == 3 * S // 8
        assert (told.process.timestamp, told.process.process_count.value) == (born[pod] + 8 * S, 3)

    on_rig(tmp_path, body)


def test_every_interface_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def counters(paths: Sequence[Path]) -> dict[Path, list[InterfaceCounters]]:
            def one(name: str, by: int) -> InterfaceCounters:
                return InterfaceCounters(name, *(by + number for number in range(8)))

            return {path: [one("net1", 10), one("eth0", 20), one("net2", 30)] for path in paths}

        rig.network.counters = counters  # type: ignore[method-assign]
        pod = await rig.run_pod(linux=pb.LinuxPodSandboxConfig(cgroup_parent="/t/own"))
        rig.statistics._read = lambda groups, full=False: dict.fromkeys(groups, Stats(7 * S))  # type: ignore[method-assign]
        told = (await rig.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod))).stats.linux.network
        assert told.timestamp == 7 * S

        def figures(one: pb.NetworkInterfaceUsage) -> tuple[object, ...]:
            return (one.name, one.rx_bytes.value, one.tx_bytes.value, one.rx_errors.value, one.tx_errors.value)

        # Of struct rtnl_link_stats64: packets, bytes, errors, received and sent in turn.
        assert figures(told.default_interface) == ("eth0", 22, 23, 24, 25)
        assert [figures(one) for one in told.interfaces] == [("net1", 12, 13, 14, 15), ("net2", 32, 33, 34, 35)]

    on_rig(tmp_path, body)


def test_a_writable_layer_is_told_with_the_time_of_its_measuring(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one = await rig.run(await rig.run_pod())
        before = time.time_ns()
        await rig.statistics._measure_one(one)
        measured = time.time_ns()
        told = (await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=one))).stats.writable_layer
        assert told.fs_id.mountpoint == str(rig.config.root)
        assert (told.used_bytes.value, told.inodes_used.value) == (4096, 1)  # as tests/fakes/snapshots has it
        assert before <= told.timestamp <= measured
        usage = await rig.call("ImageFsInfo", pb.ImageFsInfoRequest())
        (images,), (containers,) = usage.image_filesystems, usage.container_filesystems
        known = rig.images.usage()
        assert (images.used_bytes.value, images.inodes_used.value) == (known.bytes, known.inodes)
        assert (containers.used_bytes.value, containers.inodes_used.value) == (4096, 1)
        for filesystem in (images, containers):
            assert filesystem.fs_id.mountpoint == str(rig.config.root)
            assert measured <= filesystem.timestamp <= time.time_ns()

    on_rig(tmp_path, body)
