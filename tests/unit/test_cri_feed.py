"""Container events and the Stream lists, through gRPC on a socket, on fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri import feed
from cri.api import api_pb2 as pb
from cri.api import api_pb2_grpc
from cri.node import now_ns
from cri.records import Container, Pod
from cri.verbs import streams
from tests.fakes.node import Rig, connected_to, on_rig
from tests.support import SOON_S, eventually

CREATED, STARTED = pb.CONTAINER_CREATED_EVENT, pb.CONTAINER_STARTED_EVENT
STOPPED, DELETED = pb.CONTAINER_STOPPED_EVENT, pb.CONTAINER_DELETED_EVENT


@contextlib.asynccontextmanager
async def serving(rig: Rig) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of both services of `rig`, on a socket."""
    async with connected_to(rig) as channel:
        yield api_pb2_grpc.RuntimeServiceStub(channel), api_pb2_grpc.ImageServiceStub(channel)


def connected(rig: Rig) -> grpc.aio.Channel:
    """A connection of its own: what is not read from one of a connection's streams holds up all of them."""
    return grpc.aio.insecure_channel(rig.config.listen, options=[("grpc.use_local_subchannel_pool", 1)])


async def listening(stub: Any) -> Any:
    """A call of GetContainerEvents that misses nothing from now on."""
    call = stub.GetContainerEvents(pb.GetEventsRequest())
    await call.initial_metadata()
    return call


async def _take(call: Any, count: int) -> list[Any]:
    return [await call.read() for _ in range(count)]


def _kinds(events: list[Any], names: dict[str, str]) -> list[tuple[str, Any]]:
    return [(names[event.container_id], event.container_event_type) for event in events]


