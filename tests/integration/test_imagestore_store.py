"""The store as a whole: at once, on a full disk, after a crash, beside other processes, and as a layout for skopeo."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagestore.manifest import chain_ids
from imagestore.model import ContentInvalid, Image, ImageError, ImageNotFound, RegistryUnavailable
from tests.costs import soon
from tests.fakes.imagestore import Bench, run
from tests.fakes.registry import (
    OCI_INDEX,
    Cut,
    FakeRegistry,
    Hang,
    Hold,
    Stall,
    build_image,
    build_index,
    write_layout,
)
from tests.fakes.unpacker import MemoryUnpacker
from tests.support import SOON_S, eventually, needs


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def skopeo(*arguments: str) -> str:
    needs("skopeo")
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------------- at once


def test_o50_shared_layers_are_downloaded_once(bench: Bench, registry: FakeRegistry) -> None:
    """100 pulls of 10 images that share their base, with removals and collections all the while."""
    shared = [{"base": os.urandom(20_000)}, {"libs": os.urandom(20_000)}]
    images = [build_image([*shared, {f"own{number}": os.urandom(5000)}]) for number in range(10)]
    references = [registry.add(f"app{number}", "1", image) for number, image in enumerate(images)]
    stop = threading.Event()
    errors: list[BaseException] = []

    def collector() -> None:
        try:
            while not stop.wait(0.002):
                bench.store.collect()
                bench.store.list()
        except BaseException as error:
            errors.append(error)

    async def once() -> None:
        pulled = await asyncio.gather(*(bench.store.pull(references[number % 10]) for number in range(100)))
        assert len({image.id for image in pulled}) == 10

    thread = threading.Thread(target=collector)
    thread.start()
    try:
        run(once(), 60)
        for digest in images[0].layer_digests[:2]:
            assert registry.count("GET", digest) == 1
        assert sum(registry.count("GET", image.layer_digests[2]) for image in images) == 10

        async def churn() -> None:
            async def one(seed: int) -> None:
                dice = random.Random(seed)
                for _ in range(6):
                    reference = dice.choice(references)
                    await bench.store.pull(reference)
                    if dice.random() < 0.4:
                        await asyncio.to_thread(bench.store.remove, dice.choice(references))

            await asyncio.gather(*(one(seed) for seed in range(12)))

        run(churn(), 60)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    run(once(), 60)
    assert len(bench.store.list()) == 10
    for image in bench.store.list():
        assert all(bench.unpacker.has_layer(layer.chain_id) for layer in image.layers)
        assert {layer.blob.digest for layer in image.layers} <= bench.blobs()


def test_downloads_and_unpacks_are_bounded(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    reference = registry.add("app", "1", build_image([{f"f{n}": os.urandom(50_000)} for n in range(24)]))
    image = bench.pull(reference)
    assert len(image.layers) == 24
    assert registry.most_concurrent <= bench.config.concurrent_downloads
    assert bench.unpacker.most_running <= bench.config.concurrent_unpacks + 1


def test_layers_unpack_while_others_download(bench: Bench, registry: FakeRegistry) -> None:
    built = build_image([{"a": b"1"}, {"b": os.urandom(100_000)}])
    reference = registry.add("app", "1", built)
    unpacked = threading.Event()
    rule = registry.rule("GET", f"/blobs/{built.layer_digests[1]}", Hold(unpacked.is_set))
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Hold(lambda: rule.hits > 0))

    async def scenario() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        while not bench.unpacker.has_layer(built.diff_ids[0]):
            assert not pull.done() or pull.result()
            await asyncio.sleep(0.001)
        assert not pull.done()
        unpacked.set()
        await pull

    run(scenario())


def test_127_layers(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image([{f"f{n}": b"x"} for n in range(127)]))
    assert len(bench.pull(reference).layers) == 127


def test_same_blob_twice_in_one_image(bench: Bench, registry: FakeRegistry) -> None:
    empty = {"same": b"content"}
    built = build_image([empty, {"other": b"1"}, empty])
    image = bench.pull(registry.add("app", "1", built))
    assert image.layers[0].blob == image.layers[2].blob and image.layers[0].chain_id != image.layers[2].chain_id
    assert registry.count("GET", built.layer_digests[0]) == 1


def test_o43_a_stuck_unpack_blocks_no_other_pull(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    stuck = registry.add("stuck", "1", build_image([{"a": b"1"}]))
    fine = registry.add("fine", "1", build_image([{"b": b"2"}]))
    image = bench.pull(fine)
    bench.unpacker.gate = threading.Event()

    async def scenario() -> None:
        slow = asyncio.create_task(bench.store.pull(stuck))
        while not bench.unpacker.running:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        assert await bench.store.pull(fine) == image
        assert await asyncio.to_thread(bench.store.list) == [image]
        await asyncio.to_thread(bench.store.collect)
        assert bench.unpacker.gate is not None  # type: ignore[attr-defined]
        bench.unpacker.gate.set()  # type: ignore[attr-defined]
        assert (await slow).repo_tags

    run(scenario())


def test_a_layer_above_a_failed_download_is_given_up(bench: Bench, registry: FakeRegistry) -> None:
    """It was unpacked before its parent came, which never does: nobody may wait for that."""
    built = build_image([{"a": b"1"}, {"b": b"2" * 5000}])
    reference = registry.add("app", "1", built)
    registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(5))
    with soon(), pytest.raises(RegistryUnavailable):
        bench.pull(reference)
    assert bench.unpacker.running == 0  # type: ignore[attr-defined]
    assert len(bench.unpacker.calls) == 1  # type: ignore[attr-defined]
    registry.heal()
    assert bench.pull(reference).repo_tags == (reference,)


def test_cancelling_one_of_two_pulls_that_share_layers(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    unpacker = bench.unpacker
    built = build_image([{"a": os.urandom(50_000)}, {"b": b"2"}])
    first, second = registry.add("app", "1", built), registry.add("app", "2", built)
    base = registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(10, drip=3000))

    async def both() -> list[asyncio.Task[Image]]:
        """Two pulls that wait for one layer, which waits for its parent."""
        pulls = [asyncio.create_task(bench.store.pull(reference)) for reference in (first, second)]
        while not unpacker.running or bench.store._leases.holders(chain_ids(built.diff_ids)[1]) < 2:
            await asyncio.sleep(0.001)
        assert base.hits and len(unpacker.calls) == 1
        return pulls

    async def scenario() -> None:
        pulls = await both()
        pulls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulls[0]
        assert (await pulls[1]).repo_tags == (second,)

        bench.store.remove(second)
        await asyncio.to_thread(bench.store.collect)
        unpacker.calls.clear()
        pulls = await both()
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: unpacker.running == 0)

    run(scenario())
    registry.heal()
    assert bench.pull(first).repo_tags == (first,)


# ------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    needs("root")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "small", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_o47_full_disk(small_disk: Path, registry: FakeRegistry) -> None:
    bench = Bench(small_disk)
    try:
        reference = registry.add("big", "1", build_image([os.urandom(3 << 20)], compression=""))
        small = registry.add("small", "1", build_image([os.urandom(1000)]))
        for _ in range(3):
            with pytest.raises(ImageError, match="write blob sha256:.*: ENOSPC no space left on device") as raised:
                bench.pull(reference)
            assert type(raised.value) is ImageError and str(raised.value).startswith(f"pull {reference}: ")
            assert bench.ingests() == set() and bench.strays() == set() and list(bench.store.list()) == []
        image = bench.pull(small)
        filler = small_disk / "filler"
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(ImageError, match="ENOSPC|full"):
            bench.pull(registry.add("other", "1", build_image([os.urandom(1000)])))
        assert [known.id for known in bench.store.list()] == [image.id]
        assert bench.strays() == set()
        filler.unlink()
        assert bench.pull(registry.add("other", "1", build_image([{"x": b"y"}]))).repo_tags
    finally:
        bench.close()


def test_o47_remove_works_on_a_full_disk(small_disk: Path, registry: FakeRegistry) -> None:
    bench = Bench(small_disk)
    try:
        reference = registry.add("app", "1", build_image([os.urandom(500_000)], compression=""))
        bench.pull(reference)
        with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)
        bench.store.remove(reference)
        bench.store.collect()
        assert list(bench.store.list()) == [] and bench.blobs() == set()
        assert json.loads((bench.root / "index.json").read_bytes())["manifests"] == []
    finally:
        bench.close()


# --------------------------------------------------------------------------------------------- restarts and crashes


def test_images_survive_a_restart(bench: Bench, registry: FakeRegistry) -> None:
    image = bench.pull(registry.add("app", "1", build_image()))
    bench.close()
    bench.open()
    assert list(bench.store.list()) == [image]


@pytest.mark.parametrize(
    "harm", ["truncate blob", "remove blob", "garble config", "remove manifest", "lose layer", "garble and lose"]
)
def test_o45_damage_is_noticed_and_a_pull_repairs_it(bench: Bench, registry: FakeRegistry, harm: str) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    built = build_image([{"a": b"1"}, {"b": b"2"}])
    reference = registry.add("app", "1", built)
    other = bench.pull(registry.add("other", "1", build_image([{"c": b"3"}])))
    image = bench.pull(reference)
    blobs = bench.root / "blobs/sha256"
    bench.close()
    if harm == "truncate blob":
        (blobs / built.layer_digests[0][7:]).write_bytes(b"")
    elif harm == "remove blob":
        (blobs / built.layer_digests[1][7:]).unlink()
    elif harm == "garble config":
        size = (blobs / built.config_digest[7:]).stat().st_size
        (blobs / built.config_digest[7:]).write_bytes(b"{" * size)
    elif harm == "remove manifest":
        (blobs / built.digest[7:]).unlink()
    else:
        del bench.unpacker.layers[image.chain_id]
    if harm == "garble and lose":
        path = blobs / built.layer_digests[1][7:]
        path.write_bytes(b"{" * path.stat().st_size)
    bench.open()
    assert list(bench.store.list()) == [other] and bench.store.get(reference) is None
    assert bench.pull(reference) == image
    assert {known.id for known in bench.store.list()} == {image.id, other.id}


def test_o44_index_json_is_made_true_at_the_start(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    bench.pull(reference)
    whole = (bench.root / "index.json").read_bytes()
    for damaged in (b"", b"{", b'{"schemaVersion":2,"manifests":[]}', None):
        bench.close()
        if damaged is None:
            (bench.root / "index.json").unlink()
        else:
            (bench.root / "index.json").write_bytes(damaged)
        bench.open()
        assert (bench.root / "index.json").read_bytes() == whole


_PULL_IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.fakes.imagestore import Bench
print("ready", flush=True)
bench = Bench(Path(sys.argv[2]))
print(bench.pull(sys.argv[3]).id, flush=True)
"""


