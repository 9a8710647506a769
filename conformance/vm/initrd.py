"""An initrd of busybox, a script and a handful of kernel modules: enough to find the root disk, and quick to unpack.

Refuses modules that the kernel does not have; one that is built in needs no file. Debian's own initramfs-tools would
take longer to make and ten times longer to unpack under emulation.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "ext4")


def write_initrd(target: Path, root: Path, version: str, script: Path) -> None:
    """`target`, from the kernel modules and busybox in `root`; `script` becomes its /init."""
    staging = target.with_name("initrd.d")
    for name in ("bin", "dev", "proc", "sys", "root", "modules"):
        (staging / name).mkdir(parents=True)
    shutil.copy2(root / "bin/busybox", staging / "bin/busybox")
    (staging / "bin/sh").symlink_to("busybox")
    shutil.copy(script, staging / "init")
    (staging / "init").chmod(0o755)
    for number, file in enumerate(_in_order(root, version)):
        # The number keeps the order in which they must be loaded.
        shutil.copy(file, staging / "modules" / f"{number:02}-{file.name}")
    names = subprocess.run(["find", "."], cwd=staging, capture_output=True, check=True).stdout
    with target.open("wb") as output:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=staging, input=names, stdout=output, check=True)
    shutil.rmtree(staging)


def _in_order(root: Path, version: str) -> list[Path]:
    """The files of MODULES with what they depend on, first things first."""
    found: dict[Path, None] = {}
    for module in MODULES:
        shown = subprocess.run(
            ["modprobe", "--dirname", str(root / "usr"), "--set-version", version, "--show-depends", module],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in shown.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "insmod":
                found[Path(rest.split()[0])] = None
    return list(found)
