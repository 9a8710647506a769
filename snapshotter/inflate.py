"""A layer's blob as a stream of tar bytes: gzip through isal, zstd, or plain; told by magic, checked against the type.

It refuses xz, bzip2 and what it does not know, a type that disagrees with the content, garbage after the end, and
more output than `Limits` allow. An encrypted blob is decrypted on the way. Invariant: a chunk is at most CHUNK bytes,
so memory does not depend on the blob (threats S37, S41, P13).
"""

from __future__ import annotations

from snapshotter.arriving import Reader
from snapshotter.model import LayerKey, Limits, UnpackError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK = 1 << 20
_READ = 256 << 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# zstd-compression-format.md: sixteen magics for frames that decoders skip
_ZSTD_SKIPPABLE = tuple(bytes([0x50 + n, 0x2A, 0x4D, 0x18]) for n in range(16))
_REFUSED = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x04\x22\x4d\x18": "lz4"}


def kind_of(start: bytes, media_type: str) -> str:
    """ "gzip", "zstd" or "tar", by the blob's first bytes. Raises UnpackError when `media_type` says otherwise."""
    for magic, name in _REFUSED.items():
        if start.startswith(magic):
            raise UnpackError(f"layer is compressed with {name}, which is not supported (gzip, zstd and plain tar are)")
    if start.startswith(_GZIP):
        found = "gzip"
    elif start.startswith((_ZSTD, *_ZSTD_SKIPPABLE)):
        found = "zstd"
    else:
        found = "tar"
    if media_type.endswith(("+gzip", ".gzip")):
        said = "gzip"
    elif media_type.endswith(("+zstd", ".zstd")):
        said = "zstd"
    elif media_type.endswith(".tar"):
        said = "tar"
    else:
        raise UnpackError(f"layer has the media type {media_type[:100]!r}, which is not supported")
    if said != found:
        raise UnpackError(f"layer is announced as {media_type} but its content is {found}")
    return found


class _Peeked:
    """Bytes in their order; `peek` shows the first ones before they are read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        while len(self._ahead) < size and (more := self._read(size)):
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """At most `size` bytes, b"" at the end."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._read(size)


def inflate(blob: Reader, media_type: str, limits: Limits, key: LayerKey | None = None) -> Iterator[bytes]:
    """The tar's bytes; with `key` those of an encrypted blob whose plain text has `media_type`. It has ended only once
    it is known that they were right. Raises UnpackError, OSError."""
    if key is None:
        yield from _bounded(_Peeked(blob.read), blob.size, media_type, limits)
        return
    from snapshotter.sealed import Sealed

    sealed = Sealed(blob.read, key)
    try:
        yield from _bounded(_Peeked(sealed.read), blob.size, media_type, limits)
    except UnpackError:
        sealed.finish()  # a wrong key makes noise of the plain text: that it is no gzip would be the lesser half of it
        raise
    sealed.finish()


def plain(blob: Reader, limits: Limits) -> Iterator[bytes]:
    """The bytes of a blob as they are. Raises UnpackError, OSError."""
    if blob.size > limits.layer_bytes:
        raise UnpackError(f"layer has {blob.size} bytes, more than {limits.layer_bytes} (limit layer_bytes)")
    yield from _plain(_Peeked(blob.read), limits)


def _bounded(blob: _Peeked, compressed: int, media_type: str, limits: Limits) -> Iterator[bytes]:
    kind = kind_of(blob.peek(512), media_type)
    most = min(limits.layer_bytes, max(limits.inflate_floor, compressed * limits.inflate_ratio))
    chunks = {"gzip": _gzip, "zstd": _zstd, "tar": _plain}[kind](blob, limits)
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > most:
            limit = "layer_bytes" if total > limits.layer_bytes else "inflate_ratio"
            raise UnpackError(f"layer of {compressed} bytes inflates to more than {most} bytes (limit {limit})")
        yield chunk


def _plain(blob: _Peeked, limits: Limits) -> Iterator[bytes]:
    while chunk := blob.read(CHUNK):
        yield chunk


def _gzip(blob: _Peeked, limits: Limits) -> Iterator[bytes]:
    from isal import igzip_lib  # only the worker pays for it

    decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
    data = blob.read(_READ)
    while True:
        try:
            chunk = decoder.decompress(data, CHUNK)
        except (igzip_lib.IsalError, EOFError) as error:  # type: ignore[misc]  # its stubs say it is no class
            raise UnpackError(f"layer is no valid gzip: {error}") from error
        if chunk:
            yield chunk
        data = b""
        if decoder.eof:
            # RFC 1952, 2.2: members follow one another. GNU gzip lets zeros follow the last, as tapes do.
            rest = decoder.unused_data.lstrip(b"\0")
            while len(rest) < 2 and (more := blob.read(_READ)):
                rest = (rest + more).lstrip(b"\0")
            if not rest:
                return
            if not rest.startswith(_GZIP):
                raise UnpackError("layer has garbage after the end of its gzip data")
            decoder, data = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP), rest
        elif decoder.needs_input and not (data := blob.read(_READ)):
            raise UnpackError("layer is truncated: its gzip data has no end")


def _zstd(blob: _Peeked, limits: Limits) -> Iterator[bytes]:
    import zstandard  # only the worker pays for it

    decoder = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window)
    reader = decoder.stream_reader(blob, read_size=_READ, read_across_frames=True, closefd=False)  # type: ignore[arg-type]
    try:
        while chunk := reader.read(CHUNK):
            yield chunk
    except zstandard.ZstdError as error:
        raise UnpackError(
            f"layer is no valid zstd (windows up to {limits.zstd_window} bytes are accepted, "
            f"limit zstd_window): {error}"
        ) from error
