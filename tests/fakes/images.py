"""`cri.interfaces.Images` in memory: what `offer` was given can be pulled, tagged, removed as from the real store.

Passes tests/contract/test_images.py. For unit tests of `cri`: `failures` makes a pull of a reference fail, `refused`
its use, `namespaces` is who asked, `gate` holds pulls until it is set, `fetches` says what was really fetched.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from imagestore.model import (
    AccessDenied,
    Credentials,
    Descriptor,
    Image,
    ImageConfig,
    ImageError,
    ImageNotFound,
    KeyFile,
    Layer,
    Progress,
    ProgressFunction,
    ReferenceInvalid,
    Usage,
)
from imagestore.reference import Reference, id_prefix, parse


def digest(*parts: object) -> str:
    """A digest that stands for these parts."""
    return f"sha256:{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def make_image(seed: str, layers: int = 2, config: ImageConfig | None = None) -> Image:
    """A plausible image that differs from those of other seeds."""
    built: list[Layer] = []
    for number in range(layers):
        diff_id = digest(seed, "diff", number)
        chain_id = digest(built[-1].chain_id, diff_id) if built else diff_id
        blob = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", digest(seed, "blob", number), 1000)
        built.append(Layer(blob, diff_id, chain_id))
    return Image(
        id=digest(seed, "config"),
        manifest_digest=digest(seed, "manifest"),
        repo_tags=(),
        repo_digests=(),
        size=1000 * layers + 100,
        config=config or ImageConfig(env=("PATH=/bin",), cmd=("/bin/sh",), architecture="amd64"),
        layers=tuple(built),
    )


@dataclass
class _Name:
    reference: Reference
    image_id: str
    served: str


@dataclass
class _Pull:
    task: asyncio.Task[Image]
    waiters: int = 0
    listeners: list[ProgressFunction] = field(default_factory=list)


class MemoryImages:
    """A store and the registries that it can reach."""

    def __init__(self) -> None:
        self.offered: dict[str, Image] = {}
        self.passwords: dict[str, tuple[str, str]] = {}
        self.failures: dict[str, ImageError] = {}
        self.refused: dict[str, ImageError] = {}
        self.namespaces: list[str] = []
        self.gate: asyncio.Event | None = None
        self.fetches: list[str] = []
        self.pinned: set[str] = set()
        self._images: dict[str, Image] = {}
        self._names: dict[str, _Name] = {}
        self._pulls: dict[tuple[str, Credentials | None], _Pull] = {}
        self._garbage: set[str] = set()

    def offer(self, reference: str, image: Image) -> Image:
        """A registry has `image` under `reference` (and its digest) from now on."""
        parsed = parse(reference)
        self.offered[str(parsed)] = image
        self.offered[f"{parsed.repository}@{image.manifest_digest}"] = image
        return image

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
        self.namespaces.append(namespace)
        wanted = parse(reference)
        key = (str(wanted), credentials)
        running = self._pulls.get(key)
        if running is None:
            running = self._pulls[key] = _Pull(asyncio.create_task(self._pull(wanted, credentials, key)))
        running.waiters += 1
        if progress:
            running.listeners.append(progress)
        try:
            await asyncio.wait({running.task})
        finally:
            running.waiters -= 1
            if running.waiters == 0 and not running.task.done():
                running.task.cancel()
                await asyncio.wait({running.task})
        return running.task.result()

    async def _pull(
        self, wanted: Reference, credentials: Credentials | None, key: tuple[str, Credentials | None]
    ) -> Image:
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            return self._fetch(wanted, credentials, self._pulls[key].listeners)
        finally:
            del self._pulls[key]

    def _fetch(self, wanted: Reference, credentials: Credentials | None, tell: list[ProgressFunction]) -> Image:
        self.fetches.append(str(wanted))
        if str(wanted) in self.failures:
            raise self.failures[str(wanted)]
        allowed = self.passwords.get(wanted.domain)
        if allowed and (credentials is None or (credentials.username, credentials.password) != allowed):
            raise AccessDenied(f"pull {wanted}: {wanted.domain} answered 401: log in with valid credentials")
        offered = self.offered.get(str(wanted))
        if offered is None:
            raise ImageNotFound(f"pull {wanted}: {wanted.domain} answered 404 (manifest unknown)")
        known = offered.id in self._images
        self._images[offered.id] = offered
        self._give(_Name(wanted, offered.id, offered.manifest_digest))
        for layer in offered.layers:
            phase = "exists" if known else "done"
            for listener in tell:
                listener(Progress(layer.blob.digest, phase, layer.blob.size, layer.blob.size))
        return self._shown(offered.id)

    def _give(self, name: _Name) -> None:
        old = self._names.get(str(name.reference))
        if old and old.served and old.image_id != name.image_id and not old.reference.digest:
            kept = Reference(old.reference.domain, old.reference.path, "", old.served)
            self._names.setdefault(str(kept), _Name(kept, old.image_id, old.served))
        self._names[str(name.reference)] = name

    def _shown(self, image_id: str) -> Image:
        names = [name for name in self._names.values() if name.image_id == image_id]
        tags = sorted(str(name.reference) for name in names if not name.reference.digest)
        digests = sorted({f"{name.reference.repository}@{name.served}" for name in names if name.served})
        pinned = not self.pinned.isdisjoint((*tags, *digests))
        return replace(self._images[image_id], repo_tags=tuple(tags), repo_digests=tuple(digests), pinned=pinned)

    def get(self, name: str) -> Image | None:
        image_id, _ = self._find(name)
        return self._shown(image_id) if image_id else None

    def _find(self, name: str) -> tuple[str, bool]:
        digits = id_prefix(name)
        if digits is None or len(digits) < 64:
            try:
                wanted = parse(name)
            except ReferenceInvalid:
                pass
            else:
                for found in self._matching(wanted):
                    return found.image_id, False
        ids = [known for known in self._images if digits and known.startswith(f"sha256:{digits}")]
        return (ids[0], True) if len(ids) == 1 else ("", False)

    def _matching(self, wanted: Reference) -> list[_Name]:
        if not wanted.digest:
            return [self._names[str(wanted)]] if str(wanted) in self._names else []
        return [
            name
            for name in self._names.values()
            if name.reference.repository == wanted.repository and name.served == wanted.digest
        ]

    def permit(self, image: Image, name: str, namespace: str = "", keys: tuple[KeyFile, ...] = ()) -> None:
        self.namespaces.append(namespace)
        refused = self.refused.get(name)
        if refused is not None:
            raise refused

    def list(self) -> Sequence[Image]:
        return [self._shown(image_id) for image_id in self._images]

    def remove(self, name: str) -> None:
        image_id, is_id = self._find(name)
        if not image_id:
            return
        gone = (
            [found for found in self._names.values() if found.image_id == image_id]
            if is_id
            else self._matching(parse(name))
        )
        for found in gone:
            del self._names[str(found.reference)]
        if not any(found.image_id == image_id for found in self._names.values()):
            del self._images[image_id]
            self._garbage.add(image_id)

    def tag(self, name: str, new: str) -> None:
        wanted = parse(new)
        if wanted.digest:
            raise ReferenceInvalid(f"tag {name}: {new!r} is a digest, expected a tag")
        image_id, _ = self._find(name)
        if not image_id:
            raise ImageNotFound(f"tag {name}: no such image")
        self._give(_Name(wanted, image_id, ""))

    def collect(self) -> None:
        self._garbage.clear()

    def usage(self) -> Usage:
        known = set(self._images) | self._garbage
        return Usage(4096 * (1 + len(known)), 1 + len(known))
