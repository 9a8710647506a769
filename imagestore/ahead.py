"""Layers that are unpacked while they are still being downloaded: a bet on the blob's digest, which costs time if lost.

    config   ── know ──▶ what the layer must be ─┐
    download ── step ──▶ a place is free? ───────┴─▶ unpack what is there, follow what comes ──▶ wait for the digest
             ── whole ─▶ outcome: committed, or else the layer is unpacked as if nothing had been

Event loop only. It refuses more of them than the configuration says, and small layers: nothing is won. A bet that is
lost says nothing about the image, so its failure is not told; the unpacking of the whole blob tells. Invariant: an
attempt that was begun has ended, and left nothing that is visible, once `end` returns, or is told to.
"""

from __future__ import annotations

import asyncio

from imagestore.config import StoreConfig
from imagestore.growth import Growth
from imagestore.model import Descriptor, ImageError, Layer, LayerKey
from imagestore.unpacking import Unpacking


class Ahead:
    """The places of one store."""

    def __init__(self, unpacking: Unpacking, config: StoreConfig) -> None:
        self._unpacking = unpacking
        self._least = config.early_bytes
        self.free = config.early_unpacks if unpacking.can_begin_early else 0

    def attempt(self, blob: Descriptor) -> Attempt | None:
        """For one download of one layer's blob; None where none is made."""
        if not self.free or blob.size < self._least:
            return None
        return Attempt(self, self._unpacking)


class Attempt:
    """One layer's."""

    def __init__(self, places: Ahead, unpacking: Unpacking) -> None:
        self._places, self._unpacking = places, unpacking
        self._known: tuple[Layer, str | None, LayerKey | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._has_place = False
        self._is_whole = False
        self._growth: Growth | None = None

    def follow(self, take_growth: Growth) -> None:
        """There is something to follow."""
        self._growth = take_growth

    def know(self, layer: Layer, parent: str | None, key: LayerKey | None) -> None:
        """Which layer the blob is to become; it is leased."""
        self._known = layer, parent, key
        self.step()

    def step(self) -> None:
        """The download went on, or more is known: begins when there is a place, if it has not begun."""
        growth = self._growth
        if growth is None or growth.given_up or self._known is None or self._is_whole or self._task is not None:
            return
        if self._places.free:
            self._places.free -= 1
            self._has_place = True
            layer, parent, key = self._known
            self._task = asyncio.create_task(self._unpacking.unpack(layer, growth, parent, key))

    @property
    def begun(self) -> bool:
        return self._task is not None

    def whole(self) -> None:
        """The download has ended, and no network is waited for any more: what has not begun will not."""
        self._is_whole = True
        if self._has_place:
            self._has_place = False
            self._places.free += 1

    async def outcome(self) -> bool:
        """True when the layer is committed; False when it is still to be unpacked."""
        if self._task is None:
            return False
        try:
            await self._task
        except ImageError:
            return False
        return True

    async def end(self) -> None:
        """Ends what nobody will ask about."""
        self.whole()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._task is not None and not self._task.cancelled():
            self._task.exception()  # seen: it is not told
        if self._growth is not None:
            self._growth.close()
