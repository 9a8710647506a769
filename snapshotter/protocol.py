"""What the daemon and an unpack worker say to each other: one request, one reply, frames of runtime.linux.sockets.

    daemon                                  worker (thread `main` reads, thread `job` works)
      Unpack + fds (blob, layer directory, ──▶            [eventfd]: only for a blob that is still arriving
        [eventfd])
                                            ◀── Done(inodes, implied, links) | Failed
      Finish + fd (layer directory)        ──▶
                                            ◀── Done(aliases) | Failed
      close                                ──▶  exits at once, whatever it is doing

A frame is lists of byte strings: a line says how many strings each has, and then they follow, each ended by NUL, since
paths are bytes and hold no NUL. The first list is what the message is and its plain fields; text in it is escaped, so
that every text comes back (JSON would be a quarter of a worker's start). It refuses frames of another shape: a worker
reads hostile layers, so the daemon believes nothing it says but what parses.
"""

from __future__ import annotations

import errno

from runtime.linux.libc import KernelError
from runtime.linux.record import Record
from snapshotter.model import Limits, SnapshotError, UnpackError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snapshotter.model import LayerKey


class Unpack(Record):
    """Unpack the blob (first fd) of `size` bytes into the layer directory (second fd). A third fd counts those of
    them that are there (snapshotter.arriving)."""

    media_type: str
    size: int
    diff_id: str
    base: bool
    aliases: Mapping[bytes, bytes]
    limits: Limits
    key: LayerKey | None = None

    def __repr__(self) -> str:  # without the key
        return f"Unpack({self.media_type!r}, {self.size}, {self.diff_id!r})"


class Finish(Record):
    """Finish the layer directory (first fd) on `lowers`, topmost first."""

    lowers: Sequence[str]
    implied: Sequence[bytes]
    links: Sequence[bytes]


class Done(Record):
    """The job is done. After Finish only `aliases` says something, and only when the layer must be unpacked again."""

    inodes: int = 0
    opaque: bool = False
    implied: Sequence[bytes] = ()
    links: Sequence[bytes] = ()
    aliases: Sequence[bytes] = ()


class Failed(Record):
    """`number` is the errno, or 0 where the layer itself is wrong."""

    message: str
    number: int = 0
    call: str = ""
    subject: str = ""

    def raise_(self) -> None:
        """Raises what the worker raised."""
        if self.number:
            raise KernelError(self.number, self.call, self.subject)
        raise UnpackError(self.message)


def failed(error: BaseException) -> Failed:
    """`error` as a reply."""
    if isinstance(error, UnpackError):
        return Failed(str(error))
    if isinstance(error, KernelError):
        return Failed(str(error), error.errno or errno.EIO, error.call, error.subject)
    if isinstance(error, OSError):
        return Failed(str(error), error.errno or errno.EIO, "unpack", str(error.filename or ""))
    return Failed(f"unpack failed: {type(error).__name__}: {error}"[:2000])


def _pack(kind: bytes, fields: Sequence[str | int], *lists: Sequence[bytes]) -> bytes:
    texts = [str(value).encode("unicode_escape") for value in fields]
    lists = ([kind, *texts], *lists)
    return b"%b\n%b" % (
        b" ".join(b"%d" % len(items) for items in lists),
        b"".join(item + b"\0" for items in lists for item in items),
    )


def _unpack(frame: bytes) -> tuple[bytes, list[str], list[list[bytes]]]:
    line, newline, rest = frame.partition(b"\n")
    try:
        counts = [int(count) for count in line.split(b" ")]
        items = rest.split(b"\0")
        if not newline or items.pop() or sum(counts) != len(items) or min(counts) < 0 or not counts[0]:
            raise ValueError("its strings do not add up")
        lists, at = [], 0
        for count in counts:
            lists.append(items[at : at + count])
            at += count
        kind, *texts = lists[0]
        return kind, [text.decode("unicode_escape") for text in texts], lists[1:]
    except ValueError as error:
        raise SnapshotError(f"unpack worker: malformed frame: {error}") from error


def encode_request(request: Unpack | Finish) -> bytes:
    if isinstance(request, Finish):
        lowers = [path.encode("utf-8", "surrogateescape") for path in request.lowers]
        return _pack(b"finish", (), lowers, request.implied, request.links)
    limits = [getattr(request.limits, name) for name in Limits._fields]
    key = [part.hex().encode() for part in request.key or ()]
    fields = (request.media_type, request.size, request.diff_id, int(request.base), *limits)
    return _pack(b"unpack", fields, list(request.aliases), list(request.aliases.values()), key)


def decode_request(frame: bytes) -> Unpack | Finish:
    kind, fields, lists = _unpack(frame)
    if kind == b"finish":
        lowers, implied, links = lists
        return Finish([path.decode("utf-8", "surrogateescape") for path in lowers], implied, links)
    media_type, size, diff_id, base, *limits = fields
    targets, names, key = lists
    secret, nonce, hmac = (bytes.fromhex(part.decode()) for part in key or (b"", b"", b""))
    return Unpack(
        media_type,
        int(size),
        diff_id,
        base == "1",
        dict(zip(targets, names, strict=True)),
        Limits(*map(int, limits)),
        (secret, nonce, hmac) if key else None,
    )


def encode_reply(reply: Done | Failed) -> bytes:
    if isinstance(reply, Failed):
        return _pack(b"failed", (reply.message, reply.number, reply.call, reply.subject))
    return _pack(b"done", (reply.inodes, int(reply.opaque)), reply.implied, reply.links, reply.aliases)


def decode_reply(frame: bytes) -> Done | Failed:
    kind, fields, lists = _unpack(frame)
    try:
        if kind == b"failed" and not lists:
            message, number, call, subject = fields
            return Failed(message, int(number), call, subject)
        if kind == b"done":
            (inodes, opaque), (implied, links, aliases) = fields, lists
            return Done(int(inodes), opaque == "1", implied, links, aliases)
    except ValueError as error:
        raise SnapshotError(f"unpack worker: malformed reply: {error}") from error
    raise SnapshotError("unpack worker: malformed reply")
