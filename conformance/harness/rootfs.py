"""A root filesystem of busybox: what every container of the suite runs in.

Its binary is a hard link to one copy per worker, so that a hundred bundles cost nothing; a case that lets a container
write to its own programs says `own_binary`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
DIRECTORIES = ("bin", "dev", "etc", "proc", "sys", "tmp")
PASSWD = "root:x:0:0::/:/bin/sh\n1000:x:0:0::/:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"
GROUP = "root:x:0:\nuser:x:1000:\n"


def make_rootfs(directory: Path, shared: Path, *, own_binary: bool = False) -> Path:
    """Makes it at `directory`; `shared` is where the copy of busybox lies."""
    for name in DIRECTORIES:
        (directory / name).mkdir(parents=True)
    if own_binary:
        shutil.copy2(BUSYBOX, directory / "bin/busybox")
    else:
        os.link(_busybox(shared), directory / "bin/busybox")
    for applet in _applets():
        os.symlink("busybox", directory / "bin" / applet)
    (directory / "etc/passwd").write_text(PASSWD)
    (directory / "etc/group").write_text(GROUP)
    return directory


@functools.cache
def _busybox(shared: Path) -> Path:
    copy = shared / "busybox"
    shutil.copy2(BUSYBOX, copy)
    return copy


@functools.cache
def _applets() -> tuple[str, ...]:
    said = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout
    return tuple(name for name in said.split() if name != "busybox")
