"""`ocid sign`: signs an image that is in a registry, and puts the signature where those who verify look for it.

An index is signed together with every manifest that it lists: some readers look at the one, some at the other. Refuses
to sign for a name that is none of a tag, and by nothing at all. Invariant: what is signed is the digest of bytes that
were read and hashed here, never one that a registry told.
"""

from __future__ import annotations

from collections.abc import Sequence

from imagestore import signing
from imagestore.attaching import Attaching, lay
from imagestore.config import StoreConfig
from imagestore.identity import to_sign
from imagestore.keyless import Services
from imagestore.lookaside import read_lookaside
from imagestore.manifest import Index, parse_document
from imagestore.model import ContentInvalid, Credentials, ReferenceInvalid
from imagestore.push import Pusher
from imagestore.reference import Reference, parse
from imagestore.registry import Document
from imagestore.signatures import Bundle, Cosign, Signature
from imagestore.source import RegistrySource
from imagestore.tiled_log import own_hash
from imagestore.verification import Reach
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class How:
    """By what, and where to. Of `key`, `openpgp` and `token` one is there; `fulcio` goes with `token`."""

    key: bytes = b""
    openpgp: bytes = b""
    password: bytes | None = None
    token: str = ""
    fulcio: str = ""
    rekor: str = ""
    rekor_2: bool = False
    """`rekor` is a log of Rekor 2, whose answers say no time."""
    log: bytes = b""
    """The log's public key, PEM: what it answers is verified by that before anything is pushed."""
    stamper: str = ""
    bundle: bool = False
    lookaside: bool = False
    name: str = ""
    """What the signature says that the image is called; "" for what it is asked for by."""


@dataclass(frozen=True, slots=True)
class Signed:
    """One signature that was made."""

    digest: str
    name: str
    where: str


async def sign(reach: Reach, text: str, credentials: Credentials | None, how: How) -> list[Signed]:
    """Raises ImageError and its kinds."""
    reference = parse(text)
    name = _name(reference, how.name)
    source = RegistrySource(reference, await reach.remotes.repositories(reference, credentials))
    documents = await _documents(source, reach.config)
    maker = await _maker(reach, how)
    target = await _attaching(reach, reference, credentials, how)
    done = []
    for document in documents:
        made = await maker.make(document.digest, name)
        done.append(Signed(document.digest, name, await _place(reach, reference, target, document, made)))
    return done


def _name(reference: Reference, given: str) -> str:
    name = to_sign(given or str(reference))
    if not name:
        raise ReferenceInvalid(
            f"sign {reference}: {given or str(reference)!r} has no tag; say with --as what the signature should call it"
        )
    return name


async def _documents(source: RegistrySource, config: StoreConfig) -> list[Document]:
    """What the name leads to, and every manifest of an index."""
    top = await source.top()
    parsed = parse_document(top.data, top.content_type, "", f"manifest {top.digest}", config)
    found = [top]
    if isinstance(parsed, Index):
        for entry in parsed.entries:
            document = await source.manifest(entry.descriptor)
            if len(document.data) != entry.descriptor.size:
                raise ContentInvalid(f"manifest {document.digest}: another size than the index says")
            found.append(Document(document.data, entry.descriptor.media_type, document.digest))
    # A manifest need not say what it is, where the registry does.
    return [
        Document(one.data, one.content_type.partition(";")[0].strip(), one.digest)
        for one in {one.digest: one for one in found}.values()
    ]


class _Maker:
    """Makes signatures, one key or certificate for all of them."""

    def __init__(
        self, how: How, signer: signing.Signer | None, certified: signing.Certified | None, services: Services
    ) -> None:
        self._how, self._signer, self._certified, self._services = how, signer, certified, services

    async def make(self, digest: str, name: str) -> Signature:
        how, signer = self._how, self._signer
        if signer is None:
            return signing.simple(how.openpgp, how.password, digest, name)
        payload = signing.statement(digest, name) if how.bundle else signing.claim(digest, name)
        data = signing.to_be_signed(payload, bundle=how.bundle)
        if how.rekor_2:
            signature = signer.sign(data, own_hash(signer.public) or "sha256")
        else:
            signature = signer.sign(data)
        entry = await self._entry(signer, signature, payload, data)
        if how.bundle:
            stamp = await self._services.stamp(signature)
            made: Cosign | Bundle = signing.bundled(payload, signature, signer, self._certified, entry, stamp)
        else:
            made = signing.annotated(payload, signature, self._certified, entry)
        if self._certified is None:
            signing.checked(made, signer, digest, name)
        if how.log:
            signing.checked_entry(made, signer, self._certified, how.log)
        return made

    async def _entry(
        self, signer: signing.Signer, signature: bytes, payload: bytes, data: bytes
    ) -> signing.Entry | None:
        leaf = self._certified.leaf if self._certified else b""
        if self._how.rekor_2:
            return await self._services.tiled_entry(signature, payload, data, signer.public, leaf)
        return await self._services.entry(signature, payload, leaf or signer.pem, bundle=self._how.bundle)


async def _maker(reach: Reach, how: How) -> _Maker:
    services = Services(reach.transport, how.fulcio, how.rekor, how.stamper)
    if how.openpgp:
        return _Maker(how, None, None, services)
    if how.token:
        signer = signing.new_signer()
        return _Maker(how, signer, await services.certificate(how.token, signer), services)
    return _Maker(how, signing.load_signer(how.key, how.password), None, services)


async def _attaching(reach: Reach, reference: Reference, credentials: Credentials | None, how: How) -> Attaching | None:
    """Where to in the registry; None for the lookaside store, which alone has simple signing."""
    if how.lookaside or how.openpgp:
        return None
    repository = await reach.remotes.repository(reference, credentials, "pull,push")
    return Attaching(repository, Pusher(repository, reach.threads, reach.config), reach.config)


async def _place(
    reach: Reach, reference: Reference, target: Attaching | None, document: Document, made: Signature
) -> str:
    if target is None:
        lookaside = await reach.threads.io(read_lookaside, reach.config.registries_d)
        base, limit = lookaside.place(reference).write, reach.config.signatures
        return await reach.threads.io(lay, base, reference.path, document.digest, made, limit)
    if isinstance(made, Bundle):
        return await target.bundle(document.digest, len(document.data), document.content_type, made)
    assert isinstance(made, Cosign)  # simple signing has no place in a registry
    return await target.cosign(document.digest, made)


def missing(how: How) -> str:
    """ "" or what is wrong with the choice."""
    given: Sequence[bool] = (bool(how.key), bool(how.openpgp), bool(how.token))
    if sum(given) != 1:
        return "expected exactly one of --key, --openpgp-key and --identity-token"
    if how.token and not (how.fulcio and how.rekor):
        return "--identity-token needs --fulcio-url and --rekor-url: only a log says when a certificate was used"
    if how.openpgp and (how.bundle or how.rekor):
        return "--openpgp-key makes simple signing, which knows neither bundles nor logs"
    if how.rekor_2 and not (how.rekor and how.bundle and how.log):
        return (
            "--rekor-version 2 needs --rekor-url, --bundle and --rekor-key: only bundles hold what such a log answers"
        )
    if how.rekor_2 and how.token and not how.stamper:
        return "--identity-token needs --timestamp-url with --rekor-version 2: that log does not say when"
    if how.log and not how.rekor:
        return "--rekor-key is the key of the log at --rekor-url"
    if how.stamper and not how.bundle:
        return "--timestamp-url needs --bundle: only bundles hold such times"
    return ""
