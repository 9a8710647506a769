"""What each image takes on disk, and what of it others need as well: blobs as they came, and layers as unpacked.

    image A ─┬─ config, manifest        its own: gone with it
             └─ layer 1 ─┐
    image B ─┬─ layer 1 ─┴─ the same blob and the same directory: once on disk, however many have it
             └─ layer 2

Blocking. Refuses nothing: what is missing takes nothing. Invariant: what all take together is counted once, and what is
an image's own is at most what removing it would free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from imagestore.collector import Contents
from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.indexes import below
from imagestore.layout import Layout
from imagestore.model import Descriptor, Unpacker
from imagestore.records import ImageRecord, Records
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One image: the bytes of all that it needs, and of what nobody else does."""

    image: str
    bytes: int
    own: int


class Sharing:
    """As the collector has them. `contents` reads what a recorded manifest says, None when it is damaged."""

    def __init__(
        self,
        blobs: Blobs,
        records: Records,
        layout: Layout,
        unpacker: Unpacker,
        contents: Callable[[Descriptor], Contents | None],
        config: StoreConfig,
    ) -> None:
        self._blobs, self._records, self._layout = blobs, records, layout
        self._unpacker, self._contents, self._config = unpacker, contents, config

    def measure(self) -> tuple[list[Share], int]:
        """Each image, and what all of them take together. Raises OSError, ImageError."""
        sizes = {("blob", digest): size for digest, size in self._blobs.sizes()}
        sizes.update({("layer", chain_id): size for chain_id, size in self._unpacker.layer_sizes().items()})
        needs = {record.id: frozenset(self._needs(record)) & sizes.keys() for record in self._records.images()}
        users = Counter(thing for things in needs.values() for thing in things)

        def total(things: Iterable[tuple[str, str]]) -> int:
            return sum(sizes[thing] for thing in things)

        shares = [
            Share(id_, total(one), total(thing for thing in one if users[thing] == 1)) for id_, one in needs.items()
        ]
        return shares, total(users)

    def _needs(self, record: ImageRecord) -> Iterator[tuple[str, str]]:
        for name in record.names:
            yield "blob", name.served
        for manifest in (record.manifest, *(name.manifest for name in record.names)):
            yield "blob", manifest.digest
            if (shown := self._layout.shown(manifest)) is not None:
                yield "blob", shown.digest
            contents = self._contents(manifest)
            if contents is not None:
                yield "blob", contents.config_blob.digest
                for layer in contents.layers:
                    yield "blob", layer.blob.digest
                    yield "layer", layer.chain_id
        for index in record.indexes:
            for blob in below(index, self._blobs, self._config):
                yield "blob", blob.digest
