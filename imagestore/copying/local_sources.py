"""Sources on this machine that imagestore.local has not: skopeo's `dir:`, and an image of the store by its digest.

Refuses what imagestore.local refuses. Invariant: as there, digest and size are checked before anything is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence

from imagestore.local import Found, LocalSource
from imagestore.manifest import digest_of
from imagestore.model import ContentInvalid, Descriptor, ImageNotFound
from imagestore.policy import Requirements
from imagestore.registry import Document
from imagestore.signatures import Signature, from_blob


class DirSource(LocalSource):
    """A directory with manifest.json, blobs by their hex digits, and the manifests of an index as HEX.manifest.json;
    signatures are beside them (imagestore.copying.signatures)."""

    async def find(self, digests: Sequence[str], requirements: Requirements | None = None) -> list[Signature]:
        """As imagestore.trust.Finder.find."""
        top = (await self.top()).digest
        prefixes = ["" if digest == top else f"{digest[7:]}." for digest in digests]
        return [one for prefix in prefixes for one in await self._threads.io(self._signatures, prefix)]

    def _signatures(self, prefix: str) -> list[Signature]:
        found: list[Signature] = []
        for number in range(1, self._config.signatures + 1):
            name = f"{prefix}signature-{number}"
            try:
                data = self._read(name, self._config.signature_bytes)
            except ImageNotFound:
                return found
            found.append(from_blob(data, f"{self._what}: {name}"))
        raise ContentInvalid(f"{self._what}: more than {self._config.signatures} signatures")

    def _find(self) -> Found:
        data = self._read("manifest.json", self._config.manifest_bytes)
        return Found(Document(data, "", digest_of(data)), "")

    def _manifest(self, wanted: Descriptor) -> Document:
        data = self._read(f"{wanted.digest[7:]}.manifest.json", self._config.manifest_bytes)
        if digest_of(data) != wanted.digest:
            raise ContentInvalid(f"{self._what}: manifest {wanted.digest} has other content")
        return Document(data, wanted.media_type, wanted.digest)

    def _path(self, wanted: Descriptor) -> str:
        return wanted.digest.removeprefix("sha256:")


class StoredSource(LocalSource):
    """The image of the store whose manifest has the digest `tag`, with that manifest itself and not its OCI twin."""

    def _find(self) -> Found:
        path = self._path(Descriptor("", self._tag, 0))
        data = self._read(path, self._config.manifest_bytes)
        if digest_of(data) != self._tag:
            raise ContentInvalid(f"{self._what}: manifest {self._tag} has other content")
        return Found(Document(data, "", self._tag), "")
