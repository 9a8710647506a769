"""What cri.interfaces.Snapshots and imagestore.model.Unpacker promise, on the fake and on the real one."""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from cri.interfaces import Snapshots
from imagestore.model import Unpacker
from snapshotter.model import AlreadyExists, Config, NotFound, UnpackError
from snapshotter.overlay import Overlay
from tests.fakes.snapshots import GZIP, PLAIN, ZSTD, Blob, MemorySnapshots, blob, directory, file, opened, seal, tarball
from tests.support import SOON_S, needs


class Both(Snapshots, Unpacker, Protocol):
    """What Overlay is."""


def _real(path: Path, workers: int) -> Overlay:
    db = sqlite3.connect(path / "db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    return Overlay(path / "root", db, Config(workers=workers, parent_wait_s=20))


@pytest.fixture(params=["fake", "overlay", "overlay with workers"])
def snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    if request.param == "fake":
        yield MemorySnapshots(tmp_path)
        return
    needs("root", "overlay")
    real = _real(tmp_path, 2 if "workers" in request.param else 0)
    yield real
    real.close()


@pytest.fixture
def base(tmp_path: Path) -> Blob:
    return blob(
        tmp_path, [directory("etc"), file("etc/passwd", b"root:x:0:0::/:/bin/sh\n"), file("bin/a", b"a" * 9000)]
    )


def test_prepared_snapshot_is_listed_with_its_parent(snapshots: Both, base: Blob) -> None:
    snapshots.unpack_layer(*base.arguments())
    mount = snapshots.prepare("c1", base.chain_id)
    assert mount.fstype == "overlay"
    (info,) = snapshots.list()
    assert (info.key, info.parent) == ("c1", base.chain_id)
    assert info.created_ns > 0


def test_mount_again_is_the_same(snapshots: Both, base: Blob) -> None:
    snapshots.unpack_layer(*base.arguments())
    assert snapshots.prepare("c1", base.chain_id) == snapshots.mount("c1")


def test_scratch_needs_no_parent(snapshots: Both) -> None:
    assert snapshots.prepare("empty", None).fstype == "overlay"
    assert snapshots.list()[0].parent is None


def test_second_prepare_of_a_key_is_refused(snapshots: Both) -> None:
    snapshots.prepare("c1", None)
    with pytest.raises(AlreadyExists, match="c1"):
        snapshots.prepare("c1", None)
    assert len(snapshots.list()) == 1


def test_unknown_parent_and_keys(snapshots: Both) -> None:
    missing = "sha256:" + "0" * 64
    with pytest.raises(NotFound, match="0000"):
        snapshots.prepare("c1", missing)
    with pytest.raises(NotFound):
        snapshots.mount("c1")
    with pytest.raises(NotFound):
        snapshots.usage("c1")
    with pytest.raises(NotFound):
        snapshots.lower_directories(missing)
    assert snapshots.list() == []


def test_remove_is_idempotent_and_frees_the_key(snapshots: Both) -> None:
    snapshots.prepare("c1", None)
    snapshots.remove("c1")
    snapshots.remove("c1")
    assert snapshots.list() == []
    snapshots.prepare("c1", None)


def test_a_packed_layer_is_a_tar_and_an_unknown_one_is_refused(snapshots: Both, tmp_path: Path) -> None:
    snapshots.prepare("c1", None)
    with (tmp_path / "layer.tar").open("w+b") as file:
        snapshots.pack("c1", file.fileno())
        with tarfile.open(fileobj=file) as archive:
            assert archive.getnames() == []
        with pytest.raises(NotFound):
            snapshots.pack("nosuch", file.fileno())
        with pytest.raises(TimeoutError):
            snapshots.pack("c1", file.fileno(), _late)


def _late() -> None:
    raise TimeoutError


def test_a_writable_layer_is_filled_from_a_layers_tar(snapshots: Both, tmp_path: Path, base: Blob) -> None:
    snapshots.unpack_layer(*base.arguments())
    snapshots.prepare("c1", base.chain_id)
    with (tmp_path / "layer.tar").open("w+b") as tar:
        tar.write(tarball([directory("var"), file("var/state", b"kept")]))
        tar.flush()
        snapshots.unpack("c1", tar.fileno())
        with pytest.raises(NotFound):
            snapshots.unpack("nosuch", tar.fileno())
        tar.seek(0)
        tar.write(b"this is no tar" * 100)
        tar.flush()
        snapshots.prepare("c2", base.chain_id)
        with pytest.raises(UnpackError):
            snapshots.unpack("c2", tar.fileno())
    for key in ("c1", "c2"):
        snapshots.remove(key)
    assert snapshots.list() == []


def test_usage_of_a_fresh_snapshot_is_one_inode(snapshots: Both) -> None:
    snapshots.prepare("c1", None)
    assert snapshots.usage("c1").inodes == 1


def test_lower_directories_are_topmost_first(snapshots: Both, tmp_path: Path, base: Blob) -> None:
    top = blob(tmp_path, [file("etc/new", b"x")], parent=base)
    snapshots.unpack_layer(*base.arguments())
    snapshots.unpack_layer(*top.arguments())
    upper, lower = snapshots.lower_directories(top.chain_id)
    assert (upper / "etc/new").read_bytes() == b"x"
    assert (lower / "etc/passwd").read_bytes().startswith(b"root:")


@pytest.mark.parametrize("media_type", [GZIP, ZSTD, PLAIN])
def test_unpack_makes_a_layer(snapshots: Both, tmp_path: Path, media_type: str) -> None:
    layer = blob(tmp_path, [file("f", b"content" * 1000)], media_type)
    assert not snapshots.has_layer(layer.chain_id)
    snapshots.unpack_layer(*layer.arguments())
    snapshots.unpack_layer(*layer.arguments())
    assert snapshots.has_layer(layer.chain_id)
    assert (snapshots.lower_directories(layer.chain_id)[0] / "f").read_bytes() == b"content" * 1000


def test_equal_unpacks_at_once_are_one(snapshots: Both, base: Blob) -> None:
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(snapshots.unpack_layer, *base.arguments()) for _ in range(8)]:
            done.result(SOON_S)
    assert snapshots.has_layer(base.chain_id)
    assert len(snapshots.lower_directories(base.chain_id)) == 1


