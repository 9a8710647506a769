"""Every step of every verb broken on purpose, on fakes: nothing is left, and the same call works once the cause is
gone. Failing undo, failing network, hung callers, callers that leave."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path

import pytest
from grpc import StatusCode

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.interfaces import ContainerError, NetworkError, NetworkResult, PodNetwork, Sandbox, SandboxSpec
from imagestore.model import SignatureRefused
from runtime.linux import failpoint as failpoints
from tests.fakes.node import IMAGE, Rig, on_rig
from tests.support import SOON_S

VERBS = Path(__file__).parents[2] / "cri" / "verbs"


def _points(verb: str) -> list[str]:
    found = re.findall(r'failpoint\("([a-z_]+\.[a-z_]+)"\)', "".join(p.read_text() for p in sorted(VERBS.glob("*.py"))))
    points = [name for name in found if name.startswith(f"{verb}.")]
    assert points, verb
    return points


@pytest.mark.parametrize("point", _points("run_pod"))
def test_o8_run_pod_broken_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    async def body(rig: Rig) -> None:
        monkeypatch.setitem(failpoints._ARMED, point, "error")
        with pytest.raises(CallFailed, match=point) as caught:
            await rig.run_pod()
        assert caught.value.code is StatusCode.INTERNAL
        assert rig.leftovers() == []
        monkeypatch.delitem(failpoints._ARMED, point)
        await rig.remove_pod(await rig.run_pod())
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


@pytest.mark.parametrize(
    ("blame", "code"),
    [
        ("internal", StatusCode.INTERNAL),
        ("unknown", StatusCode.UNKNOWN),
        ("unavailable", StatusCode.UNAVAILABLE),
        ("deadline", StatusCode.DEADLINE_EXCEEDED),
        ("exhausted", StatusCode.RESOURCE_EXHAUSTED),
        ("failed_precondition", StatusCode.FAILED_PRECONDITION),
        ("invalid_argument", StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_failing_network_tells_who_is_to_blame(tmp_path: Path, blame: str, code: StatusCode) -> None:
    async def body(rig: Rig) -> None:
        rig.network.blame = blame
        rig.network.failures["add"] = 1
        with pytest.raises(CallFailed, match="plugin fake: add") as caught:
            await rig.run_pod()
        assert caught.value.code is code and rig.leftovers() == []
        pod = await rig.run_pod()
        rig.network.failures["delete"] = 1
        with pytest.raises(CallFailed, match="plugin fake: delete") as caught:
            await rig.stop_pod(pod)
        assert caught.value.code is code
        await rig.remove_pod(pod)

    on_rig(tmp_path, body)


@pytest.mark.parametrize("by", [IMAGE, "id", "user"])
def test_no_container_of_an_image_that_the_policy_refuses(tmp_path: Path, by: str) -> None:
    """By the name that the pod has, where a kubelet asks by id."""

    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        before = rig.leftovers()
        spec = pb.ImageSpec(image=IMAGE if by == IMAGE else rig.image.id)
        if by == "user":
            spec.user_specified_image = "trusted.example/app:1"
        asked = spec.user_specified_image or spec.image
        rig.images.refused[asked] = SignatureRefused(f"{SignatureRefused.WORD}: use image {asked}: no")
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=rig.container_config())
        request.config.image.CopyFrom(spec)
        with pytest.raises(CallFailed, match="^SignatureValidationFailed: ") as caught:
            await rig.call("CreateContainer", request)
        assert caught.value.code is StatusCode.UNKNOWN
        assert rig.leftovers() == before
        rig.images.refused.clear()
        await rig.call("CreateContainer", request)
        # A namespace may have a policy of its own.
        assert rig.images.namespaces[-1] == rig.pod_config().metadata.namespace != ""
        wanted = pb.PullImageRequest(image=spec, sandbox_config=rig.pod_config())
        wanted.image.image = IMAGE
        wanted.sandbox_config.metadata.namespace = "own"
        await rig.call("PullImage", wanted)
        assert rig.images.namespaces[-1] == "own"

    on_rig(tmp_path, body)


@pytest.mark.parametrize("point", _points("create_container"))
def test_o8_create_container_broken_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        before = rig.leftovers()
        monkeypatch.setitem(failpoints._ARMED, point, "error")
        with pytest.raises(CallFailed, match=point):
            await rig.create(pod)
        assert rig.leftovers() == before
        assert rig.shims.pods[pod].containers == {}
        monkeypatch.delitem(failpoints._ARMED, point)
        await rig.start(await rig.create(pod))

    on_rig(tmp_path, body)


@pytest.mark.parametrize("point", _points("start_container"))
def test_start_container_broken_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.create(pod)
        monkeypatch.setitem(failpoints._ARMED, point, "error")
        with pytest.raises(CallFailed, match=point):
            await rig.start(container)
        monkeypatch.delitem(failpoints._ARMED, point)
        # What is said of it is true, whichever way it went.
        started = bool(rig.shims.pods[pod].containers[container].facts.started_ns)
        assert (await rig.status(container)).state == (pb.CONTAINER_RUNNING if started else pb.CONTAINER_CREATED)
        await rig.remove(container)
        await rig.run(pod)

    on_rig(tmp_path, body)


@pytest.mark.parametrize("point", [*_points("stop_pod"), *_points("remove_pod"), *_points("remove_container")])
def test_o7_taking_away_goes_on_where_it_was_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        await rig.run(pod, "one")
        await rig.create(pod, "two")
        monkeypatch.setitem(failpoints._ARMED, point, "error")
        with pytest.raises(CallFailed, match=point):
            await rig.remove_pod(pod)
        assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY
        monkeypatch.delitem(failpoints._ARMED, point)
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


@pytest.mark.parametrize("verb", ["new_netns", "add"])
def test_a_network_that_fails_is_the_pods_failure(tmp_path: Path, verb: str) -> None:
    async def body(rig: Rig) -> None:
        rig.network.failures[verb] = 1
        with pytest.raises(CallFailed, match=f"plugin fake: {verb}"):
            await rig.run_pod()
        assert rig.leftovers() == []
        await rig.run_pod()

    on_rig(tmp_path, body)


def test_a_shim_that_does_not_start_is_the_pods_failure(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.shims.failures["start"] = ContainerError("start pod: step namespaces: unshare: EPERM", hint="see dmesg")
        with pytest.raises(CallFailed, match=r"step namespaces: unshare: EPERM \(hint: see dmesg\)"):
            await rig.run_pod()
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_sysctls_of_interfaces_are_the_networks_to_set_and_others_the_shims(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        early, late = {"net.core.somaxconn": "9", "net.ipv4.conf.all.rp_filter": "2"}, {"net.ipv6.neigh.eth0/7.x": "1"}
        start = rig.shims.start
        seen: list[Mapping[str, str]] = []

        def starting(spec: SandboxSpec) -> Sandbox:
            seen.append(spec.sysctls)
            return start(spec)

        async def before(pod: PodNetwork) -> None:
            assert pod.sysctls == late

        rig.shims.start = starting  # type: ignore[method-assign]
        rig.network.before = before
        linux = pb.LinuxPodSandboxConfig(sysctls=early | {"net/ipv6/neigh/eth0.7/x": "1"})
        await rig.run_pod(linux=linux)
        await rig.run_pod("alone", metadata=(("ocid-network", "none"),), linux=linux)  # there the shim says no
        assert seen == [early, early | late]

    on_rig(tmp_path, body)


def test_what_is_asked_for_groups_and_nobody_knows_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        linux = pb.LinuxContainerConfig()
        linux.security_context.supplemental_groups_policy = 5  # type: ignore[assignment]
        with pytest.raises(CallFailed, match="supplemental_groups_policy: unknown value 5") as refused:
            await rig.create(pod, linux=linux)
        assert refused.value.code == StatusCode.INVALID_ARGUMENT

    on_rig(tmp_path, body)


def test_o2_what_cannot_be_undone_stays_listed_until_it_can(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.shims.failures["start"] = ContainerError("no shim today")
        rig.network.failures["delete"] = 1
        with pytest.raises(CallFailed, match=r"no shim today; undo release the pod's addresses: .*told to fail"):
            await rig.run_pod()
        (pod,) = [item.id for item in (await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items]
        assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY and pod in rig.network.pods
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


@pytest.mark.parametrize("works_again", [False, True])
def test_o2_a_pod_whose_network_failed_both_ways_stays(tmp_path: Path, works_again: bool) -> None:
    async def body(rig: Rig) -> None:
        async def fails(_pod: PodNetwork) -> NetworkResult:
            error = NetworkError("network fake: plugin fake: add and delete: told to fail")
            error.left = True
            raise error

        add, rig.network.add = rig.network.add, fails  # type: ignore[method-assign]
        rig.network.failures["delete"] = 0 if works_again else 1
        with pytest.raises(CallFailed, match="told to fail"):
            await rig.run_pod()
        rig.network.add = add  # type: ignore[method-assign]
        left = (await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items
        assert [one.state for one in left] == [] if works_again else [pb.SANDBOX_NOTREADY]
        for one in left:
            await rig.remove_pod(one.id)
        assert rig.leftovers() == [] and rig.network.calls.count("delete") == (1 if works_again else 2)

    on_rig(tmp_path, body)


def test_o2_a_pod_whose_network_is_not_given_back_stays(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        rig.network.failures["delete"] = 3
        for _ in range(3):
            with pytest.raises(CallFailed, match="told to fail"):
                await rig.stop_pod(pod)
            assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY and pod in rig.network.pods
        await rig.stop_pod(pod)
        assert pod not in rig.network.pods
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_o9_a_failed_start_is_reported_and_can_be_removed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.create(pod)
        rig.shims.failures["start_container"] = ContainerError("exec /x: ENOENT", code="invalid_argument")
        with pytest.raises(CallFailed, match="exec /x: ENOENT") as caught:
            await rig.start(container)
        assert caught.value.code is StatusCode.INVALID_ARGUMENT
        status = await rig.status(container)
        assert (status.state, status.reason, status.exit_code) == (pb.CONTAINER_EXITED, "StartError", 128)
        assert status.message == "exec /x: ENOENT"
        rig.shims.failures["delete"] = ContainerError("cgroup is busy")
        with pytest.raises(CallFailed, match="cgroup is busy"):
            await rig.remove(container)
        await rig.remove(container)
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


async def _given_up(rig: Rig, call: Coroutine[object, object, str]) -> None:
    """Its caller leaves once there is a record of the pod."""
    task = asyncio.create_task(call)
    while not rig.node.store.pods:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_o6_a_retry_joins_the_work_or_takes_its_result(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        gate = asyncio.Event()

        async def wait(_: object) -> None:
            await gate.wait()

        rig.network.before = wait
        first = asyncio.create_task(rig.run_pod())
        while "add" not in rig.network.calls and not rig.node.store.pods:
            await asyncio.sleep(0)
        second = asyncio.create_task(rig.run_pod())
        await asyncio.sleep(0)
        with pytest.raises(CallFailed, match="another request with this name is being worked on"):
            await rig.run_pod(hostname="different")
        first.cancel()  # its deadline has passed
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        joined = await second
        with pytest.raises(CallFailed, match="the name is taken"):
            await rig.run_pod()
        await rig.remove_pod(joined)
        # Everybody leaves: whoever asks the same next gets what was made for them.
        gate.clear()
        await _given_up(rig, rig.run_pod())
        gate.set()
        async with asyncio.timeout(SOON_S):
            while not any(pod.made_ns for pod in rig.node.store.pods.values()):
                await asyncio.sleep(0.001)
        (made,) = rig.node.store.pods
        assert await rig.run_pod() == made
        with pytest.raises(CallFailed, match="the name is taken"):
            await rig.run_pod()

    on_rig(tmp_path, body)


@pytest.mark.parametrize("when", ["while it is made", "when it is made"])
def test_o6_a_kubelet_that_restarts_while_a_pod_is_made_gets_the_pod_it_asks_for(tmp_path: Path, when: str) -> None:
    """Its request is another one: static pods carry when they were seen. Nobody was told of the first pod."""

    async def body(rig: Rig) -> None:
        gate = asyncio.Event()

        async def wait(_: object) -> None:
            await gate.wait()

        async def made() -> str:
            async with asyncio.timeout(SOON_S):
                while not all(pod.made_ns for pod in rig.node.store.pods.values()):
                    await asyncio.sleep(0.001)
            return next(iter(rig.node.store.pods))

        async def run(seen: str) -> str:
            return await rig.run_pod(annotations={"kubernetes.io/config.seen": seen})

        rig.network.before = wait
        before = asyncio.create_task(run("monday"))
        while not rig.node.store.pods:
            await asyncio.sleep(0)
        with pytest.raises(CallFailed, match="another request with this name is being worked on"):
            await run("tuesday")  # somebody still waits for that one
        before.cancel()
        with pytest.raises(asyncio.CancelledError):
            await before
        if when == "when it is made":
            gate.set()
            first = await made()
        after = asyncio.create_task(run("tuesday"))
        await asyncio.sleep(0)
        gate.set()
        second = await after
        assert rig.node.store.pods.keys() == rig.shims.pods.keys() == rig.network.pods.keys() == {second}
        assert (await rig.pod_status(second)).annotations == {"kubernetes.io/config.seen": "tuesday"}
        if when == "when it is made":
            assert first != second
        with pytest.raises(CallFailed, match="the name is taken"):
            await run("wednesday")  # this one was told
        # One that was found in a list, and has a container by now, is nobody's to take away.
        await rig.remove_pod(second)
        gate.clear()
        await _given_up(rig, run("monday"))
        gate.set()
        await rig.create(await made())
        with pytest.raises(CallFailed, match="the name is taken"):
            await run("tuesday")

    on_rig(tmp_path, body)


def test_o1_a_caller_that_leaves_stops_neither_work_nor_undoing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        gate = asyncio.Event()

        async def wait(_: object) -> None:
            await gate.wait()

        rig.network.before = wait
        rig.network.failures["add"] = 1
        call = asyncio.create_task(rig.run_pod())
        while not rig.shims.pods:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.set()
        async with asyncio.timeout(SOON_S):
            while rig.leftovers():
                await asyncio.sleep(0.001)

    on_rig(tmp_path, body)


def test_a_failed_name_is_free_again_at_once(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.network.failures["add"] = 5
        for _ in range(5):
            with pytest.raises(CallFailed):
                await rig.run_pod()
        pod = await rig.run_pod()
        for _ in range(5):
            rig.shims.failures["create"] = ContainerError("no")
            with pytest.raises(CallFailed, match="no"):
                await rig.create(pod)
        await rig.create(pod)

    on_rig(tmp_path, body)


def test_stopping_a_pod_while_a_container_is_made_in_it_leaves_nothing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        entered, gate = threading.Event(), threading.Event()
        real = rig.shims.create

        def slow(*args: object) -> object:
            facts = real(*args)  # type: ignore[arg-type]
            entered.set()
            gate.wait(SOON_S)
            return facts

        rig.shims.create = slow  # type: ignore[method-assign,assignment]
        making = asyncio.create_task(rig.create(pod))
        await asyncio.to_thread(entered.wait, 5)
        await rig.stop_pod(pod)
        removing = asyncio.create_task(rig.remove_pod(pod))
        await asyncio.sleep(0.01)
        gate.set()
        with pytest.raises(CallFailed, match="the pod sandbox is not ready"):
            await making
        await removing
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_o54_the_second_stop_wins_and_waits_for_the_same_end(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        signals: list[int] = []
        real = rig.shims.signal

        def stubborn(sandbox: object, id_: str, number: int, *, everyone: bool = False) -> None:
            signals.append(number)
            if number == 9:
                real(sandbox, id_, number, everyone=everyone)  # type: ignore[arg-type]

        rig.shims.signal = stubborn  # type: ignore[method-assign,assignment]
        patient = asyncio.create_task(rig.stop(container, 600))
        while not signals:
            await asyncio.sleep(0.001)
        patient_too = asyncio.create_task(rig.stop(container, 300))
        await asyncio.sleep(0.01)
        assert signals == [15] and not patient.done()
        await rig.stop(container, 0)
        await asyncio.gather(patient, patient_too)
        assert signals == [15, 9]
        assert (await rig.status(container)).exit_code == 137

    on_rig(tmp_path, body)


def test_o54_an_unkillable_container_is_an_error_that_says_so(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        rig.shims.signal = lambda *_, **__: None  # type: ignore[method-assign,assignment]
        with pytest.raises(CallFailed, match="still there 0.5 s after SIGKILL") as caught:
            await rig.stop(container)
        assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        assert (await rig.status(container)).state == pb.CONTAINER_RUNNING

    on_rig(tmp_path, body)


def test_o12_a_lost_exit_event_is_noticed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        rig.events.unwatch(pod)
        await rig.stop(container)
        assert (await rig.status(container)).exit_code == 137

    on_rig(tmp_path, body)


def test_too_many_containers_is_a_named_limit(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        from dataclasses import replace

        rig.node.config = replace(rig.config, limits=replace(rig.config.limits, containers=2))
        pod = await rig.run_pod()
        await rig.create(pod, "one")
        await rig.create(pod, "two")
        with pytest.raises(CallFailed, match=r"there are 2 containers \(limits\.containers\)") as caught:
            await rig.create(pod, "three")
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED

    on_rig(tmp_path, body)
