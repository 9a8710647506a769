"""Artifacts: OCI manifests that are no container images, whose blobs become files of a tree that can be mounted.

    layer ──▶ one file, called by its org.opencontainers.image.title, or sha256-HEX where it has none

Pure. Refuses artifacts without layers, two files of one name, encrypted and foreign layers, and names that mean
something else in a layer (whiteouts). That a name stays inside the tree is for the unpacker to see to, as ever.
Invariant: equal chain ids are equal names of equal content, and no chain id of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagestore.encryption.layers import is_encrypted, plain_type
from imagestore.model import ContentInvalid, Descriptor, Layer

if TYPE_CHECKING:
    from imagestore.manifest import Manifest

# In the CRI's listings: of what type an artifact is.
ARTIFACT_TYPE = "dev.ocid.artifact-type"
TITLE = "org.opencontainers.image.title"
# What snapshotter.single has: the unpacker is to make one file, called so, of the blob.
_FILE = "application/vnd.ocid.file;name="
_NAME_BYTES = 4095


def file_of(layer: Descriptor, where: str) -> Descriptor:
    """A layer of an artifact with the only annotation that means something. Raises ContentInvalid."""
    if is_encrypted(layer):
        raise ContentInvalid(f"{where}: an encrypted layer of an artifact, which is not supported")
    title = layer.annotations.get(TITLE) or layer.digest.replace(":", "-", 1)
    parts = title.split("/")
    if len(title.encode("utf-8", "surrogateescape")) > _NAME_BYTES or parts[-1] in ("", ".", ".."):
        raise ContentInvalid(f"{where}.annotations[{TITLE}]: {title[:100]!r} is no file name")
    if any(part.startswith(".wh.") for part in parts):
        raise ContentInvalid(f"{where}.annotations[{TITLE}]: {title[:100]!r} would hide other files")
    return Descriptor(layer.media_type, layer.digest, layer.size, {TITLE: title})


def artifact_layers(manifest: Manifest, what: str) -> tuple[Layer, ...]:
    """One for each file, with chain ids of their names and digests. Raises ContentInvalid."""
    from imagestore.manifest import digest_of

    made: list[Layer] = []
    titles: set[str] = set()
    for blob in manifest.layers:
        title = blob.annotations[TITLE]
        if title in titles:
            raise ContentInvalid(f"{what}: two layers are called {title[:100]!r}")
        titles.add(title)
        above = made[-1].chain_id if made else ""
        text = f"file of an artifact\0{above}\0{blob.digest}\0{title}"
        made.append(Layer(blob, blob.digest, digest_of(text.encode("utf-8", "surrogateescape")), title))
    return tuple(made)


def unpack_type(layer: Layer) -> str:
    """How the unpacker is to take the layer's plain text."""
    return f"{_FILE}{layer.title}" if layer.title else plain_type(layer.blob)
