"""What a killed command of ours had made, and what a stop says to a shim that starts things again: on fakes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.handover import Handover
from cri.intercept import Intercept
from cri.interrupted import forsaken
from cri.own import Own
from tests.fakes.node import Rig, on_rig

UID = "0123456789abcdef0123456789abcdef"


def launched(tmp_path: Path, *, said: bool, stopping: bool = False, uid: str = UID) -> list[str]:
    """The uids that are taken away, after a client has made a pod, `said` so, and left."""
    gone: list[str] = []
    intercept = Intercept()
    images: Any = None
    own = Own(images, intercept, Handover(tmp_path / "files.sock"), gone.append)

    async def client() -> None:
        held = asyncio.create_task(hold(own, uid))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if said:
            await own.call("Launched", {"uid": uid})
        if stopping:
            intercept.why_not = "ocid is stopping"
        held.cancel()
        await asyncio.wait({held})
        if (error := None if held.cancelled() else held.exception()) is not None:
            raise error

    asyncio.run(client())
    return gone


async def hold(own: Own, uid: str) -> None:
    async for _ in own.launch({"uid": uid}):
        raise AssertionError("it says nothing")


def test_o8_who_leaves_without_a_word_leaves_what_it_made_to_be_taken_away(tmp_path: Path) -> None:
    assert launched(tmp_path, said=False) == [UID]
    assert launched(tmp_path, said=True) == []
    assert launched(tmp_path, said=False, stopping=True) == []  # the next start looks


def test_s19_a_uid_that_is_no_name_of_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="uid: expected letters and digits"):
        launched(tmp_path, said=False, uid="../../etc")


def test_o8_only_pods_of_ours_and_of_that_uid_are_taken_away(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        others = await rig.run_pod("other")
        config = rig.pod_config("mine")
        config.metadata.namespace, config.metadata.uid = "ocid", UID
        config.labels["ocid.name"] = "mine"
        made = await rig.call("RunPodSandbox", pb.RunPodSandboxRequest(config=config))
        await rig.create(made.pod_sandbox_id)
        for kind in ("logs", "volumes"):
            os.makedirs(rig.node.config.root / kind / UID / "x")
        await forsaken(rig.node, UID)
        listed = await rig.call("ListPodSandbox", pb.ListPodSandboxRequest())
        assert [pod.id for pod in listed.items] == [others]
        assert not (rig.node.config.root / "logs" / UID).exists()
        assert not (rig.node.config.root / "volumes" / UID).exists()
        await forsaken(rig.node, next(pod.uid for pod in rig.node.store.pods.values()))
        assert others in rig.node.store.pods

    on_rig(tmp_path, body)


def test_o54_a_stop_ends_restarts_before_it_signals(tmp_path: Path) -> None:
    """Or the shim would start anew what the signal has ended."""

    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        plain, again = await rig.run(pod, "plain"), await rig.run(pod, "again", annotations={"ocid.restart": "always"})
        rig.shims.log.clear()
        await rig.stop(plain, 10)
        await rig.stop(again, 10)
        assert rig.shims.log == [f"signal {plain} 15", f"retire {again}", f"signal {again} 15"]

    on_rig(tmp_path, body)


def test_policies_that_are_none_are_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        with pytest.raises(CallFailed, match=r"annotations\[ocid.restart\]: 'maybe' is not no, on-failure"):
            await rig.create(pod, annotations={"ocid.restart": "maybe"})

    on_rig(tmp_path, body)
