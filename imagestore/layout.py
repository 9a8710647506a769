"""The store as an OCI image layout (image-spec image-layout.md): `oci-layout` and `index.json` beside `blobs/`.

Refuses to list what is damaged. Invariant: every descriptor in index.json is an OCI manifest that is whole in blobs/,
with one entry for each name, which stands in `org.opencontainers.image.ref.name`, so that
`skopeo inspect oci:ROOT:docker.io/library/busybox:1` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.manifest import (
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    digest_of,
    parse_document,
)
from imagestore.model import ContentInvalid, Descriptor
from runtime.linux.files import AT_FDCWD, read_bounded, remove_tree, write_durable

REF_NAME = "org.opencontainers.image.ref.name"
VERSION_FILE = b'{"imageLayoutVersion":"1.0.0"}'
_OCI_LAYER = {
    "application/vnd.docker.image.rootfs.diff.tar": "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}


class Layout:
    """The layout's own files of one store."""

    def __init__(self, root: Path, blobs: Blobs, config: StoreConfig) -> None:
        self._root = root
        self._blobs = blobs
        self._config = config
        self._twins: dict[str, bytes] = {}

    def publish(self, entries: Iterable[tuple[str, Descriptor]]) -> None:
        """Makes index.json tell exactly these (name, manifest) pairs; name "" for a manifest without one. Sorted: the
        same state gives the same bytes. Raises OSError, ImageError."""
        entries = list(entries)
        for _, manifest in entries:
            shown = self.shown(manifest)
            if shown is not None and shown.digest != manifest.digest and not self._blobs.has(shown):
                self._blobs.put(shown.digest, self._twins[manifest.digest])
        self._write("oci-layout", VERSION_FILE)
        self._write("index.json", self._index(entries))

    def is_published(self, entries: Iterable[tuple[str, Descriptor]]) -> bool:
        """True when index.json tells exactly these."""
        return self._has("index.json", self._index(entries))

    def _index(self, entries: Iterable[tuple[str, Descriptor]]) -> bytes:
        manifests = []
        for name, manifest in sorted(entries, key=lambda pair: (pair[0], pair[1].digest)):
            shown = self.shown(manifest)
            if shown is None:
                continue
            item: dict[str, object] = {"mediaType": OCI_MANIFEST, "digest": shown.digest, "size": shown.size}
            if name:
                item["annotations"] = {REF_NAME: name}
            manifests.append(item)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        return json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode()

    def shown(self, manifest: Descriptor) -> Descriptor | None:
        """The manifest by which the layout shows an image. A Docker manifest gets an OCI twin with the same blobs:
        readers of layouts look for nothing else. None when it cannot be read any more."""
        if manifest.media_type != DOCKER_MANIFEST:
            return manifest
        twin = self._twins.get(manifest.digest)
        if twin is None:
            try:
                twin = self._twin(manifest)
            except (OSError, ContentInvalid):
                return None
            self._twins[manifest.digest] = twin
        return Descriptor(OCI_MANIFEST, digest_of(twin), len(twin))

    def forget(self, keep: set[str]) -> None:
        """Drops what is remembered of manifests outside `keep`."""
        for digest in tuple(self._twins):
            if digest not in keep:
                del self._twins[digest]

    def _twin(self, manifest: Descriptor) -> bytes:
        what = f"manifest {manifest.digest}"
        data = self._blobs.read(manifest.digest, self._config.manifest_bytes)
        parsed = parse_document(data, "", manifest.media_type, what, self._config)
        if not isinstance(parsed, Manifest):
            raise ContentInvalid(f"{what}: an index stands where a manifest should")
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _json(OCI_CONFIG, parsed.config),
            "layers": [_json(_OCI_LAYER.get(blob.media_type, blob.media_type), blob) for blob in parsed.layers],
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def _write(self, name: str, data: bytes) -> None:
        if self._has(name, data):
            return
        path = self._root / name
        try:
            write_durable(path, data, 0o644)
        except IsADirectoryError:  # nothing of ours, and in the way
            remove_tree(path)
            write_durable(path, data, 0o644)

    def _has(self, name: str, data: bytes) -> bool:
        """Nobody waits here for what may be a FIFO."""
        try:
            return read_bounded(AT_FDCWD, str(self._root / name), len(data)) == data
        except OSError:
            return False


def _json(media_type: str, blob: Descriptor) -> dict[str, object]:
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}
