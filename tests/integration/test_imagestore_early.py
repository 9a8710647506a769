"""Layers that are unpacked while they still arrive, by the real snapshotter: what a pull does when the rest comes late,
wrong, again or never. Nothing of a layer is visible before its blob was verified, and nothing stays."""

from __future__ import annotations

import asyncio
import hmac
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from imagestore.content import Blobs, Ingest
from imagestore.model import ContentInvalid, Descriptor, ImageError, RegistryUnavailable
from snapshotter.model import Arriving, Config
from snapshotter.overlay import Overlay
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import (
    OCI_LAYER,
    BuiltImage,
    Cut,
    FakeRegistry,
    Hold,
    NoRange,
    Stall,
    build_image,
    layer_tar,
    sha256,
)
from tests.support import SOON_S, eventually, needs

KIB = 1 << 10
# Noise: what is downloaded is as long as what is unpacked, so each part of a download is some of these files.
FILES = {f"f{number:02}": random.Random(number).randbytes(64 * KIB) for number in range(32)}
SIZE = 64 * KIB * len(FILES)


class _Asked:
    """snapshotter.model.Arriving that tells when all of it was unpacked, and its digest is what is waited for."""

    def __init__(self, blob: Arriving, asked: threading.Event) -> None:
        self._blob, self._asked, self.size = blob, asked, blob.size

    def open(self) -> tuple[int, int]:
        return self._blob.open()

    def verified(self, seconds: float) -> bool:
        self._asked.set()
        return self._blob.verified(seconds)


class Watched(Overlay):
    """Tells how each layer was unpacked."""

    def __init__(self, root: Path, **changes: Any) -> None:
        root.mkdir(exist_ok=True)
        db = sqlite3.connect(root / "db", check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        self.early: list[str] = []
        self.whole: list[str] = []
        self.asked = threading.Event()
        self.place = root / "snapshots"
        super().__init__(self.place, db, Config(workers=1, arriving=1, parent_wait_s=SOON_S).changed(**changes))

    def unpack_arriving(self, blob: Arriving, media_type: str, diff_id: str, chain_id: str, *more: Any) -> None:
        self.early.append(chain_id)
        super().unpack_arriving(_Asked(blob, self.asked), media_type, diff_id, chain_id, *more)

    def unpack_layer(self, blob: Path, media_type: str, diff_id: str, chain_id: str, *more: Any) -> None:
        self.whole.append(chain_id)
        super().unpack_layer(blob, media_type, diff_id, chain_id, *more)

    def files(self) -> set[str]:
        """What lies in layers that are being made."""
        return {path.name for path in self.place.glob("layers/.*/fs/*")}

    def leftovers(self) -> list[str]:
        """Directories that no committed layer has."""
        known = {str(number) for number in self.numbers()}
        found = [("layers", name) for name in os.listdir(self.place / "layers") if name not in known]
        return [f"{kind}/{name}" for kind, name in [*found, *(("trash", n) for n in os.listdir(self.place / "trash"))]]

    def numbers(self) -> list[int]:
        return [record.number for record in self._records.layers.values()]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def unpacker(tmp_path: Path) -> Iterator[Watched]:
    needs("root")
    made = Watched(tmp_path)
    yield made
    made.close()


@pytest.fixture
def bench(tmp_path: Path, unpacker: Watched) -> Iterator[Bench]:
    opened = make_bench(tmp_path, unpacker)
    yield opened
    opened.close()


def make_bench(directory: Path, unpacker: Watched, **changes: Any) -> Bench:
    return Bench(directory, unpacker, **{"early_bytes": KIB, "early_unpacks": 1, "batch_bytes": 64 * KIB, **changes})


def image(compression: str = "", **edits: Any) -> BuiltImage:
    return build_image([FILES], compression=compression, **edits)


def is_whole(unpacker: Watched, built: BuiltImage) -> bool:
    """The layer is committed, and its files are those of the image."""
    (directory,) = unpacker.lower_directories(built.diff_ids[0])
    return {path.name: path.read_bytes() for path in directory.iterdir()} == FILES


def once_known(bench: Bench, registry: FakeRegistry, built: BuiltImage, expected: str = "") -> None:
    """The layer comes, or the rest of it, when the config has told what it must be: not all of it before."""
    wanted = expected or built.diff_ids[0]
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Hold(lambda: bench.store._leases.holders(wanted) > 0))


