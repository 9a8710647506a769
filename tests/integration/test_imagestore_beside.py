"""Layers are asked for beside the config: in which order a registry is asked, and what a config that is refused leaves.
The registry holds answers back until it has seen what is to be seen, so nothing here depends on who is quicker."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagestore.model import ContentInvalid, ImageError, ImageNotFound
from tests.fakes.imagestore import Bench
from tests.fakes.registry import BuiltImage, FakeRegistry, Hold, Reply, Seen, Stall, build_image
from tests.fakes.unpacker import MemoryUnpacker
from tests.support import SOON_S

LAYERS = [{f"f{number}": random.Random(number).randbytes(20_000 * (number + 1))} for number in range(3)]
HALF = 30_000


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(**changes: Any) -> Bench:
        made.append(Bench(tmp_path, **{"answer_timeout_s": SOON_S, "stall_timeout_s": SOON_S, **changes}))
        return made[-1]

    yield bench
    for one in made:
        one.close()


def image(**edits: Any) -> BuiltImage:
    return build_image(LAYERS, compression="", **edits)


def asked(registry: FakeRegistry, built: BuiltImage) -> list[str]:
    """Which blobs, in order: "config", or the layer's number."""
    names = {built.config_digest: "config", **{digest: str(at) for at, digest in enumerate(built.layer_digests)}}
    return [names[seen.path.rpartition("/")[2]] for seen in gets(registry)]


def gets(registry: FakeRegistry) -> list[Seen]:
    return [seen for seen in registry.seen if seen.method == "GET" and "/blobs/" in seen.path]


def unpacked(bench: Bench) -> list[str]:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    return bench.unpacker.calls


def test_layers_are_asked_for_before_the_config_is_there(make: Callable[..., Bench], registry: FakeRegistry) -> None:
    bench, built = make(), image()
    reference = registry.add("app", "1", built)
    before: list[list[str]] = []

    def all_asked() -> bool:
        if len(asked(registry, built)) < 4:
            return False
        before.append(list(unpacked(bench)))
        return True

    registry.rule("GET", f"/blobs/{built.config_digest}", Hold(all_asked))
    bench.pull(reference)
    # The config has the first turn; the unpacker hears nothing until the config is there.
    assert asked(registry, built)[0] == "config" and sorted(asked(registry, built)[1:]) == ["0", "1", "2"]
    assert before == [[]] and len(unpacked(bench)) == 3


def test_the_config_has_its_turn_where_there_is_one(make: Callable[..., Bench], registry: FakeRegistry) -> None:
    bench, built = make(concurrent_downloads=1), image()
    bench.pull(registry.add("app", "1", built))
    assert asked(registry, built)[0] == "config" and len(asked(registry, built)) == 4


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        ({"architecture": "arm64"}, ImageNotFound, "the image is for linux/arm64"),
        (
            {"edit_config": lambda document: document["rootfs"]["diff_ids"].pop()},
            ContentInvalid,
            "2 diff ids for the 3",
        ),
    ],
    ids=["another machine's", "too few diff ids"],
)
def test_a_config_that_is_refused_leaves_what_can_be_resumed(
    make: Callable[..., Bench],
    registry: FakeRegistry,
    edit: dict[str, Any],
    kind: type[ImageError],
    says: str,
) -> None:
    bench, built = make(batch_bytes=1000), image(**edit)
    reference = registry.add("app", "bad", built)
    part = bench.root / "ingest" / f".{built.layer_digests[2][7:]}.part"
    for digest in built.layer_digests:
        registry.rule("GET", f"/blobs/{digest}", Stall(HALF if digest == built.layer_digests[2] else 0))
    registry.rule("GET", f"/blobs/{built.config_digest}", Hold(lambda: part.exists() and part.stat().st_size > 0))
    with pytest.raises(kind, match=says):
        bench.pull(reference)
    assert bench.ingests() == {part.name} and bench.strays() == set() and unpacked(bench) == []
    assert bench.blobs() == {built.digest, built.config_digest} and list(bench.store.list()) == []
    registry.heal()
    there, good = part.stat().st_size, image()
    assert good.layer_digests == built.layer_digests
    bench.pull(registry.add("app", "good", good))
    (resumed,) = [seen for seen in gets(registry)[4:] if seen.path.endswith(built.layer_digests[2])]
    assert resumed.headers["Range"] == f"bytes={there}-" and bench.ingests() == set()


def test_the_config_is_what_a_pull_fails_by(make: Callable[..., Bench], registry: FakeRegistry) -> None:
    """Also where a layer has failed before."""
    bench, built = make(), image(architecture="arm64")
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[1]}", Reply(404))
    registry.rule("GET", f"/blobs/{built.config_digest}", Hold(lambda: "1" in asked(registry, built)))
    with pytest.raises(ImageNotFound, match="the image is for linux/arm64"):
        bench.pull(reference)


def test_a_layer_that_fails_is_told_once_the_config_is_there(
    make: Callable[..., Bench], registry: FakeRegistry
) -> None:
    bench, built = make(), image()
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[1]}", Reply(404))
    with pytest.raises(ImageNotFound, match=f"answered 404 for blob {built.layer_digests[1]}"):
        bench.pull(reference)
    assert bench.ingests() <= {f".{digest[7:]}.part" for digest in built.layer_digests} and bench.strays() == set()


def test_a_store_that_keeps_no_blobs_asks_for_the_config_first(
    make: Callable[..., Bench], registry: FakeRegistry
) -> None:
    """It may have the layers: only their chain ids tell."""
    bench, built = make(keep_blobs=False), image()
    reference, other = registry.add("one", "1", built), registry.add("two", "1", built)
    bench.pull(reference)
    assert len(asked(registry, built)) == 4
    bench.pull(other)
    assert len(asked(registry, built)) == 4  # the config stayed
    with pytest.raises(ImageNotFound):
        bench.pull(registry.add("three", "1", image(architecture="arm64")))
    assert len(gets(registry)) == 5
