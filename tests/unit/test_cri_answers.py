"""What an answer tells is what was asked for and what is: each of these fails when its field is not filled
(docs/cri-fields.md)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cri.api import api_pb2 as pb
from runtime.cgroups.stats import Pressure, Stall, Stats
from tests.fakes.node import IMAGE, Rig, on_rig


def test_the_version_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        told = await rig.call("Version", pb.VersionRequest(version="v1"))
        assert (told.version, told.runtime_name, told.runtime_api_version) == ("0.1.0", "ocid", "v1")
        assert told.runtime_version

    on_rig(tmp_path, body)


def test_a_pod_is_told_whole_by_its_status_and_by_the_list(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        before = time.time_ns()
        config = rig.pod_config("web", labels={"app": "web"}, annotations={"note": "x"})
        config.metadata.attempt = 3
        pod = (await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=config))).pod_sandbox_id
        one = await rig.run(pod)
        answer = await rig.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
        (listed,) = (await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items
        for told in (answer.status, listed):
            metadata = told.metadata
            assert (metadata.name, metadata.uid, metadata.namespace, metadata.attempt) == (
                "web",
                "uid-web",
                "default",
                3,
            )
            assert (told.id, told.runtime_handler) == (pod, "native")
            assert (dict(told.labels), dict(told.annotations)) == ({"app": "web"}, {"note": "x"})
            assert before <= told.created_at <= time.time_ns()
        assert answer.status.network.ip and answer.info["info"]
        assert [status.id for status in answer.containers_statuses] == [one]
        assert before <= answer.timestamp <= time.time_ns()
        await rig.stop_pod(pod)
        (listed,) = (await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items
        assert listed.state == (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY

    on_rig(tmp_path, body)


def test_a_container_is_told_whole_by_its_status_and_by_the_list(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        before = time.time_ns()
        pod = await rig.run_pod()
        config = rig.container_config("main", "exit 7", labels={"c": "1"}, annotations={"why": "test"})
        config.metadata.attempt = 2
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        one = (await rig.call("CreateContainer", request)).container_id
        await rig.start(one)
        told = await rig.ended(one)
        (listed,) = (await rig.call("ListContainers", pb.ListContainersRequest())).containers
        for each in (told, listed):
            assert (each.id, each.metadata.name, each.metadata.attempt) == (one, "main", 2)
            assert (each.state, each.image.image) == (pb.CONTAINER_EXITED, IMAGE)
            assert (dict(each.labels), dict(each.annotations)) == ({"c": "1"}, {"why": "test"})
            assert before <= each.created_at <= time.time_ns()
        assert listed.pod_sandbox_id == pod
        assert before < told.started_at <= told.finished_at <= time.time_ns()
        assert (told.exit_code, told.reason) == (7, "Error")

    on_rig(tmp_path, body)


def test_limits_are_told_as_they_were_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        asked = pb.LinuxContainerResources(
            cpu_period=100_000,
            cpu_quota=50_000,
            cpu_shares=512,
            cpuset_cpus="0",
            cpuset_mems="0",
            memory_limit_in_bytes=64 << 20,
            memory_swap_limit_in_bytes=64 << 20,
            oom_score_adj=7,
            unified={"memory.high": "1048576"},
            hugepage_limits=[pb.HugepageLimit(page_size="1GB", limit=1 << 30)],
        )
        linux = pb.LinuxContainerConfig(resources=asked)
        one = await rig.create(await rig.run_pod(), linux=linux)
        assert (await rig.status(one)).resources.linux == asked

    on_rig(tmp_path, body)


def test_mounts_are_told_as_they_were_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        asked: list[dict[str, Any]] = [
            {"container_path": "/ro", "host_path": str(tmp_path), "readonly": True, "recursive_read_only": True},
            {"container_path": "/plain", "host_path": str(tmp_path), "mount_options": ["nosuid"]},
        ]
        mounts = [pb.Mount(**mount) for mount in asked]
        one = await rig.create(await rig.run_pod(), mounts=mounts)
        told = {mount.container_path: mount for mount in (await rig.status(one)).mounts}
        for mount in mounts:
            assert told[mount.container_path] == mount

    on_rig(tmp_path, body)


def test_a_command_answers_with_its_code_and_both_outputs(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one = await rig.run(await rig.run_pod())
        request = pb.ExecSyncRequest(container_id=one, cmd=["sh", "-c", "echo out; echo err >&2; exit 3"])
        told = await rig.call("ExecSync", request)
        assert (told.exit_code, told.stdout, told.stderr) == (3, b"out\n", b"err\n")

    on_rig(tmp_path, body)


def test_a_running_container_and_whose_figures_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod(labels={"app": "web"}, annotations={"note": "x"})
        one = await rig.run(pod, labels={"c": "1"}, annotations={"why": "test"})
        assert (await rig.status(one)).state == pb.CONTAINER_RUNNING
        of_one = (await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=one))).stats.attributes
        assert (dict(of_one.labels), dict(of_one.annotations)) == ({"c": "1"}, {"why": "test"})
        of_pod = (await rig.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=pod))).stats.attributes
        assert (dict(of_pod.labels), dict(of_pod.annotations)) == ({"app": "web"}, {"note": "x"})

    on_rig(tmp_path, body)


def test_the_namespaces_of_a_pod_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        linux = pb.LinuxPodSandboxConfig()
        asked = linux.security_context.namespace_options
        asked.network = asked.ipc = pb.NODE
        asked.pid = pb.CONTAINER
        asked.userns_options.mode = pb.POD
        for ids in (asked.userns_options.uids, asked.userns_options.gids):
            ids.add(host_id=300_000, container_id=0, length=1000)
            ids.add(host_id=400_000, container_id=1000, length=64536)
        pod = await rig.run_pod(linux=linux)
        assert (await rig.pod_status(pod)).linux.namespaces.options == asked

    on_rig(tmp_path, body)


def test_what_handlers_and_the_runtime_can_do_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        told = await rig.call("Status", pb.StatusRequest())
        native = {handler.name: handler.features for handler in told.runtime_handlers}["native"]
        assert native.recursive_read_only_mounts and native.user_namespaces
        assert told.features.user_namespaces_host_network and told.features.mount_options

    on_rig(tmp_path, body)


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
