"""Artifacts: OCI manifests that are no container images, whose blobs become files of a tree that can be mounted.

    layer ──▶ one file, called by its org.opencontainers.image.title, or sha256-HEX where it has none
          ──▶ a directory called so, where `oras push` has packed one: io.deis.oras.content.unpack is "true", and
              io.deis.oras.content.digest says which tar it is; where that is not said, it stays a file

Pure. Refuses artifacts without layers, two of one name, encrypted and foreign layers, and names that mean
something else in a layer (whiteouts). That a name stays inside the tree is for the unpacker to see to, as ever.
Invariant: equal chain ids are equal names of equal content, and no chain id of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from imagestore.encryption.layers import is_encrypted, plain_type
from imagestore.model import ContentInvalid, Descriptor, Layer
from imagestore.reference import is_digest

if TYPE_CHECKING:
    from imagestore.manifest import Manifest

# In the CRI's listings: of what type an artifact is.
ARTIFACT_TYPE = "dev.ocid.artifact-type"
TITLE = "org.opencontainers.image.title"
_UNPACK = "io.deis.oras.content.unpack"
_CONTENT = "io.deis.oras.content.digest"
# What snapshotter.single and snapshotter.directory have: the unpacker is to make one file, called so, of the blob, or
# to unpack it into a directory.
_FILE = "application/vnd.ocid.file;name="
_DIRECTORY = "application/vnd.ocid.directory+"
_NAME_BYTES = 4095


def file_of(layer: Descriptor, where: str) -> Descriptor:
    """A layer of an artifact with the annotations that mean something. Raises ContentInvalid."""
    if is_encrypted(layer):
        raise ContentInvalid(f"{where}: an encrypted layer of an artifact, which is not supported")
    title = layer.annotations.get(TITLE) or layer.digest.replace(":", "-", 1)
    packed = layer.annotations.get(_UNPACK) == "true" and is_digest(layer.annotations.get(_CONTENT, ""))
    parts = title.split("/")
    if packed and title in (".", "./"):
        parts, title = ["."], "."  # the directory that was pushed is the tree itself
    elif len(title.encode("utf-8", "surrogateescape")) > _NAME_BYTES or parts[-1] in ("", ".", ".."):
        raise ContentInvalid(f"{where}.annotations[{TITLE}]: {title[:100]!r} is no file name")
    if any(part.startswith(".wh.") for part in parts):
        raise ContentInvalid(f"{where}.annotations[{TITLE}]: {title[:100]!r} would hide other files")
    notes = {TITLE: title}
    if packed:
        notes |= {_UNPACK: "true", _CONTENT: layer.annotations[_CONTENT]}
    return Descriptor(layer.media_type, layer.digest, layer.size, notes)


def artifact_layers(manifest: Manifest, what: str) -> tuple[Layer, ...]:
    """One for each file or directory, with chain ids of their names and digests. Raises ContentInvalid."""
    from imagestore.manifest import digest_of

    made: list[Layer] = []
    titles: set[str] = set()
    for blob in manifest.layers:
        title = blob.annotations[TITLE]
        if title in titles:
            raise ContentInvalid(f"{what}: two layers are called {title[:100]!r}")
        titles.add(title)
        above = made[-1].chain_id if made else ""
        content = blob.annotations.get(_CONTENT, "")
        what_it_is = f"directory of an artifact\0{content}" if content else "file of an artifact"
        text = f"{what_it_is}\0{above}\0{blob.digest}\0{title}"
        made.append(Layer(blob, content or blob.digest, digest_of(text.encode("utf-8", "surrogateescape")), title))
    return tuple(made)


def unpack_type(layer: Layer) -> str:
    """How the unpacker is to take the layer's plain text."""
    if not layer.title:
        return plain_type(layer.blob)
    if _CONTENT not in layer.blob.annotations:
        return f"{_FILE}{layer.title}"
    # oras packs with gzip whatever it was told to call that.
    kinds = {"tar": "tar", "zstd": "zstd"}
    return f"{_DIRECTORY}{kinds.get(layer.blob.media_type[-4:].lstrip('.+'), 'gzip')};name={layer.title}"
