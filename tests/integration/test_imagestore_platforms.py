"""`ocid pull --all-platforms`: an index with all that it names in the store, as long as the image is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.model import ContentInvalid, ImageNotFound, RegistryUnavailable
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import OCI_INDEX, BuiltImage, Cut, FakeRegistry, as_json, build_image, build_index, sha256

OURS = build_image([{"shared": b"1" * 4000}, {"amd64": b"2" * 4000}])
THEIRS = build_image([{"shared": b"1" * 4000}, {"arm64": b"3" * 4000}], architecture="arm64")
OTHER = build_image([{"riscv64": b"4" * 4000}], architecture="riscv64")
INDEX = build_index([OURS, THEIRS, OTHER])


def blobs_of(*images: BuiltImage) -> set[str]:
    return {digest for image in images for digest in (image.digest, *image.blobs)}


ALL = blobs_of(OURS, THEIRS, OTHER) | {sha256(INDEX)}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def reference(registry: FakeRegistry) -> str:
    return served(registry)


def served(registry: FakeRegistry, index: bytes = INDEX) -> str:
    for number, image in enumerate((OURS, THEIRS, OTHER)):
        registry.add("app", f"single-{number}", image)
    return registry.put("app", "1", index, OCI_INDEX)


def pull_all(bench: Bench, reference: str) -> None:
    image = run(bench.store.pull(reference, all_platforms=True))
    assert image.id == OURS.config_digest


def test_everything_is_kept_and_ours_alone_is_unpacked(bench: Bench, registry: FakeRegistry, reference: str) -> None:
    pull_all(bench, reference)
    (image,) = bench.store.list()
    assert image.indexes == (sha256(INDEX),) and image.manifest_digest == OURS.digest
    assert bench.blobs() == ALL
    assert {digest for digest in THEIRS.diff_ids if bench.unpacker.has_layer(digest)} == {OURS.diff_ids[0]}
    bench.store.collect()
    assert bench.blobs() == ALL and list(bench.store.garbage()) == []
    bench.close()
    bench.open()  # as after a restart
    bench.store.collect()
    assert bench.blobs() == ALL


def test_another_platform_alone_is_what_the_name_means_then(
    bench: Bench, registry: FakeRegistry, reference: str
) -> None:
    """And ours again, once somebody pulls without saying which."""
    theirs = "linux/arm64/v8"
    for platform, wanted in ((theirs, THEIRS), ("", OURS), (theirs, THEIRS), (theirs, THEIRS), ("", OURS)):
        image = run(bench.store.pull(reference, platform=platform))
        assert image.id == wanted.config_digest and image.repo_tags == (reference,)
        found = bench.store.get(reference)
        assert found is not None and found.id == image.id
    with pytest.raises(ImageNotFound, match="no image for linux/s390x; there is"):
        run(bench.store.pull(reference, platform="linux/s390x"))


def test_what_was_pulled_for_another_platform_is_repaired_as_that(
    bench: Bench, registry: FakeRegistry, reference: str
) -> None:
    image = run(bench.store.pull(reference, platform="linux/arm64/v8"))
    path = bench.root / "blobs/sha256" / image.layers[0].blob.digest[7:]
    path.write_bytes(b"")
    assert run(bench.store.repair(bench.store.check())) == []
    assert bench.store.check() == [] and bench.store.get(reference) == image


def test_an_ordinary_pull_keeps_ours_and_a_later_one_completes_it(
    bench: Bench, registry: FakeRegistry, reference: str
) -> None:
    assert bench.pull(reference).indexes == ()
    assert bench.blobs() == blobs_of(OURS) | {sha256(INDEX)}
    registry.seen.clear()
    pull_all(bench, reference)
    asked = {seen.path.rpartition("/")[2] for seen in registry.seen if "/blobs/" in seen.path}
    assert bench.blobs() == ALL and not asked & blobs_of(OURS)
    # What is kept stays so when somebody pulls for this platform alone.
    bench.pull(reference)
    bench.store.collect()
    assert bench.blobs() == ALL


def test_it_goes_with_the_image_and_not_before(bench: Bench, registry: FakeRegistry, reference: str) -> None:
    pull_all(bench, reference)
    bench.store.tag(reference, "localhost/mine:1")
    bench.store.remove(reference)
    bench.store.collect()
    assert bench.blobs() >= blobs_of(OURS, THEIRS, OTHER)
    bench.store.remove("localhost/mine:1")
    assert {item.name for item in bench.store.garbage() if item.kind == "blob"} == bench.blobs()
    bench.store.collect()
    assert bench.blobs() == set() and not bench.strays()


def test_without_blobs_what_is_kept_in_full_is_whole(tmp_path: Path, registry: FakeRegistry) -> None:
    bench = Bench(tmp_path, keep_blobs=False)
    reference = served(registry)
    bench.pull(reference)
    assert not set(OURS.layer_digests) & bench.blobs()
    pull_all(bench, reference)
    bench.store.collect()
    assert bench.blobs() == ALL
    bench.close()


def test_the_doctor_looks_at_all_of_it_and_repairs_it(bench: Bench, registry: FakeRegistry, reference: str) -> None:
    pull_all(bench, reference)
    assert list(bench.store.check()) == []
    layer, config = THEIRS.layer_digests[1], OTHER.config_digest
    damaged = bench.root / "blobs/sha256" / layer[7:]
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    (bench.root / "blobs/sha256" / config[7:]).unlink()
    problems = bench.store.check()
    assert {(problem.kind, problem.name, problem.image) for problem in problems} == {
        ("blob", layer, OURS.config_digest),
        ("blob", config, OURS.config_digest),
    }
    assert list(run(bench.store.repair(problems))) == []
    assert list(bench.store.check()) == [] and bench.blobs() == ALL


def test_a_part_that_does_not_come_is_no_image(bench: Bench, registry: FakeRegistry, reference: str) -> None:
    """Nothing is recorded; what arrived is used by the next pull, or collected."""
    registry.rule("GET", f"/blobs/{OTHER.layer_digests[0]}", Cut(10))
    with pytest.raises(RegistryUnavailable, match="the connection ended"):
        pull_all(bench, reference)
    assert list(bench.store.list()) == []
    registry.heal()
    registry.seen.clear()
    pull_all(bench, reference)
    asked = {seen.path.rpartition("/")[2] for seen in registry.seen if "/blobs/" in seen.path}
    assert asked == {OTHER.layer_digests[0]} and bench.blobs() == ALL


def test_what_nobody_can_run_comes_along(bench: Bench, registry: FakeRegistry) -> None:
    """Attestations, indexes within indexes; a digest that is named twice is fetched once."""
    note = b'{"predicate": {}}'
    statement = {
        "schemaVersion": 2,
        "mediaType": OURS.media_type,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2},
        "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": sha256(note), "size": len(note)}],
    }
    attestation = BuiltImage(
        as_json(statement), OURS.media_type, {sha256(note): note, sha256(b"{}"): b"{}"}, sha256(b"{}"), (), (), {}
    )
    registry.add("app", "attestation", attestation)
    inner = build_index([OTHER, THEIRS])
    registry.put("app", "inner", inner, OCI_INDEX)
    entries = [
        {"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)},
        {
            "mediaType": OURS.media_type,
            "digest": attestation.digest,
            "size": len(attestation.manifest),
            "platform": {"os": "unknown", "architecture": "unknown"},
        },
    ]
    outer = build_index([OURS, THEIRS], extra=entries)
    reference = served(registry, outer)
    pull_all(bench, reference)
    expected = blobs_of(OURS, THEIRS, OTHER, attestation) | {sha256(outer), sha256(inner)}
    assert bench.blobs() == expected
    assert registry.count("GET", THEIRS.digest) == 1
    bench.store.collect()
    assert bench.blobs() == expected


@pytest.mark.parametrize("limit", ["manifests", "depth", "bytes"])
def test_s35_what_is_beyond_the_limits_is_refused(tmp_path: Path, registry: FakeRegistry, limit: str) -> None:
    changes: dict[str, int] = {"manifests": {"index_manifests": 2}, "depth": {"index_depth": 2}, "bytes": {}}[limit]
    bench = Bench(tmp_path, **changes)
    index = INDEX
    if limit == "manifests":  # no index has more than two, all together do
        inner = build_index([THEIRS, OTHER])
        registry.put("app", "inner", inner, OCI_INDEX)
        index = build_index([OURS], extra=[{"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}])
    elif limit == "depth":
        inner = build_index([THEIRS])
        for number in range(4):
            registry.put("app", f"deep-{number}", inner, OCI_INDEX)
            inner = build_index([], extra=[{"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}])
        registry.put("app", "deepest", inner, OCI_INDEX)
        index = build_index([OURS], extra=[{"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}])
    else:
        big = build_image([os.urandom(200_000)], compression="", architecture="arm64")
        registry.add("app", "big", big)
        bench.close()
        bench = Bench(tmp_path, image_bytes=100_000)
        index = build_index([OURS, big])
    reference = served(registry, index)
    with pytest.raises(ContentInvalid, match="more than 2 manifests|deeper than 2|the limit is 100000"):
        pull_all(bench, reference)
    assert list(bench.store.list()) == []
    assert bench.pull(reference).id == OURS.config_digest
    bench.close()


def test_a_manifest_has_no_other_platforms(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("single", "1", OURS)
    pull_all(bench, reference)
    (image,) = bench.store.list()
    assert image.indexes == () and bench.blobs() == blobs_of(OURS)


def test_an_index_without_ours_is_no_image_here(bench: Bench, registry: FakeRegistry) -> None:
    reference = served(registry, build_index([THEIRS, OTHER]))
    with pytest.raises(ImageNotFound):
        pull_all(bench, reference)
    assert bench.blobs() == set()
