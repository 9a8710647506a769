"""Blobs and ingests on disk: nothing has a name before it is whole, and what is resumed is a true prefix."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imagestore.content import Blobs, Ingest
from imagestore.leases import Leases
from imagestore.model import ContentInvalid, Descriptor, ImageError
from imagestore.threads import Threads
from tests.fakes.imagestore import run
from tests.fakes.registry import sha256
from tests.support import SOON_S

DATA = bytes(range(256)) * 1000
BLOB = Descriptor("application/x", sha256(DATA), len(DATA))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    made = Blobs(tmp_path)
    made.create()
    return made


def opened(blobs: Blobs, blob: Descriptor = BLOB) -> Ingest:
    ingest = blobs.ingest(blob)
    assert ingest is not None
    ingest.load()
    return ingest


def partial(tmp_path: Path) -> Path:
    return tmp_path / "ingest" / f".{BLOB.digest[7:]}.part"


def test_whole_blob_becomes_visible_at_the_end(blobs: Blobs, tmp_path: Path) -> None:
    ingest = opened(blobs)
    ingest.write([DATA[:1000], DATA[1000:]])
    assert not blobs.has(BLOB) and partial(tmp_path).exists()
    ingest.finish()
    assert blobs.has(BLOB) and not partial(tmp_path).exists()
    assert blobs.path(BLOB.digest).read_bytes() == DATA
    assert blobs.read(BLOB.digest, 1 << 20) == DATA
    assert os.stat(blobs.path(BLOB.digest)).st_mode & 0o777 == 0o600
    assert list(blobs.digests()) == [BLOB.digest]


def test_o49_resume_hashes_what_is_there(blobs: Blobs) -> None:
    ingest = opened(blobs)
    ingest.write([DATA[:5000]])
    ingest.close()
    ingest = opened(blobs)
    assert ingest.offset == 5000 and ingest.resumed
    ingest.write([DATA[5000:]])
    ingest.finish()
    assert blobs.has(BLOB)


def test_o49_bad_partial_is_no_poison(blobs: Blobs, tmp_path: Path) -> None:
    partial(tmp_path).write_bytes(b"x" * (len(DATA) + 5))
    ingest = opened(blobs)
    assert ingest.offset == 0
    ingest.write([b"x" * len(DATA)])
    with pytest.raises(ContentInvalid, match="wrong content"):
        ingest.finish()
    assert not partial(tmp_path).exists() and not blobs.has(BLOB)
    ingest = opened(blobs)
    ingest.write([DATA])
    ingest.finish()
    assert blobs.has(BLOB)


def test_too_much_and_too_little(blobs: Blobs) -> None:
    ingest = opened(blobs)
    with pytest.raises(ContentInvalid, match="more than the announced 256000 bytes"):
        ingest.write([DATA, b"x"])
    ingest.discard()
    ingest = opened(blobs)
    ingest.write([DATA[:-1]])
    with pytest.raises(ContentInvalid, match="255999 bytes"):
        ingest.finish()


def test_empty_ingest_leaves_no_file(blobs: Blobs, tmp_path: Path) -> None:
    opened(blobs).close()
    assert list((tmp_path / "ingest").iterdir()) == []


def test_empty_blob(blobs: Blobs) -> None:
    empty = Descriptor("x", sha256(b""), 0)
    ingest = opened(blobs, empty)
    ingest.finish()
    assert blobs.has(empty)


def test_write_after_close_touches_nothing(blobs: Blobs) -> None:
    ingest = opened(blobs)
    ingest.close()
    with pytest.raises(ImageError, match="given up"):
        ingest.write([b"x"])


def test_two_writers_of_one_blob(blobs: Blobs) -> None:
    first = opened(blobs)
    assert blobs.ingest(BLOB) is None
    first.write([DATA])
    first.finish()
    again = blobs.ingest(BLOB)  # a new file: the old one was renamed away under the lock
    assert again is not None
    again.close()


def test_s43_paths_are_made_of_strict_digests(blobs: Blobs) -> None:
    for bad in ("sha256:../../../etc/passwd", "sha256:" + "A" * 64, "x", "", "sha256:" + "a" * 64 + "\n"):
        with pytest.raises(ContentInvalid):
            blobs.path(bad)


def test_s44_a_planted_link_is_not_followed(blobs: Blobs, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    partial(tmp_path).symlink_to(victim)
    with pytest.raises(ImageError, match="ELOOP"):
        blobs.ingest(BLOB)
    assert victim.read_bytes() == b"mine"


def test_s24_directories_are_private(tmp_path: Path) -> None:
    root = tmp_path / "store"
    Blobs(root).create()
    assert all(os.stat(path).st_mode & 0o777 == 0o700 for path in (root, root / "blobs", root / "ingest"))


def test_o45_truncated_blob_is_not_there(blobs: Blobs) -> None:
    blobs.path(BLOB.digest).write_bytes(b"")
    assert not blobs.has(BLOB) and not blobs.path(BLOB.digest).exists()
    blobs.path(BLOB.digest).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(ContentInvalid, match="damaged on disk"):
        blobs.read(BLOB.digest, 1 << 20)


def test_put_checks(blobs: Blobs) -> None:
    blobs.put(BLOB.digest, DATA)
    assert blobs.has(BLOB)
    with pytest.raises(ContentInvalid):
        blobs.put(BLOB.digest, b"other")


def test_old_ingests_go_but_not_those_in_use(blobs: Blobs, tmp_path: Path) -> None:
    old = tmp_path / "ingest" / f".{'a' * 64}.part"
    old.write_bytes(b"x")
    young = tmp_path / "ingest" / f".{'b' * 64}.part"
    young.write_bytes(b"x")
    stray = tmp_path / "blobs/sha256/.temporary"
    stray.write_bytes(b"x")
    ingest = opened(blobs)
    ingest.write([b"x"])
    long_ago = time.time() - 2 * 86400
    for path in (old, stray, partial(tmp_path)):
        os.utime(path, (long_ago, long_ago))
    blobs.remove_old_ingests(86400)
    assert not old.exists() and not stray.exists() and young.exists() and partial(tmp_path).exists()


# -------------------------------------------------------------------------------------------------------------- leases


def test_leases(tmp_path: Path) -> None:
    leases, mine = Leases(tmp_path), set[str]()
    leases.enter()
    leases.lease_blob("a", mine)
    leases.lease_blob("a", mine)
    layers = set[str]()
    leases.lease_layers({"c1", "c2"}, layers)
    with leases.collecting() as alone:
        assert alone
        with leases.removing_blob("a") as free:
            assert not free
        with leases.removing_blob("b") as free:
            assert free
        with leases.sweeping_layers() as leased:
            assert leased == {"c1", "c2"}
        leases.leave(mine, layers)
        with leases.removing_blob("a") as free:
            assert not free  # its image may have been recorded since the collection read the records
    with leases.collecting(), leases.removing_blob("a") as free:
        assert free


def test_another_process_that_pulls_stops_the_collection(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from imagestore.leases import Leases;"
        "leases = Leases(Path(sys.argv[1])); leases.enter(); print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"in\n"
    with Leases(tmp_path).collecting() as alone:
        assert not alone
    other.kill()  # dead: nothing of it remains in the way
    other.communicate()
    with Leases(tmp_path).collecting() as alone:
        assert alone
    assert [path.name for path in tmp_path.iterdir()] == [".collect"]


def test_what_was_opened_for_a_pull_that_is_cancelled_meanwhile_is_let_go(blobs: Blobs) -> None:
    """Or its lock would keep every later pull of the blob waiting, until the process ends."""
    may_open = threading.Event()

    def slowly() -> Ingest:
        assert may_open.wait(SOON_S)
        return opened(blobs)

    async def scenario() -> None:
        threads = Threads(1, 1, 1)
        threads.enter()
        taking = asyncio.create_task(threads.take(Ingest.close, slowly))
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.sleep(0)
        may_open.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        threads.leave()

    run(scenario())
    ingest = blobs.ingest(BLOB)
    assert ingest is not None
    ingest.close()
