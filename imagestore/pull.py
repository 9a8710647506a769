"""From a source to a whole image: manifest, config, then all layers at once, each unpacked while it still comes.

    top ─> choose platform ─> admit ─> config ─┬─ layer 0: download ─> unpack ─┐
                                               ├─ layer 1: download ─> unpack ─┤ commit in order, by the unpacker
                                               └─ layer n: download ─> unpack ─┴─> Pulled

Refuses to make a layer visible of a blob that was not verified, and with `early_unpacks` 0 to hand anything else to
the unpacker (imagestore.ahead, docs/decisions/0012). Invariant: when `run` returns, every blob is durable and every
layer committed, and all of them are leased until the caller has recorded the image; when it raises, what is left is
whole blobs, committed layers and resumable ingests, which the next `collect` or the next pull takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from imagestore.ahead import Ahead, Attempt
from imagestore.config import StoreConfig
from imagestore.content import Blobs, Ingest, errno_text
from imagestore.encryption.layers import Opener
from imagestore.everything import fetch_everything
from imagestore.leases import Leases
from imagestore.manifest import check_platform, parse_config
from imagestore.model import (
    ContentInvalid,
    Descriptor,
    ImageConfig,
    ImageError,
    KeyFile,
    Layer,
    LayerKey,
    Progress,
    ProgressFunction,
    Unpacker,
)
from imagestore.registry import Document
from imagestore.resolve import resolve
from imagestore.shared import Flights, Slots, first_of
from imagestore.source import Source
from imagestore.threads import Threads
from imagestore.unpacking import Unpacking

# Another process writes the same blob: how often to look whether it has finished. There is no lock to wait on that a
# dead process would not also leave, and flock(2) without NB would hold a thread for as long.
_LOOK_AGAIN_S = 0.1
Admit = Callable[[str, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A whole image that is not recorded yet. `served` is the digest of the document its name led to, `index` that
    document where all that it names is here."""

    image_id: str
    manifest: Descriptor
    served: str
    config: ImageConfig
    layers: tuple[Layer, ...]
    index: Descriptor | None = None


@dataclass(slots=True)
class Held:
    """The leases of one pull, its turns at downloading, and the private keys that its caller gave."""

    turns: asyncio.Semaphore
    keys: tuple[KeyFile, ...] = ()
    blobs: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)


class Puller:
    """The pull path of one store, for its event loop."""

    def __init__(self, blobs: Blobs, leases: Leases, unpacker: Unpacker, threads: Threads, config: StoreConfig) -> None:
        self.blobs = blobs
        self.leases = leases
        self.unpacker = unpacker
        self.threads = threads
        self.config = config
        self.unpacking = Unpacking(unpacker, leases, threads, config.cancel_wait_s)
        self.ahead = Ahead(self.unpacking, config)
        self._flights = Flights()
        self._downloads = Slots(config.node_downloads)
        self.unpacks = Slots(config.concurrent_unpacks)
        self.opener = Opener(config.decryption_keys)

    async def run(
        self, source: Source, held: Held, tell: ProgressFunction, admit: Admit, *, everything: bool = False
    ) -> Pulled:
        """`admit` is asked with the digests of what the name led to and of the manifest, before anything is fetched
        that they name, and refuses by raising. With `everything`, images of other platforms come along, packed as they
        are. Raises ImageError and its kinds."""
        top = await source.top()
        chosen, manifest = await resolve(source, top, self.threads, self.config)
        await admit(top.digest, chosen.digest)
        for document in (top, chosen):
            self.leases.lease_blob(document.digest, held.blobs)
            await self.threads.io(self._keep_document, document)
        what = f"config {manifest.config.digest}"
        await self.fetch(source, manifest.config, held, tell)
        data = await self.threads.io(self.blobs.read, manifest.config.digest, self.config.config_bytes)
        config, layers = await self.threads.io(parse_config, data, manifest, what, self.config)
        check_platform(config, self.config.platform, what)
        opened = await self.threads.io(self.opener.open, layers, held.keys)
        await _Layers(self, source, layers, held, tell, opened).run()
        index = await fetch_everything(self, source, top, held, tell) if everything else None
        descriptor = Descriptor(manifest.media_type, chosen.digest, len(chosen.data))
        return Pulled(manifest.image_id(chosen.digest), descriptor, top.digest, config, layers, index)

    def _keep_document(self, document: Document) -> None:
        if not self.blobs.is_sound(Descriptor("", document.digest, len(document.data))):
            self.blobs.put(document.digest, document.data)
            self._seal(document.digest)

    def _seal(self, digest: str) -> None:
        if self.config.fs_verity:
            self.blobs.seal(digest)

    # ------------------------------------------------------------------------------------------------------- blobs

    async def fetch(
        self, source: Source, blob: Descriptor, held: Held, tell: ProgressFunction, attempt: Attempt | None = None
    ) -> None:
        """After: the blob is whole and durable. Whoever asks for the same blob meanwhile waits, and sees progress.
        `attempt` may begin with it before."""
        self.leases.lease_blob(blob.digest, held.blobs)

        def listener(phase: str, done: int) -> None:
            tell(Progress(blob.digest, phase, done, blob.size))

        listener("waiting", 0)
        async with self._flights.turn(blob.digest, listener) as announce:
            small = blob.size <= self.config.config_bytes  # cheap enough to look inside
            if await self.threads.io(self.blobs.is_sound if small else self.blobs.has, blob):
                announce("exists", blob.size)
                return
            async with held.turns, self._downloads.here():
                ingest = await self._ingest(blob)
                if ingest is not None:
                    await self._download(source, blob, ingest, lambda done: announce("download", done), attempt)
            announce("download", blob.size)

    async def _ingest(self, blob: Descriptor) -> Ingest | None:
        """The locked partial file, or None when another process has completed the blob meanwhile."""
        while True:
            ingest = await self.threads.io(self.blobs.ingest, blob)
            if ingest is not None:
                return ingest
            await asyncio.sleep(_LOOK_AGAIN_S)
            if await self.threads.io(self.blobs.has, blob):
                return None

    async def _download(
        self,
        source: Source,
        blob: Descriptor,
        ingest: Ingest,
        report: Callable[[int], None],
        attempt: Attempt | None,
    ) -> None:
        try:
            done = await self.threads.io(ingest.load)
            if attempt is not None:
                attempt.follow(await self.threads.io(ingest.follow))

            def step(done: int) -> None:
                report(done)
                if attempt is not None:
                    attempt.step()

            step(done)
            await source.blob(blob, ingest, step)
            await self.threads.io(ingest.finish)
            await self.threads.io(self._seal, blob.digest)
        except ContentInvalid:
            ingest.discard()
            raise
        except OSError as error:
            raise ImageError(f"write blob {blob.digest}: {errno_text(error)}") from error
        finally:
            # In a thread, and not awaited by name: it waits for a write under way, and a second cancel changes nothing.
            await asyncio.wait({self.threads.start_io(ingest.close)})


