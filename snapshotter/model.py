"""The snapshotter's values and failures. No I/O here.

Invariant: a layer or an active snapshot is there in full or not at all, to every reader, also after a crash.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Allocated bytes (st_blocks * 512) and inodes of one snapshot's own files."""

    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """An active snapshot: its key, the chain id it stands on (None: empty) and when it was made (ns since the epoch)."""

    key: str
    parent: str | None
    created_ns: int


class SnapshotError(Exception):
    """Any failure of the snapshotter. `str()` is one sentence with the cause."""


class AlreadyExists(SnapshotError):
    """The key is taken."""


class NotFound(SnapshotError):
    """No such layer or snapshot."""


class UnpackError(SnapshotError):
    """The layer is not one that may be unpacked: names the entry, what is wrong with it and the limit, if any."""
