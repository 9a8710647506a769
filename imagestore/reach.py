"""What an image needs on disk: its blobs, and its layers as they came and as unpacked.

    image ─┬─ what each of its names was served as, and is shown as in index.json
           ├─ manifests and configs
           ├─ layers: a blob and an unpacked directory each
           └─ the indexes that were kept in full, with all below

Blocking. Refuses nothing: what is damaged needs no more than itself. Invariant: what is not told of any image is needed
by none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.indexes import below
from imagestore.layout import Layout
from imagestore.model import Descriptor, Layer
from imagestore.records import ImageRecord
from runtime.linux.dataclass import dataclass


class Contents(Protocol):
    """What a manifest and its config say."""

    @property
    def config_blob(self) -> Descriptor: ...

    @property
    def layers(self) -> tuple[Layer, ...]: ...


@dataclass(frozen=True, slots=True)
class Needed:
    """Digests of blobs; and layers, whose blobs are not among those."""

    blobs: frozenset[str]
    layers: tuple[Layer, ...]


class Reach:
    """`contents` reads what a recorded manifest says, None when it is damaged."""

    def __init__(
        self,
        blobs: Blobs,
        layout: Layout,
        contents: Callable[[Descriptor], Contents | None],
        config: StoreConfig,
    ) -> None:
        self._blobs, self._layout, self._contents, self._config = blobs, layout, contents, config

    def of(self, record: ImageRecord) -> Needed:
        """Raises OSError, ImageError."""
        blobs = {name.served for name in record.names}
        for manifest in _manifests(record):
            blobs.add(manifest.digest)
            if (shown := self._layout.shown(manifest)) is not None:
                blobs.add(shown.digest)
            if (contents := self._contents(manifest)) is not None:
                blobs.add(contents.config_blob.digest)
        for index in record.indexes:
            blobs.update(blob.digest for blob in below(index, self._blobs, self._config))
        return Needed(frozenset(blobs), self.layers(record))

    def layers(self, record: ImageRecord) -> tuple[Layer, ...]:
        """Of all manifests that the image has been recorded with."""
        read = (self._contents(manifest) for manifest in _manifests(record))
        return tuple(layer for contents in read if contents is not None for layer in contents.layers)


def _manifests(record: ImageRecord) -> tuple[Descriptor, ...]:
    return (record.manifest, *(name.manifest for name in record.names))
