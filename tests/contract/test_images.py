"""What `cri.interfaces.Images` promises, shown on the fake and on the real store (with a fake registry behind it)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri.interfaces import Images
from imagestore.model import AccessDenied, Credentials, ImageNotFound, Progress, ReferenceInvalid
from tests.fakes.images import MemoryImages, make_image
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import FakeRegistry, build_image


class Memory:
    """The fake, with a registry that is a dict."""

    domain = "registry.test:5000"

    def __init__(self) -> None:
        self.images = MemoryImages()

    def publish(self, name: str, seed: str) -> str:
        """Puts an image under `name`; returns its manifest digest."""
        return self.images.offer(f"{self.domain}/{name}", make_image(seed)).manifest_digest

    def withdraw(self, name: str) -> None:
        del self.images.offered[f"{self.domain}/{name}"]

    def lock(self, username: str, password: str) -> None:
        self.images.passwords[self.domain] = (username, password)

    def fetches(self) -> int:
        return len(self.images.fetches)


class Real:
    """The store, with a registry on loopback."""

    def __init__(self, directory: Path, registry: FakeRegistry) -> None:
        self._registry = registry
        self.images = Bench(directory).store
        self.domain = registry.name

    def publish(self, name: str, seed: str) -> str:
        repository, _, tag = name.rpartition(":")
        image = build_image([{"base": b"base"}, {"seed": seed.encode() * 100}])
        self._registry.add(repository, tag, image)
        return image.digest

    def withdraw(self, name: str) -> None:
        repository, _, tag = name.rpartition(":")
        del self._registry.manifests[(repository, tag)]

    def lock(self, username: str, password: str) -> None:
        self._registry.basic = (username, password)

    def fetches(self) -> int:
        return self._registry.count("GET", "/manifests/")


@pytest.fixture(params=["memory", "real"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory | Real]:
    if request.param == "memory":
        yield Memory()
        return
    with FakeRegistry() as registry:
        yield Real(tmp_path, registry)


def test_is_an_images(world: Memory | Real) -> None:
    images: Images = world.images
    assert list(images.list()) == []


def test_pull_by_tag_is_found_by_every_name(world: Memory | Real) -> None:
    digest = world.publish("team/app:1", "a")
    image = run(world.images.pull(f"{world.domain}/team/app:1"))
    assert image.repo_tags == (f"{world.domain}/team/app:1",)
    assert image.repo_digests == (f"{world.domain}/team/app@{digest}",)
    assert image.manifest_digest == digest
    assert image.chain_id == image.layers[-1].chain_id and len(image.layers) == 2
    assert image.size >= sum(layer.blob.size for layer in image.layers)
    digits = image.id.removeprefix("sha256:")
    for name in (image.id, digits, digits[:12], f"sha256:{digits[:12]}", *image.repo_tags, *image.repo_digests):
        assert world.images.get(name) == image, name
    assert list(world.images.list()) == [image]


def test_unknown_names_are_none(world: Memory | Real) -> None:
    for name in ("nothing", "sha256:" + "0" * 64, "0" * 64, "UPPER/case", "", "a b", "abc"):
        assert world.images.get(name) is None


def test_pull_by_digest_has_no_tag(world: Memory | Real) -> None:
    digest = world.publish("app:1", "a")
    for reference in (f"{world.domain}/app@{digest}", f"{world.domain}/app:1@{digest}"):
        image = run(world.images.pull(reference))
        assert image.repo_tags == ()
        assert image.repo_digests == (f"{world.domain}/app@{digest}",)


def test_pull_again_is_the_same_image(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    first = run(world.images.pull(f"{world.domain}/app:1"))
    assert run(world.images.pull(f"{world.domain}/app:1")) == first
    assert len(world.images.list()) == 1


def test_unknown_image_then_published(world: Memory | Real) -> None:
    with pytest.raises(ImageNotFound, match="pull .*/app:1: .*404"):
        run(world.images.pull(f"{world.domain}/app:1"))
    assert list(world.images.list()) == []
    world.publish("app:1", "a")
    assert run(world.images.pull(f"{world.domain}/app:1")).repo_tags


@pytest.mark.parametrize("bad", ["", "UPPER", "a b", "a@sha256:short", "a:b:c", "../x", "x/../y", "a\n"])
def test_bad_reference(world: Memory | Real, bad: str) -> None:
    with pytest.raises(ReferenceInvalid):
        run(world.images.pull(bad))


def test_a_tag_that_moves_leaves_the_old_image_its_digest(world: Memory | Real) -> None:
    world.publish("app:1", "old")
    old = run(world.images.pull(f"{world.domain}/app:1"))
    world.publish("app:1", "new")
    new = run(world.images.pull(f"{world.domain}/app:1"))
    assert new.id != old.id and new.repo_tags == old.repo_tags
    kept = world.images.get(old.id)
    assert kept is not None and kept.repo_tags == () and kept.repo_digests == old.repo_digests
    assert world.images.get(old.repo_digests[0]) == kept
    assert world.images.get(f"{world.domain}/app:1") == new


def test_remove_by_tag_takes_the_image_with_its_last_name(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    world.publish("app:2", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    run(world.images.pull(f"{world.domain}/app:2"))
    world.images.remove(f"{world.domain}/app:1")
    left = world.images.get(image.id)
    assert left is not None and left.repo_tags == (f"{world.domain}/app:2",)
    world.images.remove(f"{world.domain}/app:2")
    assert world.images.get(image.id) is None and list(world.images.list()) == []


def test_remove_by_id_takes_all_names(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    world.images.tag(image.id, "other:tag")
    world.images.remove(image.id)
    assert world.images.get("other:tag") is None and world.images.get(image.repo_tags[0]) is None


def test_remove_by_digest_takes_what_the_repository_calls_by_it(world: Memory | Real) -> None:
    digest = world.publish("app:1", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    world.images.remove(f"{world.domain}/app@{digest}")
    assert world.images.get(image.id) is None


def test_remove_unknown_is_no_error(world: Memory | Real) -> None:
    for name in ("nothing", "sha256:" + "0" * 64, "UPPER", "", "abc"):
        world.images.remove(name)


def test_remove_then_pull_again(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    world.images.remove(image.id)
    world.images.collect()
    assert run(world.images.pull(f"{world.domain}/app:1")) == image


def test_tag_gives_and_moves(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    world.publish("app:2", "b")
    first = run(world.images.pull(f"{world.domain}/app:1"))
    second = run(world.images.pull(f"{world.domain}/app:2"))
    world.images.tag(first.id, "mine")
    found = world.images.get("docker.io/library/mine:latest")
    assert found is not None and found.id == first.id
    assert found.repo_digests == first.repo_digests  # no registry stands behind the new name
    world.images.tag(second.repo_tags[0], "mine:latest")
    found = world.images.get("mine")
    assert found is not None and found.id == second.id


def test_tag_of_nothing_or_to_a_digest(world: Memory | Real) -> None:
    with pytest.raises(ImageNotFound):
        world.images.tag("nothing", "new")
    digest = world.publish("app:1", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    for bad in (f"app@{digest}", "UPPER"):
        with pytest.raises(ReferenceInvalid):
            world.images.tag(image.id, bad)


def test_usage_grows_and_comes_back(world: Memory | Real) -> None:
    before = world.images.usage()
    world.publish("app:1", "a")
    image = run(world.images.pull(f"{world.domain}/app:1"))
    during = world.images.usage()
    assert during.bytes > before.bytes and during.inodes > before.inodes
    world.images.collect()
    assert world.images.get(image.id) == image
    world.images.remove(image.id)
    world.images.collect()
    assert world.images.usage().bytes < during.bytes


def test_o50_equal_pulls_at_once_are_one(world: Memory | Real) -> None:
    world.publish("app:1", "a")

    async def many() -> None:
        images = await asyncio.gather(*(world.images.pull(f"{world.domain}/app:1") for _ in range(20)))
        assert len({image.id for image in images}) == 1

    run(many())
    assert world.fetches() == 1


def test_cancelling_one_waiter_leaves_the_other(world: Memory | Real) -> None:
    world.publish("app:1", "a")

    async def scenario() -> None:
        first = asyncio.create_task(world.images.pull(f"{world.domain}/app:1"))
        second = asyncio.create_task(world.images.pull(f"{world.domain}/app:1"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).repo_tags
        with pytest.raises(asyncio.CancelledError):
            await first

    run(scenario())


def test_cancelled_pull_can_be_made_again(world: Memory | Real) -> None:
    world.publish("app:1", "a")

    async def scenario() -> None:
        task = asyncio.create_task(world.images.pull(f"{world.domain}/app:1"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(world.images.list()) == []
        assert (await world.images.pull(f"{world.domain}/app:1")).repo_tags

    run(scenario())


def test_progress_ends_in_done_and_then_in_exists(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    for last in ("done", "exists"):
        told: list[Progress] = []
        image = run(world.images.pull(f"{world.domain}/app:1", None, told.append))
        assert {item.phase for item in told} <= {"waiting", "download", "unpack", "done", "exists"}
        final = {item.digest: item.phase for item in told}
        assert all(final[layer.blob.digest] == last for layer in image.layers)
        assert all(0 <= item.done <= item.total for item in told)
        world.images.tag(image.id, "keep:layers")
        world.images.remove(f"{world.domain}/app:1")


def test_s30_credentials(world: Memory | Real) -> None:
    world.publish("app:1", "a")
    world.lock("anna", "correct-horse")
    for wrong in (None, Credentials("anna", "wrong-horse")):
        with pytest.raises(AccessDenied) as denied:
            run(world.images.pull(f"{world.domain}/app:1", wrong))
        assert "horse" not in repr(denied.value) + str(denied.value) + repr(wrong)
    assert list(world.images.list()) == []
    assert run(world.images.pull(f"{world.domain}/app:1", Credentials("anna", "correct-horse"))).repo_tags
