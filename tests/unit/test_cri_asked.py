"""What a request says arrives where it is done: names, ports, filters of streams, and what an exec, an attach and a
port-forward are to be. Each of these fails when its field is ignored (docs/cri-fields.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.api import api_pb2_grpc
from cri.interfaces import PodNetwork, PortMapping
from cri.streaming.sessions import Attach, Exec, PortForward
from imagestore.model import Credentials, Image
from tests.fakes.node import IMAGE, Rig, connected_to, on_rig


def _offered(rig: Rig, url: str) -> Any:
    """The request that a one-time URL stands for."""
    found = rig.streams._tokens.take(url.rpartition("/")[2])
    assert found is not None
    return found[0]


async def _two(rig: Rig) -> tuple[str, str, str, str]:
    """Two pods with a container each, so that an id that is ignored can be another's."""
    pods = [await rig.run_pod(name) for name in ("one", "two")]
    return pods[0], pods[1], await rig.run(pods[0], "first"), await rig.run(pods[1], "second")


def test_a_pods_whole_name_is_told_and_each_part_of_it_makes_another_pod(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def run(**changed: Any) -> str:
            config = rig.pod_config("web")
            for field, value in changed.items():
                setattr(config.metadata, field, value)
            request = pb.RunPodSandboxRequest(config=config)
            return str((await rig.call("RunPodSandbox", request)).pod_sandbox_id)

        made = {await run(), await run(uid="other"), await run(namespace="other"), await run(attempt=7)}
        assert len(made) == 4
        told = [(await rig.pod_status(pod)).metadata for pod in made]
        assert {(one.name, one.uid, one.namespace, one.attempt) for one in told} == {
            ("web", "uid-web", "default", 0),
            ("web", "other", "default", 0),
            ("web", "uid-web", "other", 0),
            ("web", "uid-web", "default", 7),
        }
        pod = next(iter(made))
        ids = set()
        for attempt in (0, 3):
            config = rig.container_config("main")
            config.metadata.attempt = attempt
            request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
            ids.add((await rig.call("CreateContainer", request)).container_id)
        assert {(await rig.status(one)).metadata.attempt for one in ids} == {0, 3}

    on_rig(tmp_path, body)


def test_ports_reach_the_network_as_they_are_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        seen: list[PodNetwork] = []

        async def note(pod: PodNetwork) -> None:
            seen.append(pod)

        rig.network.before = note
        config = rig.pod_config()
        config.port_mappings.add(container_port=80, host_port=8080)
        config.port_mappings.add(container_port=53, host_port=5353, protocol=pb.UDP, host_ip="127.0.0.1")
        config.port_mappings.add(container_port=9, host_port=9999, protocol=pb.SCTP, host_ip="::1")
        config.port_mappings.add(container_port=81)  # a kubelet lists what is not to be reached from the host, too
        await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=config))
        assert seen[0].ports == (
            PortMapping(8080, 80, "tcp", ""),
            PortMapping(5353, 53, "udp", "127.0.0.1"),
            PortMapping(9999, 9, "sctp", "::1"),
        )

    on_rig(tmp_path, body)