def _pull_in_a_process(directory: Path, reference: str, failpoints: str = "") -> subprocess.Popen[bytes]:
    tree = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", _PULL_IN_A_PROCESS, tree, str(directory), reference],
        stdout=subprocess.PIPE,
        env={**os.environ, "OCID_FAILPOINTS": failpoints},
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def test_o45_killed_in_the_middle(tmp_path: Path, registry: FakeRegistry) -> None:
    built = build_image([os.urandom(3 << 20), {"b": b"2"}], compression="")
    reference = registry.add("app", "1", built)
    rule = registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(2 << 20, drip=5000))
    child = _pull_in_a_process(tmp_path, reference)
    part = tmp_path / "images/ingest" / f".{built.layer_digests[0][7:]}.part"
    eventually(lambda: rule.hits and part.exists() and part.stat().st_size > 1 << 20)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    registry.heal()
    bench = Bench(tmp_path)
    try:
        assert list(bench.store.list()) == []
        bench.store.collect()
        assert bench.strays() == set() and part.exists()  # young: the next pull continues it
        registry.seen.clear()
        assert bench.pull(reference).repo_tags == (reference,)
        (again,) = [seen for seen in registry.seen if seen.path.endswith(built.layer_digests[0])]
        assert "Range" in again.headers
        assert bench.ingests() == set()
    finally:
        bench.close()