def test_layers_of_an_image_unpack_in_any_order(snapshots: Both, tmp_path: Path, base: Blob) -> None:
    chain = [base]
    for number in range(5):
        chain.append(blob(tmp_path, [file(f"f{number}", bytes([number]))], parent=chain[-1]))
    with ThreadPoolExecutor(len(chain)) as threads:
        started = [threads.submit(snapshots.unpack_layer, *layer.arguments()) for layer in reversed(chain)]
        for done in started:
            done.result(SOON_S)
    assert len(snapshots.lower_directories(chain[-1].chain_id)) == len(chain)


def test_wrong_diff_id_leaves_nothing_and_the_right_one_works(snapshots: Both, base: Blob) -> None:
    wrong = "sha256:" + "1" * 64
    with pytest.raises(UnpackError, match="diff id"):
        snapshots.unpack_layer(base.path, base.media_type, wrong, base.chain_id, None)
    assert not snapshots.has_layer(base.chain_id)
    snapshots.unpack_layer(*base.arguments())
    assert snapshots.has_layer(base.chain_id)


@pytest.mark.parametrize("media_type", [GZIP, ZSTD, PLAIN])
def test_an_encrypted_layer_is_opened_by_its_key_alone(snapshots: Both, tmp_path: Path, media_type: str) -> None:
    layer = blob(tmp_path, [file("etc/secret", b"s" * 300_000)], media_type)
    data, key = seal(layer.path.read_bytes())
    layer.path.write_bytes(data)
    other = (os.urandom(32), *key[1:])
    for wrong in (other, (*key[:2], bytes(32)), None):
        with pytest.raises(UnpackError):
            snapshots.unpack_layer(*layer.arguments(), wrong)
        assert not snapshots.has_layer(layer.chain_id)
    snapshots.unpack_layer(*layer.arguments(), key)
    assert snapshots.has_layer(layer.chain_id)


def test_an_encrypted_layer_that_was_altered_is_refused(snapshots: Both, tmp_path: Path) -> None:
    """Counter mode lets whoever has no key turn over bits of the plain text: only the HMAC sees it."""
    layer = blob(tmp_path, [file("etc/secret", b"s" * 3000)], PLAIN)
    data, key = seal(layer.path.read_bytes())
    at = data.index(data[600:700])  # inside the file's content: the tar itself stays well formed
    altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    raw = opened(altered, (*key[:2], hmac.digest(key[0], altered, "sha256")))
    layer.path.write_bytes(altered)
    with pytest.raises(UnpackError, match="HMAC"):
        snapshots.unpack_layer(
            layer.path, PLAIN, f"sha256:{hashlib.sha256(raw).hexdigest()}", layer.chain_id, None, key
        )
    assert not snapshots.has_layer(layer.chain_id)


def test_broken_blob_is_an_unpack_error(snapshots: Both, base: Blob) -> None:
    whole = base.path.read_bytes()
    base.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnpackError):
        snapshots.unpack_layer(*base.arguments())
    base.path.write_bytes(whole)
    snapshots.unpack_layer(*base.arguments())


def test_collect_keeps_what_is_named_and_what_snapshots_stand_on(snapshots: Both, tmp_path: Path, base: Blob) -> None:
    used = blob(tmp_path, [file("used")], parent=base)
    kept = blob(tmp_path, [file("kept")])
    lost = blob(tmp_path, [file("lost")])
    for layer in (base, used, kept, lost):
        snapshots.unpack_layer(*layer.arguments())
    snapshots.prepare("c1", used.chain_id)
    assert snapshots.remove_layers_except(frozenset({kept.chain_id})) == 1
    assert [snapshots.has_layer(layer.chain_id) for layer in (base, used, kept, lost)] == [True, True, True, False]
    snapshots.remove("c1")
    assert snapshots.remove_layers_except(frozenset()) == 3
    assert not snapshots.has_layer(base.chain_id)


def test_layers_are_forgotten_unless_a_snapshot_stands_on_them(snapshots: Both, tmp_path: Path, base: Blob) -> None:
    free, unknown = blob(tmp_path, [file("free")]), "sha256:" + "0" * 64
    for layer in (base, free):
        snapshots.unpack_layer(*layer.arguments())
    snapshots.prepare("c1", base.chain_id)
    held = snapshots.forget_layers(frozenset({free.chain_id, unknown}))
    assert list(held) == [], "what is not there is not held"
    assert not snapshots.has_layer(free.chain_id)
    assert list(snapshots.forget_layers(frozenset({base.chain_id}))) == [base.chain_id]
    assert snapshots.has_layer(base.chain_id)


def test_many_threads_prepare_and_remove(snapshots: Both, base: Blob) -> None:
    snapshots.unpack_layer(*base.arguments())
    barrier = threading.Barrier(8)

    def churn(name: int) -> None:
        barrier.wait()
        for turn in range(10):
            snapshots.prepare(f"{name}-{turn}", base.chain_id)
            snapshots.usage(f"{name}-{turn}")
            snapshots.list()
            snapshots.remove(f"{name}-{turn}")

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(churn, number) for number in range(8)]:
            done.result(SOON_S)
    assert snapshots.list() == []
