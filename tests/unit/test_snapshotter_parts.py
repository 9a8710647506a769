"""The snapshotter's smaller parts, without root: protocol, trash, shared syncs, usage, mounts as data, blob kinds."""

from __future__ import annotations

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.linux.libc import KernelError
from snapshotter import durable, protocol
from snapshotter import trash as trash_module
from snapshotter.arriving import GIVEN_UP, Reader
from snapshotter.durable import Syncer
from snapshotter.inflate import kind_of
from snapshotter.merged import Merged
from snapshotter.model import Limits, SnapshotError, UnpackError
from snapshotter.mounts import overlay_mount
from snapshotter.pool import Pool
from snapshotter.records import ActiveRecord, LayerRecord, Records
from snapshotter.trash import Trash
from snapshotter.tree import Ignored, clean
from snapshotter.usage import measure
from tests.fakes.snapshots import GZIP, PLAIN, ZSTD
from tests.support import SOON_S, eventually

PATHS = st.lists(st.binary(max_size=50).map(lambda raw: raw.replace(b"\0", b"\n")), max_size=8)


# ---------------------------------------------------------------------------------------------------------- protocol


@given(PATHS, PATHS, st.booleans())
def test_requests_come_back(one: list[bytes], two: list[bytes], base: bool) -> None:
    unpack = protocol.Unpack(GZIP, 9, "sha256:x", base, dict(zip(one, two, strict=False)), Limits(entries=7))
    assert protocol.decode_request(protocol.encode_request(unpack)) == unpack
    odd = protocol.Unpack("a\0b\n\\ü\ud800", 0, "", base, {}, Limits(), (b"k", b"", b"h"))
    assert protocol.decode_request(protocol.encode_request(odd)) == odd
    assert "'k'" not in repr(odd)
    finish = protocol.Finish(["/a b", "/\udcff"], one, two)
    assert protocol.decode_request(protocol.encode_request(finish)) == finish


@given(PATHS, PATHS, PATHS)
def test_replies_come_back(one: list[bytes], two: list[bytes], three: list[bytes]) -> None:
    done = protocol.Done(6, True, one, two, three)
    assert protocol.decode_reply(protocol.encode_reply(done)) == done


@given(
    st.binary(max_size=200)
    | st.sampled_from([b"1\ndone\0", b"-1 2\ndone\0", b"2 0\ndone\0x\0", b"3 0 0 0\ndone\0x\0000\0", b"0\n"])
)
def test_a_malformed_reply_is_an_error(frame: bytes) -> None:
    with pytest.raises(SnapshotError, match="unpack worker"):
        protocol.decode_reply(frame)


@pytest.mark.parametrize("error", [UnpackError("bad layer"), KernelError(28, "write", "x"), OSError(5, "eio", "/f")])
def test_failures_are_raised_again(error: Exception) -> None:
    reply = protocol.decode_reply(protocol.encode_reply(protocol.failed(error)))
    assert isinstance(reply, protocol.Failed)
    with pytest.raises(UnpackError if isinstance(error, UnpackError) else KernelError) as caught:
        reply.raise_()
    if isinstance(error, OSError):
        assert isinstance(caught.value, KernelError)
        assert caught.value.errno == error.errno
    else:
        assert str(caught.value) == str(error)


# ------------------------------------------------------------------------------------------------------------- trash


@pytest.fixture
def trash(tmp_path: Path) -> Trash:
    (tmp_path / "trash").mkdir()
    return Trash(tmp_path / "trash")


def _tree(path: Path) -> Path:
    (path / "a/b").mkdir(parents=True)
    (path / "a/b/f").touch()
    return path


