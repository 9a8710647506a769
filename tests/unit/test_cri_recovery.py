"""The start after a kill -9, on fakes: what was half-made goes, what ran is known, what is lost is told."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from grpc import StatusCode

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.interfaces import ContainerError, PodNetwork, Sandbox, SandboxSpec, ShimUnresponsive
from cri.node import now_ns
from cri.records import Container, Pod
from cri.recovery import check_networks
from tests.fakes.node import Rig, on_rig
from tests.support import SOON_S


def _pod_record(rig: Rig, **fields: object) -> Pod:
    config = rig.pod_config("half")
    values: dict[str, object] = {
        "id": "ab" * 32, "name": "half", "namespace": "default", "uid": "uid-half", "attempt": 0,
        "handler": "native", "config": config.SerializeToString(), "created_ns": now_ns(),
    }  # fmt: skip
    return Pod(**(values | fields))  # type: ignore[arg-type]


def test_what_ran_is_known_and_goes_on(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        running, created = await rig.run(pod, "running"), await rig.create(pod, "created")
        ended = await rig.run(pod, "ended", "exit 5")
        await rig.ended(ended)
        before = {one: (await rig.status(one)).SerializeToString() for one in (running, created, ended)}
        pod_before = (await rig.pod_status(pod)).SerializeToString()
        for _ in range(3):
            await rig.restart()
            assert {one: (await rig.status(one)).SerializeToString() for one in before} == before
            assert (await rig.pod_status(pod)).SerializeToString() == pod_before
        await rig.start(created)
        await rig.stop(running)
        assert (await rig.status(running)).exit_code == 137
        with pytest.raises(CallFailed, match="the name is taken"):
            await rig.run_pod()
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_r14_a_half_made_pod_whose_network_does_not_go_stays_and_keeps_nobody(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        whole = await rig.run_pod("whole")
        netns = await rig.network.new_netns("ab" * 32)
        await rig.node.store.add(_pod_record(rig, netns=str(netns)))
        stuck = asyncio.Event()
        delete = rig.network.delete

        async def hangs(_pod: PodNetwork) -> None:
            await stuck.wait()

        rig.network.delete = hangs  # type: ignore[method-assign]
        rig.config = replace(rig.config, limits=replace(rig.config.limits, recovery_s=0.05))
        await rig.restart()
        assert (await rig.pod_status(whole)).state == pb.SANDBOX_READY
        assert (await rig.pod_status("ab" * 32)).state == pb.SANDBOX_NOTREADY
        rig.network.delete = delete  # type: ignore[method-assign]
        for pod in (whole, "ab" * 32):
            await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_pods_that_are_not_connected_any_more_are_named_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(rig: Rig) -> None:
        good, bad, stopped = await rig.run_pod("good"), await rig.run_pod("bad"), await rig.run_pod("stopped")
        alone = await rig.run_pod("alone", metadata=(("ocid-network", "none"),))
        await rig.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=stopped))
        await rig.restart()
        del rig.network.pods[bad]
        rig.network.calls.clear()
        await check_networks(rig.node)
        assert rig.network.calls == ["check", "check"], (
            "the stopped pod and the one without a network are not looked at"
        )
        said = [record.message for record in caplog.records if "nothing is recorded of its network" in record.message]
        assert len(said) == 1 and said[0].startswith(f"pod default/bad ({bad[:13]}): ")
        assert (await rig.pod_status(bad)).state == pb.SANDBOX_READY
        for pod in (good, bad, stopped, alone):
            await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_o14_exits_while_nobody_listened_are_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        made = {code: await rig.run(pod, f"c{code}") for code in range(20)}
        sandbox = rig.sandbox(pod)
        await rig.kill()
        for code, container in made.items():
            rig.shims.finish(sandbox, container, code, oom_killed=code == 7)
        await rig.restart_only()
        for code, container in made.items():
            status = await rig.status(container)
            reason = "OOMKilled" if code == 7 else "Error" if code else "Completed"
            assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, code, reason)

    on_rig(tmp_path, body)


def test_o13_o17_a_lost_shim_is_told_and_no_code_is_invented(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        running, created = await rig.run(pod, "running"), await rig.create(pod, "created")
        rig.shims.crash(rig.sandbox(pod))
        status = await rig.ended(running)
        assert (status.exit_code, status.reason) == (255, "ContainerStatusUnknown")
        assert "its shim" in status.message and "not known" in status.message
        assert (await rig.ended(created)).exit_code == 137
        assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY
        await rig.restart()
        assert (await rig.status(running)).exit_code == 255
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_o15_what_a_shim_wrote_before_it_died_counts(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        facts = rig.shims.pods[pod].containers[container].facts
        last = replace(facts, exit_code=7, finished_ns=facts.started_ns + 5)
        bundle = rig.config.state / "bundles" / container
        (bundle / "exit.json").write_text(json.dumps(asdict(last)))
        rig.shims.crash(rig.sandbox(pod))
        status = await rig.ended(container)
        assert (status.exit_code, status.finished_at, status.reason) == (7, facts.started_ns + 5, "Error")

    on_rig(tmp_path, body)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 5}', '{"id": "x", "pid": "y"}', "nul", "[" * 50_000])
def test_a_spoilt_exit_file_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        (rig.config.state / "bundles" / container / "exit.json").write_text(text)
        rig.shims.crash(rig.sandbox(pod))
        assert (await rig.ended(container)).exit_code == 255

    on_rig(tmp_path, body)


def test_o17_o4_after_a_reboot_pods_are_not_ready_and_can_be_removed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        running, ended = await rig.run(pod, "running"), await rig.run(pod, "ended", "exit 0")
        await rig.ended(ended)
        await rig.kill()
        rig.shims.pods.clear()
        for directory in ("pods", "bundles", "netns"):  # /run is empty
            for path in (rig.config.state / directory).iterdir():
                _remove(path)
        await rig.restart_only()
        assert (await rig.status(ended)).exit_code == 0 and (await rig.status(ended)).reason == "Completed"
        assert (await rig.status(running)).exit_code == 255
        assert (await rig.pod_status(pod)).state == pb.SANDBOX_NOTREADY
        assert pod in rig.network.pods
        await rig.stop_pod(pod)
        assert pod not in rig.network.pods
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()


def test_o3_a_half_made_pod_is_undone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        record = _pod_record(rig)
        netns = await rig.network.new_netns(record.id)
        record = replace(record, netns=str(netns))
        await rig.node.store.add(record)
        (rig.config.state / "pods" / record.id).mkdir()
        await rig.network.add(record.pod_network())
        assert (await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())).items == []
        await rig.restart()
        assert rig.leftovers() == []
        await rig.run_pod("half")

    on_rig(tmp_path, body)


def test_o3_a_half_made_pod_that_cannot_be_undone_is_listed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        record = _pod_record(rig)
        record = replace(record, netns=str(await rig.network.new_netns(record.id)))
        await rig.node.store.add(record)
        rig.network.failures["delete"] = 1
        await rig.restart()
        assert (await rig.pod_status(record.id)).state == pb.SANDBOX_NOTREADY
        await rig.remove_pod(record.id)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_a_half_made_container_is_undone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        before = rig.leftovers()
        config = rig.container_config()
        record = Container("cd" * 32, pod, "main", 0, config.SerializeToString(), now_ns())
        await rig.node.store.add(record)
        rig.snapshots.prepare(record.id, rig.image.chain_id)
        (rig.config.state / "bundles" / record.id).mkdir()
        await rig.restart()
        assert rig.leftovers() == before
        await rig.create(pod)

    on_rig(tmp_path, body)


def test_what_no_record_tells_of_is_swept(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        keep = await rig.run_pod("keep")
        container = await rig.run(keep)
        before = rig.leftovers()
        stranger = "ef" * 32
        directory = rig.config.state / "pods" / stranger
        directory.mkdir()
        rig.shims.pods[stranger] = rig.shims.pods[keep].__class__(
            SandboxSpec(stranger, directory, "x", None), Sandbox(stranger, directory, 0, 0)
        )
        (rig.config.state / "bundles" / stranger).mkdir()
        rig.snapshots.prepare(stranger, rig.image.chain_id)
        pod = replace(_pod_record(rig), id=stranger, netns=str(await rig.network.new_netns(stranger)))
        await rig.network.add(pod.pod_network())
        # And a container in a known pod's shim that the records know nothing of.
        shim = rig.shims.pods[keep]
        shim.containers["aa" * 32] = replace(
            shim.containers[container], facts=replace(shim.containers[container].facts, id="aa" * 32)
        )
        await rig.restart()
        assert rig.leftovers() == before
        assert set(shim.containers) == {container}
        assert (await rig.status(container)).state == pb.CONTAINER_RUNNING

    on_rig(tmp_path, body)


def test_one_pod_that_resists_costs_that_pod_only(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        one, two = await rig.run_pod("one"), await rig.run_pod("two")
        rig.shims.failures["reconnect"] = ContainerError("the shim talks nonsense")
        await rig.restart()
        states = {pod: (await rig.pod_status(pod)).state for pod in (one, two)}
        assert set(states) == {one, two}
        assert (await rig.run(two)) and len(rig.node.store.pods) == 2

    on_rig(tmp_path, body)


def test_o20_a_shim_that_answers_later_is_taken_in_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cri.recovery.RETRY_S", 0.01)

    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        rig.shims.failures["reconnect"] = ShimUnresponsive("the shim does not answer")
        await rig.restart()
        assert (await rig.status(container)).state == pb.CONTAINER_RUNNING
        async with asyncio.timeout(SOON_S):
            while len(rig.shims.pods[pod].subscribers) < 2:  # the daemon before it was the first
                await asyncio.sleep(0.005)
        rig.shims.finish(rig.sandbox(pod), container, 3)
        assert (await rig.ended(container)).exit_code == 3

    on_rig(tmp_path, body)


def test_stopping_a_pod_with_a_hung_shim_does_not_wait_for_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        rig.shims.failures["reconnect"] = ShimUnresponsive("the shim does not answer")
        await rig.stop_pod(pod)
        assert (await rig.status(container)).state == pb.CONTAINER_EXITED
        assert not [line for line in rig.shims.log if line.startswith("signal")]
        await rig.remove_pod(pod)
        assert rig.leftovers() == []

    on_rig(tmp_path, body)


def test_until_recovery_is_done_calls_are_unavailable(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.service.intercept.why_not = "ocid is starting"
        with pytest.raises(CallFailed, match="ListPodSandbox: ocid is starting") as caught:
            await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert (await rig.call("Version", pb.VersionRequest())).runtime_name == "ocid"

    on_rig(tmp_path, body)


# ---------------------------------------------------------------------------------------------------- the database


@pytest.mark.parametrize("damage", ["zeroes", "garbage", "truncated", "text", "empty"])
def test_o44_a_damaged_database_is_set_aside_and_the_daemon_starts(tmp_path: Path, damage: str) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        container = await rig.run(pod)
        await rig.node.store.settle()
        await rig.kill()
        path = rig.config.root / "ocid.db"
        whole = path.read_bytes()
        spoilt = {
            "zeroes": bytes(len(whole)),
            "garbage": whole[:100] + bytes(255 - byte for byte in whole[100:]),
            "truncated": whole[: len(whole) // 2 + 100],
            "text": b"this is no database at all, it is a text" * 200,
            "empty": b"",
        }
        path.write_bytes(spoilt[damage])
        await rig.restart_only()
        # The pods of a database that is lost are swept, as far as they could not be read; the node works.
        known = set(rig.node.store.pods)
        assert known in (set(), {pod})
        assert set(rig.shims.pods) == known
        await rig.remove_pod(pod)
        await rig.run_pod("next")
        assert container not in rig.node.store.containers
        if damage in ("garbage", "text"):
            assert list(rig.config.root.glob("ocid.db.damaged-*"))

    on_rig(tmp_path, body)


def test_o46_one_bad_row_costs_that_row(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        good = await rig.run_pod("good")
        bad = await rig.run_pod("bad")
        await rig.node.store.settle()
        await rig.kill()
        db = sqlite3.connect(rig.config.root / "ocid.db")
        db.execute("UPDATE pods SET config = ? WHERE id = ?", (b"\xff\xff\xff not a message", bad))
        db.commit()
        db.close()
        await rig.restart_only()
        assert set(rig.node.store.pods) == {good} and set(rig.shims.pods) == {good}
        assert await rig.run_pod("bad") != bad
        await rig.restart()
        assert len(rig.node.store.pods) == 2

    on_rig(tmp_path, body)
