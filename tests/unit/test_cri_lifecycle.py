"""Pods and containers through their lives, on fakes: states, idempotency, names, filters, errors."""

from __future__ import annotations

import asyncio
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from grpc import StatusCode

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.verbs.create_container import image_ref
from tests.fakes.images import make_image
from tests.fakes.node import IMAGE, Rig, on_rig


def test_a_pod_with_two_containers_lives_and_leaves_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        status = await rig.pod_status(pod)
        assert (status.state, status.network.ip) == (pb.SANDBOX_READY, "10.99.0.2")
        one, two = await rig.run(pod, "one"), await rig.run(pod, "two", "echo hi; exit 3")
        ended = await rig.ended(two)
        assert (ended.exit_code, ended.reason, ended.finished_at > ended.started_at) == (3, "Error", True)
        assert (rig.logs / "web" / "two.log").read_text().endswith("stdout F hi\n")
        assert (await rig.status(one)).state == pb.CONTAINER_RUNNING
        await rig.stop(one, 10)
        assert (await rig.status(one)).exit_code == 128 + 15
        await rig.stop_pod(pod)
        assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_an_exit_that_is_faster_than_the_answer_to_start_is_kept(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        ended = await rig.ended(await rig.run(pod, "main", "exit 0"))
        assert (ended.exit_code, ended.reason) == (0, "Completed")
        assert ended.started_at > 0

    on_rig(tmp_path, body)


def test_removing_and_stopping_twice_is_fine_and_unknown_ids_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        for _ in range(2):
            await rig.stop(container)
        for _ in range(2):
            await rig.remove(container)
        for _ in range(2):
            await rig.stop_pod(pod)
        for _ in range(2):
            await rig.remove_pod(pod)
        await rig.stop(container)
        await rig.stop_pod(pod)
        for call in (rig.status(container), rig.pod_status(pod)):
            with pytest.raises(CallFailed) as caught:
                await call
            assert caught.value.code is StatusCode.NOT_FOUND

    on_rig(tmp_path, body)


def test_a_stopped_pod_has_no_shim_to_be_asked_to_delete_its_containers(tmp_path: Path) -> None:
    """A process would be started for that alone."""

    async def body(rig: Rig) -> None:
        pods = [await rig.run_pod(name) for name in ("one", "two")]
        first, second = [await rig.run(pod) for pod in pods]
        await rig.stop_pod(pods[0])
        for container in (first, second):
            await rig.remove(container)
        deleted = [call for call in rig.shims.log if call.startswith("delete ")]
        assert deleted == [f"delete {second}"]
        for pod in pods:
            await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_remove_container_kills_a_running_one(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        await rig.remove(await rig.run(pod))
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_o11_nothing_is_made_or_started_in_a_pod_that_is_not_ready(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        created = await rig.create(pod, "created")
        await rig.stop_pod(pod)
        for call in (rig.create(pod, "late"), rig.start(created)):
            with pytest.raises(CallFailed) as caught:
                await call
            assert caught.value.code is StatusCode.FAILED_PRECONDITION
        status = await rig.status(created)
        assert (status.state, status.exit_code, status.started_at) == (pb.CONTAINER_EXITED, 137, 0)
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_what_a_pods_end_comes_between_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """However far a create, a start and another stop have come when the pod is stopped and removed."""

    async def body(rig: Rig) -> None:
        said: set[str] = set()
        turns = 0
        # How many turns it takes to be in between is up to the machine's threads.
        while turns < 25 or (turns < 500 and "the pod sandbox was stopped meanwhile" not in said):
            turns += 1
            pod = await rig.run_pod()
            created = await rig.create(pod, "created")
            calls = [asyncio.ensure_future(call) for call in (rig.create(pod, "late"), rig.start(created))]
            for _ in range(turns % 50):
                await asyncio.sleep(0)
            calls += [asyncio.ensure_future(call) for call in (rig.remove_pod(pod), rig.stop_pod(pod))]
            *begun, removed, stopped = await asyncio.gather(*calls, return_exceptions=True)
            assert (removed, stopped) == (None, None)
            for answer in begun:
                if isinstance(answer, BaseException):
                    assert isinstance(answer, CallFailed) and answer.code is StatusCode.FAILED_PRECONDITION, answer
                    said.add(str(answer).rpartition(": ")[2])
            assert rig.leftovers() == []
        assert "the pod sandbox was stopped meanwhile" in said

    on_rig(tmp_path, body)


def test_names_are_taken_by_what_is_there_and_by_nothing_else(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        with pytest.raises(CallFailed, match=f"the name is taken by pod sandbox {pod}") as caught:
            await rig.run_pod()
        assert caught.value.code is StatusCode.ALREADY_EXISTS
        container = await rig.create(pod)
        with pytest.raises(CallFailed, match=f"the name is taken by container {container}"):
            await rig.create(pod)
        await rig.remove(container)
        await rig.create(pod)
        await rig.remove_pod(pod)
        await rig.run_pod()

    on_rig(tmp_path, body)


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        container = await rig.run(await rig.run_pod())
        with pytest.raises(CallFailed, match="is running already") as caught:
            await rig.start(container)
        assert caught.value.code is StatusCode.FAILED_PRECONDITION

    on_rig(tmp_path, body)


def test_status_has_every_field(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod(labels={"app": "web"}, annotations={"note": "x"})
        config = rig.container_config(labels={"tier": "front"}, annotations={"why": "test"})
        config.mounts.add(container_path="/data", host_path=str(tmp_path), readonly=True)
        config.stop_signal = pb.SIGNAL_SIGRTMINPLUS3
        config.linux.resources.memory_limit_in_bytes = 64 << 20
        config.linux.security_context.run_as_username = "web"
        made = await rig.call("CreateContainer", pb.CreateContainerRequest(pod_sandbox_id=pod, config=config))
        status = await rig.status(made.container_id)
        assert status.image.image == IMAGE
        assert status.image_id == rig.image.id
        (listed,) = (await rig.call("ListContainers", pb.ListContainersRequest())).containers
        by_digest = f"{IMAGE.rpartition(':')[0]}@{rig.image.manifest_digest}"
        assert status.image_ref == listed.image_ref == by_digest and listed.image_id == rig.image.id
        assert status.labels == {"tier": "front"} and status.annotations == {"why": "test"}
        assert [mount.container_path for mount in status.mounts] == ["/data"]
        assert status.log_path == str(rig.logs / "web" / "main.log")
        assert status.resources.linux.memory_limit_in_bytes == 64 << 20
        user = status.user.linux
        assert (user.uid, user.gid, sorted(user.supplemental_groups)) == (1000, 1001, [1001, 1002])
        assert status.stop_signal == pb.SIGNAL_SIGRTMINPLUS3
        assert (status.state, status.started_at, status.exit_code, status.reason) == (pb.CONTAINER_CREATED, 0, 0, "")
        pod_status = await rig.pod_status(pod)
        assert pod_status.labels == {"app": "web"} and pod_status.annotations == {"note": "x"}
        assert pod_status.linux.namespaces.options.pid == pb.CONTAINER
        assert pod_status.runtime_handler == "native"

    on_rig(tmp_path, body)


def test_an_image_is_told_by_digest_in_the_repository_that_it_was_asked_from(tmp_path: Path) -> None:
    image = make_image("x")
    image = replace(image, repo_digests=("one.test/a@sha256:1", "two.test/b@sha256:2"))
    for asked, by_user, told in (
        ("two.test/b:5", "", "two.test/b@sha256:2"),
        (image.id, "two.test/b", "two.test/b@sha256:2"),
        (image.id, "", "one.test/a@sha256:1"),
        ("three.test/c", "", "one.test/a@sha256:1"),
    ):
        config = pb.ContainerConfig(image=pb.ImageSpec(image=asked, user_specified_image=by_user))
        assert image_ref(config, image) == told
    assert image_ref(config, replace(image, repo_digests=())) == image.id


def test_an_image_asked_for_by_id_is_shown_by_name(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        for number, (spec, shown) in enumerate(
            [
                (pb.ImageSpec(image=rig.image.id), IMAGE),
                (pb.ImageSpec(image=rig.image.id[7:]), IMAGE),
                (pb.ImageSpec(image=rig.image.id, user_specified_image="busybox"), "busybox"),
                (pb.ImageSpec(image=IMAGE, user_specified_image="busybox"), IMAGE),
            ]
        ):
            config = rig.container_config(f"c{number}")
            config.image.CopyFrom(spec)
            request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
            container = (await rig.call("CreateContainer", request)).container_id
            status = await rig.status(container)
            assert (status.image.image, status.image_id) == (shown, rig.image.id)

    on_rig(tmp_path, body)


def test_verbose_status_holds_pid_spec_and_config(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        answer = await rig.call("ContainerStatus", pb.ContainerStatusRequest(container_id=container, verbose=True))
        assert answer.info.keys() == {"info"}
        info = json.loads(answer.info["info"])
        assert info["pid"] == rig.node.store.containers[container].pid
        assert info["runtimeSpec"]["process"]["args"] == ["sh", "-c", "sleep 1000"]
        assert info["config"]["metadata"]["name"] == "main"
        answer = await rig.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
        assert (info["snapshotter"], info["runtimeType"], info["privileged"]) == ("overlayfs", "native", False)
        info = json.loads(answer.info["info"])
        record = rig.node.store.pods[pod]
        assert info["pid"] == rig.node.store.containers[container].pid, "no process in the pod's namespaces"
        assert (info["shimPid"], info["runtimeType"]) == (record.pid, "native")
        assert info["network"]["ips"][0]["address"] == info["cniResult"]["ips"][0]["address"] == "10.99.0.2/16"
        namespaces = {item["type"]: item["path"] for item in info["runtimeSpec"]["linux"]["namespaces"]}
        assert namespaces == {
            "network": record.netns,
            "ipc": f"{rig.config.state}/pods/{pod}/ns/ipc",
            "uts": f"{rig.config.state}/pods/{pod}/ns/uts",
        }
        await rig.stop_pod(pod)
        answer = await rig.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
        info = json.loads(answer.info["info"])
        assert (info["pid"], info["shimPid"], info["netNamespaceClosed"]) == (0, 0, True)
        answer = await rig.call("Status", pb.StatusRequest(verbose=True))
        config = json.loads(answer.info["config"])
        assert config["configuration"]["root"] == str(rig.config.root) and config["snapshotter"] == "overlayfs"
        assert json.loads(answer.info["network"]) == {"ready": True, "reason": ""}
        conditions = {item.type: item.status for item in answer.status.conditions}
        assert conditions == {
            "RuntimeReady": True,
            "NetworkReady": True,
            "ContainerRuntimeHasNoDeprecationWarnings": True,
        }

    on_rig(tmp_path, body)


def test_pod_filters(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one = await rig.run_pod("one", labels={"app": "a", "x": "1"})
        two = await rig.run_pod("two", labels={"app": "b"})
        await rig.stop_pod(two)

        async def listed(**fields: object) -> set[str]:
            request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(**fields))
            return {item.id for item in (await rig.call("ListPodSandbox", request)).items}

        ready = pb.PodSandboxStateValue(state=pb.SANDBOX_READY)
        not_ready = pb.PodSandboxStateValue(state=pb.SANDBOX_NOTREADY)
        assert await listed() == {one, two}
        assert await listed(id=one) == await listed(id=one[:12]) == {one}
        assert await listed(id="zz") == set()
        assert await listed(state=ready) == {one} and await listed(state=not_ready) == {two}
        assert await listed(label_selector={"app": "a"}) == {one}
        assert await listed(label_selector={"app": "a", "x": "2"}) == set()
        assert await listed(id=one, state=not_ready) == set()

    on_rig(tmp_path, body)


def test_container_filters(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one, two = await rig.run_pod("one"), await rig.run_pod("two")
        created = await rig.create(one, "created", labels={"k": "v"})
        running = await rig.run(one, "running")
        exited = await rig.run(two, "exited", "exit 1")
        await rig.ended(exited)

        async def listed(**fields: object) -> set[str]:
            request = pb.ListContainersRequest(filter=pb.ContainerFilter(**fields))
            return {item.id for item in (await rig.call("ListContainers", request)).containers}

        def state(value: pb.ContainerState) -> pb.ContainerStateValue:
            return pb.ContainerStateValue(state=value)

        assert await listed() == {created, running, exited}
        assert await listed(id=running[:10]) == {running}
        assert await listed(pod_sandbox_id=one) == {created, running}
        assert await listed(pod_sandbox_id=one[:9], state=state(pb.CONTAINER_RUNNING)) == {running}
        assert await listed(state=state(pb.CONTAINER_CREATED)) == {created}
        assert await listed(state=state(pb.CONTAINER_EXITED)) == {exited}
        assert await listed(label_selector={"k": "v"}) == {created}

    on_rig(tmp_path, body)


def test_beginnings_of_ids_name_what_is_unambiguous(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pods = [await rig.run_pod(f"pod{number}") for number in range(17)]  # two of them begin with the same digit
        assert (await rig.pod_status(pods[0][:16])).id == pods[0]
        twice = next(pod[0] for pod in pods if sum(other[0] == pod[0] for other in pods) > 1)
        with pytest.raises(CallFailed, match="ids begin so"):
            await rig.pod_status(twice)
        with pytest.raises(CallFailed, match="the id is empty"):
            await rig.pod_status("")

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: setattr(config.metadata, "name", "../x"), "metadata.name"),
        (lambda config: setattr(config.metadata, "name", ""), "metadata.name"),
        (lambda config: setattr(config.metadata, "uid", "a/b"), "metadata.uid"),
        (lambda config: setattr(config.metadata, "namespace", "a b"), "metadata.namespace"),
        (lambda config: setattr(config, "log_directory", "/var/../etc"), "log_directory"),
        (lambda config: setattr(config, "hostname", "a\nb"), "hostname"),
        (lambda config: setattr(config.linux, "cgroup_parent", "/a/../../b"), "linux.cgroup_parent"),
        (lambda config: config.linux.sysctls.update({"kernel.core_pattern": "x"}), "sysctls"),
        (lambda config: config.linux.sysctls.update({"net.ipv4.ip_forward": "1+kernel.x=1"}), "sysctls"),
        (lambda config: config.dns_config.servers.append("not an address"), "dns_config.servers"),
        (lambda config: config.port_mappings.add(container_port=0, host_port=80), "port_mappings[0]"),
        (
            lambda config: config.port_mappings.add(container_port=1, host_port=80, host_ip="nonsense"),
            "port_mappings[0].host_ip: 'nonsense' is no address",
        ),
        (lambda config: config.annotations.update({"x": "y" * 300_000}), "annotations"),
        (
            lambda config: setattr(config.linux.resources, "oom_score_adj", 5),
            "linux.resources: resources.oom_score_adj: a pod has no process",
        ),
        (lambda config: setattr(config.linux.overhead, "oom_score_adj", -5), "linux.overhead: resources.oom_score_adj"),
    ],
)
def test_s57_s59_s19_a_pod_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, change: object, words: str
) -> None:
    async def body(rig: Rig) -> None:
        config = rig.pod_config()
        change(config)  # type: ignore[operator]
        with pytest.raises(CallFailed) as caught:
            await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=config))
        assert caught.value.code is StatusCode.INVALID_ARGUMENT and words in str(caught.value)
        assert rig.leftovers() == [] and rig.shims.log == [] and rig.network.calls == []

    on_rig(tmp_path, body)


def test_an_unknown_handler_is_refused_by_name(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = pb.RunPodSandboxRequest(config=rig.pod_config(), runtime_handler="kata")
        with pytest.raises(CallFailed, match="no handler 'kata' is configured; there are: native"):
            await rig.call("RunPodSandbox", request)

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda c: setattr(c.image, "image", "no.such/image"), StatusCode.NOT_FOUND, "pull it first"),
        (lambda c: setattr(c.image, "image", ""), StatusCode.INVALID_ARGUMENT, "image: the name is empty"),
        (lambda c: setattr(c.metadata, "name", "a/b"), StatusCode.INVALID_ARGUMENT, "metadata.name"),
        (lambda c: setattr(c, "log_path", "../x"), StatusCode.INVALID_ARGUMENT, "log_path"),
        (lambda c: setattr(c, "stop_signal", 99), StatusCode.INVALID_ARGUMENT, "stop_signal"),
        (
            lambda c: setattr(c.linux.security_context, "run_as_username", "nobody"),
            StatusCode.INVALID_ARGUMENT,
            "no user 'nobody'",
        ),
        (
            lambda c: c.mounts.add(container_path="/x", host_path="/dev/null/x"),
            StatusCode.INVALID_ARGUMENT,
            "mounts[0].host_path: /dev/null/x is not there and cannot be made: not a directory",
        ),
    ],
)
def test_a_container_that_cannot_be_leaves_nothing(
    tmp_path: Path, change: object, code: StatusCode, words: str
) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        before = rig.leftovers()
        config = rig.container_config()
        change(config)  # type: ignore[operator]
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
        with pytest.raises(CallFailed) as caught:
            await rig.call("CreateContainer", request)
        assert (caught.value.code, words in str(caught.value)) == (code, True), str(caught.value)
        assert rig.leftovers() == before
        await rig.run(pod)

    on_rig(tmp_path, body)


@pytest.mark.parametrize("missing", ["create", "refuse"])
def test_a_mount_of_a_path_that_is_not_there(tmp_path: Path, missing: str) -> None:
    """A directory is made of it, as the peers do; or it is refused, as the CRI has it. A link to nowhere always is."""

    async def body(rig: Rig) -> None:
        rig.node.config = replace(rig.config, runtime=replace(rig.config.runtime, missing_host_paths=missing))
        pod = await rig.run_pod()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        source = tmp_path / "new" / "data"

        async def create(path: Path) -> None:
            config = rig.container_config(name=f"on-{path.name}")
            config.mounts.add(container_path="/x", host_path=str(path))
            await rig.call("CreateContainer", pb.CreateContainerRequest(pod_sandbox_id=pod, config=config))

        for path in (tmp_path / "link", *([source] if missing == "refuse" else [])):
            with pytest.raises(CallFailed, match=r"mounts\[0\].host_path: .*: no such file or directory"):
                await create(path)
        assert not source.exists() and not (tmp_path / "nowhere").exists()
        if missing == "create":
            deep = tmp_path / "/".join(["deep"] * 700)
            await create(deep)
            assert deep.is_dir()
            with pytest.raises(CallFailed, match=r"mounts\[0\].host_path: .*: file name too long") as caught:
                await create(tmp_path / "/".join(["x"] * 3000))
            assert caught.value.code is StatusCode.INVALID_ARGUMENT and not (tmp_path / "x").exists()
            await create(source)
            assert stat.S_IMODE(source.stat().st_mode) == 0o755
        await rig.remove_pod(pod)
        assert source.exists() is (missing == "create"), "it belongs to the machine"

    on_rig(tmp_path, body)


def test_networks_host_none_and_by_name(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        node_network = pb.LinuxPodSandboxConfig()
        node_network.security_context.namespace_options.network = pb.NODE
        host = await rig.run_pod("host", linux=node_network)
        assert rig.node.store.pods[host].netns == "" and (await rig.pod_status(host)).network.ip == ""
        assert rig.shims.pods[host].spec.netns is None and not rig.shims.pods[host].spec.private_uts
        alone = await rig.run_pod("alone", metadata=(("ocid-network", "none"),))
        assert rig.node.store.pods[alone].netns and "add" not in rig.network.calls
        named = await rig.run_pod("named", metadata=(("ocid-network", "fake"),))
        assert (await rig.pod_status(named)).network.ip
        for pod in (host, alone, named):
            await rig.remove_pod(pod)
        assert rig.leftovers() == []
        with pytest.raises(CallFailed, match="no network nope"):
            await rig.run_pod("odd", metadata=(("ocid-network", "nope"),))
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_files_of_the_pod(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        dns = pb.DNSConfig(servers=["10.0.0.1"], searches=["svc.local"], options=["ndots:5"])
        pod = await rig.run_pod(hostname="web-0", dns_config=dns)
        directory = rig.config.state / "pods" / pod
        assert (directory / "resolv.conf").read_text() == "search svc.local\nnameserver 10.0.0.1\noptions ndots:5\n"
        assert "10.99.0.2\tweb-0\n" in (directory / "hosts").read_text()
        assert (directory / "hostname").read_text() == "web-0\n"
        assert {(directory / name).stat().st_mode & 0o777 for name in ("hosts", "hostname")} == {0o644}
        assert directory.stat().st_mode & 0o777 == 0o700
        assert rig.shims.pods[pod].spec.hostname == "web-0"

    on_rig(tmp_path, body)


def test_pid_namespaces(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def spec(pod: str, name: str, pid: int, target: str = "") -> list[dict[str, str]]:
            config = rig.container_config(name)
            config.linux.security_context.namespace_options.pid = pid
            config.linux.security_context.namespace_options.target_id = target
            request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config)
            container = (await rig.call("CreateContainer", request)).container_id
            raw = json.loads((rig.config.state / "bundles" / container / "config.json").read_text())
            return [item for item in raw["linux"]["namespaces"] if item["type"] == "pid"]

        pods = {}
        for mode in (pb.POD, pb.CONTAINER, pb.NODE):
            linux = pb.LinuxPodSandboxConfig()
            linux.security_context.namespace_options.pid = mode
            pods[mode] = await rig.run_pod(f"pod{mode}", linux=linux)
        shared = str(rig.config.state / "pods" / pods[pb.POD] / "ns" / "pid")
        assert await spec(pods[pb.POD], "a", pb.POD) == [{"type": "pid", "path": shared}]
        assert await spec(pods[pb.POD], "b", pb.CONTAINER) == [{"type": "pid"}]
        assert await spec(pods[pb.CONTAINER], "a", pb.CONTAINER) == [{"type": "pid"}]
        assert await spec(pods[pb.NODE], "a", pb.NODE) == await spec(pods[pb.NODE], "b", pb.POD) == []
        running = await rig.run(pods[pb.CONTAINER], "target")
        pid = rig.node.store.containers[running].pid
        joined = await spec(pods[pb.CONTAINER], "debug", pb.TARGET, running)
        assert joined == [{"type": "pid", "path": f"/proc/{pid}/ns/pid"}]
        with pytest.raises(CallFailed, match="is of another pod"):
            await spec(pods[pb.POD], "debug", pb.TARGET, running)
        with pytest.raises(CallFailed, match="NODE needs a pod sandbox with NODE"):
            await spec(pods[pb.POD], "c", pb.NODE)

    on_rig(tmp_path, body)
