"""Artifacts in the store, by the real snapshotter: files by their titles, which stay inside whatever they say."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from imagestore.artifacts import TITLE
from imagestore.model import ContentInvalid, Image
from snapshotter.model import Config
from snapshotter.overlay import Overlay
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import OCI_MANIFEST, BuiltImage, FakeRegistry, as_json, build_image, compress, sha256
from tests.support import needs

EMPTY = "application/vnd.oci.empty.v1+json"
MODEL = "application/vnd.example.model"
Files = Sequence[tuple[str | None, bytes]]


def artifact(files: Files, *, kind: str = MODEL, config: str = EMPTY, layer: str = "text/plain") -> BuiltImage:
    """As `oras push` makes one; a title of None is one that is not said."""
    layers = []
    blobs = {sha256(b"{}"): b"{}"}
    for title, content in files:
        described: dict[str, object] = {"mediaType": layer, "digest": sha256(content), "size": len(content)}
        if title is not None:
            described["annotations"] = {TITLE: title}
        layers.append(described)
        blobs[sha256(content)] = content
    document: dict[str, object] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind}
    document |= {"config": {"mediaType": config, "digest": sha256(b"{}"), "size": 2}, "layers": layers}
    digests = tuple(str(one["digest"]) for one in layers)
    return BuiltImage(as_json(document), OCI_MANIFEST, blobs, sha256(b"{}"), digests, digests, {})


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


def overlay(directory: Path) -> Overlay:
    db = sqlite3.connect(directory / "snapshots.db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    return Overlay(directory / "snapshots", db, Config(workers=1, arriving=1))


@pytest.fixture
def unpacker(tmp_path: Path) -> Iterator[Overlay]:
    needs("root")
    made = overlay(tmp_path)
    yield made
    made.close()


@pytest.fixture
def bench(tmp_path: Path, unpacker: Overlay) -> Iterator[Bench]:
    opened = Bench(tmp_path, unpacker)
    yield opened
    opened.close()


def seen(unpacker: Overlay, image: Image) -> Mapping[str, bytes]:
    """The files of all layers, by their paths."""
    found: dict[str, bytes] = {}
    for top in reversed(unpacker.lower_directories(image.chain_id)):
        for directory, _, names in os.walk(top):
            for name in names:
                path = Path(directory) / name
                found[str(path.relative_to(top))] = path.read_bytes()
    return found


def test_each_layer_is_a_file(bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    long = "models/" + "x" * 120 + "/weights.bin"
    files: Files = [("a.txt", b"alpha"), ("models/b.bin", b"\x1f\x8b no gzip"), (long, os.urandom(70_000)),
                    ("grüße.txt", b""), (None, b"nameless")]  # fmt: skip
    built = artifact(files)
    reference = registry.add("model", "1", built)
    image = bench.pull(reference)
    assert (image.id, image.manifest_digest, image.artifact) == (built.digest, built.digest, MODEL)
    assert image.repo_tags == (reference,) and image.size == 2 + sum(len(content) for _, content in files)
    expected = {title or sha256(content).replace(":", "-"): content for title, content in files}
    assert seen(unpacker, image) == expected
    file = unpacker.lower_directories(image.layers[0].chain_id)[0] / "a.txt"
    assert (file.stat().st_mode & 0o7777, file.stat().st_uid, file.stat().st_mtime) == (0o644, 0, 0)
    assert bench.store.get(image.id[7:20]) is not None and [one.id for one in bench.store.list()] == [image.id]


def test_it_lives_as_images_do(tmp_path: Path, bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    """Two artifacts share their config, as artifacts do; each goes alone. A restart changes nothing."""
    one, two = artifact([("a", b"1")]), artifact([("a", b"2"), ("b", b"1")], kind="")
    first, second = registry.add("one", "1", one), registry.add("two", "1", two)
    images = [bench.pull(first), bench.pull(second)]
    assert images[1].artifact == EMPTY and len({image.id for image in images}) == 2
    bench.store.collect()
    assert list(bench.store.check()) == [] and list(bench.store.garbage()) == []
    bench.close()
    bench.open()
    assert {image.id for image in bench.store.list()} == {image.id for image in images}
    bench.store.remove(first)
    bench.store.collect()
    assert seen(unpacker, images[1]) == {"a": b"2", "b": b"1"}
    assert not unpacker.has_layer(images[0].chain_id)
    bench.store.remove(second)
    bench.store.collect()
    assert bench.blobs() == set() and os.listdir(tmp_path / "snapshots/layers") == []


def test_damage_is_found_and_repaired(bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    built = artifact([("a", b"1" * 5000)])
    image = bench.pull(registry.add("one", "1", built))
    (bench.root / "blobs/sha256" / built.layer_digests[0][7:]).write_bytes(b"2" * 5000)
    problems = bench.store.check()
    assert [problem.name for problem in problems] == [built.layer_digests[0]]
    assert list(run(bench.store.repair(problems))) == [] and list(bench.store.check()) == []
    assert seen(unpacker, image) == {"a": b"1" * 5000}


@pytest.mark.parametrize("title", ["../x", "a/../../x", "/../x", "a/../../../../etc/passwd"])
def test_r1_names_that_lead_out_are_refused(
    tmp_path: Path, bench: Bench, unpacker: Overlay, registry: FakeRegistry, title: str
) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ContentInvalid, match="leaves the root"):
        bench.pull(registry.add("bad", "1", artifact([(title, b"out")])))
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "snapshots/layers") == []
    assert list(bench.store.list()) == []


def test_an_absolute_name_stays_inside(bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    image = bench.pull(registry.add("one", "1", artifact([("/etc/it", b"1")])))
    assert seen(unpacker, image) == {"etc/it": b"1"}


@pytest.mark.parametrize(
    ("titles", "says"),
    [
        (["a", "a"], "two layers are called 'a'"),
        ([".wh.a"], "would hide other files"),
        (["a", ".wh..wh..opq"], "would hide other files"),
        (["d/.wh.x/y"], "would hide other files"),
        (["a/"], "is no file name"),
        (["."], "is no file name"),
        (["a/.."], "is no file name"),
        (["x\0y"], "a NUL is no text"),
        (["x" * 5000], "is no file name"),
        ([], "no layers"),
    ],
)
def test_names_that_are_none_are_refused(bench: Bench, registry: FakeRegistry, titles: list[str], says: str) -> None:
    files = [(title, str(number).encode()) for number, title in enumerate(titles)]
    with pytest.raises(ContentInvalid, match=says):
        bench.pull(registry.add("bad", "1", artifact(files)))
    assert list(bench.store.list()) == []


def test_a_file_is_no_layer_of_an_image(bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    """The same blob as a file of an artifact and as the layer of an image: two trees, whichever comes first."""
    built = build_image([{"inside": b"1"}], compression="")
    blob = built.blobs[built.layer_digests[0]]
    one = bench.pull(registry.add("file", "1", artifact([("it.tar", blob)], layer=_layer_type(built))))
    two = bench.pull(registry.add("image", "1", built))
    assert seen(unpacker, one) == {"it.tar": blob} and seen(unpacker, two) == {"inside": b"1"}
    assert one.layers[0].chain_id != two.layers[0].chain_id


def _layer_type(built: BuiltImage) -> str:
    return str(json.loads(built.manifest)["layers"][0]["mediaType"])


def test_large_ones_are_unpacked_as_they_arrive(tmp_path: Path, unpacker: Overlay, registry: FakeRegistry) -> None:
    bench = Bench(tmp_path, unpacker, early_bytes=1, batch_bytes=64 << 10)
    content = os.urandom(3 << 20)
    image = bench.pull(registry.add("large", "1", artifact([("big", content)])))
    assert seen(unpacker, image) == {"big": content}
    bench.close()


# -------------------------------------------------------------------------------- directories that oras packed


Members = Sequence[tuple[str, str, str | bytes]]
TREE: Members = [("d", "models", ""), ("f", "models/a.bin", b"alpha"), ("d", "models/sub", ""),
                 ("f", "models/sub/b", b"beta"), ("l", "models/latest", "sub/b"),
                 ("h", "models/sub/same", "models/a.bin")]  # fmt: skip


def packed_tar(members: Members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind, name, content in members:
            info = tarfile.TarInfo(name)
            types = {"d": tarfile.DIRTYPE, "f": tarfile.REGTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}
            info.type = types.get(kind, tarfile.FIFOTYPE)
            info.mode = 0o755 if kind == "d" else 0o640
            data = content if isinstance(content, bytes) else b""
            info.linkname, info.size = "" if isinstance(content, bytes) else content, len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def directory(
    tar: bytes,
    title: str = "models",
    *,
    kind: str = "application/vnd.oci.image.layer.v1.tar+gzip",
    how: str = "gzip",
    said: str | None = None,
) -> BuiltImage:
    """As `oras push` makes one of a directory, and of a file beside it."""
    blob = compress(tar, how)
    built = artifact([(title, blob), ("beside.txt", b"1")], layer=kind)
    document = json.loads(built.manifest)
    notes = document["layers"][0]["annotations"]
    notes["io.deis.oras.content.unpack"] = "true"
    if said is None or said:
        notes["io.deis.oras.content.digest"] = said or sha256(tar)
    return replace(built, manifest=as_json(document))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", "zstd"),
        ("application/vnd.oci.image.layer.v1.tar", ""),
        ("application/vnd.example.weights", "gzip"),
    ],
)
def test_a_directory_is_unpacked(bench: Bench, unpacker: Overlay, registry: FakeRegistry, kind: str, how: str) -> None:
    image = bench.pull(registry.add("model", "1", directory(packed_tar(TREE), kind=kind, how=how)))
    files = seen(unpacker, image)
    assert files == {"models/a.bin": b"alpha", "models/sub/b": b"beta", "models/latest": b"beta",
                     "models/sub/same": b"alpha", "beside.txt": b"1"}  # fmt: skip
    top = unpacker.lower_directories(image.layers[0].chain_id)[0]
    assert (top / "models").stat().st_mode & 0o7777 == 0o755 and (top / "models/latest").is_symlink()
    assert (top / "models/a.bin").stat().st_nlink == 2
    assert list(bench.store.check()) == []
    bench.close()
    bench.open()
    assert [one.id for one in bench.store.list()] == [image.id]


def test_the_directory_that_was_pushed_may_be_the_tree(bench: Bench, unpacker: Overlay, registry: FakeRegistry) -> None:
    members: Members = [("d", ".", ""), ("f", "./a", b"1"), ("f", "sub/b", b"2"), ("fifo", "pipe", "")]
    image = bench.pull(registry.add("model", "1", directory(packed_tar(members), ".")))
    assert seen(unpacker, image) == {"a": b"1", "sub/b": b"2", "beside.txt": b"1"}
    # What is neither file, directory nor link is left out, as oras does.
    assert not (unpacker.lower_directories(image.layers[0].chain_id)[0] / "pipe").exists()


def test_one_that_does_not_say_which_tar_it_is_stays_a_file(
    bench: Bench, unpacker: Overlay, registry: FakeRegistry
) -> None:
    tar = packed_tar(TREE)
    image = bench.pull(registry.add("model", "1", directory(tar, said="")))
    assert seen(unpacker, image) == {"models": compress(tar, "gzip"), "beside.txt": b"1"}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("f", "other", b"1")], "is outside of b'models'"),
        ([("f", "models2", b"1")], "is outside of b'models'"),
        ([("f", "models/../other", b"1")], "is outside of b'models'"),
        ([("f", "../models/x", b"1")], "is outside of b'models'"),
        ([("f", "models/.wh.a", b"")], "would hide other files"),
        ([("f", "models/.wh..wh..opq", b"")], "would hide other files"),
        ([("d", "models/.wh.d", ""), ("f", "models/.wh.d/x", b"")], "would hide other files"),
        ([("l", "models/out", "../other")], "a link to b'../other', outside"),
        ([("l", "models/out", "/etc/passwd")], "a link to b'/etc/passwd', outside"),
        ([("h", "models/out", "beside.txt")], "a link to b'beside.txt', outside"),
        ([("l", "models/l", "."), ("f", "models/l/x", b"1")], "leads through a symbolic link"),
        ([("l", "models/l", "s"), ("d", "models/l/a", ""), ("f", "models/l/a/x", b"1")], "through a symbolic link"),
    ],
)
def test_r1_a_packed_directory_stays_inside(
    tmp_path: Path, bench: Bench, unpacker: Overlay, registry: FakeRegistry, members: Members, says: str
) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ContentInvalid, match=re.escape(says)):
        bench.pull(registry.add("bad", "1", directory(packed_tar([("d", "models", ""), *members]))))
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "snapshots/layers") == []
    assert list(bench.store.list()) == []


def test_another_tar_than_it_says_is_refused(bench: Bench, registry: FakeRegistry) -> None:
    with pytest.raises(ContentInvalid, match="diff id is sha256:"):
        bench.pull(registry.add("bad", "1", directory(packed_tar(TREE), said=sha256(b"another"))))


def test_an_encrypted_one_is_refused(bench: Bench, registry: FakeRegistry) -> None:
    kind = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    with pytest.raises(ContentInvalid, match="an encrypted layer of an artifact"):
        bench.pull(registry.add("bad", "1", directory(packed_tar(TREE), kind=kind)))