@pytest.mark.parametrize("step", ["blob.verified", "blob.named", "index.written", "recorded"])
def test_r12_killed_at_each_step(tmp_path: Path, registry: FakeRegistry, step: str) -> None:
    """A name that is there after a kill leads to a whole image; the same pull again works; nothing stray stays."""
    reference = registry.add("app", "1", build_image([{"a": b"1"}, {"b": b"2"}]))
    bench = Bench(tmp_path)
    bench.close()
    child = _pull_in_a_process(tmp_path, reference, f"images.{step}=kill")
    assert child.wait(SOON_S) == -signal.SIGKILL
    bench.open()
    try:
        assert list(bench.store.list()) == []  # the layers were in the memory of the dead process
        index = json.loads((bench.root / "index.json").read_bytes())
        assert bool(index["manifests"]) == (step == "recorded")
        assert bench.pull(reference).repo_tags == (reference,)
        bench.store.collect()
        assert bench.strays() == set() and bench.ingests() == set()
        assert len(bench.blobs()) == 4
    finally:
        bench.close()


def test_two_processes_pull_one_image_and_collect(tmp_path: Path, registry: FakeRegistry) -> None:
    built = build_image([os.urandom(2 << 20), {"b": b"2"}], compression="")
    reference = registry.add("app", "1", built)
    rule = registry.rule("GET", f"/blobs/{built.layer_digests[0]}", Stall(1 << 20, drip=50_000), times=1)
    child = _pull_in_a_process(tmp_path, reference)
    eventually(lambda: rule.hits)
    bench = Bench(tmp_path)
    try:
        bench.store.collect()  # must leave alone what the other one has on disk so far
        # The fake unpackers share nothing, so only the blobs are one: fetched once for both.
        image = bench.pull(reference)
        assert child.communicate()[0].decode().strip() == image.id
        assert registry.count("GET", f"/blobs/{built.layer_digests[0]}") == 1
        assert [known.id for known in bench.store.list()] == [image.id]
    finally:
        bench.close()


