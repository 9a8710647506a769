"""Disk: layers dropped once they are unpacked, garbage told before it goes, damage found and repaired; and layers of
formats that others fetch in parts."""

from __future__ import annotations

import fcntl
import gzip
import os
import sqlite3
import ssl
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from imagestore.model import ImageError, RegistryUnavailable
from snapshotter.overlay import Overlay
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import FakeRegistry, Reply, as_json, build_image, layer_tar, make_tls, sha256, write_layout
from tests.fakes.unpacker import MemoryUnpacker
from tests.support import needs


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.close()


# ------------------------------------------------------------------------------------------------------------- sharing


def test_what_images_share_is_there_once(bench: Bench, registry: FakeRegistry) -> None:
    base = {"base": os.urandom(50_000)}
    images = [build_image([base, {name: os.urandom(9_000)}]) for name in ("one", "two")]
    names = [registry.add("app", str(number), image) for number, image in enumerate(images)]
    for name in names:
        bench.pull(name)

    def taken() -> int:
        blobs = sum(path.stat().st_blocks * 512 for path in (bench.root / "blobs/sha256").iterdir())
        return blobs + sum(bench.unpacker.layer_sizes().values())

    shares, together = bench.store.sharing()
    before = taken()
    assert together == before
    assert sum(share.bytes for share in shares) - together > 100_000  # the base, as a blob and unpacked
    own = {share.image: share.own for share in shares}
    bench.store.remove(names[0])
    bench.store.collect()
    assert before - taken() == own[images[0].config_digest]
    (left,), together = bench.store.sharing()
    assert left.image == images[1].config_digest and left.bytes == left.own == together == taken()


# ---------------------------------------------------------------------------------------------------------- keep_blobs


def test_layers_are_dropped_once_they_are_unpacked(tmp_path: Path, registry: FakeRegistry) -> None:
    bench = Bench(tmp_path, keep_blobs=False)
    image = build_image([{"a": b"1"}, {"b": b"2"}])
    reference = registry.add("app", "1", image)
    pulled = bench.pull(reference)
    assert bench.blobs() == {image.digest, image.config_digest}
    assert pulled.size == sum(map(len, image.blobs.values()))
    bench.pull(reference)
    # Another name for the same layers costs nothing, and neither does a restart.
    other = registry.add("other", "1", image)
    bench.pull(other)
    bench.close()
    bench.open()
    bench.store.collect()
    found = bench.store.get(other)
    assert found is not None and found.id == pulled.id
    assert [registry.count("GET", f"/blobs/{digest}") for digest in image.layer_digests] == [1, 1]
    assert bench.store.garbage() == [] and bench.store.check() == []
    bench.close()


