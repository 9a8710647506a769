"""The signatures of what is copied: carried along, and made on the way.

    docker://   read from the lookaside store, from the registry itself where it keeps some, and where registries.d says
                use-sigstore-attachments: true from what is attached; written to the lookaside store (OpenPGP) and
                attached (sigstore; into the lookaside store where registries.d says false)
    dir:        signature-1, signature-2, …; those of a manifest of an index as HEX.signature-1, …

Nothing else holds signatures. Refuses, as skopeo does, a copy that would lose some: to where there is none for them,
or with a manifest that has to change; whoever wants that says so. Invariant: nothing here is believed, what is there is
not taken away, and nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from imagestore import signing
from imagestore.attaching import Attaching, lay
from imagestore.config import StoreConfig
from imagestore.identity import to_sign
from imagestore.lookaside import read_lookaside
from imagestore.model import ImageError, ReferenceInvalid
from imagestore.reference import Reference
from imagestore.registry import Document
from imagestore.signatures import Bundle, Cosign, Signature, Simple
from imagestore.threads import Threads


class Signed(Protocol):
    """Where signatures are read from."""

    async def find(self, digests: Sequence[str]) -> Sequence[Signature]:
        """Those of these manifests. Raises ImageError and its kinds."""
        ...


class Signable(Protocol):
    """Where signatures can be put."""

    async def sign(self, document: Document, top: bool, signatures: Sequence[Signature]) -> None:
        """Adds those that are not there to a manifest that is; `top` is the one that the image is called by. Raises
        ImageError and its kinds."""
        ...


class Carrying:
    """The signatures of one copy. Without a `source` none are looked for; without a `target` none can be put. By
    `signer` every manifest is signed as `name`, which must have a tag."""

    def __init__(
        self,
        source: Signed | None,
        target: Signable | None,
        where: str,
        signer: signing.Signer | None = None,
        name: str = "",
    ) -> None:
        self._source, self._target, self._where = source, target, where
        self._signer, self._name = signer, to_sign(name)
        if signer is not None and target is None:
            raise ImageError(f"{where} has no place for signatures, so none can be made")
        if signer is not None and not self._name:
            raise ReferenceInvalid(f"{name or where!r} has no tag: say with --sign-identity what to sign the image as")

    async def of(self, document: Document) -> Sequence[Signature]:
        """What has to come along with a manifest. Raises ImageError, also where there is no place for it."""
        if self._source is None:
            return ()
        found = await self._source.find((document.digest,))
        if found and self._target is None:
            raise ImageError(
                f"manifest {document.digest} has {counted(found)}, and {self._where} has no place for them: "
                "--remove-signatures leaves them behind"
            )
        return found

    async def put(self, document: Document, top: bool, carried: Sequence[Signature]) -> None:
        """Once the target has the manifest."""
        made = [*carried]
        if self._signer is not None:
            made.append(signing.attachment(self._signer, document.digest, self._name))
        if made and self._target is not None:
            await self._target.sign(document, top, made)


def counted(signatures: Sequence[Signature]) -> str:
    return f"{len(signatures)} signature{'s' if len(signatures) > 1 else ''}"


class InRegistry:
    """A repository, as a target."""

    def __init__(self, reference: Reference, attaching: Attaching, threads: Threads, config: StoreConfig) -> None:
        self._reference, self._attaching = reference, attaching
        self._threads, self._config = threads, config

    async def sign(self, document: Document, top: bool, signatures: Sequence[Signature]) -> None:
        place = (await self._threads.io(read_lookaside, self._config.registries_d)).place(self._reference)
        for one in signatures:
            if isinstance(one, Simple) or place.attachments is False:
                path, limit = self._reference.path, self._config.signatures
                await self._threads.io(lay, place.write, path, document.digest, one, limit)
            elif isinstance(one, Bundle):
                await self._attaching.bundle(document.digest, len(document.data), document.content_type, one)
            else:
                assert isinstance(one, Cosign)
                await self._attaching.cosign(document.digest, one)