def test_collect_keeps_what_a_running_pull_holds(bench: Bench, registry: FakeRegistry) -> None:
    built = build_image([{"a": b"1"}, {"b": os.urandom(60_000)}])
    reference = registry.add("app", "1", built)
    rule = registry.rule("GET", f"/blobs/{built.layer_digests[1]}", Stall(10, drip=3000))

    async def scenario() -> None:
        pull = asyncio.create_task(bench.store.pull(reference))
        while not rule.hits or not bench.unpacker.has_layer(built.diff_ids[0]):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(bench.store.collect)
        assert bench.unpacker.has_layer(built.diff_ids[0])
        assert (await pull).repo_tags

    run(scenario())
    assert registry.count("GET", built.layer_digests[0]) == 1


def test_collect_takes_garbage_and_only_that(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    kept_image, gone_image = build_image([{"a": b"1"}, {"b": b"2"}]), build_image([{"a": b"1"}, {"c": b"3"}])
    kept = bench.pull(registry.add("kept", "1", kept_image))
    gone = bench.pull(registry.add("gone", "1", gone_image))
    old = bench.root / "ingest" / f".{'e' * 64}.part"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    bench.store.remove(gone.id)
    assert gone_image.layer_digests[1] in bench.blobs()
    bench.store.collect()
    assert bench.blobs() == {*kept_image.blobs, kept_image.digest} and not old.exists()
    assert set(bench.unpacker.layers) == {layer.chain_id for layer in kept.layers}
    assert list(bench.store.list()) == [kept]


def test_r14_questions_are_answered_during_a_long_collection(bench: Bench, registry: FakeRegistry) -> None:
    assert isinstance(bench.unpacker, MemoryUnpacker)
    image = bench.pull(registry.add("app", "1", build_image()))
    entered, leave = threading.Event(), threading.Event()

    def stuck(keep: frozenset[str]) -> int:
        entered.set()
        assert leave.wait(SOON_S)
        return 0

    bench.unpacker.remove_layers_except = stuck  # type: ignore[method-assign]
    thread = threading.Thread(target=bench.store.collect)
    thread.start()
    assert entered.wait(SOON_S)
    assert list(bench.store.list()) == [image] and bench.store.get(image.id) == image
    assert bench.pull(image.repo_tags[0]) == image
    assert thread.is_alive()
    leave.set()
    thread.join()


def test_a_locked_database_is_one_sentence(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())
    bench.db.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(bench.directory / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ImageError, match=r"pull .*: image records: database is locked"):
        bench.pull(reference)
    other.execute("ROLLBACK")
    other.close()
    assert bench.pull(reference).repo_tags == (reference,)


# ----------------------------------------------------------------------------------------------- pins, names, memory


def test_o52_pinned(tmp_path: Path, registry: FakeRegistry) -> None:
    reference = registry.add("pause", "3", build_image())
    bench = Bench(tmp_path, pinned=frozenset({reference}))
    try:
        assert bench.pull(reference).pinned
        assert not bench.pull(registry.add("app", "1", build_image([{"b": b"2"}]))).pinned
    finally:
        bench.close()


def test_pools_close_when_nothing_is_pulled(bench: Bench, registry: FakeRegistry) -> None:
    reference = registry.add("app", "1", build_image())

    async def scenario() -> None:
        await bench.store.pull(reference)
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("image-")])

    run(scenario())
    assert bench.store._transport._session is None


def test_aiohttp_is_not_imported_before_the_first_pull() -> None:
    code = (
        "import sys, sqlite3, tempfile; from pathlib import Path; from imagestore.store import Store, StoreConfig;"
        "d = Path(tempfile.mkdtemp()); db = sqlite3.connect(':memory:', check_same_thread=False, isolation_level=None);"
        "s = Store(d, db, None, StoreConfig()); s.list(); s.collect if 0 else None;"
        "print([m for m in ('aiohttp', 'yarl', 'multidict', 'cryptography') if m in sys.modules])"
    )
    tree = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tree, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- layouts, skopeo


