"""May this image run here? The policy of today, asked before an image comes, and each time one is used.

    pull     refused at once by what needs no signature; else, once the manifest is known and before anything it names
             is fetched, signatures are gathered and judged; they are kept with the image
    create   the kept signatures are judged again by the policy as it is then; no network

Refuses everything while the policy or a key of it cannot be read. Invariant: an answer that is remembered was given for
the very files that are there now, and not long ago.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from imagestore.config import StoreConfig
from imagestore.lookaside import read_file, read_lookaside, read_signatures
from imagestore.model import (
    ContentInvalid,
    Image,
    ImageError,
    PolicyInvalid,
    RegistryUnavailable,
    SignatureRefused,
)
from imagestore.origins import Origin
from imagestore.policy import ANYTHING, Material, Policy, Requirements, SignedBy, SigstoreSigned, read_policy
from imagestore.reference import Reference, parse
from imagestore.scopes import Subject, in_registry
from imagestore.signatures import Signature, dump, load, to_blob
from imagestore.source import RegistrySource
from imagestore.transport import Request, Transport, place
from imagestore.verdict import Verdict, judge, needs_signatures

# How long an accepted image is not looked at again while no file has changed: certificates end by the clock.
_REMEMBERED_S = 60.0
_REMEMBERED = 4096
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)
_Stamp = tuple[tuple[str, int, int, int], ...]


class Trust:
    """The policy of one store. Any thread may call what is not async."""

    def __init__(self, config: StoreConfig) -> None:
        self._config = config
        self._timestamps = timestamp_authorities(config)
        self._read: dict[Path, tuple[_Stamp, Policy]] = {}
        self._accepted: dict[tuple[_Stamp, str, str], float] = {}

    # ------------------------------------------------------------------------------------------------------- policy

    def path(self, namespace: str = "") -> Path | None:
        """The file that decides; None where there is none, and then everything is accepted, as containerd does. Raises
        PolicyInvalid for a namespace that could be no file's name."""
        directory = self._config.policy_directory
        if directory is not None and namespace:
            if not _NAMESPACE.fullmatch(namespace):
                raise PolicyInvalid(f"signature policy: the namespace {namespace[:80]!r} is no name of one")
            own = directory / f"{namespace}.json"
            if own.exists():
                return own
        if self._config.policy is not None:
            return self._config.policy
        return next((path for path in self._config.policy_defaults if path.exists()), None)

    def policy(self, namespace: str = "") -> Policy:
        """Raises PolicyInvalid."""
        return self._current(namespace)[1]

    def _current(self, namespace: str) -> tuple[_Stamp, Policy]:
        path = self.path(namespace)
        if path is None:
            return (), ANYTHING
        known = self._read.get(path)
        if known is not None and known[0] == self._stamp(path, known[1]):
            return known
        policy = read_policy(path)
        # The stamp is of the files behind the policy too: a key that was exchanged is another policy.
        self._read[path] = known = (self._stamp(path, policy), policy)
        return known

    def _stamp(self, path: Path, policy: Policy) -> _Stamp:
        """What files the policy stands on are, as far as that can be seen without reading them."""
        found = []
        times = [self._timestamps] if self._timestamps is not None else []
        for name in (path, *(material.path for material in (*policy.materials(), *times) if material.path is not None)):
            try:
                status = os.stat(name)
                found.append((str(name), status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError as error:
                found.append((str(name), -(error.errno or 1), 0, 0))
        return tuple(found)

    # --------------------------------------------------------------------------------------------------------- pulls

    def before(self, subject: Subject, namespace: str = "") -> Requirements:
        """What is required of `subject`. Raises SignatureRefused where no signature could help, PolicyInvalid."""
        policy = self.policy(namespace)
        _, requirements = policy.requirements(subject)
        if not needs_signatures(requirements):
            judge(policy, subject, (), (), time.time()).require()
        return requirements

    def judge(
        self, subject: Subject, digests: tuple[str, ...], signatures: Sequence[Signature], namespace: str = ""
    ) -> Verdict:
        """The verdict of today's policy. Raises PolicyInvalid."""
        return judge(
            self.policy(namespace),
            subject,
            digests,
            signatures,
            time.time(),
            unnamed=self._config.accept_unnamed_bundles,
            timestamps=self._timestamps,
        )

    # ----------------------------------------------------------------------------------------------------------- use

    def permit(self, image: Image, asked: str, origins_of: Callable[[], Sequence[Origin]], namespace: str = "") -> None:
        """Raises SignatureRefused unless today's policy accepts the image by one of its origins: by that of the name
        `asked`, where it has one. PolicyInvalid."""
        stamp, policy = self._current(namespace)
        if policy is ANYTHING:
            return
        key = (stamp, image.id, asked)
        now = time.monotonic()
        if self._accepted.get(key, 0.0) > now:
            return
        origins = origins_of()
        found = _named(origins, asked) or origins or (Origin("local", image.id, (image.manifest_digest,), "[]"),)
        verdicts = [self._again(origin, namespace) for origin in found]
        if not any(verdict.accepted for verdict in verdicts):
            try:
                verdicts[0].require()
            except SignatureRefused as error:
                if all(origin.signatures in ("", "[]") for origin in found):
                    error.add_note("no signatures came with it: pull it again, and they are looked for")
                raise
        if len(self._accepted) >= _REMEMBERED:
            self._accepted.clear()
        self._accepted[key] = now + _REMEMBERED_S

    def _again(self, origin: Origin, namespace: str) -> Verdict:
        try:
            signatures = load(origin.signatures or "[]")
        except ContentInvalid:
            signatures = ()
        return self.judge(_subject(origin), origin.digests, signatures, namespace)


def timestamp_authorities(config: StoreConfig) -> Material | None:
    """Where the certificates of time-stamping authorities are: policy.json has no place for them."""
    path = config.timestamp_authorities
    return Material("image.timestamp_authorities", path) if path is not None else None


def _named(origins: Sequence[Origin], asked: str) -> list[Origin]:
    """The origins that have the very name which is asked for."""
    try:
        reference = parse(asked)
    except ImageError:
        return []
    if reference.digest:
        found = [
            origin
            for origin in origins
            if origin.transport == "docker"
            and reference.digest in origin.digests
            and parse(origin.name).repository == reference.repository
        ]
        # Whoever asks by digest is judged by that name: the policy may have a scope for it.
        return [Origin("docker", str(reference), origin.digests, origin.signatures) for origin in found]
    return [origin for origin in origins if origin.transport == "docker" and origin.name == str(reference)]


def _subject(origin: Origin) -> Subject:
    if origin.transport == "docker":
        return in_registry(parse(origin.name))
    above = [str(parent) for parent in Path(origin.name).parents if str(parent) != "/"]
    scopes = (origin.name, *above) if origin.transport in ("oci", "oci-archive", "dir") else ()
    return Subject(origin.transport, origin.name, scopes)


class Finds(Protocol):
    """Who knows an image's signatures."""

    async def find(self, digests: Sequence[str], requirements: Requirements | None = None) -> list[Signature]: ...


class Gate:
    """The check of one pull. `signatures` are what it found, for the record."""

    def __init__(
        self,
        trust: Trust,
        subject: Subject,
        requirements: Requirements,
        finder: Finds | None,
        namespace: str = "",
    ) -> None:
        self._trust = trust
        self._namespace = namespace
        self._subject = subject
        self._requirements = requirements
        self._finder = finder
        self._digests: tuple[str, ...] = ()
        self.signatures: tuple[Signature, ...] = ()

    async def admit(self, top: str, manifest: str) -> None:
        """Once the digests are known, before anything else is fetched. Raises SignatureRefused, ImageError."""
        self._digests = tuple(dict.fromkeys((manifest, top)))
        if self._finder is not None and needs_signatures(self._requirements):
            self.signatures = tuple(await self._finder.find(self._digests, self._requirements))
        verdict = await asyncio.to_thread(
            self._trust.judge, self._subject, self._digests, self.signatures, self._namespace
        )
        verdict.require()

    def origin(self) -> Origin:
        """For the record, after `admit`."""
        return Origin(self._subject.transport, self._subject.name, self._digests, dump(self.signatures))


class Finder:
    """Gathers the signatures of an image in a registry from all places that its requirements and registries.d name.
    `unsaid` is whether what is attached counts where registries.d does not say."""

    def __init__(
        self,
        reference: Reference,
        source: RegistrySource,
        transport: Transport,
        config: StoreConfig,
        *,
        unsaid: bool = True,
    ) -> None:
        self._reference = reference
        self._source = source
        self._transport = transport
        self._config = config
        self._unsaid = unsaid

    async def find(self, digests: Sequence[str], requirements: Requirements | None = None) -> list[Signature]:
        """Raises ImageError where a place that has signatures does not hand them over: fewer than there are could be
        enough, or too few."""
        from imagestore.attached import Attached
        from imagestore.extension import Extension

        lookaside = await asyncio.to_thread(read_lookaside, self._config.registries_d)
        where = lookaside.place(self._reference)
        # containers/image reads attachments only where registries.d says so; here sigstoreSigned says it.
        sigstore = requirements is None or any(isinstance(one, SigstoreSigned) for one in requirements)
        attached = (self._unsaid if where.attachments is None else where.attachments) and sigstore
        simple = requirements is None or any(isinstance(one, SignedBy) for one in requirements)
        found: list[Signature] = []
        for digest in digests:
            found += await read_signatures(where.read, self._reference.path, digest, self._config.signatures, self._get)
            if simple:
                found += await Extension(self._source, self._reference.path, self._config).signatures(digest)
            if attached:
                found += await Attached(self._source, self._config).signatures(digest)
        size = sum(len(to_blob(one)) for one in found)
        if size > self._config.signatures_bytes:
            limit = self._config.signatures_bytes
            raise ContentInvalid(f"signatures of {self._reference}: {size} bytes in all, the limit is {limit}")
        return found

    async def _get(self, url: str) -> bytes | None:
        limit = self._config.signature_bytes
        if url.startswith("file:"):
            return await asyncio.to_thread(read_file, url, limit)
        async with asyncio.timeout(self._config.answer_timeout_s):
            async with self._transport.send(Request("GET", url)) as answer:
                status = answer.response.status
                if status in (404, 410):
                    return None
                if status != 200:
                    raise RegistryUnavailable(f"lookaside {place(url)}: answered {status}")
                pieces, size = [], 0
                while piece := await answer.response.content.readany():
                    size += len(piece)
                    if size > limit:
                        raise ContentInvalid(f"lookaside {place(url)}: a signature of more than {limit} bytes")
                    pieces.append(piece)
        return b"".join(pieces)
