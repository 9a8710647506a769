"""A writable layer packed and unpacked again is the same layer, whatever was done to it and however it is named."""

from __future__ import annotations

import gc
import os
import sqlite3
import stat
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from snapshotter.model import Config
from snapshotter.overlay import Overlay
from snapshotter.pack import pack
from tests.support import needs

TAR = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    needs("root", "overlay")
    database = sqlite3.connect(tmp_path / "db", check_same_thread=False, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    made = Overlay(tmp_path / "root", database, Config(workers=1, parent_wait_s=20))
    yield made
    made.close()
    database.close()


def _look(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything below `top`: kind and mode, owner, size or link or device, time, attributes, other names."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            path = Path(directory, name)
            status = path.lstat()
            inside = str(path.relative_to(top))
            more: object = status.st_size if stat.S_ISREG(status.st_mode) else status.st_rdev
            if path.is_symlink():
                more = os.readlink(path)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in _attributes(path)}
            same = first.setdefault(status.st_ino, inside) if status.st_nlink > 1 and not path.is_dir() else inside
            found[inside] = (status.st_mode, status.st_uid, status.st_gid, more, status.st_mtime_ns, xattrs, same)
    return found


def _attributes(path: Path) -> list[str]:
    return [key for key in os.listxattr(path, follow_symlinks=False) if key != "trusted.overlay.origin"]


def _fill(upper: Path) -> None:
    (upper / "plain").write_bytes(b"content" * 1000)
    os.utime(upper / "plain", ns=(1, 1_600_000_000_123_456_789))
    os.chmod(upper / "plain", 0o4711)
    os.chown(upper / "plain", 3_000_000, 70_000)
    os.chmod(upper / "plain", 0o4711)
    os.link(upper / "plain", upper / "zlinked")
    (upper / "deep" / ("d" * 120) / "e").mkdir(parents=True)
    (upper / "deep" / ("d" * 120) / "e" / "ünïcode\n").write_text("x")
    (upper / "a").symlink_to("../" * 60 + "etc/passwd")
    (upper / "sparse").touch()
    os.truncate(upper / "sparse", 3 << 20)
    os.mkfifo(upper / "fifo", 0o622)
    os.mknod(upper / "node", 0o660 | stat.S_IFBLK, os.makedev(7, 300))
    os.setxattr(upper / "plain", "user.one", b"\x00value=\n")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    (upper / "opaque").mkdir()
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    (upper / "opaque" / "new").write_text("new")


def _layer(overlay: Overlay, tar: Path, parent: str | None) -> str:
    diff = "sha256:" + sha256(tar.read_bytes()).hexdigest()
    chain = diff if parent is None else "sha256:" + sha256(f"{parent} {diff}".encode()).hexdigest()
    overlay.unpack_layer(tar, TAR, diff, chain, parent)
    return chain


def test_what_is_packed_unpacks_to_the_same(overlay: Overlay, tmp_path: Path) -> None:
    below = tmp_path / "below"
    (below / "opaque").mkdir(parents=True)
    for name in ("gone", "opaque/old"):
        (below / name).write_text("of the image")
    base = tmp_path / "base.tar"
    with tarfile.open(base, "w") as archive:
        archive.add(below, ".")
    parent = _layer(overlay, base, None)
    overlay.prepare("c", parent)
    upper = next((tmp_path / "root").glob("**/upper"))
    _fill(upper)
    packed = tmp_path / "packed.tar"
    with packed.open("wb") as file:
        overlay.pack("c", file.fileno())
    chain = _layer(overlay, packed, parent)
    unpacked = overlay.lower_directories(chain)[0]
    before, after = _look(upper), _look(Path(unpacked))
    for looks in (before, after):
        for name in ("gone",):  # a whiteout has no looks of its own
            looks[name] = (stat.S_IFMT(int(str(looks[name][0]))), looks[name][3])
    assert after == before


def test_others_read_it_and_names_of_whiteouts_are_no_whiteouts(tmp_path: Path) -> None:
    needs("root")
    upper = tmp_path / "upper"
    upper.mkdir()
    (upper / ".wh.victim").write_text("a container may name its files as it likes")
    (upper / "kept").write_text("x")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    os.mkdir(upper / "sub")
    os.mknod(upper / "sub/gone", stat.S_IFCHR, 0)
    with (tmp_path / "t.tar").open("w+b") as file:
        fd = os.open(upper, os.O_RDONLY | os.O_DIRECTORY)
        pack(fd, file.fileno())
        os.close(fd)
        with tarfile.open(tmp_path / "t.tar") as archive:
            assert archive.getnames() == [".wh.gone", "kept", "sub", "sub/.wh.gone"]


def test_r05_a_tree_without_end_is_an_error_and_no_crash(tmp_path: Path) -> None:
    top = tmp_path / "upper"
    top.mkdir()
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(400):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        gc.collect()  # what other tests have left is not closed meanwhile
        before = len(os.listdir("/proc/self/fd"))
        with (tmp_path / "t.tar").open("wb") as file, pytest.raises(OSError, match="more than 256 directories deep"):
            pack(fd, file.fileno())
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)
