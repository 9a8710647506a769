"""fs-verity on blobs: sealed when they come, and what the disk gives otherwise is told by the kernel at the next read.

The filesystems are files of this machine: what is changed below a filesystem is changed there, while it is unmounted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cri.cli.main import ocid
from imagestore.content import Blobs
from tests.fakes.registry import FakeRegistry, build_image

IMAGE = build_image([{"etc/one": b"bytes that nobody is to change, " * 4096}, {"etc/two": b"two"}], compression="")
BLOBS = (IMAGE.digest, *IMAGE.layer_digests)


@dataclass
class Disk:
    """A filesystem in a file, and a root of ocid's on it."""

    image: Path
    mountpoint: Path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.mountpoint)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.mountpoint)], check=True)

    def ocid(self, *words: str, code: int = 0) -> str:
        out = io.StringIO()
        where = ["--root", str(self.mountpoint / "root"), "--state", str(self.mountpoint / "state")]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = ocid([*where, *words])
        assert status == code, out.getvalue()
        return out.getvalue()

    @property
    def blobs(self) -> Blobs:
        return Blobs(self.mountpoint / "root/images")

    def damage(self, blob: Path) -> None:
        """Turns over one bit of a plain layer's first tar header, which is nowhere else on the disk."""
        header = blob.read_bytes()[:512]
        self.unmount()
        data = self.image.read_bytes()
        (place,) = [at for at in range(0, len(data), 512) if data.startswith(header, at)]
        with self.image.open("r+b") as file:
            file.seek(place)
            file.write(bytes([header[0] ^ 1]))
        self.mount()


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """Of ext4, with the options of the test's parameter."""
    made = Disk(tmp_path / "disk", tmp_path / "mounted")
    made.mountpoint.mkdir()
    with made.image.open("wb") as file:
        file.truncate(192 << 20)
    # Small filesystems get small blocks, and Linux before 6.3 has fs-verity with blocks of a page's size alone.
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", *request.param, str(made.image)], check=True)
    made.mount()
    yield made
    with contextlib.suppress(subprocess.CalledProcessError):
        made.unmount()


@pytest.mark.parametrize("disk", [["-O", "verity"]], indirect=True)
def test_blobs_are_sealed(disk: Disk, registry: FakeRegistry) -> None:
    name = registry.add("app", "1", IMAGE)
    disk.ocid("pull", name)
    assert [disk.blobs.is_sealed(digest) for digest in (*BLOBS, IMAGE.config_digest)] == [True] * 4
    with pytest.raises(PermissionError):
        os.open(disk.blobs.path(BLOBS[1]), os.O_WRONLY)
    assert "fs-verity: 3 of 3 blobs sealed\n" in disk.ocid("verify", "--deep", name)
    # They go like others, and come again.
    disk.ocid("rmi", name)
    disk.ocid("gc")
    assert not disk.blobs.path(BLOBS[1]).exists()
    disk.ocid("pull", name)
    assert disk.blobs.is_sealed(BLOBS[1])


@pytest.mark.parametrize("disk", [["-O", "verity"]], indirect=True)
def test_what_the_disk_gives_otherwise_is_not_read(disk: Disk, registry: FakeRegistry) -> None:
    name = registry.add("app", "1", IMAGE)
    disk.ocid("pull", name)
    path = disk.blobs.path(IMAGE.layer_digests[0])
    disk.damage(path)
    with pytest.raises(OSError) as error:
        path.read_bytes()
    assert error.value.errno == errno.EIO
    assert f"blob {IMAGE.layer_digests[0]}: EIO" in disk.ocid("verify", "--deep", name, code=1)
    assert "EIO" in disk.ocid("doctor", code=1)
    disk.ocid("doctor", "--repair")
    assert path.read_bytes() == IMAGE.blobs[IMAGE.layer_digests[0]]
    assert disk.blobs.is_sealed(IMAGE.layer_digests[0])


@pytest.mark.parametrize("disk", [["-O", "^verity"]], indirect=True)
def test_a_filesystem_without_it(disk: Disk, registry: FakeRegistry) -> None:
    """Where the same damage is bytes like others, until somebody hashes them."""
    name = registry.add("app", "1", IMAGE)
    disk.ocid("pull", name)
    assert disk.blobs.is_sealed(BLOBS[1]) is None
    assert "fs-verity: not on this filesystem\n" in disk.ocid("verify", "--deep", name)
    path = disk.blobs.path(IMAGE.layer_digests[0])
    before = path.read_bytes()
    disk.damage(path)
    assert path.read_bytes() != before
    assert f"blob {IMAGE.layer_digests[0]}: its content is" in disk.ocid("verify", "--deep", name, code=1)


@pytest.mark.parametrize("disk", [["-O", "verity"]], indirect=True)
def test_it_can_be_turned_off(disk: Disk, registry: FakeRegistry, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[image]\nfs_verity = false\n")
    name = registry.add("app", "1", IMAGE)
    disk.ocid("--config", str(config), "pull", name)
    assert disk.blobs.is_sealed(BLOBS[1]) is False
    assert "fs-verity: 0 of 3 blobs sealed\n" in disk.ocid("verify", "--deep", name)
