"""The layers of an image as its manifest says, after every blob of it was hashed again.

Reads only: unlike the store, which takes a damaged blob away to fetch it anew, this tells. Invariant: layers without a
complaint are those that the manifest's digest stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from imagestore.config import StoreConfig
from imagestore.content import Blobs, errno_text
from imagestore.manifest import Manifest, parse_config, parse_document
from imagestore.model import ContentInvalid, Layer
from runtime.linux.dataclass import dataclass


def layers_of(blobs: Blobs, manifest: str) -> tuple[tuple[Layer, ...], list[str]]:
    """The layers, base first, and what is wrong with blobs. Raises ContentInvalid, OSError where not even the manifest
    and its config are whole."""
    config = StoreConfig()
    what = f"manifest {manifest}"
    data = blobs.read(manifest, config.manifest_bytes)
    parsed = parse_document(data, "", "", what, config)
    if not isinstance(parsed, Manifest):
        raise ContentInvalid(f"{what}: an index, not an image")
    _, layers = parse_config(blobs.read(parsed.config.digest, config.config_bytes), parsed, what, config)
    return layers, [wrong for layer in layers if (wrong := _wrong(blobs, layer.blob.digest))]


@dataclass(frozen=True, slots=True)
class Seals:
    """How many of `blobs` the kernel checks at every read; `here` is whether the filesystem can have it do so."""

    sealed: int
    blobs: int
    here: bool

    def __str__(self) -> str:
        if not self.here:
            return "not on this filesystem"
        return f"{self.sealed} of {self.blobs} blobs sealed"


def seals(blobs: Blobs, digests: Iterable[str]) -> Seals:
    """A blob that is gone is not sealed. Raises OSError."""
    found = []
    for digest in digests:
        try:
            found.append(blobs.is_sealed(digest))
        except FileNotFoundError:
            found.append(False)
    return Seals(sum(one is True for one in found), len(found), None not in found)


def _wrong(blobs: Blobs, digest: str) -> str:
    try:
        with open(blobs.path(digest), "rb", buffering=0) as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        # EIO of a sealed blob: the disk gives other bytes than were sealed, and the kernel keeps them to itself.
        return f"blob {digest}: {errno_text(error)}"
    return "" if found == digest else f"blob {digest}: its content is {found}"