async def stalled(bench: Bench, unpacker: Watched, reference: str) -> asyncio.Task[object]:
    """A pull that does not go on, of which some files are unpacked already."""
    pull: asyncio.Task[object] = asyncio.create_task(bench.store.pull(reference))
    async with asyncio.timeout(SOON_S):
        while not {"f00", "f10"} <= unpacker.files():
            assert not pull.done() or pull.result()
            await asyncio.sleep(0.005)
    return pull


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_files_are_made_before_the_last_byte_and_a_cancel_takes_them_away(
    tmp_path: Path, unpacker: Watched, registry: FakeRegistry, compression: str
) -> None:
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S)
    built = image(compression)
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(SIZE * 3 // 4))

    async def scenario() -> None:
        pull = await stalled(bench, unpacker, reference)
        assert not unpacker.has_layer(built.diff_ids[0]) and "f31" not in unpacker.files()
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    assert unpacker.early == [built.diff_ids[0]] and unpacker.leftovers() == []
    assert bench.ingests() == {f".{built.layer_digests[0][7:]}.part"}
    registry.heal()
    once_known(bench, registry, built)
    bench.pull(reference)
    # What was downloaded before counts at once: the second pull is early, too.
    assert unpacker.early == [built.diff_ids[0]] * 2 and unpacker.whole == [] and is_whole(unpacker, built)
    bench.close()


def test_a_layer_that_has_begun_before_its_config_is_unpacked_from_its_beginning(
    tmp_path: Path, unpacker: Watched, registry: FakeRegistry
) -> None:
    """What came before anybody knew its diff id is there for the unpacker, too."""
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S, answer_timeout_s=SOON_S)
    built = image()
    reference = registry.add("app", "1", built)
    part = bench.root / "ingest" / f".{built.layer_digests[0][7:]}.part"
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(SIZE * 3 // 4))
    registry.rule(
        "GET", f"/blobs/{built.config_digest}", Hold(lambda: part.exists() and part.stat().st_size > SIZE // 2)
    )

    async def scenario() -> None:
        pull = await stalled(bench, unpacker, reference)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    assert unpacker.early == [built.diff_ids[0]] and unpacker.whole == [] and unpacker.leftovers() == []
    bench.close()


@pytest.mark.parametrize("trouble", [Stall(SIZE // 3), Cut(SIZE // 3)], ids=["stall", "cut"])
def test_what_goes_on_after_a_break_is_read_on(
    bench: Bench, unpacker: Watched, registry: FakeRegistry, trouble: Stall | Cut
) -> None:
    built = image("gzip")
    reference = registry.add("app", "1", built)
    rule = registry.rule("GET", f"/blobs/{built.layer_digests[0]}", trouble, times=1)
    once_known(bench, registry, built)
    bench.pull(reference)
    assert rule.hits == 1 and unpacker.early == [built.diff_ids[0]] and unpacker.whole == []
    assert is_whole(unpacker, built) and unpacker.leftovers() == []


def test_ranges_are_read_in_their_order(tmp_path: Path, unpacker: Watched, registry: FakeRegistry) -> None:
    step = 64 * KIB
    bench = make_bench(
        tmp_path, unpacker, ranges=3, range_bytes=step, range_after_s=0.0, range_below=1e18, batch_bytes=step
    )
    built = image()
    once_known(bench, registry, built)
    bench.pull(registry.add("app", "1", built))
    assert sum("Range" in seen.headers for seen in registry.seen) > 20
    assert unpacker.early == [built.diff_ids[0]] and unpacker.whole == [] and is_whole(unpacker, built)
    bench.close()


def test_a_blob_that_begins_anew_is_unpacked_once_it_is_whole(
    bench: Bench, unpacker: Watched, registry: FakeRegistry
) -> None:
    built = image()
    reference = registry.add("app", "1", built)
    path = f"/blobs/{built.layer_digests[0]}"
    registry.rule("GET", path, Cut(SIZE // 2), times=1)
    again = registry.rule("GET", path, NoRange(), times=1)
    bench.pull(reference)
    assert again.hits == 1 and unpacker.whole == [built.diff_ids[0]]
    assert is_whole(unpacker, built) and unpacker.leftovers() == []


def test_a_poisoned_beginning_is_not_kept(bench: Bench, unpacker: Watched, registry: FakeRegistry) -> None:
    built = image()
    other = build_image([{**FILES, "f00": b"\0" * 64 * KIB}], compression="").blobs
    (foreign,) = (data for data in other.values() if len(data) > SIZE)
    part = bench.root / "ingest" / f".{built.layer_digests[0][7:]}.part"
    part.write_bytes(foreign[: SIZE // 2])
    bench.pull(registry.add("app", "1", built))
    assert is_whole(unpacker, built) and unpacker.leftovers() == []


@pytest.mark.parametrize("diff_id", ["of what was announced", "of what comes"])
def test_a_wrong_digest_at_the_end_leaves_nothing(
    bench: Bench, unpacker: Watched, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, diff_id: str
) -> None:
    """The last file differs. Where the config has the diff id of what comes, the blob's digest alone tells; it is
    looked at when everything else is done."""
    built, other = image(), build_image([{**FILES, "f31": b"\0" * 64 * KIB}], compression="")
    foreign = other.blobs[other.layer_digests[0]]
    expected = built.diff_ids[0]
    if diff_id == "of what comes":
        expected = other.diff_ids[0]
        check = Ingest.check

        def late(ingest: Ingest) -> None:
            if ingest.offset > SIZE:
                unpacker.asked.wait(SOON_S)
            check(ingest)

        monkeypatch.setattr(Ingest, "check", late)
        built = image(edit_config=lambda document: document.update(rootfs={"type": "layers", "diff_ids": [expected]}))
    reference = registry.add("app", "1", built)
    registry.blobs[built.layer_digests[0]] = foreign
    once_known(bench, registry, built, expected)
    with pytest.raises(ContentInvalid, match="wrong content"):
        bench.pull(reference)
    assert unpacker.early == [expected] and unpacker.whole == []
    assert not unpacker.has_layer(expected) and unpacker.numbers() == [] and unpacker.leftovers() == []
    assert bench.ingests() == set() and built.layer_digests[0] not in bench.blobs() and not bench.strays()


def test_a_blob_that_never_gets_whole_leaves_nothing_unpacked(
    bench: Bench, unpacker: Watched, registry: FakeRegistry
) -> None:
    built = image()
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Cut(KIB))
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Cut(SIZE // 2), times=1)
    with pytest.raises(RegistryUnavailable):
        bench.pull(reference)
    assert not unpacker.has_layer(built.diff_ids[0]) and unpacker.leftovers() == []


def test_a_blob_that_was_made_too_short_is_told_as_ever(
    bench: Bench, unpacker: Watched, registry: FakeRegistry
) -> None:
    good = image("gzip")
    short = good.blobs[good.layer_digests[0]][: SIZE // 2]

    def edit(document: dict[str, Any]) -> None:
        document["layers"][0].update(digest=sha256(short), size=len(short))

    registry.blobs[sha256(short)] = short
    reference = registry.add("app", "bad", image("gzip", edit_manifest=edit))
    with pytest.raises(ContentInvalid, match=f"unpack layer {sha256(short)}: .*truncated"):
        bench.pull(reference)
    assert unpacker.leftovers() == [] and not unpacker.has_layer(good.diff_ids[0])
    bench.pull(registry.add("app", "good", good))
    assert is_whole(unpacker, good)


def test_a_bad_layer_ends_its_reader_at_once(tmp_path: Path, unpacker: Watched, registry: FakeRegistry) -> None:
    """The tar is refused while the rest of it is still awaited: the worker is free again, the pull still fails."""
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S)
    built = build_image([b"\x01" * SIZE], compression="")
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(SIZE // 2), times=1)

    async def scenario() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        async with asyncio.timeout(SOON_S):
            while not unpacker.early or unpacker._layers._flights:
                await asyncio.sleep(0.005)
        assert not pull.done() and unpacker.leftovers() == []
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    with pytest.raises(ContentInvalid, match="unpack layer"):
        bench.pull(reference)
    bench.close()


def test_r14_a_slow_line_takes_no_worker_away(tmp_path: Path, unpacker: Watched, registry: FakeRegistry) -> None:
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S)
    slow, quick = image(), build_image([{"a": b"1" * 5000}, {"b": b"2" * 5000}], compression="")
    reference, other = registry.add("slow", "1", slow), registry.add("quick", "1", quick)
    registry.rule("GET", f"/blobs/{slow.layer_digests[0]}", Stall(SIZE * 3 // 4))

    async def scenario() -> None:
        pull = await stalled(bench, unpacker, reference)
        assert (await bench.store.pull(other)).repo_tags == (other,)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    assert unpacker.early == [slow.diff_ids[0]]
    bench.close()


def test_another_pull_goes_on_with_what_a_cancelled_one_left(
    tmp_path: Path, unpacker: Watched, registry: FakeRegistry
) -> None:
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S)
    built = image()
    one, two = registry.add("one", "1", built), registry.add("two", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(SIZE * 3 // 4), times=1)

    async def scenario() -> None:
        first = await stalled(bench, unpacker, one)
        second = asyncio.create_task(bench.store.pull(two))
        while bench.store._leases.holders(built.diff_ids[0]) < 2:
            await asyncio.sleep(0.005)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).repo_tags == (two,)

    run(scenario())
    assert is_whole(unpacker, built) and unpacker.leftovers() == []
    bench.close()


def test_an_encrypted_layer_is_opened_as_it_arrives(tmp_path: Path, unpacker: Watched) -> None:
    tar = layer_tar(FILES)
    secret, nonce = os.urandom(32), os.urandom(16)
    sealed = Cipher(AES(secret), CTR(nonce)).encryptor().update(tar)
    key = (secret, nonce, hmac.digest(secret, sealed, "sha256"))
    blobs = Blobs(tmp_path / "blobs")
    blobs.create()
    ingest = blobs.ingest(Descriptor("", sha256(sealed), len(sealed)))
    assert ingest is not None
    growth = ingest.follow()
    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(unpacker.unpack_arriving, growth, OCI_LAYER, sha256(tar), sha256(tar), None, key)
        ingest.write([sealed[: SIZE // 2]])
        eventually(lambda: "f10" in unpacker.files())
        ingest.write([sealed[SIZE // 2 :]])
        ingest.finish()
        work.result(SOON_S)
    growth.close()
    (directory,) = unpacker.lower_directories(sha256(tar))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == FILES


def test_0_unpacks_what_was_verified_only(tmp_path: Path, unpacker: Watched, registry: FakeRegistry) -> None:
    bench = make_bench(tmp_path, unpacker, early_unpacks=0)
    built = image()
    bench.pull(registry.add("app", "1", built))
    assert unpacker.early == [] and unpacker.whole == [built.diff_ids[0]]
    bench.close()


@pytest.mark.parametrize("space", ["1500k", "3500k"], ids=["for half of the blob", "for the blob, not for its files"])
def test_o47_a_full_disk(tmp_path: Path, registry: FakeRegistry, space: str) -> None:
    needs("root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={space},mode=700", "small", str(disk)], check=True)
    unpacker = Watched(disk)
    bench = make_bench(disk, unpacker)
    try:
        reference = registry.add("big", "1", image())
        with pytest.raises(ImageError, match="ENOSPC no space left on device") as raised:
            bench.pull(reference)
        assert type(raised.value) is ImageError
        assert unpacker.leftovers() == [] and unpacker.numbers() == []
        assert bench.ingests() == set() and bench.strays() == set() and list(bench.store.list()) == []
        bench.store.collect()
        small = registry.add("small", "1", build_image([{"x": b"y" * 5000}], compression=""))
        assert bench.pull(small).repo_tags == (small,)
    finally:
        bench.close()
        unpacker.close()
        unpacker._records._db.close()
        subprocess.run(["umount", str(disk)], check=True)


_PULL_IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.integration.test_imagestore_early import Watched, make_bench
from tests.support import SOON_S
directory = Path(sys.argv[2])
bench = make_bench(directory, Watched(directory), stall_timeout_s=SOON_S)
bench.pull(sys.argv[3])
"""


def test_r12_killed_in_the_middle_of_both(tmp_path: Path, registry: FakeRegistry) -> None:
    needs("root")
    built = image()
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(SIZE * 3 // 4))
    tree = str(Path(__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", _PULL_IN_A_PROCESS, tree, str(tmp_path), reference])
    eventually(lambda: any(tmp_path.glob("snapshots/layers/.*/fs/f10")))
    child.send_signal(signal.SIGKILL)
    child.wait()
    registry.heal()
    unpacker = Watched(tmp_path)
    bench = make_bench(tmp_path, unpacker)
    try:
        eventually(lambda: not unpacker.leftovers())
        assert not unpacker.has_layer(built.diff_ids[0]) and list(bench.store.list()) == []
        registry.seen.clear()
        bench.pull(reference)
        (again,) = [seen for seen in registry.seen if seen.path.endswith(built.layer_digests[0])]
        assert "Range" in again.headers and is_whole(unpacker, built) and unpacker.leftovers() == []
    finally:
        bench.close()
        unpacker.close()


def test_a_closed_snapshotter_waits_for_no_line(tmp_path: Path, registry: FakeRegistry) -> None:
    needs("root")
    unpacker = Watched(tmp_path)
    bench = make_bench(tmp_path, unpacker, stall_timeout_s=SOON_S)
    reference = registry.add("app", "1", image())
    registry.rule("GET", "/blobs/", Stall(SIZE * 3 // 4), times=1 << 30)

    async def scenario() -> None:
        registry.heal()
        registry.rule("GET", f"/blobs/{image().layer_digests[0]}", Stall(SIZE * 3 // 4))
        pull = await stalled(bench, unpacker, reference)
        await asyncio.to_thread(unpacker.close)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull

    run(scenario())
    assert unpacker.leftovers() == []
    bench.close()
