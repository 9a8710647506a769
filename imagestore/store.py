"""The image store: pulled images, whole and unpacked, in a directory that is an OCI image layout.

    ROOT/oci-layout, index.json    the layout's own files; index.json names every image that is recorded
    ROOT/blobs/sha256/             manifests, configs, layers: whole, verified, durable
    ROOT/ingest/                   what is on its way in; hidden names

Refuses to show an image that is not whole: records are read together with what is on disk and in the snapshotter.
Invariant: an image is recorded after its last byte is durable, and forgotten before the first one is removed. `pull`
and `import_layout` belong to one event loop at a time; all else blocks and may be called from any thread.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from imagestore.catalog import Catalog
from imagestore.collector import Collector, Garbage
from imagestore.config import StoreConfig
from imagestore.content import Blobs, errno_text
from imagestore.doctor import Doctor, Problem
from imagestore.encryption.layers import is_encrypted
from imagestore.errands import Errand
from imagestore.frame import Frame
from imagestore.imports import Imports
from imagestore.layout import Layout
from imagestore.leases import Leases
from imagestore.manifest import check_platform
from imagestore.model import (
    AccessDenied,
    ContentInvalid,
    Credentials,
    Image,
    ImageError,
    ImageNotFound,
    KeyFile,
    Progress,
    ProgressFunction,
    ReferenceInvalid,
    RegistryUnavailable,
    SignatureRefused,
    Unpacker,
    Usage,
)
from imagestore.platforms import Platform, parse_platform
from imagestore.pull import Held, Puller
from imagestore.reach import Reach
from imagestore.records import ImageRecord, Records
from imagestore.reference import Reference, parse
from imagestore.remotes import Remotes
from imagestore.repair import Repair
from imagestore.reserve import Reserve
from imagestore.scopes import in_registry
from imagestore.shared import SharedWork
from imagestore.sharing import Share, Sharing
from imagestore.source import RegistrySource
from imagestore.threads import Threads
from imagestore.told import kind_of, told
from imagestore.transport import Transport, preload
from imagestore.trust import Trust
from imagestore.usage import disk_usage
from runtime.linux.dataclass import dataclass

__all__ = ["Store", "StoreConfig"]


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who asks for a pull, a login, the pod's namespace, private keys; and whether for all platforms, or another than
    this machine's."""

    credentials: Credentials | None
    namespace: str
    keys: tuple[KeyFile, ...]
    everything: bool
    platform: Platform | None


