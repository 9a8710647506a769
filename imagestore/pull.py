"""From a source to a whole image: manifest, then its config and all layers at once (imagestore.layers).

    top ─> choose platform ─> admit ─┬─ config: download ─> layers and their keys are known ─┐
                                     ├─ layer 0: download ─────────────────────────> unpack ─┤ commit in order,
                                     └─ layer n: download ─────────────────────────> unpack ─┴─> Pulled

Refuses to make a layer visible of a blob that was not verified, and with `early_unpacks` 0 to hand anything else to
the unpacker (imagestore.ahead, docs/decisions/0012). Invariant: when `run` returns, every blob is durable and every
layer committed, and all of them are leased until the caller has recorded the image; when it raises, what is left is
whole blobs, committed layers and resumable ingests, which the next `collect` or the next pull takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import field, replace

from imagestore.ahead import Ahead, Attempt
from imagestore.config import StoreConfig
from imagestore.content import Blobs, Ingest, errno_text
from imagestore.encryption.layers import Opener
from imagestore.everything import fetch_everything
from imagestore.growth import Growth
from imagestore.layers import Layers
from imagestore.leases import Leases
from imagestore.model import (
    ContentInvalid,
    Descriptor,
    ImageConfig,
    ImageError,
    KeyFile,
    Layer,
    Progress,
    ProgressFunction,
    Unpacker,
)
from imagestore.platforms import Platform
from imagestore.registry import Document
from imagestore.resolve import resolve
from imagestore.shared import Flights, Slots
from imagestore.source import Source
from imagestore.threads import Threads
from imagestore.unpacking import Unpacking
from runtime.linux.dataclass import dataclass

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
    """The leases of one pull, its turns at downloading, the platform that it is for, and the private keys that its
    caller gave."""

    turns: asyncio.Semaphore
    platform: Platform
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
        self.opener = Opener(config.decryption_keys, config.key_providers)

    async def run(
        self, source: Source, held: Held, tell: ProgressFunction, admit: Admit, *, everything: bool = False
    ) -> Pulled:
        """`admit` is asked with the digests of what the name led to and of the manifest, before anything is fetched
        that they name, and refuses by raising. With `everything`, images of other platforms come along, packed as they
        are. Raises ImageError and its kinds."""
        top = await source.top()
        chosen, manifest = await resolve(source, top, self.threads, replace(self.config, platform=held.platform))
        await admit(top.digest, chosen.digest)
        for document in (top, chosen):
            self.leases.lease_blob(document.digest, held.blobs)
            await self.threads.io(self._keep_document, document)
        known = await Layers(self, source, manifest, held, tell).run()
        index = await fetch_everything(self, source, top, held, tell) if everything else None
        descriptor = Descriptor(manifest.media_type, chosen.digest, len(chosen.data))
        return Pulled(manifest.image_id(chosen.digest), descriptor, top.digest, known.config, known.layers, index)

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
            ingest = await self.threads.take(_close, self.blobs.ingest, blob)
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
                attempt.follow(await self.threads.take(Growth.close, ingest.follow))

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


def _close(ingest: Ingest | None) -> None:
    if ingest is not None:
        ingest.close()
