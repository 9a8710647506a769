"""Where signatures go: cosign's tag, the image's referrers, a lookaside store in a directory.

    PUT /v2/PATH/manifests/sha256-HEX.sig      what is there, and one layer more
    PUT /v2/PATH/manifests/sha256:…            a manifest with the image as its subject; where the registry has no API
                                               for referrers, the index under the tag sha256-HEX gets one entry more
    PATH@sha256=HEX/signature-N                the next number

Refuses to take away what was there before, and puts nothing there twice. Of two signers at the same moment one may lose
the tag to the other: registries cannot write only if nobody else has. Invariant: a manifest is put after all that it
names.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagestore.attached import cosign_tag, fallback_tag, json_at
from imagestore.config import StoreConfig
from imagestore.content import errno_text
from imagestore.lookaside import url_of
from imagestore.manifest import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, digest_of
from imagestore.model import ContentInvalid, Descriptor, ImageError
from imagestore.push import Pusher
from imagestore.registry import Document, Repository
from imagestore.signatures import BUNDLE_TYPE, COSIGN_TYPE, Bundle, Cosign, Signature, to_blob
from runtime.linux.files import AT_FDCWD, read_bounded, write_durable

_EMPTY = "application/vnd.oci.empty.v1+json"


class Attaching:
    """One repository to attach to."""

    def __init__(self, repository: Repository, pusher: Pusher, config: StoreConfig) -> None:
        self._repository = repository
        self._pusher = pusher
        self._config = config

    async def cosign(self, digest: str, made: Cosign) -> str:
        """Returns where it is. Raises ImageError and its kinds."""
        tag = cosign_tag(digest)
        before = await self._json(f"/manifests/{tag}", f"signatures {tag}")
        layers = _list(before, "layers")
        added = {"mediaType": COSIGN_TYPE, **_described(made.payload), "annotations": dict(made.annotations)}
        if added in layers:
            return f"tag {tag}, number {layers.index(added) + 1}"
        await self._blob(made.payload)
        layers.append(added)
        # A config as image tools expect it: some registries look into it.
        rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
        config = json.dumps({"architecture": "", "os": "", "config": {}, "rootfs": rootfs}).encode()
        described = {"mediaType": OCI_CONFIG, **await self._blob(config)}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": layers}
        await self._put(document, OCI_MANIFEST, tag)
        return f"tag {tag}, number {len(layers)}"

    async def bundle(self, digest: str, size: int, media_type: str, made: Bundle) -> str:
        """`size` and `media_type` of the manifest that was signed. Returns where it is. Raises as `cosign` does."""
        layer = {"mediaType": BUNDLE_TYPE, **await self._blob(made.data)}
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": BUNDLE_TYPE,
            "config": {"mediaType": _EMPTY, **await self._blob(b"{}")},
            "layers": [layer],
            "subject": {"mediaType": media_type, "digest": digest, "size": size},
            "annotations": {"dev.sigstore.bundle.content": "dsse-envelope"},
        }
        described = await self._put(document, OCI_MANIFEST, "")
        if await self._json(f"/referrers/{digest}", f"referrers of {digest}") is None:
            tag = fallback_tag(digest)
            entries = _list(await self._json(f"/manifests/{tag}", f"referrers {tag}"), "manifests")
            if any(entry["digest"] == described["digest"] for entry in entries):
                return f"referrer {described['digest']}"
            entries.append({**described, "mediaType": OCI_MANIFEST, "artifactType": BUNDLE_TYPE})
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
            await self._put(index, OCI_INDEX, tag)
        return f"referrer {described['digest']}"

    async def _blob(self, data: bytes) -> dict[str, object]:
        blob = Descriptor("", digest_of(data), len(data))
        if not await self._pusher.has(blob):
            with tempfile.TemporaryDirectory(prefix="ocid-sign-") as directory:
                path = Path(directory) / "blob"
                path.write_bytes(data)
                await self._pusher.upload(blob, path, lambda _: None)
        return _described(data)

    async def _put(self, document: Mapping[str, object], media_type: str, tag: str) -> dict[str, object]:
        data = json.dumps(document, separators=(",", ":")).encode()
        digest = digest_of(data)
        await self._pusher.manifest(Document(data, media_type, digest), tag or digest)
        return _described(data)

    async def _json(self, path: str, what: str) -> dict[str, object] | None:
        """What is there now, with all that we do not know; None where nothing is, or no such path."""
        found = await json_at(self._repository, path, what, self._config)
        return dict(json.loads(found[0])) if found is not None else None


def _described(data: bytes) -> dict[str, object]:
    return {"digest": digest_of(data), "size": len(data)}


def _list(document: dict[str, object] | None, key: str) -> list[dict[str, object]]:
    found = (document or {}).get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) and "digest" in item for item in found):
        raise ContentInvalid(f"what is there has {key} that are no descriptors, so nothing is added to it")
    return list(found)


def lay(base: str, path: str, digest: str, made: Signature, limit: int) -> str:
    """Into a lookaside store that is a directory; returns where it is. Raises ImageError."""
    if not base.startswith("file:"):
        raise ImageError(f"lookaside {base}: signatures can be written to file: only; say so as lookaside-staging")
    data = to_blob(made)
    for number in range(1, limit + 1):
        url = url_of(base, path, digest, number)
        file = Path(unquote(urlsplit(url).path))
        try:
            if file.exists():
                if file.stat().st_size == len(data) and read_bounded(AT_FDCWD, str(file), len(data)) == data:
                    return f"lookaside {url}"
                continue
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_durable(file, data)
            file.chmod(0o644)  # everybody who pulls reads it
        except OSError as error:
            raise ImageError(f"lookaside {file}: {errno_text(error)}") from None
        return f"lookaside {url}"
    raise ImageError(f"lookaside {base}: there are {limit} signatures of {digest} already")
