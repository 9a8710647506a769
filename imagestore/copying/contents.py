"""What a manifest or an index names, for whoever carries it and does not run it.

Pure. As strict as imagestore.manifest about digests, sizes and documents that are two things at once (threats S25, S35,
S43), but media types that we cannot run (artifacts, attestations, encrypted layers) are carried as they are. Refuses
foreign layers: their bytes are not the registry's to give (threats S26).
"""

from __future__ import annotations

import json

from imagestore.config import StoreConfig
from imagestore.manifest import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, descriptor
from imagestore.model import ContentInvalid, Descriptor
from imagestore.registry import Document
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass

INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
_FOREIGN = ("application/vnd.oci.image.layer.nondistributable.", "application/vnd.docker.image.rootfs.foreign.")


@dataclass(frozen=True, slots=True)
class Contents:
    """`media_type` is what the document really is. An index has `children`, a manifest `config` and `layers`."""

    media_type: str
    children: tuple[Descriptor, ...] = ()
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()

    @property
    def is_index(self) -> bool:
        return self.media_type in INDEXES

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, each digest once."""
        found = {blob.digest: blob for blob in (*((self.config,) if self.config else ()), *self.layers)}
        return tuple(found.values())


def read(document: Document, config: StoreConfig) -> Contents:
    """Raises ContentInvalid."""
    what = f"manifest {document.digest}"
    fields = parse_object(document.data, what, config.json_values)
    if fields.integer("schemaVersion", 0, 1 << 31, 0) != 2:
        raise ContentInvalid(f"{what}: expected schemaVersion 2")
    is_index = fields.has("manifests")
    if is_index and (fields.has("layers") or fields.has("config")):
        raise ContentInvalid(f"{what}: the document is both an index and a manifest")
    media_type = _media_type(fields, document.content_type, is_index, what)
    if is_index:
        items = fields.objects("manifests", config.index_manifests)
        return Contents(media_type, tuple(descriptor(item, config.manifest_bytes) for item in items))
    found = fields.object("config")
    if found is None:
        raise ContentInvalid(f"{what}.config: missing")
    layers = tuple(_layer(item, config) for item in fields.objects("layers", config.layers))
    return Contents(media_type, (), descriptor(found, config.config_bytes), layers)


def _media_type(fields: Fields, announced: str, is_index: bool, what: str) -> str:
    announced = announced.partition(";")[0].strip().lower()
    told = {kind for kind in (fields.string("mediaType"), announced) if kind in INDEXES | MANIFESTS}
    if len(told) > 1:
        raise ContentInvalid(f"{what}: media types contradict one another ({', '.join(sorted(told))})")
    media_type = told.pop() if told else (OCI_INDEX if is_index else OCI_MANIFEST)
    if (media_type in INDEXES) != is_index:
        raise ContentInvalid(f"{what}: media type {media_type} does not fit the document's fields")
    return media_type


def _layer(fields: Fields, config: StoreConfig) -> Descriptor:
    found = descriptor(fields, config.blob_bytes)
    if found.media_type.startswith(_FOREIGN):
        raise ContentInvalid(
            f"{fields.path}: a foreign layer ({found.media_type}), which is not the registry's to give"
        )
    return found


def encode(document: object) -> bytes:
    """JSON as we write it: the same document gives the same bytes."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
