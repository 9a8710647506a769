"""What no image, pull, container or lease reaches: found, told with the reason, and removed.

    reached: images' manifests, configs and layers; all of the indexes that are kept in full; what running
             pulls have leased; what the layout shows; in the snapshotter also layers below active snapshots
             and below those being unpacked

Blocking. Refuses to remove anything while another process pulls into the same root: its leases cannot be seen from
here, and garbage can wait. Invariant: `plan` names exactly what `collect` would remove at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.indexes import below
from imagestore.layout import Layout
from imagestore.leases import Leases
from imagestore.model import Descriptor, Layer, Unpacker
from imagestore.records import ImageRecord, Records
from runtime.linux.dataclass import dataclass

_UNREACHED = "no image names it"
_UNPACKED = "unpacked, and image.keep_blobs is off"


class Contents(Protocol):
    """What a manifest and its config say."""

    @property
    def config_blob(self) -> Descriptor: ...

    @property
    def layers(self) -> tuple[Layer, ...]: ...


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that goes. `kind` is "blob", "layer" or "download", `name` a digest, a chain id or a file's name."""

    kind: str
    name: str
    bytes: int
    why: str


class Collector:
    """The collector of one store. `contents` reads what a recorded manifest says, None when it is damaged."""

    def __init__(
        self,
        blobs: Blobs,
        leases: Leases,
        records: Records,
        layout: Layout,
        unpacker: Unpacker,
        contents: Callable[[Descriptor], Contents | None],
        config: StoreConfig,
    ) -> None:
        self._blobs, self._leases, self._records, self._layout = blobs, leases, records, layout
        self._unpacker, self._contents, self._config = unpacker, contents, config

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
            keep.update(name.served for name in record.names)
            for manifest in _manifests(record):
                keep.add(manifest.digest)
                shown = self._layout.shown(manifest)
                if shown is not None:
                    keep.add(shown.digest)
                contents = self._contents(manifest)
                if contents is not None:
                    keep.add(contents.config_blob.digest)
                    layers = {layer.blob.digest for layer in contents.layers}
                    if self._config.keep_blobs:
                        keep |= layers
                    else:
                        here = {one.blob.digest for one in contents.layers if self._unpacker.has_layer(one.chain_id)}
                        keep |= layers - here
                        unpacked |= here
            for index in record.indexes:
                keep.update(blob.digest for blob in below(index, self._blobs, self._config))
        return keep, unpacked - keep

    def _reached_layers(self, leased: Iterable[str]) -> frozenset[str]:
        keep = set(leased)
        for record in self._records.images():
            for manifest in _manifests(record):
                contents = self._contents(manifest)
                keep.update(layer.chain_id for layer in contents.layers) if contents else None
        return frozenset(keep)


def _manifests(record: ImageRecord) -> tuple[Descriptor, ...]:
    return (record.manifest, *(name.manifest for name in record.names))
