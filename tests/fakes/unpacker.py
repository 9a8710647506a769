"""An Unpacker that keeps layers in memory: it inflates, verifies the diff id and commits in order, as the real one.

`gate`, when set, holds every unpack until it is opened; `fail` is raised by the next unpacks of a chain id.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
import zlib
from collections import Counter
from pathlib import Path

import zstandard

from snapshotter.model import LayerKey, UnpackError
from tests.fakes.snapshots import opened
from tests.support import SOON_S


class MemoryUnpacker:
    """imagestore.model.Unpacker."""

    def __init__(self) -> None:
        self.layers: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.running = 0
        self.most_running = 0
        self.fail: dict[str, BaseException] = {}
        self.damage: dict[str, str] = {}
        self.broken_snapshots: dict[str, str] = {}
        self.gate: threading.Event | None = None
        self._cancelled: set[str] = set()
        self._active: Counter[str] = Counter()
        self._changed = threading.Condition()

    def has_layer(self, chain_id: str) -> bool:
        return chain_id in self.layers

    def unpack_layer(
        self,
        blob: Path,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        with self._changed:
            self.calls.append(chain_id)
            self._active[chain_id] += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if self.gate is not None and not self.gate.wait(SOON_S):
                raise UnpackError("the test's gate stayed shut")
            if chain_id in self.fail:
                raise self.fail[chain_id]
            tar = _inflate(opened(blob.read_bytes(), key), media_type)
            found = f"sha256:{hashlib.sha256(tar).hexdigest()}"
            if found != diff_id:
                raise UnpackError(f"layer's diff id is {found}, the image's config says {diff_id}")
            with self._changed:
                waited = self._changed.wait_for(
                    lambda: parent is None or parent in self.layers or chain_id in self._cancelled, 10
                )
                if chain_id in self._cancelled:
                    raise UnpackError("unpacking was cancelled")
                if not waited:
                    raise UnpackError(f"parent {parent} never came")
                self.layers[chain_id] = tar
                self._changed.notify_all()
        finally:
            with self._changed:
                self.running -= 1
                self._active[chain_id] -= 1
                if not self._active[chain_id]:
                    self._cancelled.discard(chain_id)

    def cancel(self, chain_id: str) -> None:
        """Optional for an Unpacker: ends the wait for a parent that will not come."""
        with self._changed:
            if self._active[chain_id]:
                self._cancelled.add(chain_id)
                self._changed.notify_all()

    def removable_layers(self, keep: frozenset[str]) -> list[tuple[str, int]]:
        with self._changed:
            return [(chain_id, len(tar)) for chain_id, tar in self.layers.items() if chain_id not in keep]

    def layer_sizes(self) -> dict[str, int]:
        with self._changed:
            return {chain_id: len(tar) for chain_id, tar in self.layers.items()}

    def damaged_layers(self) -> list[tuple[str, str]]:
        return [(chain_id, why) for chain_id, why in self.damage.items() if chain_id in self.layers]

    def damaged_snapshots(self) -> list[tuple[str, str]]:
        return [*self.broken_snapshots.items()]

    def forget_layers(self, chain_ids: frozenset[str]) -> list[str]:
        with self._changed:
            for chain_id in chain_ids:
                self.layers.pop(chain_id, None)
                self.damage.pop(chain_id, None)
            return []

    def remove_layers_except(self, keep: frozenset[str]) -> int:
        with self._changed:
            gone = set(self.layers) - keep
            for chain_id in gone:
                del self.layers[chain_id]
            return len(gone)


def _inflate(data: bytes, media_type: str) -> bytes:
    try:
        if media_type.endswith("gzip"):
            return gzip.decompress(data)
        if media_type.endswith("zstd"):
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 28)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UnpackError(f"damaged stream: {error}") from error
    return data
