"""The snapshotter's values and failures. No I/O here.

Invariant: a layer or an active snapshot is there in full or not at all, to every reader, also after a crash.
"""

from __future__ import annotations

from runtime.linux.record import Record

TYPE_CHECKING = False  # a worker that unpacks one layer would be importing typing for a tenth of its time
if TYPE_CHECKING:
    from typing import Protocol, TypeAlias
else:
    Protocol = object

LayerKey: TypeAlias = tuple[bytes, bytes, bytes]
"""What opens an encrypted layer: the AES-256 key, the nonce, and the HMAC that the encrypted bytes have."""


class Usage(Record):
    """Allocated bytes (st_blocks * 512) and inodes of one snapshot's own files."""

    bytes: int
    inodes: int


class SnapshotInfo(Record):
    """An active snapshot: its key, the chain id it stands on (None: empty), when it was made (ns since the epoch)."""

    key: str
    parent: str | None
    created_ns: int


class Arriving(Protocol):
    """A layer's blob while it is being written; snapshotter.arriving has the reader's side."""

    size: int
    """As announced."""

    def open(self) -> tuple[int, int]:
        """The file, and the eventfd(2) that counts the bytes of it which are there; both become the caller's."""

    def verified(self, seconds: float) -> bool:
        """Waits at most so long; True once all of it is there with the announced digest. Raises, what its owner likes,
        when that will not be."""


class IdMap(Record):
    """The ids of a user namespace on the host: lines of (inside, outside, count), as uid_map and gid_map have."""

    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner on the host of what belongs to `uid` and `gid` inside; who is not mapped becomes the first one."""
        return _outside(self.uids, uid), _outside(self.gids, gid)


def _outside(lines: tuple[tuple[int, int, int], ...], number: int) -> int:
    for inside, outside, count in lines:
        if inside <= number < inside + count:
            return outside + number - inside
    return lines[0][1]


class SnapshotError(Exception):
    """Any failure of the snapshotter. `str()` is one sentence with the cause."""


class AlreadyExists(SnapshotError):
    """The key is taken."""


class NotFound(SnapshotError):
    """No such layer or snapshot."""


class UnpackError(SnapshotError):
    """The layer is not one that may be unpacked: names the entry, what is wrong with it and the limit, if any."""


class Limits(Record):
    """What one layer may ask for (threats S37, R5). Each bound is named in the error that it causes.

    `layer_bytes` bounds the tar; `inflate_ratio` bounds it too, as a multiple of the blob, once it is larger than
    `inflate_floor`. `pending_bytes` bounds the paths that wait for the parent (implied directories, hard links into
    lower layers), `directory_bytes` the paths of the directories whose metadata is set last.
    """

    layer_bytes: int = 256 << 30
    inflate_ratio: int = 250
    inflate_floor: int = 1 << 30
    entries: int = 5_000_000
    path_bytes: int = 4095
    depth: int = 512
    pax_bytes: int = 1 << 20
    xattrs: int = 256
    sparse_regions: int = 100_000
    file_bytes: int = 8 << 40
    directories: int = 1_000_000
    directory_bytes: int = 64 << 20
    pending_bytes: int = 8 << 20
    zstd_window: int = 128 << 20


class Config(Record):
    """How the snapshotter works. `workers` 0 unpacks in the calling thread (tests); `arriving` more are for blobs that
    are still being written.

    `volatile` mounts a container's writable layer without syncing it on unmount or fsync (threats O40).
    `parent_wait_s` is how long a layer that is ready waits for a parent nobody is unpacking.
    """

    workers: int = 2
    arriving: int = 2
    worker_idle_s: float = 10.0
    parent_wait_s: float = 1800.0
    volatile: bool = True
    limits: Limits = Limits()
