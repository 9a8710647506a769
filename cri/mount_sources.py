"""Directories of this machine that a container's mounts name and that are not there yet (docs/decisions/0014).

Refuses to touch what is there, whatever it is: a link that leads nowhere stays one. Invariant: a directory that is made
is root's, 0755, and belongs to the machine: no container's end takes it away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument


def make_missing(mounts: Sequence[pb.Mount]) -> None:
    """Makes them; blocks. Raises InvalidArgument by the field of the mount."""
    for index, mount in enumerate(mounts):
        path = mount.host_path
        # Whatever is no source for a bind mount is refused by its name later (cri/spec/mounts).
        if mount.HasField("image") or not path.startswith("/") or "\0" in path or os.path.lexists(path):
            continue
        try:
            os.makedirs(path, 0o755, exist_ok=True)
        except OSError as error:
            words = f"mounts[{index}].host_path: {path[:200]} is not there and cannot be made"
            raise InvalidArgument(f"{words}: {(error.strerror or '').lower()}") from error
