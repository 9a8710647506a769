"""The overlay snapshotter on a real kernel: many layers, shared pages, crashes, stuck removals, worker processes."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from runtime.cgroups.manager import manager_for
from runtime.linux.mount import MS_BIND, FsMount, mount, mountinfo, move_mount, umount2
from runtime.linux.overlay_joined import make_joined
from runtime.linux.writeback import cachestat, syncfs
from runtime.resources import Resources
from snapshotter import overlay as overlay_module
from snapshotter.model import Config, NotFound, SnapshotError, UnpackError
from snapshotter.mounts import overlay_mount
from snapshotter.overlay import Overlay
from tests.fakes.snapshots import PLAIN, Blob, blob, directory, file
from tests.integration.cgroup_child import fork, own_path
from tests.support import SOON_S, eventually, needs

CHILD = """
import sqlite3, sys
from pathlib import Path
from snapshotter.model import Config
from snapshotter.overlay import Overlay
root, workers, action, *rest = sys.argv[1:]
db = sqlite3.connect(Path(root) / "db", check_same_thread=False, isolation_level=None)
db.execute("PRAGMA journal_mode=WAL")
overlay = Overlay(Path(root) / "root", db, Config(workers=int(workers)))
print("ready", flush=True)
if action == "unpack":
    blob, media_type, diff_id, chain_id, parent = rest
    overlay.unpack_layer(Path(blob), media_type, diff_id, chain_id, parent or None)
elif action == "prepare":
    overlay.prepare(rest[0], rest[1] or None)
elif action == "remove":
    overlay.remove(rest[0])
elif action == "collect":
    overlay.remove_layers_except(frozenset())
