"""Signatures that lie in the image's own repository: cosign's tags and the referrers API.

    GET /v2/PATH/manifests/sha256-HEX.sig      a manifest whose layers are claims, with annotations
    GET /v2/PATH/referrers/sha256:HEX          an index of manifests with that subject; or the tag sha256-HEX,
                                               where a registry has no such API; those of sigstore have bundles

Refuses more of them than the limit, and parts that are not what their descriptor announces. What a registry does not
have is no error; what it has and does not hand over is. Invariant: nothing here has been believed yet.
"""

from __future__ import annotations

from typing import Protocol

from imagestore.config import StoreConfig
from imagestore.manifest import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, descriptor, digest_of
from imagestore.model import ContentInvalid, Descriptor, ImageNotFound
from imagestore.signatures import COSIGN_TYPE, Bundle, Cosign, Signature
from imagestore.source import RegistrySource
from imagestore.strict_json import Fields, parse_object

_ACCEPT = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}"
_BUNDLES = "application/vnd.dev.sigstore.bundle"


def cosign_tag(digest: str) -> str:
    """Where cosign puts the signatures of a manifest."""
    return f"{digest.replace(':', '-', 1)}.sig"


def fallback_tag(digest: str) -> str:
    """Where the index of referrers lies in a registry without that API (distribution-spec, "Referrers Tag Schema")."""
    return digest.replace(":", "-", 1)


class Asked(Protocol):
    """Who can be asked for small documents: one repository, or an image's hosts in their order."""

    async def small(self, path: str, what: str, limit: int, accept: str = "*/*") -> bytes: ...


async def json_at(asked: Asked, path: str, what: str, config: StoreConfig) -> tuple[bytes, Fields] | None:
    """A JSON object as it is there and as it is read; None where there is none. A registry that knows no referrers may
    answer what it likes to a question for them. Raises ImageError and its kinds."""
    try:
        data = await asked.small(path, what, config.manifest_bytes, _ACCEPT)
        return data, parse_object(data, what, config.json_values)
    except ImageNotFound:
        return None
    except ContentInvalid:
        if path.startswith("/referrers/"):
            return None
        raise


class Attached:
    """The signatures beside one image."""

    def __init__(self, source: RegistrySource, config: StoreConfig) -> None:
        self._source = source
        self._config = config

    async def signatures(self, digest: str) -> list[Signature]:
        """All that the repository has for the manifest. Raises ImageError and its kinds."""
        return [*await self._by_tag(digest), *await self._by_referrers(digest)]

    async def _by_tag(self, digest: str) -> list[Signature]:
        tag = cosign_tag(digest)
        document = await self._document(f"/manifests/{tag}", f"signatures {tag}")
        if document is None:
            return []
        found: list[Signature] = []
        for number, layer in enumerate(document.objects("layers", self._config.signatures)):
            blob = self._descriptor(layer)
            if blob.media_type == COSIGN_TYPE:
                payload = await self._blob(blob)
                found.append(Cosign(payload, blob.annotations, f"tag {tag}, number {number + 1}"))
        return found

    async def _by_referrers(self, digest: str) -> list[Signature]:
        # Some registries leave the type out: then the manifest itself tells.
        kinds = (
            (item, item.string("artifactType"))
            for index in await self._indexes(digest)
            for item in index.objects("manifests", self._config.index_manifests)
        )
        items = [item for item, kind in kinds if not kind or kind.startswith(_BUNDLES)]
        if len(items) > self._config.signatures:
            raise ContentInvalid(
                f"referrers of {digest}: {len(items)} that may be signatures, the limit is {self._config.signatures}"
            )
        return [one for item in items for one in await self._bundles(self._descriptor(item), digest)]

    async def _indexes(self, digest: str) -> list[Fields]:
        """What refers to the manifest: the pages of the API, or the index that the tag has instead."""
        what = f"referrers of {digest}"
        try:
            pages = await self._source.pages(f"/referrers/{digest}", what, _ACCEPT)
            found = [parse_object(data, what, self._config.json_values) for data in pages]
            if found[0].has("manifests"):
                return found
        except (ImageNotFound, ContentInvalid):
            pass  # a registry that knows no referrers may answer what it likes
        tag = fallback_tag(digest)
        index = await self._document(f"/manifests/{tag}", f"referrers {tag}")
        return [index] if index is not None else []

    async def _bundles(self, wanted: Descriptor, digest: str) -> list[Signature]:
        if wanted.media_type != OCI_MANIFEST:
            return []
        data = await self._source.small(
            f"/manifests/{wanted.digest}", f"manifest {wanted.digest}", self._config.manifest_bytes, _ACCEPT
        )
        if digest_of(data) != wanted.digest:
            raise ContentInvalid(f"manifest {wanted.digest}: the content has another digest")
        manifest = parse_object(data, f"manifest {wanted.digest}", self._config.json_values)
        subject = manifest.object("subject")
        if subject is None or subject.string("digest") != digest:
            return []  # an index of referrers may say what it likes
        return [
            Bundle(await self._blob(blob), f"referrer {wanted.digest}")
            for blob in map(self._descriptor, manifest.objects("layers", self._config.signatures))
            if blob.media_type.startswith(_BUNDLES)
        ]

    def _descriptor(self, fields: Fields) -> Descriptor:
        return descriptor(fields, self._config.signature_bytes)

    async def _document(self, path: str, what: str) -> Fields | None:
        found = await json_at(self._source, path, what, self._config)
        return found[1] if found is not None else None

    async def _blob(self, wanted: Descriptor) -> bytes:
        what = f"blob {wanted.digest}"
        data = await self._source.small(f"/blobs/{wanted.digest}", what, self._config.signature_bytes)
        if digest_of(data) != wanted.digest:
            raise ContentInvalid(f"{what}: the content has another digest")
        return data
