"""All of an index into the store: the manifests of every platform, their configs and layers, as they are.

    index ─┬─ manifest ─▶ config, layers: downloaded and verified, not unpacked
           ├─ manifest ─▶ …                    (that of this machine's platform is here already)
           └─ index ─▶ …

It runs nothing of what it fetches, so media types that nobody here knows are welcome. Refuses foreign layers, and
indexes beyond the limits on depth, manifests and bytes (threats S35). Invariant: when it returns, all that the index
names is durable, and leased by the pull.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from imagestore.copying.contents import Contents, read
from imagestore.model import ContentInvalid, Descriptor, ProgressFunction
from imagestore.registry import Document
from imagestore.shared import first_of
from imagestore.source import Source

if TYPE_CHECKING:
    from imagestore.pull import Held, Puller


async def fetch_everything(
    puller: Puller, source: Source, top: Document, held: Held, tell: ProgressFunction
) -> Descriptor | None:
    """The index, or None where `top` is a manifest and so has no other platforms. Raises ImageError and its kinds."""
    contents = await puller.threads.io(read, top, puller.config)
    if not contents.is_index:
        return None
    await _Everything(puller, source, held, tell).index(contents, 0)
    return Descriptor(contents.media_type, top.digest, len(top.data))


class _Everything:
    def __init__(self, puller: Puller, source: Source, held: Held, tell: ProgressFunction) -> None:
        self._puller, self._source, self._held, self._tell = puller, source, held, tell
        self._seen: set[str] = set()

    async def index(self, contents: Contents, depth: int) -> None:
        if depth > self._puller.config.index_depth:
            raise ContentInvalid(f"indexes within indexes, deeper than {self._puller.config.index_depth}")
        for child in contents.children:
            if child.digest in self._seen:
                continue
            self._seen.add(child.digest)
            if len(self._seen) > self._puller.config.index_manifests:
                raise ContentInvalid(f"more than {self._puller.config.index_manifests} manifests")
            below = await self._document(child)
            if below.is_index:
                await self.index(below, depth + 1)
            else:
                await self._manifest(child, below)

    async def _document(self, wanted: Descriptor) -> Contents:
        puller = self._puller
        puller.leases.lease_blob(wanted.digest, self._held.blobs)
        if await puller.threads.io(puller.blobs.is_sound, wanted):
            data = await puller.threads.io(puller.blobs.read, wanted.digest, puller.config.manifest_bytes)
        else:
            data = (await self._source.manifest(wanted)).data
            if len(data) != wanted.size:
                raise ContentInvalid(f"manifest {wanted.digest}: {len(data)} bytes, the index says {wanted.size}")
            await puller.threads.io(puller.blobs.put, wanted.digest, data)
        return await puller.threads.io(read, Document(data, wanted.media_type, wanted.digest), puller.config)

    async def _manifest(self, manifest: Descriptor, contents: Contents) -> None:
        size, most = sum(blob.size for blob in contents.blobs), self._puller.config.image_bytes
        if size > most:
            raise ContentInvalid(f"manifest {manifest.digest}: {size} bytes of layers, the limit is {most}")
        try:
            async with asyncio.TaskGroup() as group:
                for blob in contents.blobs:
                    group.create_task(self._puller.fetch(self._source, blob, self._held, self._tell))
        except BaseExceptionGroup as group_error:
            error = first_of(group_error)
            raise error from error.__cause__
