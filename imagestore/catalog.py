"""What images there are: the records together with what is on disk and in the snapshotter.

Blocking; any thread. Refuses to show an image that is not whole. Invariant: what a manifest and its config say is read
once, since it never changes; whether all of it is there is known until somebody asks to look again.
"""

from __future__ import annotations

from collections.abc import Iterable

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.manifest import Manifest, parse_config, parse_document
from imagestore.model import (
    ContentInvalid,
    Descriptor,
    Image,
    ImageConfig,
    ImageError,
    Layer,
    ReferenceInvalid,
    Unpacker,
)
from imagestore.records import ImageRecord, Records
from imagestore.reference import Reference, id_prefix, parse
from imagestore.remotes import Remotes
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Contents:
    """What a manifest and its config say."""

    config_blob: Descriptor
    config: ImageConfig
    layers: tuple[Layer, ...]
    artifact: str = ""

    @property
    def size(self) -> int:
        return self.config_blob.size + sum(layer.blob.size for layer in self.layers)


class Catalog:
    """The images of one store."""

    def __init__(
        self, blobs: Blobs, records: Records, remotes: Remotes, unpacker: Unpacker, config: StoreConfig
    ) -> None:
        self._blobs = blobs
        self._records = records
        self._remotes = remotes
        self._unpacker = unpacker
        self._config = config
        self._pinned = frozenset(str(parse(name)) for name in config.pinned)
        self._known: dict[str, Contents] = {}
        self._whole: set[str] = set()

    def find(self, name: str) -> tuple[ImageRecord | None, bool]:
        """The record, and whether `name` is an id: a whole id first, then a name, then the beginning of an id, since
        "cafe" may be both of the latter."""
        digits = id_prefix(name)
        if digits is None or len(digits) < 64:
            record = next((found for found in map(self._records.by_name, self.meanings(name)) if found), None)
            if record is not None:
                return record, False
        return (self._records.by_id(digits), True) if digits is not None else (None, False)

    def meanings(self, name: str) -> tuple[Reference, ...]:
        try:
            return self._remotes.candidates(name)
        except ImageError:
            pass  # of a file that cannot be read a pull tells; what is here is found by its whole name all the same
        try:
            return (parse(name),)
        except ReferenceInvalid:
            return ()

    def image(self, record: ImageRecord, *, again: bool = False) -> Image | None:
        """The image of a record, None when something of it is missing; `again` looks at the disk once more."""
        contents = self.contents(record.manifest)
        digest = record.manifest.digest
        if contents is None or not ((digest in self._whole and not again) or self._is_whole(contents)):
            self._whole.discard(digest)
            return None
        self._whole.add(digest)
        return Image(
            id=record.id,
            manifest_digest=digest,
            repo_tags=record.tags,
            repo_digests=record.digests,
            size=contents.size,
            config=contents.config,
            layers=contents.layers,
            artifact=contents.artifact,
            indexes=tuple(index.digest for index in record.indexes),
            pinned=not self._pinned.isdisjoint((*record.tags, *record.digests)),
        )

    def contents(self, manifest: Descriptor) -> Contents | None:
        """What a recorded manifest and its config say; None when they are damaged or gone. They never change, so they
        are read once."""
        known = self._known.get(manifest.digest)
        if known is None:
            what = f"manifest {manifest.digest}"
            try:
                data = self._blobs.read(manifest.digest, self._config.manifest_bytes)
                parsed = parse_document(data, "", manifest.media_type, what, self._config)
                if not isinstance(parsed, Manifest):
                    return None
                data = self._blobs.read(parsed.config.digest, self._config.config_bytes)
                config, layers = parse_config(data, parsed, what, self._config)
            except (OSError, ContentInvalid):
                return None
            known = self._known[manifest.digest] = Contents(parsed.config, config, layers, parsed.artifact)
        return known

    def _is_whole(self, contents: Contents) -> bool:
        # Without keep_blobs a layer is whole when it is unpacked.
        layers = contents.layers if self._config.keep_blobs else ()
        blobs = (contents.config_blob, *(layer.blob for layer in layers))
        return all(self._blobs.has(blob) for blob in blobs) and all(
            self._unpacker.has_layer(layer.chain_id) for layer in contents.layers
        )

    def forget(self, kept: Iterable[str] = ()) -> None:
        """Of what is not in `kept`, nothing is known any more."""
        for digest in set(self._known).difference(kept):
            self._known.pop(digest, None)
            self._whole.discard(digest)
