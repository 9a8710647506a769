"""The store as an OCI image layout (image-spec image-layout.md): `oci-layout` and `index.json` beside `blobs/`.

Pure but for `write`. Refuses nothing: it only tells what the records hold. Invariant: every descriptor in index.json
is whole in blobs/, with one entry for each name, which stands in `org.opencontainers.image.ref.name`, so that
`skopeo inspect oci:ROOT:docker.io/library/busybox:1` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from imagestore.manifest import OCI_INDEX
from imagestore.model import Descriptor
from runtime.linux.files import write_durable

REF_NAME = "org.opencontainers.image.ref.name"
VERSION_FILE = b'{"imageLayoutVersion":"1.0.0"}'


def index_json(entries: Iterable[tuple[str, Descriptor]]) -> bytes:
    """index.json for (name, manifest) pairs; name "" for a manifest that has none. Sorted: the same state gives the
    same bytes."""
    manifests = []
    for name, manifest in sorted(entries, key=lambda pair: (pair[0], pair[1].digest)):
        item: dict[str, object] = {
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": manifest.size,
        }
        if name:
            item["annotations"] = {REF_NAME: name}
        manifests.append(item)
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def write(root: Path, index: bytes) -> None:
    """Puts both files in place, atomically, and leaves alone what is right already. Raises OSError."""
    for name, data in (("oci-layout", VERSION_FILE), ("index.json", index)):
        path = root / name
        try:
            if path.read_bytes() == data:
                continue
        except FileNotFoundError:
            pass
        write_durable(path, data, 0o644)
