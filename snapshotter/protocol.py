"""What the daemon and an unpack worker say to each other: one request, one reply, frames of runtime.linux.sockets.

    daemon                                  worker (thread `main` reads, thread `job` works)
      Unpack + fds (blob, layer directory, ──▶            [eventfd]: only for a blob that is still arriving
        [eventfd])
                                            ◀── Done(inodes, implied, links) | Failed
      Finish + fd (layer directory)        ──▶
                                            ◀── Done(aliases) | Failed
      close                                ──▶  exits at once, whatever it is doing

A frame is a line of JSON and then paths, each ended by NUL, since paths are bytes and hold no NUL. It refuses frames
of another shape: a worker reads hostile layers, so the daemon believes nothing it says but what parses.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import field

from runtime.linux.dataclass import dataclass
from runtime.linux.libc import KernelError
from snapshotter.model import LayerKey, Limits, SnapshotError, UnpackError


@dataclass(frozen=True, slots=True)
class Unpack:
    """Unpack the blob (first fd) of `size` bytes into the layer directory (second fd). A third fd counts those of
    them that are there (snapshotter.arriving)."""

    media_type: str
    size: int
    diff_id: str
    base: bool
    aliases: Mapping[bytes, bytes]
    limits: Limits
    key: LayerKey | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Finish:
    """Finish the layer directory (first fd) on `lowers`, topmost first."""

    lowers: Sequence[str]
    implied: Sequence[bytes]
    links: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Done:
    """The job is done. After Finish only `aliases` says something, and only when the layer must be unpacked again."""

    inodes: int = 0
    opaque: bool = False
    implied: Sequence[bytes] = ()
    links: Sequence[bytes] = ()
    aliases: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Failed:
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


def _pack(head: Mapping[str, object], *lists: Sequence[bytes]) -> bytes:
    paths = [path + b"\0" for paths in lists for path in paths]
    return json.dumps({**head, "counts": [len(paths) for paths in lists]}).encode() + b"\n" + b"".join(paths)


def _unpack(frame: bytes) -> tuple[dict[str, object], list[list[bytes]]]:
    line, newline, rest = frame.partition(b"\n")
    try:
        head = json.loads(line)
        counts = head.pop("counts")
        paths = rest.split(b"\0")[:-1]
        if not newline or sum(counts) != len(paths) or min(counts, default=0) < 0:
            raise ValueError("paths do not add up")
        lists, at = [], 0
        for count in counts:
            lists.append(paths[at : at + count])
            at += count
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"unpack worker: malformed frame: {error}") from error
    return head, lists


def encode_request(request: Unpack | Finish) -> bytes:
    if isinstance(request, Finish):
        lowers = [path.encode("utf-8", "surrogateescape") for path in request.lowers]
        return _pack({"type": "finish"}, lowers, request.implied, request.links)
    limits = {name: getattr(request.limits, name) for name in Limits.__slots__}
    head = {
        "type": "unpack",
        "media_type": request.media_type,
        "size": request.size,
        "diff_id": request.diff_id,
        "base": request.base,
        "limits": limits,
        "key": [part.hex() for part in request.key or ()],
    }
    return _pack(head, list(request.aliases), list(request.aliases.values()))


def decode_request(frame: bytes) -> Unpack | Finish:
    head, lists = _unpack(frame)
    if head["type"] == "finish":
        lowers, implied, links = lists
        return Finish([path.decode("utf-8", "surrogateescape") for path in lowers], implied, links)
    limits, key = head["limits"], head["key"]
    assert isinstance(limits, dict) and isinstance(key, list)
    secret, nonce, hmac = map(bytes.fromhex, key or ("", "", ""))
    return Unpack(
        str(head["media_type"]),
        int(str(head["size"])),
        str(head["diff_id"]),
        bool(head["base"]),
        dict(zip(lists[0], lists[1], strict=True)),
        Limits(**limits),
        (secret, nonce, hmac) if key else None,
    )


def encode_reply(reply: Done | Failed) -> bytes:
    if isinstance(reply, Failed):
        return _pack(
            {
                "type": "failed",
                "message": reply.message,
                "number": reply.number,
                "call": reply.call,
                "subject": reply.subject,
            }
        )
    return _pack(
        {"type": "done", "inodes": reply.inodes, "opaque": reply.opaque},
        reply.implied,
        reply.links,
        reply.aliases,
    )


def decode_reply(frame: bytes) -> Done | Failed:
    head, lists = _unpack(frame)
    if head.get("type") == "failed":
        number = head.get("number")
        return Failed(
            str(head.get("message")),
            number if isinstance(number, int) else errno.EIO,
            str(head.get("call")),
            str(head.get("subject")),
        )
    inodes = head.get("inodes")
    if head.get("type") != "done" or len(lists) != 3 or not isinstance(inodes, int):
        raise SnapshotError("unpack worker: malformed reply")
    return Done(inodes, head.get("opaque") is True, *lists)
