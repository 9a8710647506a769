"""What no image, pull, container or lease reaches: found, told with the reason, and removed.

    reached: images' manifests, configs and layers; all of the indexes that are kept in full; what running
             pulls have leased; what the layout shows; in the snapshotter also layers below active snapshots
             and below those being unpacked

Blocking. Refuses to remove anything while another process pulls into the same root: its leases cannot be seen from
here, and garbage can wait. Invariant: `plan` names exactly what `collect` would remove at that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.leases import Leases
from imagestore.model import Unpacker
from imagestore.reach import Reach
from imagestore.records import Records
from runtime.linux.dataclass import dataclass

_UNREACHED = "no image names it"
_UNPACKED = "unpacked, and image.keep_blobs is off"


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that goes. `kind` is "blob", "layer" or "download", `name` a digest, a chain id or a file's name."""

    kind: str
    name: str
    bytes: int
    why: str


class Collector:
    """The collector of one store."""

    def __init__(
        self, blobs: Blobs, leases: Leases, records: Records, unpacker: Unpacker, reach: Reach, config: StoreConfig
    ) -> None:
        self._blobs, self._leases, self._records = blobs, leases, records
        self._unpacker, self._reach, self._config = unpacker, reach, config

    def plan(self) -> list[Garbage]:
        """What `collect` would remove now; empty while another process pulls."""
        with self._leases.collecting() as alone:
            if not alone:
                return []
            found = list(self._downloads())
            keep, unpacked = self._reached_blobs()
            for digest, size in self._blobs.sizes():
                with self._leases.removing_blob(digest) as free:
                    if free and digest not in keep:
                        found.append(Garbage("blob", digest, size, _UNPACKED if digest in unpacked else _UNREACHED))
            with self._leases.sweeping_layers() as leased:
                for chain_id, size in self._unpacker.removable_layers(self._reached_layers(leased)):
                    found.append(Garbage("layer", chain_id, size, "no image and no container stands on it"))
        return found

    def collect(self) -> set[str] | None:
        """Removes it; the blobs that stay, or None while another process pulls."""
        with self._leases.collecting() as alone:
            if not alone:
                return None
            self._blobs.remove_old_ingests(self._config.ingest_age_s)
            keep, _ = self._reached_blobs()
            for digest in self._blobs.digests():
                if digest not in keep:
                    self.remove_blob(digest)
            # Leases first, records second: a pull that ends in between is in one of them.
            with self._leases.sweeping_layers() as leased:
                self._unpacker.remove_layers_except(self._reached_layers(leased))
        return keep

    def remove_blob(self, digest: str) -> None:
        """Removes a blob unless a pull has leased it."""
        with self._leases.removing_blob(digest) as free:
            if free:
                self._blobs.remove(digest)

    def _downloads(self) -> Iterator[Garbage]:
        for name, size, age_s in self._blobs.old_ingests(self._config.ingest_age_s):
            yield Garbage("download", name, size, f"broken off {age_s / 3600:.0f} h ago, and nobody went on with it")

    def _reached_blobs(self) -> tuple[set[str], set[str]]:
        """The digests that stay, and those that go although an image names them."""
        keep: set[str] = set()
        unpacked: set[str] = set()
        for record in self._records.images():
            needed = self._reach.of(record)
            keep |= needed.blobs
            layers = {layer.blob.digest for layer in needed.layers}
            if self._config.keep_blobs:
                keep |= layers
            else:
                here = {layer.blob.digest for layer in needed.layers if self._unpacker.has_layer(layer.chain_id)}
                keep |= layers - here
                unpacked |= here
        return keep, unpacked - keep

    def _reached_layers(self, leased: Iterable[str]) -> frozenset[str]:
        needed = (layer.chain_id for record in self._records.images() for layer in self._reach.layers(record))
        return frozenset({*leased, *needed})