class _Layers:
    """The layers of one pull, downloaded and unpacked at once."""

    def __init__(
        self,
        puller: Puller,
        source: Source,
        layers: tuple[Layer, ...],
        held: Held,
        tell: ProgressFunction,
        keys: Mapping[str, LayerKey],
    ) -> None:
        self._puller = puller
        self._source = source
        self._layers = layers
        self._held = held
        self._tell = tell
        self._keys = keys
        self._arrived = [asyncio.Event() for _ in layers]
        self._committed = [asyncio.Event() for _ in layers]
        self._leased = asyncio.Event()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lease())
                # The largest first: it takes longest to come, and then to unpack.
                for number in sorted(range(len(self._layers)), key=lambda at: -self._layers[at].blob.size):
                    group.create_task(self._layer(number))
        except BaseExceptionGroup as group_error:
            first = first_of(group_error)
            raise first from first.__cause__

    async def _lease(self) -> None:
        puller = self._puller
        chains = {layer.chain_id for layer in self._layers}
        await puller.threads.io(puller.leases.lease_layers, chains, self._held.layers)
        self._leased.set()

    async def _layer(self, number: int) -> None:
        layer = self._layers[number]
        attempt = self._puller.ahead.attempt(layer, self._parent(number), self._keys.get(layer.chain_id))
        try:
            await self._fetch_and_unpack(number, attempt)
        finally:
            if attempt is not None:
                await attempt.end()

    async def _fetch_and_unpack(self, number: int, attempt: Attempt | None) -> None:
        layer = self._layers[number]
        has = self._puller.unpacker.has_layer
        if attempt is not None:
            await self._leased.wait()  # or what is unpacked might be collected before it is
        if self._puller.config.keep_blobs:
            await self._puller.fetch(self._source, layer.blob, self._held, self._tell, attempt)
            await self._leased.wait()
        else:
            await self._leased.wait()  # or what is here now might go while nothing is fetched in its place
            if not await self._puller.threads.io(has, layer.chain_id):
                await self._puller.fetch(self._source, layer.blob, self._held, self._tell, attempt)
        if number and not self._puller.unpacking.can_cancel:
            # An unpack waits for its parent's commit. Where that wait cannot be ended, it must not begin before all
            # below have arrived: a download may fail.
            await self._arrived[number - 1].wait()
        self._arrived[number].set()
        if attempt is not None and attempt.begun:
            attempt.whole()
            self._report(layer, "unpack", 0)
        if attempt is not None and await attempt.outcome():
            self._report(layer, "done")
        elif await self._puller.threads.io(has, layer.chain_id):
            self._report(layer, "exists")
        else:
            await self._unpack(number, layer)
            self._report(layer, "done")
        self._committed[number].set()

    def _parent(self, number: int) -> str | None:
        return self._layers[number - 1].chain_id if number else None

    async def _unpack(self, number: int, layer: Layer) -> None:
        puller = self._puller
        blob = puller.blobs.path(layer.blob.digest)
        parent = self._parent(number)
        key = self._keys.get(layer.chain_id)
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
