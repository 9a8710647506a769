"""An image made of the virtual machine's own busybox: no packages can be had in there."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.registry import BuiltImage, build_image
from tests.fakes.snapshots import directory, file, symlink, tarball

_APPLETS = ("sh", "sleep", "cat", "echo", "id", "true")


def busybox() -> BuiltImage:
    """sh and a few more in /bin; /etc, /tmp and /data are empty."""
    binary = Path("/bin/busybox").read_bytes()
    members = [directory(name) for name in ("bin", "etc", "tmp", "data")]
    members.append(file("bin/busybox", binary, 0o755))
    members += [symlink(f"bin/{name}", "busybox") for name in _APPLETS]
    return build_image(layers=[tarball(members)])
