"""What an answer tells is what was asked for and what is: each of these fails when its field is not filled
(docs/cri-fields.md)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.interfaces import NetworkResult, PodNetwork
from cri.version import VERSION
from runtime.linux.mount import MountPoint
from tests.fakes.node import IMAGE, Rig, on_rig


def test_the_version_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        told = await rig.call("Version", pb.VersionRequest(version="v1"))
        assert (told.version, told.runtime_name, told.runtime_api_version) == ("0.1.0", "ocid", "v1")
        assert told.runtime_version == VERSION

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
        assert answer.status.network.ip == "10.99.0.2" and answer.info.keys() == {"info"}
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
        assert list((await rig.status(one)).mounts) == mounts

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
        assert [handler.name for handler in told.runtime_handlers] == ["", "native"]
        for handler in told.runtime_handlers:
            assert handler.features.recursive_read_only_mounts and handler.features.user_namespaces
        assert told.features.user_namespaces_host_network and told.features.mount_options

    on_rig(tmp_path, body)


def test_all_addresses_of_a_pod_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def add(pod: PodNetwork) -> NetworkResult:
            return NetworkResult(("10.99.0.2", "fd00::2", "10.98.0.2"), {})

        rig.network.add = add  # type: ignore[method-assign]
        pod = await rig.run_pod()
        told = (await rig.pod_status(pod)).network
        assert (told.ip, [one.ip for one in told.additional_ips]) == ("10.99.0.2", ["fd00::2", "10.98.0.2"])
        await rig.stop_pod(pod)
        assert (await rig.pod_status(pod)).network == pb.PodSandboxNetworkStatus()

    on_rig(tmp_path, body)


def test_what_a_pod_was_told_of_others_is_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        linux = pb.LinuxPodSandboxConfig()
        asked = linux.security_context.namespace_options
        asked.target_id = "another"  # says nothing where no namespace is a target's
        asked.userns_options.mode = pb.NODE
        pod = await rig.run_pod(linux=linux)
        told = (await rig.pod_status(pod)).linux.namespaces.options
        assert (told.target_id, told.userns_options.mode) == ("another", pb.NODE)

    on_rig(tmp_path, body)


def test_a_containers_image_is_told_as_it_was_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        config = rig.container_config()
        config.image.annotations["org.example/note"] = "x"
        config.image.runtime_handler = "native"
        config.image.user_specified_image = "busybox:1"
        config.image.image_ref = "sha256:told"
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        one = (await rig.call("CreateContainer", request)).container_id
        (listed,) = (await rig.call("ListContainers", pb.ListContainersRequest())).containers
        assert (await rig.status(one)).image == listed.image == config.image

    on_rig(tmp_path, body)


def test_mounts_of_every_kind_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = MountPoint(1, 1, "8:1", "/", "/", "rw", "shared:1", "ext4", "/dev/x", "rw")
    monkeypatch.setattr("cri.spec.mounts.mountinfo", lambda: [shared])
    monkeypatch.setattr("runtime.labels.has_selinux", lambda: False)

    async def body(rig: Rig) -> None:
        mapped = pb.Mount(container_path="/mapped", host_path=str(tmp_path))
        mapped.uidMappings.add(host_id=300_000, container_id=7, length=65536)
        mapped.gidMappings.add(host_id=400_000, container_id=8, length=65535)
        image = pb.ImageSpec(image=IMAGE)
        asked = [
            pb.Mount(container_path="/slave", host_path=str(tmp_path), propagation=pb.PROPAGATION_HOST_TO_CONTAINER),
            pb.Mount(container_path="/labelled", host_path=str(tmp_path), selinux_relabel=True),
            mapped,
            pb.Mount(container_path="/image", image=image, image_sub_path="etc", readonly=True),
        ]
        one = await rig.create(await rig.run_pod(), mounts=asked)
        image.image_ref = rig.image.id  # which one it is, now that it is known
        asked[-1].image.CopyFrom(image)
        assert list((await rig.status(one)).mounts) == asked

    on_rig(tmp_path, body)


def test_an_image_is_told_whole(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=IMAGE))
        before = (await rig.call("ImageStatus", request)).image
        rig.images.pinned.add(IMAGE)
        told = (await rig.call("ImageStatus", request)).image
        (listed,) = (await rig.call("ListImages", pb.ListImagesRequest())).images
        assert (
            told
            == listed
            == pb.Image(
                id=rig.image.id,
                repo_tags=[IMAGE],
                repo_digests=[f"{IMAGE.rpartition(':')[0]}@{rig.image.manifest_digest}"],
                size=rig.image.size,
                spec=pb.ImageSpec(image=rig.image.id),
                pinned=True,
            )
        )
        assert rig.image.size > 0 and not before.pinned

    on_rig(tmp_path, body)
