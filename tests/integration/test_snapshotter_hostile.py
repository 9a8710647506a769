"""Layers that mean harm: nothing outside the layer changes, whatever they hold (threats S23, S36–S41, P1, P13)."""

from __future__ import annotations

import gzip
import hashlib
import os
import resource
import sqlite3
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from snapshotter.model import Config, Limits, UnpackError
from snapshotter.overlay import Overlay
from tests.costs import soon
from tests.fakes.snapshots import (
    GZIP,
    PLAIN,
    ZSTD,
    Blob,
    Member,
    blob,
    device,
    directory,
    fifo,
    file,
    hardlink,
    opaque,
    symlink,
    tarball,
    whiteout,
    xattrs,
)
from tests.support import needs


def open_overlay(path: Path, **config: object) -> Overlay:
    needs("root", "overlay")
    db = sqlite3.connect(path / "db", check_same_thread=False, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    return Overlay(path / "root", db, Config(**config))  # type: ignore[arg-type]


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    made = open_overlay(tmp_path, workers=0)
    yield made
    made.remove_layers_except(frozenset())  # thousands of files: pytest keeps tmp_path for a while
    made.close()


class HostMarker:
    """A tree outside every layer: what it is made of, to the last attribute."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "dir").mkdir(parents=True)
        (path / "dir/file").write_bytes(b"host")
        (path / "file").write_bytes(b"host marker")
        (path / "link").symlink_to("file")
        (path / "empty").mkdir()
        os.mkfifo(path / "pipe")
        for entry in (path, *path.rglob("*")):
            os.chown(entry, 11, 12, follow_symlinks=False)
            if not entry.is_symlink():
                entry.chmod(0o751 if entry.is_dir() else 0o640)
                if not stat.S_ISFIFO(entry.lstat().st_mode):
                    os.setxattr(entry, "user.host", b"1")
        for entry in (*path.rglob("*"), path):
            os.utime(entry, ns=(1_000_000_007, 1_000_000_007), follow_symlinks=False)
        self.before = self.now()

    def now(self) -> list[tuple[object, ...]]:
        found = []
        for entry in sorted((self.path, *self.path.rglob("*"))):
            status = entry.lstat()
            regular = stat.S_ISREG(status.st_mode)
            found.append(
                (
                    str(entry),
                    status.st_mode,
                    status.st_uid,
                    status.st_gid,
                    status.st_ino,
                    status.st_nlink,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    entry.read_bytes() if regular else b"",
                    tuple(os.listxattr(entry, follow_symlinks=False)),
                )
            )
        return found

    def unchanged(self) -> bool:
        return self.now() == self.before


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostMarker]:
    marker = HostMarker(tmp_path / "host")
    yield marker
    assert marker.unchanged(), "the host marker tree changed"


ROUTES = [
    "symlink",
    "relative symlink",
    "hardlink",
    "hardlink to symlink",
    "chain of three",
    "pax path",
    "gnu longname",
    "duplicate entry",
    "link in the lower layer",
]
ACTIONS = [
    "file",
    "dir",
    "chmod",
    "chown",
    "xattr",
    "mtime",
    "whiteout",
    "opaque",
    "device",
    "fifo",
    "symlink",
    "hardlink",
    "truncate",
]


def _route(route: str, host: HostMarker) -> tuple[list[Member], list[Member], str, int]:
    """Members of the lower layer, members that lead out, the name that leads out, and the tar format."""
    out, up = str(host.path), "../" * 20 + str(host.path).lstrip("/")
    pax = tarfile.PAX_FORMAT
    routes: dict[str, tuple[list[Member], list[Member], str, int]] = {
        "symlink": ([], [symlink("l", out)], "l", pax),
        "relative symlink": ([], [directory("a"), symlink("a/l", up)], "a/l", pax),
        "hardlink": ([], [hardlink("l", f"{out}/file")], "l", pax),
        "hardlink to symlink": ([], [symlink("s", out), hardlink("l", "s")], "l", pax),
        "chain of three": ([], [symlink("a", out), symlink("b", "a"), symlink("l", "b/.")], "l", pax),
        "pax path": ([], [symlink("x", "y", pax_headers={"path": "l", "linkpath": out})], "l", pax),
        "gnu longname": ([], [symlink("n" * 120, out + "/./" * 60)], "n" * 120, tarfile.GNU_FORMAT),
        "duplicate entry": ([], [directory("l"), file("l/dir"), file("l/file"), symlink("l", out)], "l", pax),
        "link in the lower layer": ([symlink("l", out), directory("a"), symlink("a/l", up)], [], "l", pax),
    }
    return routes[route]


def _action(action: str, way: str) -> list[Member]:
    """Members that try to do `action` to the marker tree through `way`, on it and on what is in it."""
    spots = [way, f"{way}/file", f"{way}/dir", f"{way}/dir/file", f"{way}/link", f"{way}/new/x"]
    owned = {"uid": 66, "gid": 67}
    per: dict[str, list[Member]] = {
        "file": [file(spot, b"evil") for spot in spots],
        "dir": [directory(spot, 0o777) for spot in spots],
        "chmod": [directory(way, 0o6777), *(file(spot, b"", 0o6777) for spot in spots[1:])],
        "chown": [directory(way, **owned), *(file(spot, b"", **owned) for spot in spots[1:])],
        "xattr": [directory(spot, pax_headers=xattrs(user__evil=b"1")) for spot in spots],
        "mtime": [directory(f"{spot}/.", mtime=5) for spot in spots],
        "whiteout": [whiteout(spot) for spot in spots],
        "opaque": [opaque(spot) for spot in spots],
        "device": [device(spot, 1, 3) for spot in spots],
        "fifo": [fifo(spot) for spot in spots],
        "symlink": [symlink(spot, "evil") for spot in spots],
        "hardlink": [hardlink(f"{way}/evil{at}", spot) for at, spot in enumerate(spots)]
        + [hardlink(f"stolen{at}", spot) for at, spot in enumerate(spots)],
        "truncate": [hardlink("mine", f"{way}/file"), file("mine", b"")],
    }
    return per[action]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_s39_no_way_out(overlay: Overlay, tmp_path: Path, host: HostMarker, route: str, action: str) -> None:
    lower, leading, way, form = _route(route, host)
    base = blob(tmp_path, [*lower, directory("here")])
    overlay.unpack_layer(*base.arguments())
    for members in ([*leading, *_action(action, way)], *([*leading, member] for member in _action(action, way))):
        layer = blob(tmp_path, tarball(members, form), parent=base)
        try:
            overlay.unpack_layer(*layer.arguments())
        except UnpackError as error:
            assert "tar" in str(error)
        assert host.unchanged()
    # A normal layer still works afterwards.
    good = blob(tmp_path, [file("good", b"1")], parent=base)
    overlay.unpack_layer(*good.arguments())


def test_s23_modes_of_directories_that_became_links(overlay: Overlay, tmp_path: Path, host: HostMarker) -> None:
    out = str(host.path)
    members = [
        directory("a", 0o777),
        symlink("a", out),
        directory("b", 0o777, uid=5),
        directory("b/dir", 0o777, mtime=3),
        symlink("b", out),
        directory("c"),
        directory("c/dir", 0o777),
        file("c"),
        symlink("c", out),
    ]
    layer = blob(tmp_path, members)
    overlay.unpack_layer(*layer.arguments())
    (root,) = overlay.lower_directories(layer.chain_id)
    assert sorted(os.listdir(root)) == ["a", "b", "c"]
    assert all((root / name).is_symlink() for name in "abc")


def test_s38_a_cached_parent_that_became_a_link(overlay: Overlay, tmp_path: Path, host: HostMarker) -> None:
    members = [
        directory("d"),
        file("d/x"),
        symlink("d", str(host.path)),
        file("d/y", b"evil"),
        file("d/file", b"evil"),
        directory("e/f"),
        file("e/f/x"),
        symlink("e", str(host.path)),
        file("e/dir/file", b"evil"),
        symlink("t", "u"),
        file("t/x"),
        symlink("t", str(host.path)),
        file("t/file", b"evil"),
    ]
    layer = blob(tmp_path, members)
    overlay.unpack_layer(*layer.arguments())
    (root,) = overlay.lower_directories(layer.chain_id)
    inside = str(host.path).lstrip("/")
    assert (root / inside / "y").read_bytes() == b"evil"
    assert (root / inside / "file").read_bytes() == b"evil"


def test_s38_a_cached_parent_that_became_another_directory(overlay: Overlay, tmp_path: Path) -> None:
    layer = blob(
        tmp_path, [directory("d"), file("d/x"), file("d"), directory("d"), file("d/y"), hardlink("d/z", "d/y")]
    )
    overlay.unpack_layer(*layer.arguments())
    (root,) = overlay.lower_directories(layer.chain_id)
    assert sorted(os.listdir(root / "d")) == ["y", "z"]


def test_s38_layers_unpacked_in_parallel_with_links_between_them(tmp_path: Path, host: HostMarker) -> None:
    overlay = open_overlay(tmp_path, workers=2)
    try:
        layers = [blob(tmp_path, [directory("d"), file("d/x")])]
        for turn in range(6):
            members = [symlink("d", str(host.path))] if turn % 2 == 0 else [file("d/file", b"evil"), whiteout("d/dir")]
            layers.append(blob(tmp_path, members, parent=layers[-1]))
        with ThreadPoolExecutor(len(layers)) as threads:
            for done in [threads.submit(overlay.unpack_layer, *layer.arguments()) for layer in reversed(layers)]:
                done.result(60)
        assert host.unchanged()
    finally:
        overlay.close()


def _seconds(overlay: Overlay, directory: Path, members: list[Member], parent: Blob | None = None) -> float:
    """The processor time that a layer takes: the least of three, since what else the machine does only adds to it. A
    member of no weight makes each of them another layer."""
    raw = tarball(members)

    def once(number: int) -> float:
        layer = blob(directory, file(f"turn{number}")[0].tobuf() + raw, PLAIN, parent)
        start = time.process_time()
        overlay.unpack_layer(*layer.arguments())
        return time.process_time() - start

    return min(once(number) for number in range(3))


def test_s36_opaque_whiteouts_take_linear_time(overlay: Overlay, tmp_path: Path) -> None:
    base = blob(tmp_path, [file("base")])
    overlay.unpack_layer(*base.arguments())
    files = [file(f"d/f{number}") for number in range(4000)]
    nested = [directory(f"n{number % 50}/s{number}") for number in range(1000)]
    others = [file(f"o{number}") for number in range(5000)]
    marks = [*(opaque("d") for _ in range(4000)), *(opaque(f"n{number % 50}/s{number}") for number in range(1000))]
    plain = _seconds(overlay, tmp_path, [*files, *nested, *others], base)
    marked = _seconds(overlay, tmp_path, [*files, *nested, *marks], base)
    # A look at the directory for each mark would be eight seconds and more.
    assert marked < 5 * plain


def test_s36_replacing_directories_takes_linear_time(overlay: Overlay, tmp_path: Path) -> None:
    def turns(count: int) -> list[Member]:
        return [
            member for number in range(count) for member in (directory("d"), file(f"d/{number}"), symlink("d", "e"))
        ]

    short, long = turns(250), turns(2000)
    few = _seconds(overlay, tmp_path, short)
    many = _seconds(overlay, tmp_path, long)
    # Eight times as long; sixty-four times would be quadratic.
    assert many < 25 * few


# -------------------------------------------------------------------------------------------------- bombs and broken


def _raw_blob(path: Path, content: bytes, raw: bytes, media_type: str) -> Blob:
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    target = path / f"raw-{hashlib.sha256(content).hexdigest()[:16]}"
    target.write_bytes(content)
    return Blob(target, media_type, digest, digest)


def _zeros(total: int, media_type: str) -> bytes:
    head = tarball([file("zeros", b"")])[:512]
    info = tarfile.TarInfo("zeros")
    info.size = total
    head = info.tobuf(tarfile.GNU_FORMAT)
    piece = bytes(1 << 20)
    if media_type == ZSTD:
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        return packer.compress(head) + b"".join(packer.compress(piece) for _ in range(total >> 20)) + packer.flush()
    once = gzip.compress(piece * 16, 9)
    return gzip.compress(head) + once * (total >> 24)


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
def test_s37_a_blob_that_inflates_for_ever_is_stopped(tmp_path: Path, media_type: str) -> None:
    overlay = open_overlay(tmp_path, workers=1, limits=Limits(inflate_floor=64 << 20))
    try:
        content = _zeros(512 << 20, media_type)  # twice what the ratio lets pass
        bomb = _raw_blob(tmp_path, content, b"?", media_type)
        with pytest.raises(UnpackError, match="inflate_ratio"):
            overlay.unpack_layer(*bomb.arguments())
        assert [os.listdir(tmp_path / "root" / kind) for kind in ("layers", "trash")] == [[], []]
    finally:
        overlay.close()


def test_s37_the_size_limit_counts_the_tar(tmp_path: Path) -> None:
    overlay = open_overlay(tmp_path, workers=0, limits=Limits(layer_bytes=1 << 20))
    try:
        with pytest.raises(UnpackError, match="layer_bytes"):
            overlay.unpack_layer(*blob(tmp_path, [file("f", os.urandom(2 << 20))]).arguments())
    finally:
        overlay.close()


def test_s37_a_huge_zstd_window_is_refused(overlay: Overlay, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    raw = tarball([file("f", b"x" * 1000)])
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = packer.compress(raw) + packer.flush()
    with pytest.raises(UnpackError, match="zstd_window"):
        overlay.unpack_layer(*_raw_blob(tmp_path, content, raw, ZSTD).arguments())


@pytest.mark.parametrize(
    ("limits", "members", "named"),
    [
        (Limits(directories=10), [directory(f"d{n}") for n in range(11)], "directories"),
        (Limits(directory_bytes=1000), [directory(f"{n:0100}") for n in range(11)], "directory_bytes"),
        (Limits(pending_bytes=1000), [file(f"{n:0100}/f") for n in range(11)], "pending_bytes"),
        (Limits(depth=5), [file("a/b/c/d/e/f/g")], "depth"),
        (Limits(entries=5), [file(f"f{n}") for n in range(6)], "entries"),
    ],
)
def test_s37_limits_of_a_layer_are_named(tmp_path: Path, limits: Limits, members: list[Member], named: str) -> None:
    overlay = open_overlay(tmp_path, workers=0, limits=limits)
    try:
        with pytest.raises(UnpackError, match=f"limit {named}"):
            overlay.unpack_layer(*blob(tmp_path, members).arguments())
    finally:
        overlay.close()


def _broken() -> dict[str, tuple[bytes, str, str]]:
    raw = tarball([file("f", os.urandom(300_000)), directory("d")])
    packed, z = gzip.compress(raw), zstandard.compress(raw)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0x55
    return {
        "empty gzip": (b"", GZIP, "content is tar"),
        "truncated gzip": (packed[:-100], GZIP, "truncated"),
        "gzip without trailer": (packed[:-8], GZIP, "truncated"),
        "flipped gzip": (bytes(flipped), GZIP, "gzip|diff id|tar"),
        "wrong crc": (packed[:-8] + bytes(4) + packed[-4:], GZIP, "gzip"),
        "garbage after gzip": (packed + b"garbage", GZIP, "garbage"),
        "truncated zstd": (z[: len(z) // 2], ZSTD, "zstd|tar ends|diff id"),
        "garbage zstd": (z[:100] + b"x" * 1000, ZSTD, "zstd|tar"),
        "xz": (b"\xfd7zXZ\x00" + bytes(100), GZIP, "xz"),
        "bzip2": (b"BZh9" + bytes(100), GZIP, "bzip2"),
        "gzip called tar": (packed, PLAIN, "content is gzip"),
        "zstd called gzip": (z, GZIP, "content is zstd"),
        "noise called tar": (os.urandom(5000), PLAIN, "tar"),
        "unknown type": (packed, "application/x-nothing", "media type"),
        "truncated tar": (raw[:100_000], PLAIN, "tar ends"),
    }


@pytest.mark.parametrize("name", list(_broken()))
def test_s41_a_broken_blob_fails_and_the_next_one_works(tmp_path: Path, name: str) -> None:
    content, media_type, says = _broken()[name]
    overlay = open_overlay(tmp_path, workers=1)
    threads = threading.active_count()
    try:
        with soon():
            with pytest.raises(UnpackError, match=says):
                overlay.unpack_layer(*_raw_blob(tmp_path, content, content, media_type).arguments())
            overlay.unpack_layer(*blob(tmp_path, [file("fine", b"1")]).arguments())
        assert threading.active_count() <= threads + 1  # the one that ends idle workers
        assert len(os.listdir(tmp_path / "root/layers")) == 1
    finally:
        overlay.close()


def test_members_of_gzip_follow_one_another_and_zeros_may_end_it(overlay: Overlay, tmp_path: Path) -> None:
    raw = tarball([file("f", os.urandom(100_000))])
    content = b"".join(gzip.compress(raw[at : at + 7000]) for at in range(0, len(raw), 7000)) + bytes(1000)
    layer = _raw_blob(tmp_path, content, raw, GZIP)
    overlay.unpack_layer(*layer.arguments())
    assert overlay.has_layer(layer.chain_id)


def test_zstd_frames_follow_one_another_and_skippable_ones_are_skipped(overlay: Overlay, tmp_path: Path) -> None:
    raw = tarball([file("f", os.urandom(100_000))])
    skip = bytes([0x50, 0x2A, 0x4D, 0x18]) + (8).to_bytes(4, "little") + bytes(8)
    content = skip + b"".join(zstandard.compress(raw[at : at + 7000]) for at in range(0, len(raw), 7000)) + skip
    layer = _raw_blob(tmp_path, content, raw, ZSTD)
    overlay.unpack_layer(*layer.arguments())
    assert overlay.has_layer(layer.chain_id)


def test_p13_a_worker_s_memory_does_not_grow_with_the_layer(tmp_path: Path) -> None:
    overlay = open_overlay(tmp_path, workers=1)
    try:
        overlay.unpack_layer(*blob(tmp_path, [file("small", b"1")]).arguments())
        (pid,) = overlay._layers.pool.processes()
        overlay.unpack_layer(
            *blob(tmp_path, [file("big", bytes(128 << 20)), file("b2", os.urandom(1 << 20))]).arguments()
        )
        assert overlay._layers.pool.processes() == [pid]
        peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        assert int(peak.split()[1]) < 96 << 10, peak
    finally:
        overlay.close()


def test_s37_unpacking_fits_into_512_mib_of_address_space(tmp_path: Path) -> None:
    overlay = open_overlay(tmp_path, workers=1)
    try:
        overlay.unpack_layer(*blob(tmp_path, [file("small", b"1")]).arguments())
        (pid,) = overlay._layers.pool.processes()
        resource.prlimit(pid, resource.RLIMIT_AS, (512 << 20, 512 << 20))
        many = [
            file(f"d{number % 300}/f{number}", b"x" * 3000, pax_headers=xattrs(user__a=b"1")) for number in range(5000)
        ]
        overlay.unpack_layer(*blob(tmp_path, [*many, file("big", os.urandom(30 << 20))], ZSTD).arguments())
        assert overlay._layers.pool.processes() == [pid]
    finally:
        overlay.close()
