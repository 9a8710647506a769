"""The cgroup directories above containers: which of them were missing before a pod, to be removed after it.

Refuses to remove what was there before or is not empty. Invariant: paths were checked by `run_pod.cgroup_parent` and
hold no "." or "..".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection

from runtime.cgroups.hierarchy import detect


def hierarchies() -> tuple[str, ...]:
    """Where cgroup hierarchies are mounted."""
    return tuple(hierarchy.mount for hierarchy in detect())


def first_missing(parent: str) -> str:
    """The topmost part of `parent` that exists in no hierarchy, "" when all of it exists somewhere."""
    path = ""
    for part in parent.strip("/").split("/"):
        path += f"/{part}"
        if not any(os.path.isdir(f"{root}{path}") for root in hierarchies()):
            return path
    return ""


def remove_made(parent: str, made: str, others: Collection[str]) -> None:
    """Removes `parent` and what is above it up to `made`, as far as it is empty and no parent in `others` is at or
    below it: somebody may be about to make a cgroup there. rmdir(2) of a cgroup refuses while it has processes or
    children, so this can take away nothing that is in use."""
    while made and is_within(parent, made) and not any(is_within(other, parent) for other in others):
        for root in hierarchies():
            try:
                os.rmdir(f"{root}{parent}")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY, errno.EROFS):
                    raise
        parent = parent.rpartition("/")[0]


def is_within(path: str, above: str) -> bool:
    """True when `path` is `above` or below it."""
    return path == above or path.startswith(f"{above}/")