class Store:
    """cri.interfaces.Images. `db` belongs to the store alone; `root` is made when it is missing."""

    def __init__(self, root: Path, db: sqlite3.Connection, unpacker: Unpacker, config: StoreConfig) -> None:
        self._root = root
        self._unpacker = unpacker
        self._config = config
        self._blobs = Blobs(root)
        self._blobs.create()
        self._reserve = Reserve(root / "ingest")
        self._layout = Layout(root, self._blobs, config)
        self._records = Records(db, self._layout.publish, self._reserve.spend)
        self._records.publish()
        self._reserve.fill()
        self._leases = Leases(root / "ingest")
        self._threads = Threads(
            config.concurrent_downloads + 2,
            config.concurrent_unpacks + config.concurrent_pulls + config.early_unpacks,
            config.concurrent_pulls,
        )
        self._transport = Transport(config)
        self._remotes = Remotes(self._transport, self._threads, config)
        self._catalog = Catalog(self._blobs, self._records, self._remotes, unpacker, config)
        contents = self._catalog.contents
        reach = Reach(self._blobs, self._layout, contents, config)
        self._collector = Collector(self._blobs, self._leases, self._records, unpacker, reach, config)
        self._doctor = Doctor(self._blobs, self._records, self._layout, unpacker, contents, config)
        self._sharing = Sharing(self._blobs, self._records, unpacker, reach)
        self._trust = Trust(config)
        self._puller = Puller(self._blobs, self._leases, unpacker, self._threads, config)
        self._frame = Frame(
            self._records,
            self._catalog,
            self._leases,
            self._puller,
            self._remotes,
            self._transport,
            self._trust,
            self._threads,
            config,
        )
        self.watched = self._frame.watched
        imports = Imports(self._frame)
        self.import_layout, self.import_archive = imports.layout, imports.archive
        self._repair = Repair(self._frame, self._doctor, self._records, self._catalog)
        self._shared: SharedWork[Image, Progress] = SharedWork(config.cancel_wait_s)

    # --------------------------------------------------------------------------------------------------------- pulls

    async def pull(
        self,
        reference: str,
        credentials: Credentials | None = None,
        progress: ProgressFunction | None = None,
        namespace: str = "",
        keys: tuple[KeyFile, ...] = (),
        *,
        all_platforms: bool = False,
        platform: str = "",
    ) -> Image:
        """See cri.interfaces.Images.pull. A short name that may mean several images is the first that there is."""
        wanted_platform = parse_platform(platform) if platform else None
        caller = _Caller(credentials, namespace, keys, all_platforms, wanted_platform)
        candidates = self._remotes.candidates(reference)
        said: list[str] = []
        for wanted in candidates[:-1]:
            try:
                return await self._pull_one(wanted, caller, progress)
            except (ImageNotFound, AccessDenied, RegistryUnavailable) as error:
                said.append(str(error))
        try:
            return await self._pull_one(candidates[-1], caller, progress)
        except ImageError as error:
            if not said or isinstance(error, SignatureRefused):
                raise
            kind = kind_of(error)
            raise kind("; ".join([*said[:8], str(error)])) from error

    async def _pull_one(self, wanted: Reference, caller: _Caller, progress: ProgressFunction | None) -> Image:
        # Who asks is part of what is asked: nobody joins a pull that somebody else's password, key or policy opened.
        try:
            image = await self._shared.join(
                (str(wanted), caller),
                lambda tell: self._pull(wanted, caller, self._frame.also(str(wanted), tell)),
                progress,
            )
            if not self._config.keep_blobs and not image.indexes:
                await asyncio.to_thread(self._drop_layers, image)
            return image
        except ImageError as error:
            raise told(f"pull {wanted}", error) from error

    async def _pull(self, wanted: Reference, caller: _Caller, tell: ProgressFunction) -> Image:
        async def work(held: Held) -> Image:
            requirements = await self._threads.io(self._trust.before, in_registry(wanted), caller.namespace)
            await self._threads.io(preload)
            async with self._transport.open():
                source = await self._frame.source(wanted, caller.credentials)
                # What other platforms have may be missing where this one's is here.
                image = None
                if not caller.everything and caller.platform is None:
                    image = await self._unchanged(wanted, source, caller)
                if image is None:
                    gate = self._frame.gate(source, requirements, caller.namespace)
                    pulled = await self._puller.run(source, held, tell, gate.admit, everything=caller.everything)
                    image = await self._frame.record(wanted, pulled, pulled.served, gate)
                return image

        return await self._frame.session(work, caller.keys, caller.platform)

    def _drop_layers(self, image: Image) -> None:
        for layer in image.layers:
            self._collector.remove_blob(layer.blob.digest)

    async def _unchanged(self, wanted: Reference, source: RegistrySource, caller: _Caller) -> Image | None:
        """The image when the registry still means by `wanted` what is here, whole."""
        record = await self._threads.io(self._records.by_name, wanted)
        served = {name.served for name in record.names if name.name == str(wanted)} if record else set()
        if record is None or not served:
            return None
        try:
            digest = await source.digest()
        except ContentInvalid:
            return None  # some registries know no HEAD: then the manifest itself tells
        if digest not in served:
            return None
        return await self._threads.ask(self._still_permitted, record, str(wanted), caller)

    def _still_permitted(self, record: ImageRecord, name: str, caller: _Caller, errand: Errand) -> Image | None:
        """The image of a record, if it is whole and the policy of today accepts it with the signatures it came with."""
        image = self._catalog.image(record, again=True)
        try:
            if image is not None:
                check_platform(image.config, self._config.platform, name)
                self._permit(image, name, caller.namespace, caller.keys, errand)
        except ImageNotFound:
            return None  # it was pulled for another platform
        except SignatureRefused:
            return None  # there may be other signatures by now
        return image

    # ----------------------------------------------------------------------------------------------------- questions

    def get(self, name: str) -> Image | None:
        """See cri.interfaces.Images.get."""
        record, _ = self._catalog.find(name)
        return self._catalog.image(record) if record else None

    def permit(self, image: Image, name: str, namespace: str = "", keys: tuple[KeyFile, ...] = ()) -> None:
        """See cri.interfaces.Images.permit."""
        self._permit(image, name, namespace, keys, Errand())

    def has_seals(self, name: str) -> bool:
        """Whether `permit` would read what strangers have made and no digest of ours vouches for its harmlessness:
        signatures of the image, or keys that its layers' come wrapped in."""
        image = self.get(name)
        return image is not None and (
            any(is_encrypted(layer.blob) for layer in image.layers)
            or any(origin.signatures not in ("", "[]") for origin in self._records.origins(image.id))
        )

    def _permit(self, image: Image, name: str, namespace: str, keys: tuple[KeyFile, ...], errand: Errand) -> None:
        try:
            self._trust.permit(image, name, lambda: self._records.origins(image.id), namespace)
            self._puller.opener.open(image.layers, keys, errand)
        except ImageError as error:
            raise told(f"use image {name}", error) from error

    def list(self) -> Sequence[Image]:
        """See cri.interfaces.Images.list."""
        images = (self._catalog.image(record) for record in self._records.images())
        return [image for image in images if image is not None]

    # ------------------------------------------------------------------------------------------------------- changes

    def remove(self, name: str) -> None:
        """See cri.interfaces.Images.remove. By digest: all that this repository calls by it, tags included."""
        record, is_id = self._catalog.find(name)
        if record is not None and is_id:
            self._records.remove_image(record.id)
        elif record is not None:
            for meaning in self._catalog.meanings(name):
                if self._records.by_name(meaning) is not None:
                    self._records.remove_name(meaning)
                    break

    def tag(self, name: str, new: str) -> None:
        """See cri.interfaces.Images.tag. Raises ImageNotFound, ReferenceInvalid."""
        wanted = parse(new)
        if wanted.digest:
            raise ReferenceInvalid(f"tag {name}: {new!r} is a digest, expected a tag")
        record, _ = self._catalog.find(name)
        if record is None or not self._records.tag(record.id, record.manifest, wanted):
            raise ImageNotFound(f"tag {name}: no such image")

    def collect(self) -> None:
        """See cri.interfaces.Images.collect. Does nothing while another process pulls into the same root."""
        try:
            kept = self._collector.collect()
            if kept is None:
                return
            self._catalog.forget(kept)
            self._layout.forget(kept)
            self._records.publish()
            self._reserve.fill()
        except OSError as error:
            raise ImageError(f"collect images: {errno_text(error)}") from error

    def garbage(self) -> Sequence[Garbage]:
        """What `collect` would remove now, and why. Raises ImageError."""
        try:
            return self._collector.plan()
        except OSError as error:
            raise ImageError(f"look for garbage: {errno_text(error)}") from error

    def check(self) -> Sequence[Problem]:
        """All that is not as it is recorded; reads every blob. Changes nothing. Raises ImageError."""
        return self._doctor.check()

    async def repair(self, problems: Sequence[Problem], progress: ProgressFunction | None = None) -> Sequence[Problem]:
        """Throws away what `check` found damaged and fetches it again from where it came; what is still wrong then,
        with the reason. Raises ImageError."""
        return await self._repair.run(problems, progress or (lambda _: None))

    def sharing(self) -> tuple[Sequence[Share], int]:
        """What each image takes on disk, and what all of them do together. Raises ImageError."""
        try:
            return self._sharing.measure()
        except OSError as error:
            raise ImageError(f"measure images: {errno_text(error)}") from error

    def usage(self) -> Usage:
        """See cri.interfaces.Images.usage."""
        mine = disk_usage(self._root)
        layers = self._config.layers_usage() if self._config.layers_usage else Usage(0, 0)
        return Usage(mine.bytes + layers.bytes, mine.inodes + layers.inodes)