@pytest.mark.parametrize("docker", [False, True])
def test_skopeo_reads_the_store(bench: Bench, registry: FakeRegistry, docker: bool, tmp_path: Path) -> None:
    built = build_image([{"a": b"1"}, {"b": b"2"}], docker=docker)
    other = build_image([{"c": b"3"}], architecture="arm64")
    registry.add("app", "inner", built)
    registry.add("app", "other", other)
    reference = registry.put("app", "1", build_index([other, built]), OCI_INDEX)
    bench.pull(reference)
    bench.store.tag(reference, "docker.io/library/mine:1.0")
    for name in (reference, "docker.io/library/mine:1.0"):
        told = json.loads(skopeo("inspect", f"oci:{bench.root}:{name}"))
        assert told["Layers"] == list(built.layer_digests) and (docker or told["Digest"] == built.digest)
    skopeo("copy", "-q", f"oci:{bench.root}:{reference}", f"oci:{tmp_path}/copy:x")
    bench.store.remove(reference)
    bench.store.collect()
    skopeo("inspect", f"oci:{bench.root}:docker.io/library/mine:1.0")
    names = [
        item["annotations"]["org.opencontainers.image.ref.name"]
        for item in json.loads((bench.root / "index.json").read_bytes())["manifests"]
    ]
    assert names == ["docker.io/library/mine:1.0"]


def test_import_of_a_layout(bench: Bench, tmp_path: Path) -> None:
    built, other = build_image([{"a": b"1"}, {"b": b"2"}], compression="zstd"), build_image([{"c": b"3"}])
    write_layout(tmp_path / "My Layout", {"one": built, "registry.example/x:2": other})
    image = run(bench.store.import_layout(tmp_path / "My Layout", "one"))
    assert image.repo_tags == ("localhost/my-layout:one",) and image.repo_digests == ()
    assert image.manifest_digest == built.digest
    image = run(bench.store.import_layout(tmp_path / "My Layout", "registry.example/x:2"))
    assert image.repo_tags == ("registry.example/x:2",)
    image = run(bench.store.import_layout(tmp_path / "My Layout", "one", "my/name:3"))  # one image, two names
    assert image.repo_tags == ("docker.io/my/name:3", "localhost/my-layout:one")
    with pytest.raises(ImageNotFound, match="0 images named 'two'; there is one, registry.example/x:2"):
        run(bench.store.import_layout(tmp_path / "My Layout", "two"))
    with pytest.raises(ImageNotFound, match="without a name to choose it by"):
        run(bench.store.import_layout(tmp_path / "My Layout"))
    with pytest.raises(ImageNotFound, match=r"read index\.json: ENOENT"):
        run(bench.store.import_layout(tmp_path / "nowhere"))


def test_import_of_damaged_layouts(bench: Bench, tmp_path: Path) -> None:
    built = build_image([{"a": b"1"}])
    layout = tmp_path / "layout"
    write_layout(layout, {"x": built})
    layer = layout / "blobs/sha256" / built.layer_digests[0][7:]
    good = layer.read_bytes()
    for bad in (good[:-1], good + b"x", b"y" * len(good)):
        layer.write_bytes(bad)
        with pytest.raises(ContentInvalid):
            run(bench.store.import_layout(layout))
        assert bench.ingests() == set()
    layer.unlink()
    os.mkfifo(layer)
    with pytest.raises(ContentInvalid, match="no regular file"):
        run(bench.store.import_layout(layout))
    layer.unlink()
    layer.write_bytes(good)
    assert run(bench.store.import_layout(layout)).repo_tags == ("localhost/layout:x",)


