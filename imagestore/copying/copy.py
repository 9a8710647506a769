"""One image, or all of an index, from a source to a target.

    top ─┬─ a manifest ──> its blobs, each: there already? ─no─> staged, verified ─> (changed) ─> handed over
         └─ an index ──> the one for a platform, or with `all` every child, then the index itself

Event loop only. Refuses indexes within indexes beyond `index_depth`, with `preserve_digests` any change, and changes of
what is signed. Invariant: what is handed to a target has been verified here, and a manifest follows all that it names.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from imagestore.config import StoreConfig
from imagestore.content import Blobs, errno_text
from imagestore.copying.contents import Contents, encode, read
from imagestore.copying.convert import FORMATS, compression, recompress, rewritten
from imagestore.copying.signatures import Carrying, counted
from imagestore.copying.targets import Target
from imagestore.encryption.keys import Recipients
from imagestore.encryption.layers import is_encrypted, plain_type
from imagestore.encryption.sealing import decrypt, encrypt
from imagestore.errands import Errand
from imagestore.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    digest_of,
)
from imagestore.model import ContentInvalid, Descriptor, ImageError, KeyFile, Progress, ProgressFunction
from imagestore.platforms import Platform
from imagestore.pull import Admit
from imagestore.registry import Document
from imagestore.resolve import resolve
from imagestore.shared import first_of
from imagestore.source import Source
from imagestore.threads import Threads
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """`format` is "oci", "docker" or "" for what it is; `compress` "gzip", "zstd", "none" for every layer, "plain" for
    gzip where a layer is not compressed, or "" for what it is."""

    platform: Platform
    all: bool = False
    format: str = ""
    compress: str = ""
    preserve_digests: bool = False
    decryption_keys: tuple[KeyFile, ...] = ()
    """With any, every encrypted layer is decrypted, or the copy fails."""
    recipients: Recipients = Recipients()
    """With any, every layer is encrypted for them."""


@dataclass(frozen=True, slots=True)
class _Change:
    """What a layer goes through on its way: decrypted, compressed with `how` unless that is None, encrypted."""

    decrypt: bool = False
    how: str | None = None
    encrypt: bool = False

    def __bool__(self) -> bool:
        return self != _Change()


class Copy:
    """A copy of one image. `staging` holds a blob from its first byte until the target has it; `admit` is asked, as in
    a pull, before anything is copied, and refuses by raising; `carrying` has the signatures."""

    def __init__(
        self,
        source: Source,
        target: Target,
        staging: Blobs,
        threads: Threads,
        config: StoreConfig,
        options: CopyOptions,
        tell: ProgressFunction = lambda _: None,
        admit: Admit | None = None,
        carrying: Carrying | None = None,
    ) -> None:
        self._admit = admit
        self._source, self._target, self._staging = source, target, staging
        self._threads, self._config, self._options, self._tell = threads, config, options, tell
        self._slots = asyncio.Semaphore(config.concurrent_downloads)
        self._done: dict[str, Descriptor] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._carrying = carrying or Carrying(None, None, "")
        self._images = 0
        # Bytes are copied between one question and the next: only each by itself has a limit.
        self._errand = Errand(math.inf)

    async def run(self) -> Document:
        """The top manifest as the target has it. Raises ImageError and its kinds."""
        try:
            return await self._run()
        finally:
            self._errand.end()

    async def _run(self) -> Document:
        asked = top = await self._source.top()
        if read(top, self._config).is_index and not self._options.all:
            config = replace(self._config, platform=self._options.platform)
            top, _ = await resolve(self._source, top, self._threads, config)
        if self._admit is not None:
            await self._admit(asked.digest, top.digest)
        return await self._document(
            top, 0, "and its digest is to be preserved" if self._options.preserve_digests else ""
        )

    async def _child(self, wanted: Descriptor) -> Document:
        document = await self._source.manifest(wanted)
        if len(document.data) != wanted.size or document.digest != wanted.digest:
            raise ContentInvalid(f"manifest {wanted.digest}: not what its index says")
        # What led to it says what it is; a registry may have no better word than octet-stream.
        return Document(document.data, document.content_type or wanted.media_type, document.digest)

    # --------------------------------------------------------------------------------------------------- documents

    async def _document(self, document: Document, depth: int, fixed: str = "") -> Document:
        """Copies a manifest with all that it names; what it has become at the target. `fixed` is why it must not
        change."""
        contents = read(document, self._config)
        document = Document(document.data, contents.media_type, document.digest)
        if depth > self._config.index_depth:
            raise ContentInvalid(f"manifest {document.digest}: indexes within indexes, too deep")
        signatures = await self._carrying.of(document)
        if signatures and not fixed:
            fixed = f"which would invalidate {counted(signatures)} of {document.digest} (see --remove-signatures)"
        if contents.is_index:
            made = await self._index(document, contents, depth, fixed)
        else:
            self._images += 1
            if self._images > self._config.index_manifests:
                raise ContentInvalid(f"more than {self._config.index_manifests} manifests")
            made = await self._manifest(document, contents, fixed)
        await self._target.manifest(made, depth == 0)
        await self._carrying.put(made, depth == 0, signatures)
        return made

    async def _index(self, document: Document, contents: Contents, depth: int, fixed: str) -> Document:
        made = {}
        for child in contents.children:
            made[child.digest] = await self._document(await self._child(child), depth + 1, fixed)
        index_type = self._index_type(contents)
        if index_type == contents.media_type and all(digest == child.digest for digest, child in made.items()):
            return document
        _may_change(document, fixed)
        # Every field but those of the children stays: annotations, platforms, what we do not know.
        changed = json.loads(document.data)
        changed["mediaType"] = index_type
        for item in changed["manifests"]:
            new = made[item["digest"]]
            item.update(mediaType=new.content_type, digest=new.digest, size=len(new.data))
        data = encode(changed)
        return Document(data, index_type, digest_of(data))

    def _index_type(self, contents: Contents) -> str:
        format_type = self._target.format_type or FORMATS.get(self._options.format, "")
        return {OCI_MANIFEST: OCI_INDEX, DOCKER_MANIFEST: DOCKER_LIST}.get(format_type, contents.media_type)

    async def _manifest(self, document: Document, contents: Contents, fixed: str) -> Document:
        wanted = {layer.digest: self._change(layer, fixed) for layer in contents.layers}
        # An artifact has no words in another format: it stays what it is, unless the target insists.
        own = OCI_MANIFEST if self._options.recipients else contents.media_type  # Docker's has no encrypted layers
        format_type = self._target.format_type or FORMATS.get(self._options.format, "") or own
        if any(wanted.values()) or format_type != contents.media_type:
            _may_change(document, fixed)
        found: dict[str, Descriptor] = {}

        async def carry(blob: Descriptor) -> None:
            made = await self._blob(blob, wanted.get(blob.digest, _Change()))
            if made.digest != blob.digest:
                found[blob.digest] = made

        try:
            async with asyncio.TaskGroup() as group:
                for blob in contents.blobs:
                    group.create_task(carry(blob))
        except BaseExceptionGroup as failed:
            raise first_of(failed) from None
        return rewritten(document, contents, format_type, found)

    def _change(self, layer: Descriptor, fixed: str) -> _Change:
        options, sealed = self._options, is_encrypted(layer)
        decrypt = sealed and bool(options.decryption_keys)
        if sealed and options.recipients and not decrypt:
            raise ImageError(f"layer {layer.digest}: it is encrypted already, and no key is given to open it")
        plain = replace(layer, media_type=plain_type(layer)) if decrypt else layer
        encrypt = bool(options.recipients) and compression(plain) is not None
        return _Change(decrypt, self._compression(plain, fixed), encrypt)

    def _compression(self, layer: Descriptor, fixed: str) -> str | None:
        """What the layer has to be compressed with, None when it stays as it is."""
        has = compression(layer)
        if has is None:
            return None
        if self._target.layers is not None:
            wanted = self._target.layers
        elif self._options.compress == "plain":
            wanted = has or ("" if fixed else "gzip")  # nobody has asked for that: it is not worth a signature
        elif self._options.compress:
            wanted = self._options.compress.replace("none", "")
        else:
            return None
        return None if wanted == has else wanted

    # ------------------------------------------------------------------------------------------------------- blobs

    async def _blob(self, blob: Descriptor, change: _Change) -> Descriptor:
        """Carries a blob over, once for however many manifests name it; the descriptor that it has there."""
        async with self._locks.setdefault(blob.digest, asyncio.Lock()):
            if blob.digest not in self._done:
                async with self._slots:
                    self._done[blob.digest] = await self._carry(blob, change)
            return self._done[blob.digest]

    async def _carry(self, blob: Descriptor, change: _Change) -> Descriptor:
        if not change and await self._target.has(blob):
            self._tell(Progress(blob.digest, "exists", blob.size, blob.size))
            return blob
        await self._stage(blob, self._teller(blob, "download"))
        path = self._staging.path(blob.digest)
        made = blob
        try:
            if change:
                self._tell(Progress(blob.digest, "compress", 0, blob.size))
                path, made = await self._threads.io(self._changed, path, blob, change)
            if not change or not await self._target.has(made):
                await self._target.put(made, path, self._teller(made, "upload"))
        finally:
            await self._threads.io(_unlink, path, self._staging.path(blob.digest))
        self._tell(Progress(blob.digest, "done", blob.size, blob.size))
        return made

    def _changed(self, path: Path, blob: Descriptor, change: _Change) -> tuple[Path, Descriptor]:
        """Another file and its descriptor; of the files between nothing is left."""
        options, limit, asked = self._options, self._config.image_bytes, (self._config.key_providers, self._errand)
        steps: list[tuple[str, Callable[[Path, Descriptor, Path], Descriptor]]] = []
        if change.decrypt:
            steps.append(("open", lambda old, of, new: decrypt(old, of, options.decryption_keys, new, *asked)))
        if (how := change.how) is not None:
            steps.append((how or "plain", lambda old, of, new: recompress(old, of, how, new, limit)))
        if change.encrypt:
            steps.append(("sealed", lambda old, of, new: encrypt(old, of, options.recipients, new, *asked)))
        made, files = blob, [path]
        try:
            for name, step in steps:
                files.append(path.with_name(f".{path.name}.{name}"))
                made = step(files[-2], made, files[-1])
        except OSError as error:
            _unlink(*files[1:])
            raise ImageError(f"layer {blob.digest}: {errno_text(error)}") from error
        except ImageError:
            _unlink(*files[1:])
            raise
        _unlink(*files[1:-1])
        return files[-1], made

    async def _stage(self, blob: Descriptor, report: Callable[[int], None]) -> None:
        ingest = await self._threads.io(self._staging.ingest, blob)
        if ingest is None:
            raise ImageError(f"blob {blob.digest}: another process works in {self._staging.path(blob.digest).parent}")
        try:
            await self._threads.io(ingest.load)
            await self._source.blob(blob, ingest, report)
            await self._threads.io(ingest.finish)
        finally:
            await asyncio.wait({self._threads.start_io(ingest.close)})

    def _teller(self, blob: Descriptor, phase: str) -> Callable[[int], None]:
        return lambda done: self._tell(Progress(blob.digest, phase, done, blob.size))


def _may_change(document: Document, fixed: str) -> None:
    if fixed:
        raise ImageError(f"manifest {document.digest}: it would have to change, {fixed}")


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
