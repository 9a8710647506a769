"""An image in other words: OCI or Docker media types, layers compressed in another way.

Blocking, for worker threads. Refuses what cannot be said in the other format (artifacts, encrypted layers), and layers
that inflate beyond `image_bytes`. Invariant: config bytes are never touched, so an image keeps its id; a manifest that
needs no change keeps every byte.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from imagestore.copying.contents import Contents, encode
from imagestore.encryption.layers import ENCRYPTED, is_encrypted, own_annotations, plain_type
from imagestore.manifest import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_MANIFEST,
    digest_of,
)
from imagestore.model import ContentInvalid, Descriptor
from imagestore.registry import Document

_PIECE = 1 << 20
_WINDOW = 128 << 20
_OCI = "application/vnd.oci.image.layer.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
# Compression by media type, and the suffixes that say it.
_HOW = {
    _OCI: "",
    f"{_OCI}+gzip": "gzip",
    f"{_OCI}+zstd": "zstd",
    _DOCKER: "",
    f"{_DOCKER}.gzip": "gzip",
    f"{_DOCKER}.zstd": "zstd",
}
FORMATS = {"oci": OCI_MANIFEST, "docker": DOCKER_MANIFEST}


def compression(layer: Descriptor) -> str | None:
    """ "", "gzip" or "zstd"; None for what is no layer that we know."""
    return _HOW.get(layer.media_type)


def layer_type(format_type: str, how: str) -> str:
    """The media type of a layer in a manifest of `format_type`. Raises ContentInvalid."""
    if format_type == DOCKER_MANIFEST:
        if how == "zstd":
            raise ContentInvalid("docker's format has no layers compressed with zstd: choose gzip (--compress gzip)")
        return f"{_DOCKER}.{how}" if how else _DOCKER
    return f"{_OCI}+{how}" if how else _OCI


def rewritten(document: Document, contents: Contents, format_type: str, layers: Mapping[str, Descriptor]) -> Document:
    """The manifest in the format `format_type`, with `layers` in the place of those whose digests they stand under.
    Raises ContentInvalid."""
    changes = any(blob.digest in layers for blob in contents.layers)
    if contents.media_type == format_type and not changes:
        return document
    config = contents.config
    assert config is not None  # an index is not rewritten
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        raise ContentInvalid(
            f"manifest {document.digest}: an artifact ({config.media_type[:80]}), which stays as it is"
        )
    config_type = DOCKER_CONFIG if format_type == DOCKER_MANIFEST else OCI_CONFIG
    made: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": format_type,
        "config": {"mediaType": config_type, "digest": config.digest, "size": config.size},
        "layers": [_described(layers.get(blob.digest, blob), format_type) for blob in contents.layers],
    }
    data = encode(made)
    return Document(data, format_type, digest_of(data))


def _described(layer: Descriptor, format_type: str) -> dict[str, Any]:
    if is_encrypted(layer):
        if format_type == DOCKER_MANIFEST:
            raise ContentInvalid(f"layer {layer.digest}: docker's format has no encrypted layers (--format oci has)")
        plain = _described(replace(layer, media_type=plain_type(layer)), format_type)
        opening = own_annotations(layer.annotations)
        return {**plain, "mediaType": plain["mediaType"] + ENCRYPTED, "annotations": opening}
    how = compression(layer)
    if how is None:
        raise ContentInvalid(f"layer {layer.digest}: {layer.media_type[:80]} has no name in {format_type}")
    return {"mediaType": layer_type(format_type, how), "digest": layer.digest, "size": layer.size}


def recompress(source: Path, layer: Descriptor, how: str, target: Path, limit: int) -> Descriptor:
    """Writes the layer in `source` to `target`, compressed as `how` says. Raises ContentInvalid, OSError."""
    old = compression(layer)
    if old is None:
        raise ContentInvalid(f"layer {layer.digest}: {layer.media_type[:80]} is no layer that we can inflate")
    with open(source, "rb") as file, open(target, "wb", opener=_private) as out:
        written = _Hashed(out)
        pieces = _bounded(_inflate(file, old, layer.digest), limit, layer.digest)
        for piece in _deflate(pieces, how):
            written.write(piece)
    # In OCI's words, whatever the manifest is going to be: it finds its own.
    return Descriptor(layer_type(OCI_MANIFEST, how), written.digest, written.size)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


class _Hashed:
    def __init__(self, out: BinaryIO) -> None:
        self._out, self._hash, self.size = out, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)
        self._out.write(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def _bounded(pieces: Iterator[bytes], limit: int, digest: str) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise ContentInvalid(f"layer {digest}: inflates to more than {limit} bytes")
        yield piece


def _inflate(file: BinaryIO, how: str, digest: str) -> Iterator[bytes]:
    import zstandard
    from isal import igzip

    # A damaged gzip stream is an EOFError, isal's own error, or an OSError without a number (BadGzipFile).
    damaged = (EOFError, zlib.error, zstandard.ZstdError)
    if how and not os.fstat(file.fileno()).st_size:
        raise ContentInvalid(f"layer {digest}: not valid {how}")  # which the readers below take for an empty stream
    reader: Any = file
    if how == "gzip":
        reader = igzip.IGzipFile(fileobj=file, mode="rb")
    elif how == "zstd":
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file, read_across_frames=True)
    try:
        while piece := reader.read(_PIECE):
            yield piece
    except (OSError, *damaged) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ContentInvalid(f"layer {digest}: not valid {how}") from None


def _deflate(pieces: Iterator[bytes], how: str) -> Iterator[bytes]:
    if not how:
        yield from pieces
        return
    compressor = _compressor(how)
    for piece in pieces:
        if made := compressor.compress(piece):
            yield made
    yield compressor.flush()


def _compressor(how: str) -> Any:
    if how == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compressobj()
    from isal import isal_zlib

    # 31: a gzip header, whose time stays zero, so that the same layer gives the same bytes.
    return isal_zlib.compressobj(2, isal_zlib.DEFLATED, 31)
