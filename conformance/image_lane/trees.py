"""An unpacked tree as a listing that can be compared: a line for each name.

    python -m conformance.image_lane.trees DIRECTORY...     one directory, or overlay layers with the topmost first

Several directories are mounted as one overlay, read-only, in a mount namespace that ends with the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Listing = dict[str, list[Any]]
# Where the time of the last change stands in an entry.
MTIME = 4


def listing(root: Path) -> Listing:
    """Name -> kind, mode, owner, mtime, content or link or device, xattrs, and the first of its hard links."""
    found: Listing = {}
    links: dict[tuple[int, int], list[str]] = {}
    pending = [root]
    while pending:
        for entry in os.scandir(pending.pop()):
            path = Path(entry.path)
            name = str(path.relative_to(root))
            status = entry.stat(follow_symlinks=False)
            found[name] = _looks(path, status)
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
                found[name].append("")
            else:
                links.setdefault((status.st_dev, status.st_ino), []).append(name)
    for names in links.values():
        for name in names:
            # Counted, and not by st_nlink: overlayfs counts names that an upper layer has covered.
            found[name].append(min(names) if len(names) > 1 else "")
    return found


def _looks(path: Path, status: os.stat_result) -> list[Any]:
    kind = stat.S_IFMT(status.st_mode)
    content: str | int = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        content = os.readlink(path)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        content = status.st_rdev
    names = sorted(os.listxattr(path, follow_symlinks=False))
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}
    # overlayfs's own marks are on its layers, and seen through a mount by nobody but it.
    xattrs = {name: value for name, value in xattrs.items() if not name.startswith("trusted.overlay.")}
    mode = oct(stat.S_IMODE(status.st_mode))
    return [kind, mode, status.st_uid, status.st_gid, int(status.st_mtime), content, xattrs]


def merged(layers: Sequence[Path]) -> Listing:
    """The listing of `layers`, topmost first, as one tree."""
    command = ["unshare", "-m", sys.executable, "-m", "conformance.image_lane.trees", *map(str, layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: Listing = json.loads(done.stdout)
    return found


def main(layers: Sequence[str]) -> None:
    if len(layers) == 1:
        json.dump(listing(Path(layers[0])), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as target:
        options = f"ro,lowerdir={':'.join(layers)}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, target], check=True)
        try:
            json.dump(listing(Path(target)), sys.stdout)
        finally:
            subprocess.run(["umount", target], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
