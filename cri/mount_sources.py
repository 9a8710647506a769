"""Directories of this machine that a container's mounts name and that are not there yet (docs/decisions/0014).

Refuses to touch what is there, whatever it is: a link that leads nowhere stays one. Invariant: a directory that is made
is root's, 0755, and belongs to the machine: no container's end takes it away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument

_PATH_MAX = 4096  # linux/limits.h, with the byte that ends it


def make_missing(mounts: Sequence[pb.Mount]) -> None:
    """Makes them; blocks. Raises InvalidArgument by the field of the mount."""
    for index, mount in enumerate(mounts):
        path = mount.host_path
        # Whatever is no source for a bind mount is refused by its name later (cri/spec/mounts).
        if mount.HasField("image") or not path.startswith("/") or "\0" in path or os.path.lexists(path):
            continue
        words = f"mounts[{index}].host_path: {path[:200]} is not there and cannot be made"
        if len(os.fsencode(path)) >= _PATH_MAX:
            raise InvalidArgument(f"{words}: {os.strerror(errno.ENAMETOOLONG).lower()}")
        try:
            _make(path)
        except OSError as error:
            raise InvalidArgument(f"{words}: {(error.strerror or '').lower()}") from error


def _make(path: str) -> None:
    """As os.makedirs, which calls itself for each directory: a path has room for more than Python lets it."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:  # another call was faster
            pass