"""


def open_overlay(path: Path, **config: object) -> Overlay:
    needs("root", "overlay")
    db = sqlite3.connect(path / "db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    return Overlay(path / "root", db, Config(**config))  # type: ignore[arg-type]


@contextmanager
def opened(path: Path, **config: object) -> Iterator[Overlay]:
    made = open_overlay(path, **config)
    try:
        yield made
    finally:
        made.close()
        made._records._db.close()


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    with opened(tmp_path, workers=0) as made:
        yield made


@contextmanager
def mounted(what: FsMount, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True, parents=True)
    fd, place = what.make(), os.open(target, os.O_PATH)
    try:
        move_mount(fd, place)
    finally:
        os.close(fd)
        os.close(place)
    try:
        yield target
    finally:
        umount2(str(target))


def contents(path: Path) -> dict[str, list[str]]:
    return {kind: sorted(os.listdir(path / "root" / kind)) for kind in ("layers", "active", "trash")}


# ------------------------------------------------------------------------------------------------------------ mounts


def test_o53_many_layers_are_mounted(overlay: Overlay, tmp_path: Path) -> None:
    layers: list[Blob] = []
    for number in range(500):
        parent = layers[-1] if layers else None
        layers.append(blob(tmp_path, [file(f"f{number}", b"%d" % number), file("same", b"%d" % number)], parent=parent))
        overlay.unpack_layer(*layers[-1].arguments())
    for count in (128, 500):
        with mounted(overlay.prepare(f"c{count}", layers[count - 1].chain_id), tmp_path / f"m{count}") as root:
            assert len(os.listdir(root)) == count + 1
            assert (root / "same").read_bytes() == b"%d" % (count - 1)
            assert (root / "f0").read_bytes() == b"0"
            (root / "f0").write_bytes(b"changed")
        assert (tmp_path / "root/layers/1/fs/f0").read_bytes() == b"0"


@pytest.mark.parametrize("count", [2, 128])
def test_o53_the_form_for_older_kernels_mounts_too(overlay: Overlay, tmp_path: Path, count: int) -> None:
    """Before Linux 6.5 there is only the joined lowerdir. This kernel still takes it, so it can be shown here."""
    lower = [tmp_path / f"l{number}:,\\x" for number in range(count)]
    for number, path in enumerate(lower):
        path.mkdir()
        (path / f"f{number}").touch()
        (path / "same").write_text(str(number))
    (tmp_path / "d/upper").mkdir(parents=True)
    (tmp_path / "d/work").mkdir()
    joined = overlay_mount(lower, tmp_path / "d", volatile=True, plus=False)
    assert sum(key == "lowerdir" for key, _ in joined.options) == 1
    (tmp_path / "m").mkdir()
    before = len(list(mountinfo()))
    fd, place = make_joined(joined), os.open(tmp_path / "m", os.O_PATH)
    assert len(list(mountinfo())) == before
    move_mount(fd, place)
    os.close(fd)
    os.close(place)
    try:
        assert len(os.listdir(tmp_path / "m")) == count + 1
        assert (tmp_path / "m/same").read_text() == "0"
        (tmp_path / "m/new").touch()
    finally:
        umount2(str(tmp_path / "m"))
    assert (tmp_path / "d/upper/new").exists()


def test_a_container_without_layers_starts_empty(overlay: Overlay, tmp_path: Path) -> None:
    with mounted(overlay.prepare("c", None), tmp_path / "m") as root:
        assert os.listdir(root) == []
        assert stat.S_IMODE(root.stat().st_mode) == 0o755
        (root / "x").write_bytes(b"1")
    assert overlay.usage("c").inodes == 2


def test_o40_mounts_are_volatile_and_can_be_made_again(overlay: Overlay, tmp_path: Path) -> None:
    what = overlay.prepare("c", None)
    for turn in range(3):
        with mounted(what, tmp_path / "m") as root:
            options = next(point.super_options for point in mountinfo() if point.target == str(root))
            assert "volatile" in options
            assert sorted(os.listdir(root)) == [str(before) for before in range(turn)]
            (root / str(turn)).touch()
        what = overlay.mount("c")


def test_a_volatile_snapshot_of_an_earlier_boot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, workers=0) as overlay:
        never = overlay.prepare("never mounted", None)
        with mounted(overlay.prepare("c", None), tmp_path / "m"):
            pass
    monkeypatch.setattr(overlay_module, "boot_id", lambda: "another boot")
    with opened(tmp_path, workers=0) as overlay:
        with pytest.raises(SnapshotError, match="remove it and prepare a new one"):
            overlay.mount("c")
        assert overlay.mount("never mounted") == never
        overlay.remove("c")
        assert [info.key for info in overlay.list()] == ["never mounted"]


def test_without_volatile_it_can_be_mounted_over_and_over(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0, volatile=False) as overlay:
        what = overlay.prepare("c", None)
        for _ in range(2):
            with mounted(what, tmp_path / "m") as root:
                (root / "x").touch()


def test_o47_prepare_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    needs("root", "overlay")
    with mounted(FsMount("tmpfs", "small", (("nr_inodes", "30"), ("mode", "700"))), tmp_path / "small") as place:
        with opened(place, workers=0) as overlay:
            ready = 0
            with pytest.raises(OSError, match="No space left"):
                while True:
                    overlay.prepare(f"c{ready}", None)
                    ready += 1
            assert ready > 1
            assert [info.key for info in overlay.list()] == [f"c{number}" for number in range(ready)]
            assert len(contents(place)["active"]) == ready
            assert contents(place)["trash"] == []
            overlay.remove("c0")
            overlay.prepare("again", None)


def test_s24_nobody_else_gets_in(tmp_path: Path) -> None:
    needs("root")
    before = os.umask(0)
    try:
        (tmp_path / "root").mkdir(mode=0o777)
        (tmp_path / "root/layers").mkdir(mode=0o777)
        with opened(tmp_path, workers=0):
            pass
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / "root" / name).stat().st_mode) for name in ("", "layers", "active", "trash")} == {
        0o700
    }


# ------------------------------------------------------------------------------------------ fifty containers, one image


def _disk_bytes(path: Path) -> int:
    """What the files below take on disk, each counted once."""
    found = {(entry.st_dev, entry.st_ino): entry.st_blocks for entry in map(Path.lstat, path.rglob("*"))}
    return sum(found.values()) * 512


def _page_cache(files: list[int]) -> int:
    """The bytes of page cache that a process of a memory cgroup of its own fills by reading the files."""

    def read() -> None:
        for fd in files:
            while os.read(fd, 8 << 20):
                pass
        os.write(1, b"read")
        time.sleep(50)

    with own_path() as path:
        manager = manager_for(path, "reader")
        manager.create(Resources())
        child = fork(read, manager)
        try:
            assert child.read() == b"read"
            return manager.stats().memory_cache
        finally:
            child.end()


def test_fifty_containers_hold_an_image_once_on_disk_and_once_in_memory(overlay: Overlay, tmp_path: Path) -> None:
    size = 32 << 20
    layer = blob(tmp_path, [file("big", os.urandom(1 << 20) * 32), file("small", b"1")], PLAIN)
    overlay.unpack_layer(*layer.arguments())
    (lower,) = overlay.lower_directories(layer.chain_id)
    with ExitStack() as stack:
        fd = os.open(lower / "big", os.O_RDONLY)
        stack.callback(os.close, fd)
        syncfs(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert cachestat(fd)[0] < 1000
        used = _disk_bytes(tmp_path / "root")
        roots = [
            stack.enter_context(mounted(overlay.prepare(f"c{n}", layer.chain_id), tmp_path / f"m{n}"))
            for n in range(50)
        ]
        inside = [os.open(root / "big", os.O_RDONLY) for root in roots]
        for each in inside:
            stack.callback(os.close, each)
        grown = _page_cache(inside)
        # Every container reads the pages of the layer's own file.
        assert cachestat(fd)[0] == size // 4096
        assert size * 0.9 < grown < size * 2, f"page cache grew by {grown >> 20} MiB for 50 x {size >> 20} MiB"
        assert _disk_bytes(tmp_path / "root") - used < size // 10
        assert all(overlay.usage(f"c{n}").inodes == 1 for n in range(50))


# ----------------------------------------------------------------------------------------------------------- removing


def test_o38_p12_removal_stops_at_a_mount_and_can_be_taken_up(overlay: Overlay, tmp_path: Path) -> None:
    precious = tmp_path / "volume"
    precious.mkdir()
    (precious / "data").write_bytes(b"precious")
    overlay.prepare("c", None)
    upper = tmp_path / "root/active/1/upper"
    (upper / "a/b").mkdir(parents=True)
    (upper / "a/file").touch()
    mount(str(precious), str(upper / "a/b"), None, MS_BIND)
    try:
        with pytest.raises(OSError, match="EXDEV|EBUSY") as caught:
            overlay.remove("c")
        assert caught.value.errno in (errno.EXDEV, errno.EBUSY)
        assert (precious / "data").read_bytes() == b"precious"
        assert [info.key for info in overlay.list()] == ["c"]
        with pytest.raises(NotFound):
            overlay.mount("c")
        overlay.prepare("other", None)
        overlay.remove("other")
    finally:
        target = next(
            point.target for point in mountinfo() if point.target.endswith("/a/b") and str(tmp_path) in point.target
        )
        umount2(target)
    overlay.remove("c")
    assert overlay.list() == []
    assert contents(tmp_path) == {"layers": [], "active": [], "trash": []}
    assert (precious / "data").read_bytes() == b"precious"


def test_removal_follows_no_link(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/file").touch()
    overlay.prepare("c", None)
    (tmp_path / "root/active/1/upper/l").symlink_to(tmp_path / "host")
    overlay.remove("c")
    assert (tmp_path / "host/file").exists()


def test_a_very_deep_tree_is_measured_and_removed(overlay: Overlay, tmp_path: Path) -> None:
    overlay.prepare("c", None)
    here = os.open(tmp_path / "root/active/1/upper", os.O_RDONLY)
    for _ in range(700):
        os.mkdir("d" * 20, dir_fd=here)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert overlay.usage("c").inodes == 702
    overlay.remove("c")
    assert contents(tmp_path)["trash"] == []


def test_o43_a_removal_that_hangs_blocks_nobody(
    overlay: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = blob(tmp_path, [file("f", b"1")])
    overlay.unpack_layer(*layer.arguments())
    overlay.prepare("stuck", layer.chain_id)
    from snapshotter import trash  # noqa: PLC0415

    entered, release, real = threading.Event(), threading.Event(), trash.remove_tree

    def hanging(path: Path) -> None:
        if "active-" in str(path):
            entered.set()
            assert release.wait(SOON_S)
        real(path)

    monkeypatch.setattr(trash, "remove_tree", hanging)
    with ThreadPoolExecutor(1) as threads:
        removal = threads.submit(overlay.remove, "stuck")
        assert entered.wait(SOON_S)
        other = blob(tmp_path, [file("g", b"2")], parent=layer)
        overlay.unpack_layer(*other.arguments())
        overlay.prepare("next", other.chain_id)
        assert {info.key for info in overlay.list()} == {"stuck", "next"}
        assert overlay.usage("next").inodes == 1
        assert overlay.remove_layers_except(frozenset()) == 0
        assert not removal.done()
        release.set()
        removal.result(SOON_S)
    assert [info.key for info in overlay.list()] == ["next"]


def test_layers_of_a_removed_image_leave_the_disk(overlay: Overlay, tmp_path: Path) -> None:
    base = blob(tmp_path, [directory("d"), file("d/f", b"x" * 10000)])
    top = blob(tmp_path, [file("e")], parent=base)
    for layer in (base, top):
        overlay.unpack_layer(*layer.arguments())
    assert overlay.remove_layers_except(frozenset({base.chain_id})) == 1
    assert len(contents(tmp_path)["layers"]) == 1
    assert overlay.remove_layers_except(frozenset()) == 1
    assert contents(tmp_path) == {"layers": [], "active": [], "trash": []}


# ------------------------------------------------------------------------------------------------ crashes and restarts


def _child(path: Path, workers: int, *arguments: str, failpoint: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OCID_FAILPOINTS": failpoint, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(workers), *arguments], env=environment,
                            stdout=subprocess.PIPE)  # fmt: skip


def _arguments(layer: Blob) -> list[str]:
    return [str(layer.path), layer.media_type, layer.diff_id, layer.chain_id, layer.parent or ""]


@pytest.mark.parametrize("step", ["snapshots.layer.extracted", "snapshots.layer.synced"])
def test_killed_while_committing_a_layer(tmp_path: Path, step: str) -> None:
    needs("root", "overlay")
    layer = blob(tmp_path, [file("f", b"1")])
    child = _child(tmp_path, 1, "unpack", *_arguments(layer), failpoint=f"{step}=kill")
    child.communicate(timeout=SOON_S)
    assert child.returncode == -signal.SIGKILL
    assert len(contents(tmp_path)["layers"]) == 1
    with opened(tmp_path, workers=1) as overlay:
        assert not overlay.has_layer(layer.chain_id)
        eventually(lambda: contents(tmp_path) == {"layers": [], "active": [], "trash": []}, what="sweep")
        overlay.unpack_layer(*layer.arguments())
        assert overlay.has_layer(layer.chain_id)


def test_killed_while_preparing(tmp_path: Path) -> None:
    needs("root", "overlay")
    child = _child(tmp_path, 0, "prepare", "c", "", failpoint="snapshots.prepare.renamed=kill")
    child.communicate(timeout=SOON_S)
    assert child.returncode == -signal.SIGKILL
    with opened(tmp_path, workers=0) as overlay:
        assert overlay.list() == []
        eventually(lambda: contents(tmp_path)["active"] == [] and contents(tmp_path)["trash"] == [], what="sweep")
        overlay.prepare("c", None)


def test_killed_while_collecting(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0) as overlay:
        layer = blob(tmp_path, [file("f", b"1")])
        overlay.unpack_layer(*layer.arguments())
    child = _child(tmp_path, 0, "collect", failpoint="snapshots.layers.unrecorded=kill")
    child.communicate(timeout=SOON_S)
    assert child.returncode == -signal.SIGKILL
    with opened(tmp_path, workers=0) as overlay:
        assert not overlay.has_layer(layer.chain_id)
        eventually(lambda: contents(tmp_path) == {"layers": [], "active": [], "trash": []}, what="sweep")


def _held(tmp_path: Path) -> str:
    """A failpoint that keeps a worker which has made all files of its layer from saying so, for ever."""
    os.mkfifo(tmp_path / "held")
    return f"snapshots.worker.unpacked=pause:{tmp_path}/held"


def test_a_killed_daemon_takes_its_workers_along(tmp_path: Path) -> None:
    needs("root", "overlay")
    layer = blob(tmp_path, [file(f"f{number}", b"x") for number in range(20)])
    child = _child(tmp_path, 2, "unpack", *_arguments(layer), failpoint=_held(tmp_path))
    assert child.stdout is not None
    child.stdout.readline()
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    tasks = Path(f"/proc/{child.pid}/task")

    def workers() -> list[int]:
        return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    assert children.exists()
    (worker,) = eventually(workers, what="worker")
    eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/f19")), what="files")
    child.kill()
    child.communicate(timeout=SOON_S)
    eventually(lambda: not Path(f"/proc/{worker}").exists(), what="the worker ends")
    with opened(tmp_path, workers=2) as overlay:
        assert not overlay.has_layer(layer.chain_id)
        eventually(lambda: contents(tmp_path) == {"layers": [], "active": [], "trash": []}, what="sweep")


def test_o45_a_layer_whose_directory_is_gone_is_not_there(tmp_path: Path) -> None:
    base, other = blob(tmp_path, [file("f", b"1")]), blob(tmp_path, [file("h", b"1")])
    top = blob(tmp_path, [file("g", b"2")], parent=base)
    with opened(tmp_path, workers=0) as overlay:
        for layer in (base, top, other):
            overlay.unpack_layer(*layer.arguments())
        overlay.prepare("on top", top.chain_id)
        overlay.prepare("elsewhere", other.chain_id)
    os.rename(tmp_path / "root/layers/1", tmp_path / "lost")
    with opened(tmp_path, workers=0) as overlay:
        assert [overlay.has_layer(layer.chain_id) for layer in (base, top, other)] == [False, False, True]
        with pytest.raises(NotFound):
            overlay.mount("on top")
        assert overlay.mount("elsewhere")
        overlay.remove("on top")
        for layer in (base, top):
            overlay.unpack_layer(*layer.arguments())
        assert overlay.has_layer(top.chain_id)


def test_everything_is_known_again_after_a_restart(tmp_path: Path) -> None:
    base = blob(tmp_path, [file("f", b"1")])
    with opened(tmp_path, workers=0) as overlay:
        overlay.unpack_layer(*base.arguments())
        before = overlay.prepare("c", base.chain_id), overlay.list(), overlay.layers_usage()
    with opened(tmp_path, workers=0) as overlay:
        assert (overlay.mount("c"), overlay.list(), overlay.layers_usage()) == before
        overlay.prepare("d", base.chain_id)
        assert sorted(contents(tmp_path)["active"]) == ["2", "3"]


def test_a_snapshot_whose_directory_is_gone_is_not_there(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0) as overlay:
        overlay.prepare("c", None)
    os.rename(tmp_path / "root/active/1", tmp_path / "lost")
    with opened(tmp_path, workers=0) as overlay:
        assert overlay.list() == []
        overlay.prepare("c", None)


def test_damaged_snapshots(tmp_path: Path) -> None:
    base = blob(tmp_path, [file("f", b"1")])
    with opened(tmp_path, workers=0) as overlay:
        overlay.unpack_layer(*base.arguments())
        for key in ("whole", "no upper", "no layer"):
            overlay.prepare(key, base.chain_id if key == "no layer" else None)
        assert overlay.damaged_snapshots() == []
        numbers = {key: overlay._records.active[key].number for key in ("no upper", "no layer")}
        os.rename(tmp_path / f"root/active/{numbers['no upper']}/upper", tmp_path / "lost")
        overlay._records.remove_layer(base.chain_id)
        assert overlay.damaged_snapshots() == [
            ("no upper", "upper: gone"),
            ("no layer", f"layer {base.chain_id}: gone"),
        ]
        overlay.remove("no upper")
        assert [key for key, _ in overlay.damaged_snapshots()] == ["no layer"]


# ------------------------------------------------------------------------------------------------------------ workers


def test_workers_are_two_at_most_and_end_when_idle(tmp_path: Path) -> None:
    with opened(tmp_path, workers=2, worker_idle_s=0.3) as overlay:
        layers = [blob(tmp_path, [file(f"f{number}-{at}", b"x" * 100) for at in range(300)]) for number in range(6)]
        seen: set[int] = set()
        with ThreadPoolExecutor(6) as threads:
            for done in [threads.submit(overlay.unpack_layer, *layer.arguments()) for layer in layers]:
                done.result(SOON_S)
                seen.update(overlay._layers.pool.processes())
        assert 1 <= len(seen) <= 2
        eventually(lambda: not overlay._layers.pool.processes(), what="idle workers end")
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen), what="they are waited for")
        overlay.unpack_layer(*blob(tmp_path, [file("later")]).arguments())


def test_a_worker_that_dies_is_an_error_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, workers=1) as overlay:
        layer = blob(tmp_path, [file(f"f{number}", b"x") for number in range(20)])
        monkeypatch.setenv("OCID_FAILPOINTS", _held(tmp_path))
        with ThreadPoolExecutor(1) as threads:
            unpacking = threads.submit(overlay.unpack_layer, *layer.arguments())
            eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/f19")), what="files")
            (pid,) = overlay._layers.pool.processes()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(SnapshotError, match="SIGKILL"):
                unpacking.result(SOON_S)
        monkeypatch.delenv("OCID_FAILPOINTS")
        assert contents(tmp_path) == {"layers": [], "active": [], "trash": []}
        overlay.unpack_layer(*layer.arguments())
        assert overlay.has_layer(layer.chain_id)
        overlay.remove_layers_except(frozenset())


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    overlay = open_overlay(tmp_path, workers=2)
    layer = blob(tmp_path, [file(f"f{number}", b"x") for number in range(30_000)])
    orphan = blob(tmp_path, [file("o")], parent="sha256:" + "0" * 64)
    with ThreadPoolExecutor(2) as threads:
        unpacking = threads.submit(overlay.unpack_layer, *layer.arguments())
        waiting = threads.submit(overlay.unpack_layer, *orphan.arguments())
        eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/f1000")), what="files")
        eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/o")), what="the orphan")
        overlay.close()
        for failed in (unpacking, waiting):
            with pytest.raises(SnapshotError, match="closed"):
                failed.result(SOON_S)
    assert overlay._layers.pool.processes() == []
    assert contents(tmp_path) == {"layers": [], "active": [], "trash": []}


def test_a_parent_that_fails_fails_its_children(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0, parent_wait_s=30) as overlay:
        base, wrong = blob(tmp_path, [file("f", b"1")]), "sha256:" + "1" * 64
        top = blob(tmp_path, [file("g", b"2")], parent=base)
        with ThreadPoolExecutor(1) as threads:
            child = threads.submit(overlay.unpack_layer, *top.arguments())
            eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/g")), what="the child")
            with pytest.raises(UnpackError):
                overlay.unpack_layer(base.path, base.media_type, wrong, base.chain_id, None)
            with pytest.raises(SnapshotError, match="parent layer .* failed"):
                child.result(SOON_S)
        overlay.unpack_layer(*base.arguments())
        overlay.unpack_layer(*top.arguments())


def test_a_parent_that_never_comes(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0, parent_wait_s=0.05) as overlay:
        orphan = blob(tmp_path, [file("o")], parent="sha256:" + "0" * 64)
        with pytest.raises(NotFound, match="was not unpacked within"):
            overlay.unpack_layer(*orphan.arguments())
        assert contents(tmp_path) == {"layers": [], "active": [], "trash": []}


def test_a_wait_for_the_parent_can_be_cancelled(tmp_path: Path) -> None:
    with opened(tmp_path, workers=0) as overlay:
        orphan = blob(tmp_path, [file("o")], parent="sha256:" + "0" * 64)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(overlay.unpack_layer, *orphan.arguments())
            eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/o")), what="the orphan")
            overlay.cancel(orphan.chain_id)
            with pytest.raises(SnapshotError, match="cancelled"):
                waiting.result(SOON_S)


def test_unpacking_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, workers=1) as overlay:
        layer = blob(tmp_path, [file(f"f{number}", b"x") for number in range(20)])
        queued = blob(tmp_path, [file("queued")])
        monkeypatch.setenv("OCID_FAILPOINTS", _held(tmp_path))
        with ThreadPoolExecutor(3) as threads:
            unpacking = [threads.submit(overlay.unpack_layer, *layer.arguments()) for _ in range(2)]
            eventually(lambda: any(tmp_path.glob("root/layers/.*/fs/f19")), what="files")
            monkeypatch.delenv("OCID_FAILPOINTS")
            behind = threads.submit(overlay.unpack_layer, *queued.arguments())
            overlay.cancel(layer.chain_id)
            for failed in unpacking:
                with pytest.raises(SnapshotError, match="cancelled"):
                    failed.result(SOON_S)
            behind.result(SOON_S)
        assert contents(tmp_path)["trash"] == []
        assert len(contents(tmp_path)["layers"]) == 1
        overlay.unpack_layer(*layer.arguments())
        assert overlay.has_layer(layer.chain_id)
        overlay.remove_layers_except(frozenset())


def test_no_fds_are_left(tmp_path: Path) -> None:
    with opened(tmp_path, workers=1) as overlay:
        base = blob(tmp_path, [directory("d"), file("d/f", b"1")])
        overlay.unpack_layer(*base.arguments())
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(5):
            layer = blob(tmp_path, [file(f"d/g{turn}", b"2")], parent=base)
            overlay.unpack_layer(*layer.arguments())
            with pytest.raises(UnpackError):
                overlay.unpack_layer(*blob(tmp_path, [file("d/x"), file(f"../{turn}")], parent=base).arguments())
            overlay.prepare(f"c{turn}", layer.chain_id)
            overlay.usage(f"c{turn}")
            overlay.remove(f"c{turn}")
        assert len(os.listdir("/proc/self/fd")) == before