def test_events_tell_a_whole_life_in_order_with_statuses(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async with serving(rig) as (stub, _):
            call = await listening(stub)
            before = now_ns()
            pod = await rig.run_pod(labels={"app": "web"})
            one = await rig.run(pod, "one", "sleep 1000")
            await rig.stop(one)
            await rig.remove(one)
            await rig.stop_pod(pod)
            await rig.remove_pod(pod)
            events = await _take(call, 8)
            assert _kinds(events, {pod: "pod", one: "one"}) == [
                ("pod", CREATED),
                ("pod", STARTED),
                ("one", CREATED),
                ("one", STARTED),
                ("one", STOPPED),
                ("one", DELETED),
                ("pod", STOPPED),
                ("pod", DELETED),
            ]
            times = [event.created_at for event in events]
            assert times == sorted(set(times)) and before <= times[0] <= times[-1] <= now_ns()
            # A kubelet finds the pod by its uid in every event, and forgets it with the last.
            assert {event.pod_sandbox_status.metadata.uid for event in events} == {"uid-web"}
            assert events[0].pod_sandbox_status.labels == {"app": "web"}
            assert [event.pod_sandbox_status.state for event in events[5:]] == [
                pb.SANDBOX_READY,
                pb.SANDBOX_NOTREADY,
                pb.SANDBOX_NOTREADY,
            ]
            states = [[(item.id, item.state) for item in event.containers_statuses] for event in events]
            assert states[2:6] == [
                [(one, pb.CONTAINER_CREATED)],
                [(one, pb.CONTAINER_RUNNING)],
                [(one, pb.CONTAINER_EXITED)],
                [],
            ]
            assert events[4].containers_statuses[0].exit_code == 137  # stopped with no time to spare
            call.cancel()

    on_rig(tmp_path, body)


def test_what_ends_at_once_and_what_never_starts_are_told_too(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        async with serving(rig) as (stub, _):
            call = await listening(stub)
            quick = await rig.run(pod, "quick", "exit 3")
            assert _kinds(await _take(call, 3), {quick: "quick"}) == [
                ("quick", CREATED),
                ("quick", STARTED),
                ("quick", STOPPED),
            ]
            waits = await rig.create(pod, "waits", "sleep 1000")
            await rig.stop_pod(pod)
            events = await _take(call, 3)
            assert _kinds(events, {waits: "waits", pod: "pod"}) == [
                ("waits", CREATED),
                ("waits", STOPPED),
                ("pod", STOPPED),
            ]
            call.cancel()

    on_rig(tmp_path, body)


def test_an_exit_that_is_told_before_its_start_was_answered_comes_second(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def start(sandbox: Any, container_id: str) -> Any:
            pod, container = rig.shims._container(sandbox, container_id)
            rig.shims._end(pod, container, 3, 0)
            eventually(lambda: rig.node.starting[container_id], what="the daemon has read of the exit")
            return replace(container.facts, started_ns=container.facts.finished_ns, finished_ns=0)

        pod = await rig.run_pod()
        rig.shims.start_container = start  # type: ignore[method-assign]
        async with serving(rig) as (stub, _):
            call = await listening(stub)
            one = await rig.run(pod, "one")
            events = await _take(call, 3)
            assert _kinds(events, {one: "one"}) == [("one", CREATED), ("one", STARTED), ("one", STOPPED)]
            (status,) = events[2].containers_statuses
            assert (status.exit_code, status.started_at > 0) == (3, True) and rig.node.starting == {}
            call.cancel()

    on_rig(tmp_path, body)


def test_a_lost_shim_is_told_once(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pod = await rig.run_pod()
        one = await rig.run(pod, "one", "sleep 1000")
        async with serving(rig) as (stub, _):
            call = await listening(stub)
            rig.shims.crash(rig.sandbox(pod))
            told = _kinds(await _take(call, 2), {one: "one", pod: "pod"})
            assert sorted(told) == [("one", STOPPED), ("pod", STOPPED)]
            await rig.remove_pod(pod)
            rest = _kinds(await _take(call, 2), {one: "one", pod: "pod"})
            assert rest == [("one", DELETED), ("pod", DELETED)]
            call.cancel()

    on_rig(tmp_path, body)


def test_what_fails_to_be_made_is_nobodys_business(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        from cri.errors import CallFailed
        from cri.interfaces import ContainerError

        async with serving(rig) as (stub, _):
            call = await listening(stub)
            rig.shims.failures["start"] = ContainerError("no shim today", code="internal")
            with pytest.raises(CallFailed, match="no shim today"):
                await rig.run_pod("bad")
            good = await rig.run_pod("good")
            assert (await call.read()).container_id == good
            call.cancel()

    on_rig(tmp_path, body)


def test_o55_a_slow_reader_is_ended_and_the_others_get_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one reads nothing while 500 containers come and go; what it may hold is bounded, and it is told."""
    monkeypatch.setattr(feed, "MAX_EVENTS", 300)

    async def body(rig: Rig) -> None:
        pod = await rig.run_pod(annotations={"long": "x" * 4096})  # 8 MiB of events: no buffer below takes them all
        made = [Container(f"{n:064x}", pod, f"c{n}", 0, b"", 1) for n in range(500)]
        async with serving(rig) as (stub, _), connected(rig) as other:
            fast = await listening(stub)
            (ahead,) = rig.feed._readers
            slow = await listening(api_pb2_grpc.RuntimeServiceStub(other))
            reader = asyncio.create_task(_take(fast, 2000))
            for container in made:
                await rig.node.store.add(container)
                for facts in ({"made_ns": 1}, {"started_ns": 2}, {"finished_ns": 3, "exit_code": 0}):
                    rig.node.store.note_container(container.id, **facts)
                await rig.node.store.remove(container)
                while len(ahead.queue) > 100:  # the fast one shares this loop
                    await asyncio.sleep(0)
                held = sum(len(one.queue) for one in rig.feed._readers)
                assert held <= 2 * feed.MAX_EVENTS
            events = await reader
            assert [event.container_id for event in events] == [one.id for one in made for _ in range(4)]
            assert [event.container_event_type for event in events] == [CREATED, STARTED, STOPPED, DELETED] * 500
            with pytest.raises(grpc.aio.AioRpcError, match="events behind; list and read anew") as caught:
                while await slow.read():
                    pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            # It lists anew, and is told what comes after that.
            again = await listening(stub)
            assert [item.id for item in (await stub.ListPodSandbox(pb.ListPodSandboxRequest())).items] == [pod]
            await rig.remove_pod(pod)
            assert _kinds(await _take(again, 2), {pod: "pod"}) == [("pod", STOPPED), ("pod", DELETED)]
            fast.cancel(), again.cancel()

    on_rig(tmp_path, body, 60)


def test_o55_readers_have_bounds_in_number_and_bytes_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_READERS", 2)
    reader = feed._Reader()
    reader.put(b"x" * (feed.MAX_BYTES + 1))  # one alone may be longer
    assert len(reader.queue) == 1
    reader.put(b"x")
    assert not reader.queue and not reader.bytes
    with pytest.raises(feed.LimitExceeded, match="1 events behind"):
        reader.take()

    async def body(rig: Rig) -> None:
        async with serving(rig) as (stub, _):
            calls = [await listening(stub), await listening(stub)]
            with pytest.raises(grpc.aio.AioRpcError, match="2 readers") as caught:
                await stub.GetContainerEvents(pb.GetEventsRequest()).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            calls.pop().cancel()
            async with asyncio.timeout(SOON_S):
                while rig.feed.readers > 1:
                    await asyncio.sleep(0)
            rig.feed.close()
            with pytest.raises(grpc.aio.AioRpcError, match="stopping") as caught:
                await calls[0].read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and rig.feed.readers == 0

    on_rig(tmp_path, body)


def test_streams_hold_what_the_lists_hold_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_ITEMS", 2)

    async def body(rig: Rig) -> None:
        pods = [await rig.run_pod(f"p{n}", labels={"n": str(n)}) for n in range(5)]
        made = [await rig.run(pods[0], f"c{n}", "sleep 1000") for n in range(3)]
        async with serving(rig) as (runtime, images):
            pieces = [piece async for piece in runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest())]
            assert [len(piece.pod_sandboxes) for piece in pieces] == [2, 2, 1]
            listed = (await runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
            assert [item for piece in pieces for item in piece.pod_sandboxes] == list(listed)
            request = pb.StreamPodSandboxesRequest(filter=pb.PodSandboxFilter(label_selector={"n": "3"}))
            pieces = [piece async for piece in runtime.StreamPodSandboxes(request)]
            assert [item.id for piece in pieces for item in piece.pod_sandboxes] == [pods[3]]
            asked = pb.ContainerFilter(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING))
            pieces = [piece async for piece in runtime.StreamContainers(pb.StreamContainersRequest(filter=asked))]
            assert [item.id for piece in pieces for item in piece.containers] == made and len(pieces) == 2
            found = [piece async for piece in images.StreamImages(pb.StreamImagesRequest())]
            assert [item.id for piece in found for item in piece.images] == [rig.image.id]

    on_rig(tmp_path, body)


def test_pieces_are_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 100)
    items = [pb.Container(id="x" * size) for size in (60, 60, 500, 10, 10)]
    pieces = [
        pb.StreamContainersResponse.FromString(piece)
        for piece in streams.chunks(pb.StreamContainersResponse, "containers", items)
    ]
    assert [[len(item.id) for item in piece.containers] for piece in pieces] == [[60], [60], [500], [10, 10]]
    assert list(streams.chunks(pb.StreamContainersResponse, "containers", [])) == []


def test_one_change_may_be_several_events() -> None:
    half = Container("c", "p", "c", 0, b"", 1)
    made = Container("c", "p", "c", 0, b"", 1, made_ns=2, started_ns=3, finished_ns=4)
    assert list(feed._happened(half, made)) == [CREATED, STARTED, STOPPED]
    assert list(feed._happened(half, None)) == [] and list(feed._happened(made, made)) == []
    pod = Pod("p", "p", "", "", 0, "native", b"", 1, made_ns=2, lost_ns=3)
    gone = Pod("p", "p", "", "", 0, "native", b"", 1, made_ns=2, lost_ns=3, stopped_ns=4)
    assert list(feed._happened(pod, gone)) == []
