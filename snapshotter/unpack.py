"""One layer from blob to directory: a thread inflates and hashes, the caller's walks headers and makes files.

Both spend nearly all of their time outside the interpreter lock, so one layer keeps two cores busy. It refuses a tar
whose digest is not the announced diff id. Invariant: at most QUEUED + 2 chunks of inflate.CHUNK are held; after a
failure both threads have ended and the directory is garbage for the caller.
"""

from __future__ import annotations

from _queue import SimpleQueue

from runtime.linux.record import Record
from runtime.linux.writeback import syncfs
from snapshotter import directory, inflate, single
from snapshotter.arriving import Reader
from snapshotter.extract import Extracted, Extractor
from snapshotter.model import LayerKey, Limits, UnpackError
from snapshotter.tar import Walker
from snapshotter.tar_feed import Feed
from snapshotter.thread import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from hashlib import _Hash as HASH

QUEUED = 8
WRITEBACK = 128 << 20
_SMALL = 256 << 10


def _sha256(size: int) -> HASH:
    """For a blob of `size` bytes. To load libcrypto takes as long as it takes to hash a megabyte without."""
    made: HASH
    if size < _SMALL:
        from _sha256 import sha256  # type: ignore[import-not-found]

        made = sha256()
    else:
        from _hashlib import openssl_sha256

        made = openssl_sha256()
    return made


class Unpacked(Record):
    """The digest of the raw tar, of a single file that of its content; and what was made of it."""

    diff_id: str
    extracted: Extracted


class _Producer:
    """The inflating thread; `take` is its other end."""

    def __init__(self, blob: Reader, media_type: str, limits: Limits, key: LayerKey | None) -> None:
        self._blob = blob
        self._queue: SimpleQueue[bytes | BaseException] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._make_room(QUEUED)
        self._stop = False
        self._ended = False
        self._hash = _sha256(blob.size)
        self._thread = Thread(self._run, media_type, limits, key)

    def _run(self, media_type: str, limits: Limits, key: LayerKey | None) -> None:
        try:
            before, behind = b"", b""
            if media_type.startswith(single.TYPE):
                before, behind = single.around(media_type, self._blob.size)
                chunks = inflate.plain(self._blob, limits)
            else:
                chunks = inflate.inflate(self._blob, media_type, limits, key)
            if before:
                self._put(before)
            for chunk in chunks:
                self._hash.update(chunk)
                self._put(chunk)
                if self._stop:
                    return
            if behind:
                self._put(behind)
            self._queue.put(b"")
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._queue.put(error)

    def _put(self, chunk: bytes) -> None:
        """Waits until there is room for it."""
        self._room.get()
        self._queue.put(chunk)

    def _make_room(self, chunks: int) -> None:
        for _ in range(chunks):
            self._room.put(None)

    def take(self) -> bytes:
        """The next chunk, b"" at the end and ever after. Raises what the thread failed with."""
        if self._ended:
            return b""
        item = self._queue.get()
        if isinstance(item, bytes):
            self._make_room(1)
            self._ended = not item
            return item
        self._ended = True
        raise item

    def finish(self) -> str:
        """The digest, once everything was taken."""
        self._thread.join()
        return f"sha256:{self._hash.hexdigest()}"

    def stop(self) -> None:
        """Ends the thread, whatever it is at."""
        self._stop = True
        if self._thread.is_alive():
            self._blob.stop()
        self._make_room(3)  # enough for all that it puts before it looks
        self._thread.join()


class _Writeback:
    """Lets the disk work while the processors do: what was written goes out every WRITEBACK bytes, in the background,
    one syncfs(2) at a time. It makes nothing durable and reports nothing: the commit's own sync does both."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = WRITEBACK
        self._thread: Thread | None = None

    def passed(self, count: int) -> None:
        """`count` more bytes went by."""
        self._left -= count
        if self._left < 0 and (self._thread is None or not self._thread.is_alive()):
            self._left = WRITEBACK
            self._thread = Thread(self._sync)

    def _sync(self) -> None:
        try:
            syncfs(self._fd)
        except OSError:
            return

    def end(self) -> None:
        if self._thread is not None:
            self._thread.join()


def unpack(
    blob: Reader,
    layer_fd: int,
    media_type: str,
    diff_id: str,
    limits: Limits,
    *,
    base: bool,
    aliases: Mapping[bytes, bytes] | None = None,
    key: LayerKey | None = None,
) -> Unpacked:
    """Unpacks the blob into the empty directory `layer_fd`. Raises UnpackError, OSError."""
    packed = directory.parse(media_type)
    if packed is not None:
        media_type, name = packed
    producer = _Producer(blob, media_type, limits, key)
    writeback = _Writeback(layer_fd)

    def more() -> bytes:
        chunk = producer.take()
        writeback.passed(len(chunk))
        return chunk

    try:
        walker = Walker(Feed(more), limits) if packed is None else directory.Inside(Feed(more), limits, name)
        extracted = Extractor(layer_fd, walker, limits, base=base, aliases=aliases).run()
        found = producer.finish()
    finally:
        producer.stop()
        writeback.end()
    if found != diff_id:
        raise UnpackError(f"layer's diff id is {found}, the image's config says {diff_id}")
    return Unpacked(found, extracted)
