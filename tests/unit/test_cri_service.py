"""The service through gRPC on a socket, on fakes: names, codes, limits; and the calls that have no lifecycle."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri.api import api_pb2 as pb
from cri.api import api_pb2_grpc
from cri.daemon import _server
from cri.errors import CODES, CallFailed, code_of
from cri.interfaces import ContainerError, ExecResult
from cri.threads import LIMIT
from cri.undo import Undo, both
from cri.verbs.images import credentials, mount_points
from cri.verbs.stop_container import signal_number
from imagestore.model import ImageConfig, RegistryUnavailable
from runtime.cgroups.stats import Stats
from tests.fakes.images import make_image
from tests.fakes.node import IMAGE, Rig, on_rig
from tests.support import SOON_S

METHODS = {m.name: m for service in pb.DESCRIPTOR.services_by_name.values() for m in service.methods}


async def _serving(rig: Rig) -> tuple[grpc.aio.Server, grpc.aio.Channel]:
    server = _server(rig.config, rig.service)
    await server.start()
    return server, grpc.aio.insecure_channel(f"unix://{rig.config.state}/ocid.sock")


@pytest.fixture(autouse=True)
def _short_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # sun_path has 108 bytes, and gRPC takes no other way in.
    assert len(str(tmp_path)) < 90, "set --basetemp to something shorter"


def _rig_with_socket(rig: Rig) -> None:
    from dataclasses import replace

    rig.config = replace(rig.config, listen=f"unix://{rig.config.state}/ocid.sock")


def test_every_call_answers_and_those_that_are_off_say_so_by_name(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _rig_with_socket(rig)
        server, channel = await _serving(rig)
        stubs = [api_pb2_grpc.RuntimeServiceStub(channel), api_pb2_grpc.ImageServiceStub(channel)]
        off = {}
        for name, method in METHODS.items():
            stub = next(stub for stub in stubs if hasattr(stub, name))
            request = getattr(pb, method.input_type.name)()
            try:
                if name == "GetContainerEvents":  # which has no end
                    call = stub.GetContainerEvents(request)
                    await call.initial_metadata()
                    call.cancel()
                elif method.server_streaming:
                    async for _ in getattr(stub, name)(request):
                        pass
                else:
                    await getattr(stub, name)(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    off[name] = str(error.details())
                else:
                    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), error
        assert off.keys() == {"CheckpointContainer", "CheckpointPod", "RestorePod"}
        for name, why in off.items():
            assert why.startswith(f"{name}: ") and " off; checkpoint." in why
        await channel.close()
        await server.stop(0)

    on_rig(tmp_path, body)


def test_the_network_travels_as_metadata(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _rig_with_socket(rig)
        server, channel = await _serving(rig)
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        request = pb.RunPodSandboxRequest(config=rig.pod_config())
        answer = await stub.RunPodSandbox(request, metadata=(("ocid-network", "none"),))
        assert rig.node.store.pods[answer.pod_sandbox_id].network == "none" and not rig.network.pods
        await channel.close()
        await server.stop(0)

    on_rig(tmp_path, body)


def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _rig_with_socket(rig)
        server, channel = await _serving(rig)
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        request = pb.VersionRequest(version="x" * (rig.config.limits.message_bytes + 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Version(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Version(pb.VersionRequest())).runtime_name == "ocid"
        await channel.close()
        await server.stop(0)

    on_rig(tmp_path, body)


def test_s55_garbage_on_the_socket_hurts_nobody(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _rig_with_socket(rig)
        server, channel = await _serving(rig)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)
        continuation = struct.pack(">I", 100)[1:] + b"\x09\x00" + struct.pack(">I", 1) + b"a" * 100
        for payload in (os.urandom(4096), preface + os.urandom(4096), preface + settings + continuation * 1000):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(rig.config.socket))
                raw.setblocking(False)
                try:
                    raw.send(payload)
                except OSError:
                    pass
                await asyncio.sleep(0)
        stub = api_pb2_grpc.RuntimeServiceStub(channel)
        assert (await stub.Version(pb.VersionRequest())).runtime_api_version == "v1"
        await channel.close()
        await server.stop(0)

    on_rig(tmp_path, body)


def test_status_says_what_there_is(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        answer = await rig.call("Status", pb.StatusRequest(verbose=True))
        assert {item.type: item.status for item in answer.status.conditions} == {
            "RuntimeReady": True,
            "NetworkReady": True,
            "ContainerRuntimeHasNoDeprecationWarnings": True,
        }
        assert [handler.name for handler in answer.runtime_handlers] == ["", "native"]
        assert answer.info.keys() == {"config", "network"}
        assert "exec_output_bytes" in answer.info["config"] and answer.features.supplemental_groups_policy
        rig.network.not_ready = "no network list"
        answer = await rig.call("Status", pb.StatusRequest())
        (network,) = [item for item in answer.status.conditions if item.type == "NetworkReady"]
        assert (network.status, network.message) == (False, "no network list") and not answer.info
        assert network.reason == "NetworkPluginNotReady"
        config = await rig.call("RuntimeConfig", pb.RuntimeConfigRequest())
        assert config.linux.cgroup_driver == pb.CGROUPFS
        cidr = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.1.0.0/24"))
        await rig.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=cidr))
        cidr.network_config.pod_cidr = "10.1.0.0/24,fd00:10::/64"
        await rig.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=cidr))
        cidr.network_config.pod_cidr = "10.1.0.0/24,nonsense"
        with pytest.raises(CallFailed, match="pod_cidr: 'nonsense' is no range"):
            await rig.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=cidr))

    on_rig(tmp_path, body)


# ------------------------------------------------------------------------------------------------------------ images


def test_images_by_every_name(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def status(name: str) -> pb.Image | None:
            request = pb.ImageStatusRequest(image=pb.ImageSpec(image=name), verbose=True)
            answer = await rig.call("ImageStatus", request)
            return answer.image if answer.HasField("image") else None

        image = await status(IMAGE)
        assert image is not None and image.id == rig.image.id and list(image.repo_tags) == [IMAGE]
        assert await status(image.id) == await status(image.id[7:20]) == await status(image.repo_digests[0]) == image
        assert await status("registry.test/other") is None
        listed = (await rig.call("ListImages", pb.ListImagesRequest())).images
        assert list(listed) == [image]
        repository = IMAGE.rpartition(":")[0]
        rig.images.offer(f"{repository}:other", make_image("other"))
        await rig.call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=f"{repository}:other")))
        names = ((IMAGE, 1), (repository, 2), (f"{repository}:none", 0), (image.id[7:20], 1), (repository[:-1], 0))
        for name, count in (*names, ("registry.test/other", 0), ("UPPER", 0)):
            filtered = pb.ListImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image=name)))
            assert len((await rig.call("ListImages", filtered)).images) == count
        with pytest.raises(CallFailed, match="the name is empty"):
            await status("")
        usage = await rig.call("ImageFsInfo", pb.ImageFsInfoRequest())
        assert usage.image_filesystems[0].used_bytes.value > 0
        assert usage.container_filesystems[0].fs_id.mountpoint == str(rig.config.root)

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [("", None, ""), ("0", 0, ""), ("1000:1000", 1000, ""), ("web", None, "web"), ("web:web", None, "web")],
)
def test_the_images_user(tmp_path: Path, user: str, uid: int | None, username: str) -> None:
    async def body(rig: Rig) -> None:
        rig.images.offer("registry.test/user", make_image(user or "none", config=ImageConfig(user=user, cmd=("x",))))
        spec = pb.ImageSpec(image="registry.test/user")
        await rig.call("PullImage", pb.PullImageRequest(image=spec))
        image = (await rig.call("ImageStatus", pb.ImageStatusRequest(image=spec))).image
        assert (image.uid.value if image.HasField("uid") else None, image.username) == (uid, username)

    on_rig(tmp_path, body)


def test_removing_images(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def remove(name: str) -> None:
            await rig.call("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))

        digest = rig.images.list()[0].repo_digests[0]
        for name in ("registry.test/second:2", IMAGE, rig.image.id, rig.image.id[7:19], digest):
            rig.images.tag(IMAGE, "registry.test/second:2")
            await remove(name)
            assert rig.images.list() == [], f"{name} left another name, which a client takes for removed"
            await remove(name)
            await rig.pull()

    on_rig(tmp_path, body)


def test_pulls_by_several_are_one_and_fail_with_the_cause(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.images.gate = asyncio.Event()
        rig.images.fetches.clear()
        pulls = [asyncio.create_task(rig.pull()) for _ in range(5)]
        await asyncio.sleep(0.01)
        pulls[0].cancel()
        rig.images.gate.set()
        done = await asyncio.gather(*pulls, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError) and set(done[1:]) == {rig.image.id}
        assert len(rig.images.fetches) == 1
        rig.images.failures[IMAGE] = RegistryUnavailable("pull: registry.test answered 503 four times")
        with pytest.raises(CallFailed, match="503 four times") as caught:
            await rig.pull()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE

    on_rig(tmp_path, body)


def test_s30_credentials_are_understood_and_never_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded = base64.b64encode(b"me:se:cret").decode()
    given = credentials(pb.AuthConfig(auth=encoded, server_address="registry.test"))
    assert given is not None and (given.username, given.password) == ("me", "se:cret")
    assert credentials(pb.AuthConfig()) is None
    assert credentials(pb.AuthConfig(identity_token="t")) is not None
    assert "cret" not in repr(given)
    for wrong in ("!!!", base64.b64encode(b"no colon").decode(), base64.b64encode(b"\xff\xfe:x").decode()):
        with pytest.raises(Exception, match="not base64 of user:password"):
            credentials(pb.AuthConfig(auth=wrong))

    async def body(rig: Rig) -> None:
        caplog.set_level(logging.DEBUG)
        rig.images.passwords["registry.test"] = ("me", "se:cret")
        auth = pb.AuthConfig(username="me", password="wrong-s3cret")
        request = pb.PullImageRequest(image=pb.ImageSpec(image=IMAGE), auth=auth)
        with pytest.raises(CallFailed) as caught:
            await rig.call("PullImage", request)
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        assert "s3cret" not in str(caught.value) and "s3cret" not in caplog.text
        request.auth.CopyFrom(pb.AuthConfig(auth=encoded))
        await rig.call("PullImage", request)

    on_rig(tmp_path, body)


def test_a_pods_status_has_the_newest_container_first(tmp_path: Path) -> None:
    """Of several tries of one container a kubelet takes the first it meets, and counts on from its attempt."""

    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        tries = [await rig.create(pod, f"try-{number}") for number in range(3)]
        answer = await rig.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod))
        assert [item.id for item in answer.containers_statuses] == tries[::-1]

    on_rig(tmp_path, body)


# --------------------------------------------------------------------------------------- exec, update, logs and stats


async def _exec(rig: Rig, container: str, script: str, timeout: int = 0) -> Any:
    request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", script], timeout=timeout)
    return await rig.call("ExecSync", request)


def test_exec_sync(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        created = await rig.create(pod, "created")
        with pytest.raises(CallFailed, match="was not started") as caught:
            await _exec(rig, created, "true")
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        running = await rig.run(pod, "running")
        answer = await _exec(rig, running, "echo out; echo err >&2; exit 3")
        assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 3)
        rig.node.processes.clear()  # as after a restart: the process comes from config.json again
        assert (await _exec(rig, running, "echo again")).stdout == b"again\n"
        with pytest.raises(CallFailed, match="not done within 1 s, it was killed") as caught:
            await _exec(rig, running, "sleep 1000", timeout=1)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(CallFailed, match="cmd: empty"):
            await rig.call("ExecSync", pb.ExecSyncRequest(container_id=running))
        with pytest.raises(CallFailed, match="less than none"):
            await _exec(rig, running, "true", timeout=-1)
        await rig.stop(running)
        with pytest.raises(CallFailed, match="has ended"):
            await _exec(rig, running, "true")

    on_rig(tmp_path, body)


def test_an_exec_that_the_containers_end_comes_between_says_that_it_has_ended(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        running = await rig.run(await rig.run_pod())
        begun, ended = threading.Event(), threading.Event()

        def dies(*_: object) -> ExecResult:
            begun.set()
            ended.wait(SOON_S)
            raise ContainerError("the shim died during the call", code="unavailable")

        rig.shims.exec_sync = dies  # type: ignore[method-assign]
        call = asyncio.create_task(_exec(rig, running, "true"))
        await asyncio.to_thread(begun.wait, 20)
        await rig.node.store.change_container(running, finished_ns=1, exit_code=137)
        ended.set()
        with pytest.raises(CallFailed, match="has ended") as caught:
            await call
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION

    on_rig(tmp_path, body)


def test_s51_too_much_output_is_dropped_and_the_command_goes_on(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        from dataclasses import replace

        rig.node.config = replace(rig.config, limits=replace(rig.config.limits, exec_output_bytes=10))
        running = await rig.run(await rig.run_pod())
        assert (await _exec(rig, running, "echo 123456789")).stdout == b"123456789\n"
        for script, stdout, stderr in (
            ("echo 1234567890; exit 3", b"1234567890", b""),
            ("echo 123456; echo 123456 >&2; exit 3", b"123456\n", b"123"),
            ("echo 1234567890; echo abc >&2; exit 3", b"123456789", b"a"),
            ("echo 12 ; echo 1234567890 >&2; exit 3", b"12\n", b"1234567"),
        ):
            answer = await _exec(rig, running, script)
            assert (answer.stdout, answer.stderr, answer.exit_code) == (stdout, stderr, 3)

    on_rig(tmp_path, body)


def test_updates_are_merged_and_shown(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)

        async def update(**fields: Any) -> None:
            linux = pb.LinuxContainerResources(**fields)
            request = pb.UpdateContainerResourcesRequest(container_id=container, linux=linux)
            await rig.call("UpdateContainerResources", request)

        await update(memory_limit_in_bytes=1 << 30, cpu_shares=512)
        await update(cpu_quota=-1, hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=4)])
        await update(hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=8)], oom_score_adj=500)
        await update(hugepage_limits=[pb.HugepageLimit(page_size="1GB", limit=0)])
        asked = rig.shims.pods[pod].containers[container].resources
        assert asked[0] == {"cpu": {"shares": 512}, "memory": {"limit": 1 << 30}}
        assert asked[1]["cpu"] == {"quota": -1}
        shown = (await rig.status(container)).resources.linux
        assert (shown.memory_limit_in_bytes, shown.cpu_shares, shown.cpu_quota) == (1 << 30, 512, -1)
        assert [(limit.page_size, limit.limit) for limit in shown.hugepage_limits] == [("2MB", 8), ("1GB", 0)]
        assert shown.oom_score_adj == 500
        with pytest.raises(CallFailed, match=r"resources\.cpu_period") as caught:
            await update(cpu_period=-5)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        await rig.stop(container)
        with pytest.raises(CallFailed, match="has ended"):
            await update(cpu_shares=2)

    on_rig(tmp_path, body)


def test_limits_of_a_pod_are_the_pods_alone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def request(pod: str, **fields: Any) -> pb.UpdatePodSandboxResourcesRequest:
            limits = pb.LinuxContainerResources(**fields)
            return pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=limits)

        plain, *shared = [
            await rig.run_pod(name, linux=pb.LinuxPodSandboxConfig(cgroup_parent=parent))
            for name, parent in (("plain", ""), ("a", "/no-such/one"), ("b", "/no-such/one"))
        ]
        for pod in (plain, *shared):
            with pytest.raises(CallFailed, match="no cgroup for itself") as caught:
                await rig.call("UpdatePodSandboxResources", request(pod, cpu_shares=512))
            assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(CallFailed, match=r"resources\.cpu_shares"):
            await rig.call("UpdatePodSandboxResources", request(plain, cpu_shares=-1))
        # What limits nothing is kept; a kubelet tells the overhead of a runtime class so.
        overhead = pb.LinuxContainerResources(memory_limit_in_bytes=1 << 20)
        await rig.call(
            "UpdatePodSandboxResources",
            pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=plain, overhead=overhead),
        )
        assert rig.node.store.pods[plain].request.linux.overhead == overhead
        assert not rig.node.store.pods[shared[0]].request.linux.resources.cpu_shares
        await rig.stop_pod(plain)
        with pytest.raises(CallFailed, match="not ready"):
            await rig.call("UpdatePodSandboxResources", request(plain, cpu_shares=512))
        with pytest.raises(CallFailed, match="not found"):
            await rig.call("UpdatePodSandboxResources", request("f" * 64))

    on_rig(tmp_path, body)


def test_logs_are_reopened_while_it_runs(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        log = rig.logs / "web" / "main.log"
        log.unlink()
        request = pb.ReopenContainerLogRequest(container_id=container)
        await rig.call("ReopenContainerLog", request)
        assert log.exists()
        await rig.stop(container)
        with pytest.raises(CallFailed, match="has ended"):
            await rig.call("ReopenContainerLog", request)

    on_rig(tmp_path, body)


def test_stats_hold_what_is_known_and_filters(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one, two = await rig.run_pod("one"), await rig.run_pod("two")
        running = await rig.run(one, "running", labels={"k": "v"})
        other = await rig.run(two, "other")
        await rig.create(two, "created")
        ended = await rig.run(two, "ended", "exit 0")
        await rig.ended(ended)
        rig.statistics._read = lambda groups, full=False: dict.fromkeys(groups, Stats(1))  # type: ignore[method-assign]

        async def listed(**fields: Any) -> set[str]:
            request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(**fields))
            return {item.attributes.id for item in (await rig.call("ListContainerStats", request)).stats}

        assert await listed() == {running, other}
        assert await listed(id=running[:12]) == await listed(pod_sandbox_id=one) == {running}
        assert await listed(label_selector={"k": "v"}) == {running}
        answer = await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=running))
        assert answer.stats.attributes.metadata.name == "running" and answer.stats.HasField("memory")
        answer = await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=ended))
        assert not answer.stats.HasField("memory")

        measuring = asyncio.create_task(rig.statistics.measure())
        async with asyncio.timeout(SOON_S):
            while not answer.stats.writable_layer.used_bytes.value:
                answer = await rig.call("ContainerStats", pb.ContainerStatsRequest(container_id=running))
                await asyncio.sleep(0.002)
        measuring.cancel()
        assert answer.stats.writable_layer.used_bytes.value == 4096

    on_rig(tmp_path, body)


def test_o41_r14_lists_wait_for_nobody(tmp_path: Path) -> None:
    """A hundred lists while every pod's lock is held and a call to a shim hangs."""

    async def body(rig: Rig) -> None:
        pods = [await rig.run_pod(f"pod{number}") for number in range(20)]
        containers = [await rig.run(pod) for pod in pods]
        locks = [rig.node.locks.held(id_) for id_ in (*pods, *containers)]
        for lock in locks:
            await lock.__aenter__()
        for _ in range(100):
            assert len((await rig.call("ListContainers", pb.ListContainersRequest())).containers) == 20
            assert len((await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items) == 20
        await rig.status(containers[0])
        for lock in locks:
            await lock.__aexit__(None, None, None)

    on_rig(tmp_path, body)


# ----------------------------------------------------------------------------------------------------- small things


@pytest.mark.parametrize(
    ("name", "number"),
    [("TERM", 15), ("SIGTERM", 15), ("sigusr1", 10), ("9", 9), ("SIGRTMIN+3", 37), ("RTMINPLUS3", 37), ("RTMAX-1", 63),
     ("SIGRTMAXMINUS1", 63), ("SIGCLD", 17), ("SIGIOT", 6), ("SIGPOLL", 29), ("SIGRTMIN", 34)],
)  # fmt: skip
def test_signals_by_every_name(name: str, number: int) -> None:
    assert signal_number(name) == number


@pytest.mark.parametrize("name", ["", "NOPE", "0", "65", "-1", "１５", "SIG", "RTMIN+99", "RTMIN+"])
def test_words_that_are_no_signal(name: str) -> None:
    with pytest.raises(Exception, match="is no signal"):
        signal_number(name)


def test_every_error_has_a_code_and_the_most_specific_wins() -> None:
    for kind, code in CODES.items():
        assert code is not grpc.StatusCode.OK
        assert code_of(kind("x")) is code or issubclass(kind, OSError)
    assert code_of(KeyError("x")) is grpc.StatusCode.INTERNAL
    assert code_of(OSError(28, "no space")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code_of(FileNotFoundError(2, "x")) is grpc.StatusCode.INTERNAL


def test_undo_runs_backwards_to_its_end_and_tells_what_failed() -> None:
    done: list[str] = []

    def inverse(name: str, error: Exception | None = None) -> Any:
        async def undo() -> None:
            await asyncio.sleep(0)
            done.append(name)
            if error:
                raise error

        return undo

    async def work() -> None:
        async with Undo() as undo:
            undo.did("one", inverse("one"))
            undo.did("two", inverse("two", OSError("busy")))
            undo.did("three", inverse("three"))
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause") as caught:
        asyncio.run(work())
    assert done == ["three", "two", "one"]
    assert caught.value.__notes__ == ["undo two: busy"]


def test_o1_a_cancelled_caller_waits_for_the_undoing() -> None:
    done: list[str] = []
    gate = asyncio.Event

    async def main() -> None:
        unwinding = gate()

        async def slow() -> None:
            unwinding.set()
            await asyncio.sleep(0.02)
            done.append("slow")

        async def work() -> None:
            async with Undo() as undo:
                undo.did("slow", slow)
                raise ValueError("x")

        task = asyncio.create_task(work())
        await unwinding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert done == ["slow"]


def test_an_inverse_that_hangs_has_a_deadline() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        async with Undo(deadline_s=0.02) as undo:
            undo.did("hang", hang)
            raise ValueError("x")

    with pytest.raises(ValueError) as caught:
        asyncio.run(work())
    assert caught.value.__notes__ == ["undo hang: not done within 0.02 s"]


def test_both_run_to_their_ends() -> None:
    done: list[int] = []

    async def one(number: int, error: Exception | None = None) -> int:
        await asyncio.sleep(number / 100)
        done.append(number)
        if error:
            raise error
        return number

    assert asyncio.run(both(one(1), one(2))) == (1, 2)
    with pytest.raises(ValueError, match="first") as caught:
        asyncio.run(both(one(1, ValueError("first")), one(2, ValueError("second"))))
    assert caught.value.__notes__ == ["also: second"] and done == [1, 2, 1, 2]


def test_pods_of_the_systemd_driver_are_in_slices(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.node.config = replace(
            rig.node.config,
            runtime=replace(rig.node.config.runtime, cgroup_driver="systemd", cgroup_parent="/ocid.slice"),
        )
        answer = await rig.call("RuntimeConfig", pb.RuntimeConfigRequest())
        assert answer.linux.cgroup_driver == pb.SYSTEMD

        async def cgroup_of(name: str, parent: str) -> str:
            pod = await rig.run_pod(name, linux=pb.LinuxPodSandboxConfig(cgroup_parent=parent))
            container = await rig.create(pod)
            record = rig.node.store.containers[container]
            assert not rig.node.store.pods[pod].cgroup_made  # systemd's, not ours to remove
            spec = json.loads((rig.node.paths.bundle(container) / "config.json").read_text())
            slice_ = record.cgroup.rpartition("/")[0]
            assert spec["linux"]["cgroupsPath"] == f"{slice_.rpartition('/')[2]}:ocid:{container}"
            return record.cgroup.replace(container, "ID")

        deep = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice"
        assert await cgroup_of("kubelets", deep) == f"{deep}/ocid-ID.scope"
        assert await cgroup_of("short", "a-b.slice") == "/a.slice/a-b.slice/ocid-ID.scope"
        assert await cgroup_of("none", "") == "/ocid.slice/ocid-ID.scope"
        with pytest.raises(CallFailed, match=r"linux.cgroup_parent: '/kubepods/podx': .*no slice"):
            await rig.run_pod("wrong", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/kubepods/podx"))

    on_rig(tmp_path, body)


def test_r14_creations_that_wait_for_a_key_leave_questions_alone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        answered, waiting = threading.Event(), 0

        def permit(*_: object) -> None:
            nonlocal waiting
            waiting += 1
            assert answered.wait(SOON_S)

        rig.images.permit = permit  # type: ignore[method-assign]
        pod = await rig.run_pod("stuck")
        stuck = [asyncio.create_task(rig.create(pod, f"c{n}")) for n in range(LIMIT)]
        try:
            async with asyncio.timeout(SOON_S):
                while waiting < LIMIT:
                    await asyncio.sleep(0.01)
                image = pb.ImageStatusRequest(image=pb.ImageSpec(image=IMAGE))
                assert (await rig.call("ImageStatus", image)).image.id
        finally:
            answered.set()
            await asyncio.gather(*stuck)

    on_rig(tmp_path, body)


def test_images_on_a_filesystem_of_their_own_are_told_apart(tmp_path: Path) -> None:
    assert mount_points(tmp_path) == (str(tmp_path), str(tmp_path))
    for name in ("images", "snapshots"):
        (tmp_path / name).mkdir()
    assert mount_points(tmp_path) == (str(tmp_path), str(tmp_path))
    (tmp_path / "images").rmdir()
    (tmp_path / "images").symlink_to("/proc")
    assert mount_points(tmp_path) == (str(tmp_path / "images"), str(tmp_path / "snapshots"))


def test_what_containers_have_written_is_their_filesystems(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        for name in ("one", "two"):
            container = await rig.run(pod, name)
            layer = pb.FilesystemUsage()
            layer.used_bytes.value, layer.inodes_used.value = 4096, 3
            measured[container] = layer
        rig.node.statistics.layer = measured.__getitem__  # type: ignore[method-assign]
        told = await rig.call("ImageFsInfo", pb.ImageFsInfoRequest())
        (containers,), (images,) = told.container_filesystems, told.image_filesystems
        assert (containers.used_bytes.value, containers.inodes_used.value) == (8192, 6)
        assert images.used_bytes.value > 0 and images.fs_id == containers.fs_id

    measured: dict[str, pb.FilesystemUsage] = {}
    on_rig(tmp_path, body)


def test_what_another_binary_might_pass_over_is_refused_for_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        runtime = replace(rig.node.config.runtime, handlers={"native": "native", "other": "/usr/sbin/other"})
        rig.node.config = replace(rig.node.config, runtime=runtime)
        request = pb.RunPodSandboxRequest(config=rig.pod_config("foreign"), runtime_handler="other")
        pod = (await rig.call("RunPodSandbox", request)).pod_sandbox_id
        one = [pb.IDMapping(length=1)]
        for field, mount in (
            ("uidMappings", pb.Mount(host_path="/", container_path="/x", uidMappings=one, gidMappings=one)),
            ("image", pb.Mount(container_path="/x", readonly=True, image=pb.ImageSpec(image=IMAGE))),
        ):
            with pytest.raises(CallFailed, match=rf"mounts\[0\].{field}: not with runtime handler 'other'"):
                await rig.create(pod, mounts=[mount])
        users = rig.pod_config("users")
        users.linux.security_context.namespace_options.userns_options.mode = pb.POD
        for lines in ("uids", "gids"):
            getattr(users.linux.security_context.namespace_options.userns_options, lines).add(host_id=9, length=9)
        with pytest.raises(CallFailed, match=r"userns_options: runtime handler 'other' runs no pods"):
            await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=users, runtime_handler="other"))

    on_rig(tmp_path, body)
