"""What cri.interfaces.Network promises, on the fake and on the real network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cri.interfaces import Network, NetworkError, PodNetwork
from tests.fakes.network import FakeNetwork, network_corner, pod_id
from tests.support import needs


@dataclass
class Subject:
    network: Network
    name: str


@pytest.fixture(params=["fake", "real"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    if request.param == "fake":
        yield Subject(FakeNetwork(tmp_path / "netns"), "fake")
        return
    needs("root")
    with network_corner(tmp_path) as corner:
        yield Subject(corner.cni, corner.config.default_name)


async def _pod(network: Network, identity: str = "") -> PodNetwork:
    identity = identity or pod_id()
    return PodNetwork(identity, "web", "default", "u-1", await network.new_netns(identity))


def test_a_namespace_is_named_after_its_pod_and_made_anew_each_time(subject: Subject) -> None:
    async def scenario() -> None:
        identity = pod_id()
        known = subject.network.netns_path(identity)
        path = await subject.network.new_netns(identity)
        assert path == known and path.name == identity and path.exists()
        assert await subject.network.new_netns(identity) == path
        await subject.network.remove_netns(path)
        assert not path.exists()
        await subject.network.remove_netns(path)

    asyncio.run(scenario())


def test_only_own_namespaces_are_removed(subject: Subject, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("kept")
    with pytest.raises(NetworkError, match="marker"):
        asyncio.run(subject.network.remove_netns(marker))
    assert marker.read_text() == "kept"


@pytest.mark.parametrize("bad", ["", "..", "a/b", "../x", "-x", "a\nb", "a\0b", "x" * 300])
def test_ids_that_are_no_names_are_refused(subject: Subject, bad: str) -> None:
    async def scenario() -> None:
        with pytest.raises(NetworkError):
            await subject.network.new_netns(bad)
        good = await _pod(subject.network)
        for call in (subject.network.add, subject.network.delete):
            with pytest.raises(NetworkError, match="not a pod's id"):
                await call(replace(good, id=bad))
        await subject.network.remove_netns(good.netns)

    asyncio.run(scenario())


def test_pods_get_distinct_addresses_without_prefix_length(subject: Subject) -> None:
    async def scenario() -> None:
        pods = [await _pod(subject.network) for _ in range(3)]
        results = [await subject.network.add(pod) for pod in pods]
        assert len({result.ips for result in results}) == 3
        assert all(len(result.ips) == 1 and "/" not in result.ips[0] for result in results)
        assert all(result.ips[0] in str(result.raw["ips"]) for result in results)
        for pod in pods:
            await subject.network.delete(pod)
            await subject.network.remove_netns(pod.netns)

    asyncio.run(scenario())


def test_the_same_add_again_has_the_same_answer(subject: Subject) -> None:
    async def scenario() -> None:
        pod = await _pod(subject.network)
        first = await subject.network.add(pod)
        assert (await subject.network.add(pod)).ips == first.ips
        await subject.network.delete(pod)
        await subject.network.remove_netns(pod.netns)

    asyncio.run(scenario())


def test_delete_is_idempotent_and_needs_no_namespace(subject: Subject) -> None:
    async def scenario() -> None:
        pod = await _pod(subject.network)
        await subject.network.delete(pod)
        await subject.network.add(pod)
        await subject.network.remove_netns(pod.netns)
        await subject.network.delete(pod)
        await subject.network.delete(pod)

    asyncio.run(scenario())


def test_add_without_namespace_or_network_is_refused_by_name(subject: Subject) -> None:
    async def scenario() -> None:
        pod = await _pod(subject.network)
        with pytest.raises(NetworkError, match="nosuch"):
            await subject.network.add(replace(pod, network="nosuch"))
        await subject.network.remove_netns(pod.netns)
        with pytest.raises(NetworkError, match="no pinned network namespace"):
            await subject.network.add(pod)

    asyncio.run(scenario())


def test_a_check_finds_a_pod_as_it_was_added_and_names_what_is_gone(subject: Subject) -> None:
    async def scenario() -> None:
        pod = await _pod(subject.network)
        assert await subject.network.check(pod)
        await subject.network.add(pod)
        assert await subject.network.check(pod) is None
        await subject.network.remove_netns(pod.netns)
        said = await subject.network.check(pod)
        assert said is not None and "is no pinned network namespace" in said
        await subject.network.delete(pod)
        assert await subject.network.check(pod)

    asyncio.run(scenario())


def test_status_of_a_good_network_is_none(subject: Subject) -> None:
    assert asyncio.run(subject.network.status()) is None


def test_collect_keeps_valid_pods_and_lets_the_others_go(subject: Subject) -> None:
    async def scenario() -> None:
        kept, gone = await _pod(subject.network), await _pod(subject.network)
        before = await subject.network.add(kept)
        await subject.network.add(gone)
        await subject.network.collect(frozenset({kept.id}))
        assert kept.netns.exists() and not gone.netns.exists()
        assert (await subject.network.add(kept)).ips == before.ips
        await subject.network.collect(frozenset())
        assert not kept.netns.exists()

    asyncio.run(scenario())


def test_counters_are_of_the_pods_interfaces_and_what_is_gone_is_left_out(subject: Subject) -> None:
    async def scenario() -> None:
        one, two = await _pod(subject.network), await _pod(subject.network)
        for pod in (one, two):
            await subject.network.add(pod)
        await subject.network.delete(two)
        await subject.network.remove_netns(two.netns)
        found = await subject.network.counters([one.netns, two.netns])
        assert list(found) == [one.netns]
        assert [counters.name for counters in found[one.netns]] == ["eth0"]
        await subject.network.delete(one)
        await subject.network.remove_netns(one.netns)

    asyncio.run(scenario())
