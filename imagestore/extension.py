"""Signatures that a registry keeps itself: the extension of OpenShift's registry, which Pulp has as well.

    GET /v2/                                      X-Registry-Supports-Signatures: 1
    GET /extensions/v2/PATH/signatures/sha256:HEX {"signatures": [{"schemaVersion": 2, "type": "atomic", "content": …}]}

Simple signing, and nothing else: other types are passed over. Refuses more of them than the limit. A host that does not
say that it has this is asked no more, and that is no error; one that says so and does not hand them over is. Invariant:
nothing here has been believed yet.
"""

from __future__ import annotations

import asyncio

from imagestore.config import StoreConfig
from imagestore.model import ContentInvalid, ImageNotFound
from imagestore.registry import Repository
from imagestore.signatures import Signature, Simple, decoded
from imagestore.source import RegistrySource
from imagestore.strict_json import parse_object

_HEADER = "X-Registry-Supports-Signatures"
# As with any registry, one may have to log in before it says more than its headers.
_PING = frozenset({200, 401, 403, 404})


class Extension:
    """The signatures that the hosts of one image keep."""

    def __init__(self, source: RegistrySource, path: str, config: StoreConfig) -> None:
        self._source, self._path, self._config = source, path, config

    async def signatures(self, digest: str) -> list[Signature]:
        """Raises ImageError and its kinds."""
        try:
            return await self._source.ask(lambda host: self._of(host, digest))
        except ImageNotFound:
            return []

    async def _of(self, host: Repository, digest: str) -> list[Signature]:
        """Raises ImageNotFound where this host has none of it."""
        origin, what = host.host.origin, f"signatures of {digest}"

        async def has_it() -> bool:
            async with asyncio.timeout(self._config.answer_timeout_s):
                async with host.open("GET", f"{host.host.base}/", {}, "the registry's API", accept=_PING) as answer:
                    return answer.header(_HEADER) == "1"

        if not await host.retrying(has_it, what):
            raise ImageNotFound(f"{origin} keeps no signatures")
        path = host.host.path or self._path
        url = f"{origin}/extensions/v2/{path}/signatures/{digest}"
        data = await host.small(url, what, self._config.signatures_bytes)
        fields = parse_object(data, f"{origin}: {what}", self._config.json_values)
        found: list[Signature] = []
        for item in fields.objects("signatures", self._config.signatures):
            if item.string("type") != "atomic" or item.integer("schemaVersion", 0, 1 << 31, 0) != 2:
                continue
            content = decoded(item, "content")
            if len(content) > self._config.signature_bytes:
                raise ContentInvalid(f"{origin}: {what}: one of more than {self._config.signature_bytes} bytes")
            found.append(Simple(content, f"{origin}, number {len(found) + 1}"))
        return found
