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
from collections.abc import Iterable, Iterator

from imagestore.content import Blobs
from imagestore.model import Unpacker
from imagestore.reach import Reach
from imagestore.records import ImageRecord, Records
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One image: the bytes of all that it needs, and of what nobody else does."""

    image: str
    bytes: int
    own: int


class Sharing:
    """Of one store."""

    def __init__(self, blobs: Blobs, records: Records, unpacker: Unpacker, reach: Reach) -> None:
        self._blobs, self._records, self._unpacker, self._reach = blobs, records, unpacker, reach

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
        needed = self._reach.of(record)
        for digest in needed.blobs:
            yield "blob", digest
        for layer in needed.layers:
            yield "blob", layer.blob.digest
            yield "layer", layer.chain_id
