"""`recheck`: what was changed on disk below a container is found, whatever it is; nothing else is complained of."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.model import Config, UnpackError
from snapshotter.overlay import Overlay
from snapshotter.recheck import Checked, directories, recheck
from tests.support import needs

TAR = "application/vnd.oci.image.layer.v1.tar"


def tar(*entries: tuple[str, dict[str, object], bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as made:
        for name, fields, content in entries:
            info = tarfile.TarInfo(name)
            info.mtime, info.size = 1_600_000_000, len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            made.addfile(info, io.BytesIO(content))
    return out.getvalue()


DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}
LOWER = tar(
    ("etc/", DIRECTORY, b""),
    ("etc/passwd", {"mode": 0o644}, b"root:x:0:0::/:/bin/sh\n"),
    ("etc/link", {"type": tarfile.SYMTYPE, "linkname": "passwd"}, b""),
    ("bin/tool", {"mode": 0o4755, "uid": 7, "pax_headers": {"SCHILY.xattr.user.note": "x"}}, b"\x7fELF" * 1000),
    ("bin/same", {"type": tarfile.LNKTYPE, "linkname": "bin/tool"}, b""),
    ("dev/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3, "mode": 0o666}, b""),
    ("a/" * 300 + "deep", {}, b"far down"),
)
UPPER = tar(("etc/.wh.passwd", {}, b""), ("implied/new", {}, b"new"), ("etc/shadow", {"mode": 0o600}, b"secret"))


class Image:
    """Two layers, unpacked as a daemon does."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "snapshots"
        self.database = directory / "ocid.db"
        self.scratch = directory / "verify"
        self.layers: list[Checked] = []
        db = sqlite3.connect(self.database, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        self.overlay = Overlay(self.root, db, Config(workers=0))
        parent = None
        for number, data in enumerate((LOWER, UPPER)):
            blob = directory / f"blob{number}"
            blob.write_bytes(data)
            diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
            chain = (
                diff_id if parent is None else f"sha256:{hashlib.sha256(f'{parent} {diff_id}'.encode()).hexdigest()}"
            )
            self.overlay.unpack_layer(blob, TAR, diff_id, chain, parent)
            self.layers.append(Checked(blob, TAR, diff_id, chain))
            parent = chain
        self.places = directories(self.database, self.root)
        self.lower, self.upper = (self.places[layer.chain_id] for layer in self.layers)

    def check(self) -> list[str]:
        found = [what for _, what in recheck(self.scratch, self.layers, self.places)]
        assert not self.scratch.exists()
        return found


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    needs("root")
    found = Image(tmp_path)
    yield found
    found.overlay.close()


def test_nothing_was_touched(image: Image) -> None:
    assert image.check() == []


def keep_times(path: Path, change: Callable[[Path], object]) -> None:
    """As somebody would who does not want to be seen: the times of file and directory are put back."""
    times = [(item, os.lstat(item).st_mtime_ns) for item in (path, path.parent)]
    change(path)
    for item, at in times:
        if os.path.lexists(item):
            os.utime(item, ns=(at, at), follow_symlinks=False)


def other_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replaced(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("layer", "name", "change", "said"),
    [
        ("lower", "etc/passwd", other_byte, "etc/passwd: has other content"),
        ("lower", "etc/passwd", lambda path: path.write_bytes(b""), "etc/passwd: has 0 bytes, not 22"),
        ("lower", "etc/passwd", lambda path: path.chmod(0o666), "etc/passwd: has mode 0666, not 0644"),
        ("lower", "bin/tool", lambda path: os.chown(path, 0, 0), "bin/tool: belongs to 0:0, not 7:0"),
        ("lower", "bin/tool", lambda path: os.setxattr(path, "user.note", b"y"), "other extended attributes"),
        ("lower", "bin/same", lambda path: path.unlink(), "bin/same: is missing"),
        ("lower", "etc/link", replaced, "etc/link: leads elsewhere"),
        ("lower", "etc/passwd", replaced, "etc/passwd: is of another type"),
        ("lower", "bin/more", lambda path: path.touch(), "bin/more: is not in the layer"),
        ("lower", "a/" * 300 + "deep", other_byte, "deep: has other content"),
        ("upper", "etc/passwd", lambda path: path.unlink(), "etc/passwd: is missing"),
        ("upper", "implied/new", other_byte, "implied/new: has other content"),
    ],
)
def test_what_was_changed_is_found(
    image: Image, layer: str, name: str, change: Callable[[Path], object], said: str
) -> None:
    path = (image.lower if layer == "lower" else image.upper) / name
    if name == "bin/more":
        change(path)
    else:
        keep_times(path, change)
    found = image.check()
    assert any(said in line for line in found), found
    number = 0 if layer == "lower" else 1
    assert all(line.startswith(f"layer {image.layers[number].diff_id}: ") for line in found)


def test_a_changed_time_alone_is_found(image: Image) -> None:
    os.utime(image.lower / "etc/passwd", (0, 0))
    assert [line for line in image.check() if "etc/passwd: has another time" in line]


def test_another_device_is_found(image: Image) -> None:
    def exchange(path: Path) -> None:
        path.unlink()
        os.mknod(path, 0o020666, os.makedev(1, 5))
        path.chmod(0o666)

    keep_times(image.lower / "dev/null", exchange)
    assert [line for line in image.check() if "dev/null: is another device" in line]


def test_a_layer_that_is_gone_is_said(image: Image) -> None:
    del image.places[image.layers[1].chain_id]
    assert image.check() == [f"layer {image.layers[1].diff_id}: is not unpacked"]


def test_a_blob_that_is_not_its_diff_id_is_refused(image: Image) -> None:
    image.layers[0].blob.write_bytes(UPPER)
    with pytest.raises(UnpackError, match="diff id"):
        image.check()
    assert not image.scratch.exists()
