"""The layers of one pull: asked for beside the config, and unpacked once the config has told what they must be.

    config:  asked for ───▶ parsed, this machine's, its keys found ─▶ leased: known
    layer:   as soon as the config was asked for ─▶ download ─▶ known? ─▶ early or whole ─▶ committed

A manifest names its layers; only the config has the diff ids that make chain ids of them. So the bytes may come before
it, where they stay as blobs anyway, and nothing is handed to the unpacker before it. Refuses to fetch layers ahead that
may turn out not to be wanted: encrypted ones, for which there may be no key, and those of stores that keep no blobs.
Invariant: a config that is refused is what the pull fails by, whatever its layers did, and it leaves of them what any
failed pull leaves: whole blobs and resumable ingests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from imagestore.ahead import Attempt
from imagestore.encryption.layers import is_encrypted
from imagestore.manifest import Manifest, check_platform, parse_config
from imagestore.model import ContentInvalid, ImageConfig, ImageError, Layer, LayerKey, Progress, ProgressFunction
from imagestore.shared import first_of
from imagestore.source import Source
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from imagestore.pull import Held, Puller


@dataclass(frozen=True, slots=True)
class Known:
    """What the config has told, and the keys that open encrypted layers, by chain id."""

    config: ImageConfig
    layers: tuple[Layer, ...]
    keys: Mapping[str, LayerKey]


class Layers:
    """The config and the layers of `manifest`, downloaded and unpacked at once."""

    def __init__(self, puller: Puller, source: Source, manifest: Manifest, held: Held, tell: ProgressFunction) -> None:
        self._puller = puller
        self._source = source
        self._manifest = manifest
        self._blobs = manifest.layers
        self._held = held
        self._tell = tell
        self._beside = puller.config.keep_blobs and not any(map(is_encrypted, self._blobs))
        self._config_asked = asyncio.Event()
        self._judged = asyncio.Event()
        self._layers: tuple[Layer, ...] = ()
        self._keys: Mapping[str, LayerKey] = {}
        self._attempts: list[Attempt | None] = [None for _ in self._blobs]
        self._arrived = [asyncio.Event() for _ in self._blobs]
        self._committed = [asyncio.Event() for _ in self._blobs]

    async def run(self) -> Known:
        """After: every layer is committed. Raises ImageError and its kinds."""
        try:
            async with asyncio.TaskGroup() as group:
                known = group.create_task(self._learn())
                # The largest first: it takes longest to come, and then to unpack.
                for number in sorted(range(len(self._blobs)), key=lambda at: -self._blobs[at].size):
                    group.create_task(self._layer(number))
        except BaseExceptionGroup as group_error:
            first = first_of(group_error)
            raise first from first.__cause__
        return known.result()

    # ------------------------------------------------------------------------------------------------------ the config

    async def _learn(self) -> Known:
        puller = self._puller
        try:
            known = await self._read_config()
            chains = {layer.chain_id for layer in known.layers}
            await puller.threads.io(puller.leases.lease_layers, chains, self._held.layers)
            self._layers, self._keys = known.layers, known.keys
            for number, attempt in enumerate(self._attempts):
                if attempt is not None:
                    attempt.know(known.layers[number], self._parent(number), self._key(number))
        finally:
            self._judged.set()
        return known

    async def _read_config(self) -> Known:
        puller, manifest = self._puller, self._manifest

        def tell(step: Progress) -> None:
            if step.phase != "waiting":
                self._config_asked.set()  # it has its turn: layers cannot take the last one before it
            self._tell(step)

        what = f"config {manifest.config.digest}"
        await puller.fetch(self._source, manifest.config, self._held, tell)
        data = await puller.threads.io(puller.blobs.read, manifest.config.digest, puller.config.config_bytes)
        config, layers = await puller.threads.io(parse_config, data, manifest, what, puller.config)
        check_platform(config, self._held.platform, what)
        if not any(map(is_encrypted, self._blobs)):
            return Known(config, layers, {})
        return Known(config, layers, await puller.threads.ask(puller.opener.open, layers, self._held.keys))

    def _parent(self, number: int) -> str | None:
        return self._layers[number - 1].chain_id if number else None

    def _key(self, number: int) -> LayerKey | None:
        return self._keys.get(self._layers[number].chain_id)

    # ------------------------------------------------------------------------------------------------------- one layer

    async def _layer(self, number: int) -> None:
        await (self._config_asked if self._beside else self._judged).wait()
        if self._judged.is_set() and not self._layers:
            return
        attempt = self._attempts[number] = self._puller.ahead.attempt(self._blobs[number])
        if attempt is not None and self._layers:
            attempt.know(self._layers[number], self._parent(number), self._key(number))
        try:
            await self._fetch(number, attempt)
            if attempt is not None:
                attempt.whole()
            await self._judged.wait()
            if self._layers:
                await self._commit(number, attempt)
        finally:
            if attempt is not None:
                await attempt.end()

    async def _fetch(self, number: int, attempt: Attempt | None) -> None:
        puller = self._puller
        # What is here now cannot go while nothing is fetched in its place: its layers are leased.
        if not puller.config.keep_blobs and await puller.threads.io(
            puller.unpacker.has_layer, self._layers[number].chain_id
        ):
            return
        try:
            await puller.fetch(self._source, self._blobs[number], self._held, self._tell, attempt)
        except ImageError:
            # Whether these bytes were wanted at all is told first. Not by way of a cancel: that may be what has become
            # this failure, where it met one of the disk or of the content.
            await self._judged.wait()
            raise

    async def _commit(self, number: int, attempt: Attempt | None) -> None:
        layer = self._layers[number]
        if number and not self._puller.unpacking.can_cancel:
            # An unpack waits for its parent's commit. Where that wait cannot be ended, it must not begin before all
            # below have arrived: a download may fail.
            await self._arrived[number - 1].wait()
        self._arrived[number].set()
        if attempt is not None and attempt.begun:
            self._report(layer, "unpack", 0)
        if attempt is not None and await attempt.outcome():
            self._report(layer, "done")
        elif await self._puller.threads.io(self._puller.unpacker.has_layer, layer.chain_id):
            self._report(layer, "exists")
        else:
            await self._unpack(number, layer)
            self._report(layer, "done")
        self._committed[number].set()

    async def _unpack(self, number: int, layer: Layer) -> None:
        puller = self._puller
        blob = puller.blobs.path(layer.blob.digest)
        parent = self._parent(number)
        key = self._key(number)
        slot = await self._slot(number)
        try:
            self._report(layer, "unpack", 0)
            try:
                await puller.unpacking.unpack(layer, blob, parent, key)
            except ContentInvalid:
                if await puller.threads.io(puller.blobs.is_sound, layer.blob):
                    raise
                # It was damaged on this disk since it was verified: that is no fault of the image.
                await puller.fetch(self._source, layer.blob, self._held, self._tell)
                await puller.unpacking.unpack(layer, blob, parent, key)
        finally:
            if slot:
                puller.unpacks.here().release()

    async def _slot(self, number: int) -> bool:
        """Waits for a slot, or for the parent's commit. The layer whose parent is committed needs no slot: were all
        slots taken by layers that wait for it, nothing would ever move. True when a slot was taken."""
        if number == 0 or self._committed[number - 1].is_set():
            return False
        slot = asyncio.create_task(self._puller.unpacks.here().acquire())
        parent = asyncio.create_task(self._committed[number - 1].wait())
        try:
            await asyncio.wait({slot, parent}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if slot.done():
                self._puller.unpacks.here().release()
            raise
        finally:
            parent.cancel()
            if not slot.done():
                slot.cancel()
        return slot.done()

    def _report(self, layer: Layer, phase: str, done: int | None = None) -> None:
        size = layer.blob.size
        self._tell(Progress(layer.blob.digest, phase, size if done is None else done, size))