def test_what_was_kept_goes_when_the_configuration_changes(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    reference = registry.add("app", "1", image)
    bench.pull(reference)
    bench.close()
    bench.config = replace(bench.config, keep_blobs=False)
    bench.open()
    planned = bench.store.garbage()
    assert [(item.kind, item.name, item.why) for item in planned] == [
        ("blob", image.layer_digests[0], "unpacked, and image.keep_blobs is off")
    ]
    bench.store.collect()
    assert bench.blobs() == {image.digest, image.config_digest} and bench.store.garbage() == []
    assert bench.store.get(reference) is not None


# ------------------------------------------------------------------------------------------------------------- garbage


def test_the_plan_is_what_goes(bench: Bench, registry: FakeRegistry) -> None:
    """Blobs, layers and an old download, each with its reason; afterwards nothing, and what is needed is there."""
    kept = registry.add("kept", "1", build_image([{"shared": b"s"}, {"kept": b"k"}]))
    gone = registry.add("gone", "1", build_image([{"shared": b"s"}, {"gone": b"g"}]))
    bench.pull(kept)
    image = bench.pull(gone)
    assert bench.store.garbage() == []
    bench.store.remove(gone)
    part = bench.root / "ingest" / f".{'0' * 64}.part"
    part.write_bytes(b"x" * 5000)
    os.utime(part, (1, 1))
    planned = bench.store.garbage()
    assert {item.kind for item in planned} == {"blob", "layer", "download"}
    blobs = {item.name for item in planned if item.kind == "blob"}
    assert blobs == {image.id, image.manifest_digest, image.layers[1].blob.digest}
    assert [item.name for item in planned if item.kind == "layer"] == [image.layers[1].chain_id]
    before = bench.blobs()
    bench.store.collect()
    assert before - bench.blobs() == blobs and not part.exists()
    assert bench.store.garbage() == [] and bench.store.get(kept) is not None


def test_nothing_is_planned_while_another_process_pulls(bench: Bench, registry: FakeRegistry) -> None:
    bench.pull(registry.add("app", "1", build_image()))
    bench.store.remove(bench.store.list()[0].id)
    assert bench.store.garbage()
    with open(bench.root / "ingest" / ".pulls-1-abc", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert bench.store.garbage() == []


# -------------------------------------------------------------------------------------------------------------- doctor


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("harm", ["gone", "short", "flipped", "directory", "fifo"])
def test_every_blob_is_looked_at_and_repaired(bench: Bench, registry: FakeRegistry, which: str, harm: str) -> None:
    image = build_image([{"a": b"1" * 500}])
    reference = registry.add("app", "1", image)
    pulled = bench.pull(reference)
    digest = {"manifest": image.digest, "config": image.config_digest, "layer": image.layer_digests[0]}[which]
    path = bench.root / "blobs/sha256" / digest[7:]
    data = path.read_bytes()
    if harm in ("gone", "directory", "fifo"):
        path.unlink()
        if harm == "directory":
            (path / "below").mkdir(parents=True)
        elif harm == "fifo":
            os.mkfifo(path)
    else:
        path.write_bytes(data[:-1] if harm == "short" else data[:30] + bytes([data[30] ^ 1]) + data[31:])
    bench.close()
    bench.open()
    problems = bench.store.check()
    assert problems and {problem.image for problem in problems if problem.image} == {pulled.id}
    assert path.exists() is (harm != "gone"), "looking changed something"
    assert list(run(bench.store.repair(problems))) == []
    assert bench.store.check() == [] and path.read_bytes() == data
    found = bench.store.get(reference)
    assert found is not None and found.repo_tags == (reference,)


def test_a_snapshot_that_is_damaged_is_told_and_stays(bench: Bench, registry: FakeRegistry) -> None:
    bench.pull(registry.add("app", "1", build_image()))
    bench.unpacker.broken_snapshots["c1"] = "upper: gone"
    problems = bench.store.check()
    assert [(problem.kind, problem.name, problem.what) for problem in problems] == [("snapshot", "c1", "upper: gone")]
    assert run(bench.store.repair(problems)) == problems


def test_a_damaged_layer_is_unpacked_again(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    image = bench.pull(registry.add("app", "1", build_image()))
    bench.unpacker.damage[image.chain_id] = "3 inodes, 4 were unpacked"
    (problem,) = bench.store.check()
    assert (problem.kind, problem.name, problem.what) == ("layer", image.chain_id, "3 inodes, 4 were unpacked")
    assert list(run(bench.store.repair([problem]))) == []
    assert bench.store.check() == [] and bench.unpacker.calls.count(image.chain_id) == 2


def test_what_cannot_be_fetched_is_told(bench: Bench, registry: FakeRegistry, tmp_path: Path) -> None:
    """An image of a file has no registry; one whose registry has it no more is said so, too. Others are repaired."""
    write_layout(tmp_path / "layout", {"one": build_image([{"file": b"1"}])})
    local = run(bench.store.import_layout(tmp_path / "layout"))
    lost = build_image([{"lost": b"1"}])
    bench.pull(registry.add("lost", "1", lost))
    well = build_image([{"well": b"1"}])
    bench.pull(registry.add("well", "1", well))
    for digest in (local.layers[0].blob.digest, lost.layer_digests[0], well.layer_digests[0]):
        (bench.root / "blobs/sha256" / digest[7:]).write_bytes(b"damaged")
    registry.rule("GET", "/lost/", Reply(404))
    left = {problem.image: problem.what for problem in run(bench.store.repair(bench.store.check()))}
    assert set(left) == {local.id, lost.config_digest}
    assert "no registry" in left[local.id] and "404" in left[lost.config_digest]


def test_index_json_that_says_something_else(bench: Bench, registry: FakeRegistry) -> None:
    bench.pull(registry.add("app", "1", build_image()))
    path = bench.root / "index.json"
    told = path.read_bytes()

    def fifo() -> None:
        path.unlink()
        os.mkfifo(path)  # which nobody may wait for

    def directory() -> None:
        path.unlink()
        (path / "below").mkdir(parents=True)

    for harm in (lambda: path.write_text("{}"), fifo, directory):
        harm()
        (problem,) = bench.store.check()
        assert problem.name == "index.json"
        assert run(bench.store.repair([problem])) == []
        assert bench.store.check() == [] and path.read_bytes() == told


def test_damaged_records_are_not_called_repaired(bench: Bench, registry: FakeRegistry) -> None:
    bench.pull(registry.add("app", "1", build_image()))
    with sqlite3.connect(bench.directory / "state.db", isolation_level=None) as other:
        other.execute("PRAGMA foreign_keys=OFF")
        other.execute("UPDATE image_name SET image_id = 'sha256:nothing' WHERE name LIKE '%@%' OR 1")
    problems = bench.store.check()
    assert ("record", "database", "image_name: a row refers to nothing") in {
        (one.kind, one.name, one.what) for one in problems
    }
    assert "database" in {problem.name for problem in run(bench.store.repair(problems))}


# ---------------------------------------------------------------------------------- formats that others fetch in parts


def _estargz(tar: bytes) -> bytes:
    """As stargz-snapshotter makes them: a gzip member for each piece, one for the table of contents, and a footer that
    is an empty member with an extra field."""
    pieces = [tar[at : at + 700] for at in range(0, len(tar), 700)]
    extra = b"SG" + struct.pack("<H", 22) + b"%016x" % 12345 + b"STARGZ"
    footer = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\x00\x00\xff\xff" + bytes(8)
    return b"".join(gzip.compress(piece, mtime=0) for piece in pieces) + footer


def _zstd_chunked(tar: bytes) -> bytes:
    """As containers/storage makes them: a frame for each piece, then skippable frames with manifest and footer."""
    pieces = [tar[at : at + 700] for at in range(0, len(tar), 700)]
    frames = b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces)
    manifest = zstandard.ZstdCompressor().compress(b'{"version":1,"entries":[]}')
    skipped = [manifest, bytes(64)]
    return frames + b"".join(struct.pack("<II", 0x184D2A50, len(data)) + data for data in skipped)


@pytest.mark.parametrize(
    ("make", "suffix", "annotation"),
    [
        (_estargz, "+gzip", "containerd.io/snapshot/stargz/toc.digest"),
        (_zstd_chunked, "+zstd", "io.github.containers.zstd-chunked.manifest-checksum"),
    ],
)
def test_they_pull_as_ordinary_images(
    tmp_path: Path, registry: FakeRegistry, make: object, suffix: str, annotation: str
) -> None:
    needs("root", "overlay")
    tar = layer_tar({"bin/hello": b"hello" * 500, "etc/x": b"x"})
    blob = make(tar)  # type: ignore[operator]

    def layer(manifest: dict[str, object]) -> None:
        kind = f"application/vnd.oci.image.layer.v1.tar{suffix}"
        annotations = {annotation: sha256(b"toc")}
        manifest["layers"] = [
            {"mediaType": kind, "digest": sha256(blob), "size": len(blob), "annotations": annotations}
        ]

    image = build_image([tar], edit_manifest=layer)
    registry.blobs[sha256(blob)] = blob
    db = sqlite3.connect(tmp_path / "snapshots.db", check_same_thread=False, isolation_level=None)
    overlay = Overlay(tmp_path / "snapshots", db)
    bench = Bench(tmp_path, overlay, answer_timeout_s=20.0)
    try:
        pulled = bench.pull(registry.add("app", "1", image))
        (directory,) = overlay.lower_directories(pulled.chain_id)
        assert (directory / "bin/hello").read_bytes() == b"hello" * 500
    finally:
        bench.close()
        overlay.close()
        db.close()


# ------------------------------------------------------------------------------------------------- addresses and proofs


def test_a_registry_on_ipv6(bench: Bench) -> None:
    with FakeRegistry(host="::1") as six:
        image = build_image()
        six.add("team/app", "1", image)
        bench.pull(f"[::1]:{six.port}/team/app:1")
        assert six.count("GET", "/manifests/") == 1


def test_a_client_certificate_is_shown_to_its_host_alone(bench: Bench, tmp_path: Path) -> None:
    """The server asks for one and trusts only ours; without the `client` of hosts.toml it lets nobody in."""
    context, ca = make_tls(tmp_path, "127.0.0.1")
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    _client(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificate)
    with FakeRegistry(tls=context) as secure:
        reference = secure.add("team/app", "1", build_image())
        bench.hosts_toml(secure.name, f'server = "{secure.url}"\nca = "{ca}"\n')
        with pytest.raises(RegistryUnavailable):
            bench.pull(reference)
        bench.hosts_toml(secure.name, f'server = "{secure.url}"\nca = "{ca}"\nclient = [["{certificate}", "{key}"]]\n')
        bench.pull(reference)
        bench.hosts_toml(secure.name, f'server = "{secure.url}"\nca = "{ca}"\nclient = "{ca}"\n')
        with pytest.raises(ImageError):
            bench.pull(reference)


def test_certificates_as_docker_has_them(bench: Bench, tmp_path: Path) -> None:
    """No hosts.toml: a CA and a client's certificate in the registry's directory, and a file that is lost is named."""
    context, ca = make_tls(tmp_path, "127.0.0.1")
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    _client(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificate)
    with FakeRegistry(tls=context) as secure:
        reference = secure.add("team/app", "1", build_image())
        files = bench.hosts / secure.name
        files.mkdir(parents=True)
        for name, path in (("ca.crt", ca), ("client.cert", certificate), ("client.key", key)):
            with pytest.raises(ImageError):
                bench.pull(reference)
            (files / name).write_bytes(path.read_bytes())
        bench.pull(reference)


def _client(certificate: Path, key: Path) -> None:
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=client"]
    command = ["openssl", "req", "-x509", *kind, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)


def test_a_charset_in_a_content_type_changes_nothing(bench: Bench, registry: FakeRegistry) -> None:
    image = build_image()
    registry.blobs.update(image.blobs)
    for number, kind in enumerate(
        (f"{image.media_type}; charset=utf-8", f"{image.media_type.upper()};charset=UTF-16", "application/json")
    ):
        bench.pull(registry.put("team/app", str(number), image.manifest, kind))
    document = as_json({"schemaVersion": 2}).decode().encode("utf-16")
    with pytest.raises(ImageError, match="not valid JSON"):
        bench.pull(registry.put("team/app", "utf16", document, f"{image.media_type}; charset=utf-16"))