def test_an_exec_is_what_the_request_says(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _, _, _, second = await _two(rig)

        async def offered(**fields: Any) -> Exec:
            request = pb.ExecRequest(container_id=second, cmd=["ls", "-l"], **fields)
            found = _offered(rig, (await rig.call("Exec", request)).url)
            assert isinstance(found, Exec) and found.container_id == second
            assert found.process["args"] == ["ls", "-l"]
            return found

        for wanted in ({"stdin"}, {"stdout"}, {"stderr"}, {"stdin", "stdout", "stderr"}):
            found = await offered(**dict.fromkeys(wanted, True))
            assert {name for name in ("stdin", "stdout", "stderr") if getattr(found, name)} == wanted
            assert not found.terminal and found.process.get("terminal") in (None, False)
        found = await offered(stdout=True, tty=True)
        assert found.terminal and found.process["terminal"] is True

    on_rig(tmp_path, body)


def test_an_attach_is_what_the_request_says(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod, *_ = await _two(rig)
        plain = await rig.run(pod, "plain", stdin=True)
        terminal = await rig.run(pod, "terminal", stdin=True, tty=True)
        for wanted in ({"stdin"}, {"stdout"}, {"stderr"}, {"stdin", "stdout", "stderr"}):
            request = pb.AttachRequest(container_id=plain, **dict.fromkeys(wanted, True))
            found = _offered(rig, (await rig.call("Attach", request)).url)
            assert isinstance(found, Attach) and found.container_id == plain and not found.terminal
            assert {name for name in ("stdin", "stdout", "stderr") if getattr(found, name)} == wanted
        request = pb.AttachRequest(container_id=terminal, tty=True, stdout=True)
        found = _offered(rig, (await rig.call("Attach", request)).url)
        assert found.container_id == terminal and found.terminal

    on_rig(tmp_path, body)


def test_a_port_forward_is_to_the_pod_and_the_ports_of_the_request(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _, second, *_ = await _two(rig)
        request = pb.PortForwardRequest(pod_sandbox_id=second, port=[80, 443])
        found = _offered(rig, (await rig.call("PortForward", request)).url)
        assert isinstance(found, PortForward) and found.sandbox.id == second and found.ports == (80, 443)

    on_rig(tmp_path, body)


def test_streams_hold_what_their_filters_let_through(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one, two, first, second = await _two(rig)
        async with connected_to(rig) as channel:
            runtime = api_pb2_grpc.RuntimeServiceStub(channel)

            async def ids(call: Any, request: Any, field: str) -> list[str]:
                items = [item for piece in [piece async for piece in call(request)] for item in getattr(piece, field)]
                return [item.attributes.id if hasattr(item, "attributes") else item.id for item in items]

            by_pod = pb.ContainerFilter(pod_sandbox_id=two)
            request: Any = pb.StreamContainersRequest(filter=by_pod)
            assert await ids(runtime.StreamContainers, request, "containers") == [second]
            request = pb.StreamContainerStatsRequest(filter=pb.ContainerStatsFilter(pod_sandbox_id=one))
            assert await ids(runtime.StreamContainerStats, request, "container_stats") == [first]
            request = pb.StreamPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(id=two))
            assert await ids(runtime.StreamPodSandboxStats, request, "pod_sandbox_stats") == [two]
            request = pb.StreamPodSandboxesRequest(filter=pb.PodSandboxFilter(id=one))
            assert await ids(runtime.StreamPodSandboxes, request, "pod_sandboxes") == [one]
            images = api_pb2_grpc.ImageServiceStub(channel)
            for name, found in ((IMAGE, [rig.image.id]), ("registry.test/other", [])):
                request = pb.StreamImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image=name)))
                assert await ids(images.StreamImages, request, "images") == found

    on_rig(tmp_path, body)


def test_a_pulls_login_is_what_the_request_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(rig: Rig) -> None:
        given: list[Credentials | None] = []

        async def pull(reference: str, credentials: Credentials | None = None, *_: Any, **__: Any) -> Image:
            given.append(credentials)
            return rig.image

        monkeypatch.setattr(rig.images, "pull", pull)
        for auth in (
            pb.AuthConfig(username="me", password="secret", server_address="registry.test"),
            pb.AuthConfig(auth="bWU6c2VjcmV0", server_address="registry.test"),
            pb.AuthConfig(identity_token="identity"),
            pb.AuthConfig(registry_token="bearer"),
            None,
        ):
            await rig.call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=IMAGE), auth=auth))
        mine = Credentials("me", "secret", "", "", "registry.test")
        assert given == [
            mine,
            mine,
            Credentials("", "", "identity", "", ""),
            Credentials("", "", "", "bearer", ""),
            None,
        ]

    on_rig(tmp_path, body)


def test_what_is_verbose_is_told_to_who_asks(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        for verbose in (True, False):
            request = pb.ImageStatusRequest(image=pb.ImageSpec(image=IMAGE), verbose=verbose)
            info = (await rig.call("ImageStatus", request)).info
            assert info.keys() == ({"info"} if verbose else set())
            assert not verbose or json.loads(info["info"])["manifestDigest"] == rig.image.manifest_digest

    on_rig(tmp_path, body)


def test_the_ids_of_a_user_namespace_are_those_of_the_request(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        config = rig.pod_config()
        config.linux.security_context.namespace_options.network = pb.NODE  # the fake shim pins no namespace
        options = config.linux.security_context.namespace_options.userns_options
        options.mode = pb.POD
        for ids in (options.uids, options.gids):
            ids.add(host_id=200_000, container_id=0, length=1000)
            ids.add(host_id=300_000, container_id=1000, length=64536)
        pod = (await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=config))).pod_sandbox_id
        spec = rig.shims.pods[pod].spec
        assert spec.uids == spec.gids == ((0, 200_000, 1000), (1000, 300_000, 64536))

    on_rig(tmp_path, body)


def test_a_container_has_an_input_where_it_is_asked_for(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        asks: list[dict[str, Any]] = [{}, {"stdin": True}, {"stdin": True, "stdin_once": True}, {"tty": True}]
        for asked in asks:
            one = await rig.create(pod, "-".join(["c", *asked]).replace("_", "-"), **asked)
            spec = rig.shims.pods[pod].containers[one].spec
            told = {"stdin": spec.stdin, "stdin_once": spec.stdin_once, "tty": spec.terminal}
            assert {name: value for name, value in told.items() if value} == asked

    on_rig(tmp_path, body)