def test_discarding_removes_and_missing_is_fine(trash: Trash, tmp_path: Path) -> None:
    trash.discard(_tree(tmp_path / "x"))
    trash.discard(tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["trash"]
    assert os.listdir(tmp_path / "trash") == []


def test_what_could_not_be_deleted_is_taken_up(trash: Trash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trash_module.remove_tree

    def refuse(path: Path) -> None:
        raise KernelError(18, "unlink", path)

    monkeypatch.setattr(trash_module, "remove_tree", refuse)
    with pytest.raises(KernelError, match="EXDEV"):
        trash.discard(_tree(tmp_path / "x"), name="x")
    error = ValueError("first")
    trash.undo(error, _tree(tmp_path / "y"))
    assert "EXDEV" in error.__notes__[0]
    trash.retry()
    assert len(os.listdir(tmp_path / "trash")) == 2
    monkeypatch.setattr(trash_module, "remove_tree", real)
    trash.discard(tmp_path / "x", name="x")
    trash.sweep()
    trash.close()
    assert os.listdir(tmp_path / "trash") == []


# ------------------------------------------------------------------------------------------------------------- syncs


def test_waiters_share_a_sync_that_began_after_they_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go, calls = threading.Semaphore(0), threading.Semaphore(0), []

    def slow(fd: int) -> None:
        calls.append(fd)
        began.release()
        assert go.acquire(timeout=SOON_S)

    monkeypatch.setattr(durable, "syncfs", slow)
    syncer = Syncer(7)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(syncer.sync)
        assert began.acquire(timeout=SOON_S)
        later = [threads.submit(syncer.sync) for _ in range(6)]
        eventually(lambda: len(syncer._changed._waiters) == 6, what="they wait")  # type: ignore[attr-defined]
        go.release()
        first.result(SOON_S)
        assert began.acquire(timeout=SOON_S)
        assert not any(done.done() for done in later)
        go.release()
        for done in later:
            done.result(SOON_S)
    assert calls == [7, 7]


def test_a_failed_sync_fails_those_who_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [KernelError(5, "syncfs"), None]

    def failing(fd: int) -> None:
        error = errors.pop(0)
        if error:
            raise error

    monkeypatch.setattr(durable, "syncfs", failing)
    syncer = Syncer(7)
    with pytest.raises(KernelError, match="EIO"):
        syncer.sync()
    syncer.sync()


# ------------------------------------------------------------------------------------------------------------- usage


def test_usage_counts_links_once_and_agrees_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/f").write_bytes(b"x" * 10_000)
    os.link(tmp_path / "d/f", tmp_path / "d/e/g")
    (tmp_path / "s").symlink_to("/")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    fd = os.open(tmp_path, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    usage = measure(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    everything = {entry.lstat().st_ino: entry.lstat() for entry in (tmp_path, *tmp_path.rglob("*"))}
    assert usage.inodes == 6 == len(everything)
    assert usage.bytes == sum(status.st_blocks * 512 for status in everything.values())


def test_usage_of_a_tree_that_keeps_changing_ends(tmp_path: Path) -> None:
    stop = threading.Event()

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            (tmp_path / f"a{turn % 5}/b/c").mkdir(parents=True, exist_ok=True)
            os.rename(tmp_path / f"a{turn % 5}/b", tmp_path / f"moved{turn}")
            if turn > 20:
                os.rmdir(tmp_path / f"moved{turn - 20}/c")
                os.rmdir(tmp_path / f"moved{turn - 20}")

    fd = os.open(tmp_path, os.O_RDONLY)
    with ThreadPoolExecutor(1) as threads:
        churning = threads.submit(churn)
        for _ in range(200):
            assert measure(fd).inodes >= 1
        stop.set()
        churning.result(SOON_S)
    os.close(fd)


# ------------------------------------------------------------------------------------------------------- mounts, kinds


def test_a_mount_names_each_layer_by_itself_topmost_first() -> None:
    mount = overlay_mount([Path("/l/2"), Path("/l/1")], Path("/a/3"), volatile=True, plus=True)
    assert mount.options[:4] == (
        ("lowerdir+", "/l/2"), ("lowerdir+", "/l/1"), ("upperdir", "/a/3/upper"), ("workdir", "/a/3/work"),
    )  # fmt: skip
    assert ("volatile", None) in mount.options
    assert {("index", "off"), ("metacopy", "off"), ("redirect_dir", "nofollow")} < set(mount.options)
    assert ("volatile", None) not in overlay_mount([Path("/l")], Path("/a"), volatile=False, plus=True).options
    joined = overlay_mount([Path("/a:b"), Path("/c\\d")], Path("/x"), volatile=False, plus=False)
    assert joined.options[0] == ("lowerdir", "/a\\:b:/c\\\\d")


def test_o53_more_layers_than_overlayfs_takes_are_refused() -> None:
    with pytest.raises(SnapshotError, match="501 layers.*500 at most"):
        overlay_mount([Path("/l")] * 501, Path("/a"), volatile=True, plus=True)


@pytest.mark.parametrize(
    ("start", "media_type", "kind"),
    [
        (b"\x1f\x8b\x08", GZIP, "gzip"),
        (b"\x1f\x8b\x08", "application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        (b"\x28\xb5\x2f\xfd", ZSTD, "zstd"),
        (b"\x5e\x2a\x4d\x18", "application/vnd.docker.image.rootfs.diff.tar.zstd", "zstd"),
        (b"etc/", PLAIN, "tar"),
        (b"etc/", "application/vnd.docker.image.rootfs.diff.tar", "tar"),
    ],
)
def test_blobs_are_told_by_their_magic(start: bytes, media_type: str, kind: str) -> None:
    assert kind_of(start, media_type) == kind


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [(b"", b""), (b"/", b""), (b"./", b""), (b"a", b"a"), (b"/a//b/./c/", b"a/b/c"), (b"a/../b", b"b"), (b"a/..", b"")],
)
def test_paths_are_cleaned(path: bytes, cleaned: bytes) -> None:
    assert clean(path, Limits()) == cleaned


@pytest.mark.parametrize("path", [b"..", b"a/../..", b"/../a", b".wh.a/b"])
def test_paths_are_refused(path: bytes) -> None:
    with pytest.raises(UnpackError):
        clean(path, Limits())
    with pytest.raises(Ignored):
        clean(b"a/.wh..wh.plnk/1", Limits())


# --------------------------------------------------------------------------------------------------- merged, records


def test_the_merged_view_resolves_links_within_itself(tmp_path: Path) -> None:
    top, low = tmp_path / "top", tmp_path / "low"
    (low / "usr/lib").mkdir(parents=True)
    (low / "usr/lib/x").touch()
    (low / "up").symlink_to("../../../usr")
    (low / "lib").symlink_to("/usr/lib")
    (low / "hidden").mkdir()
    top.mkdir()
    (top / "hidden").touch()
    (top / "loop").symlink_to("loop")
    (top / "usr").mkdir()
    roots = [os.open(path, os.O_PATH) for path in (top, low)]
    merged = Merged(roots)
    assert merged.resolve(b"lib/x") == b"usr/lib/x"
    assert merged.resolve(b"up/lib/../lib/new/y") == b"usr/lib/new/y"
    assert merged.directories(b"usr") == (0, 1)
    assert merged.directories(b"usr/lib") == (1,)
    assert merged.directories(b"hidden") == ()
    assert merged.look_up(b"hidden/x") is None
    found = merged.look_up(b"lib")
    assert found is not None
    assert found.layer == 1
    with pytest.raises(KernelError, match="ELOOP"):
        merged.resolve(b"loop/x")
    for fd in roots:
        os.close(fd)


def test_records_come_back_and_chains_must_be_whole(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    records = Records(db)
    layers = [LayerRecord("a", "d", None, 1, 2, 3, False, 4), LayerRecord("b", "d", "a", 2, 2, 3, True, 4)]
    for layer in layers:
        records.add_layer(layer)
    records.add_active(ActiveRecord("k", "b", 3, 5, "boot"))
    records.start_removing("k")
    again = Records(db)
    assert again.chain("b") == layers[::-1]
    assert again.active == {"k": ActiveRecord("k", "b", 3, 5, "boot", True)}
    again.remove_layer("a")
    assert again.chain("b") is None
    assert again.chain("c") is None
    db.execute("UPDATE snapshotter_layers SET parent = 'b' WHERE chain_id = 'b'")
    assert Records(db).chain("b") is None  # a circle is no chain
    db.close()


def test_a_worker_that_answers_while_it_is_cancelled_is_not_used_again(tmp_path: Path) -> None:
    pool = Pool(1, 60.0)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        owner = object()
        worker = pool._take(owner, patient=False)
        pool.cancel(owner)
        pool._give_back(worker, patient=False)
        pool.forget(owner)
        assert pool.processes() == []
        pool.ask(object(), protocol.Finish([], [], []), directory)
        assert worker.pid not in pool.processes()
    finally:
        os.close(directory)
        pool.close()


def test_no_more_is_read_than_was_counted(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"0123456789" + b"junk that nobody counted")
    fd, credit = os.open(tmp_path / "blob", os.O_RDONLY), os.eventfd(4)
    try:
        reader = Reader(fd, 10, credit)
        assert reader.read(100) == b"0123"
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(reader.read, 100)
            os.eventfd_write(credit, 3)
            assert waiting.result(SOON_S) == b"456"
            os.eventfd_write(credit, 3)
            assert reader.read(2) == b"78" and reader.read(2) == b"9" and reader.read(2) == b""
    finally:
        os.close(fd)
        os.close(credit)


@pytest.mark.parametrize("by", ["the writer", "the reader's own side"])
def test_a_blob_that_is_given_up_ends_the_wait(tmp_path: Path, by: str) -> None:
    (tmp_path / "blob").write_bytes(b"0123456789")
    fd, credit = os.open(tmp_path / "blob", os.O_RDONLY), os.eventfd(0)
    try:
        reader = Reader(fd, 10, credit)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(reader.read, 100)
            if by == "the writer":
                os.eventfd_write(credit, GIVEN_UP)
            else:
                reader.stop()
            with pytest.raises(UnpackError, match="will not be whole"):
                waiting.result(SOON_S)
    finally:
        os.close(fd)
        os.close(credit)