def test_skopeo_writes_what_we_import(bench: Bench, registry: FakeRegistry, tmp_path: Path) -> None:
    reference = registry.add("app", "1", build_image([{"a": b"1"}]))
    skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{reference}", f"oci:{tmp_path}/out:v1")
    assert run(bench.store.import_layout(tmp_path / "out", "v1")).repo_tags == ("localhost/out:v1",)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_that_skopeo_writes(bench: Bench, registry: FakeRegistry, tmp_path: Path, kind: str) -> None:
    built = build_image([{"a": b"1" * 3000}, {"deep/" * 30 + "b": b"2"}])
    reference = registry.add("team/app", "1.0", built)
    path = tmp_path / "saved.tar"
    docker = kind == "docker-archive"
    name = "docker.io/team/app:1.0" if docker else "v7"
    skopeo("copy", "-q", "--src-tls-verify=false", f"docker://{reference}", f"{kind}:{path}:{name}")
    image = run(bench.store.import_archive(path, docker=docker))
    assert image.repo_tags == ("docker.io/team/app:1.0" if docker else "localhost/saved:v7",)
    assert tuple(layer.diff_id for layer in image.layers) == built.diff_ids
    assert run(bench.store.import_archive(path, name, "mine:1", docker=docker)).id == image.id
    told = json.loads(skopeo("inspect", f"oci:{bench.root}:docker.io/library/mine:1"))
    assert len(told["Layers"]) == 2
    with pytest.raises(ImageNotFound, match="0 images named 'other'; there is"):
        run(bench.store.import_archive(path, "other", docker=docker))
    data = path.read_bytes()
    for spoiled in (
        data[:700],
        data[: len(data) // 2],
        b"",
        b"\x1f\x8b" + data,
        data.replace(b"ustar", b"uSTAR"),
        b"x" * 2048,
    ):
        path.write_bytes(spoiled)
        with pytest.raises((ContentInvalid, ImageNotFound), match=r"import .*saved\.tar: archive .*saved\.tar: "):
            run(bench.store.import_archive(path, docker=docker))
    assert bench.ingests() == set() and bench.strays() == set()


# ------------------------------------------------------------------------------------------------ Debian's registry


@pytest.fixture
def docker_registry(tmp_path: Path) -> Iterator[str]:
    """A real registry on a free port, empty; its name."""
    import socket

    needs("docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\nhttp: {{addr: 'localhost:{port}'}}\n"
    )
    server = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        try:
            socket.create_connection(("localhost", port), 1).close()
        except OSError:
            return False
        return True

    eventually(answers)
    yield f"localhost:{port}"
    server.terminate()
    server.wait()


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_pull_from_the_real_registry(bench: Bench, docker_registry: str, tmp_path: Path, compression: str) -> None:
    built = build_image([{"a": os.urandom(500_000)}, {"b": b"2"}], compression=compression)
    write_layout(tmp_path / "in", {"x": built})
    reference = f"{docker_registry}/team/app:1.0"
    skopeo(
        "copy", "-q", "--preserve-digests", "--dest-tls-verify=false", f"oci:{tmp_path}/in:x", f"docker://{reference}"
    )
    image = bench.pull(reference)
    assert image.manifest_digest == built.digest and image.repo_tags == (reference,)
    assert bench.pull(f"{docker_registry}/team/app@{built.digest}").id == image.id
    assert json.loads(skopeo("inspect", f"oci:{bench.root}:{reference}"))["Digest"] == built.digest
    with pytest.raises(ImageNotFound, match=r"answered 404 for manifest 2 \(manifest unknown\)"):
        bench.pull(f"{docker_registry}/team/app:2")
    with pytest.raises(ImageNotFound, match=r"answered 404"):
        bench.pull(f"{docker_registry}/nobody/nothing:1")


def test_docker_manifest_from_the_real_registry(bench: Bench, docker_registry: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "in", {"x": build_image([{"a": b"1"}])})
    reference = f"{docker_registry}/app:docker"
    skopeo("copy", "-q", "--format", "v2s2", "--dest-tls-verify=false", f"oci:{tmp_path}/in:x", f"docker://{reference}")
    image = bench.pull(reference)
    assert image.layers[0].blob.media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"


def test_hang_then_cancel_frees_everything(bench: Bench, registry: FakeRegistry) -> None:
    before = set(os.listdir("/proc/self/fd"))
    reference = registry.add("app", "1", build_image())
    for path in ("/manifests/", "/blobs/"):
        registry.heal()
        rule = registry.rule("GET", path, Hang())

        async def scenario(rule: object = rule) -> None:
            pull = asyncio.create_task(bench.store.pull(reference))
            while not rule.hits:  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull

        run(scenario())
    assert bench.ingests() == set() and bench.strays() == set()
    registry.heal()
    registry.rule("GET", "/blobs/", Cut(5), times=1)
    assert bench.pull(reference).repo_tags
    ours = {fd for fd in os.listdir("/proc/self/fd") if fd not in before}
    eventually(lambda: len([fd for fd in ours if os.path.exists(f"/proc/self/fd/{fd}")]) <= 4)
