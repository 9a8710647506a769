"""OCI image layouts: layers plus a config become a manifest, manifests become an index, all of it in a directory that
any tool reads (image-spec image-layout.md). Blobs appear under their digest only when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conformance.images.layer import Layer

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Config:
    """What an image says of how to run it (image-spec config.md)."""

    cmd: Sequence[str] = ()
    entrypoint: Sequence[str] = ()
    env: Sequence[str] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    exposed_ports: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def document(self, layers: Sequence[Layer], architecture: str) -> dict[str, Any]:
        named = {
            "Cmd": list(self.cmd),
            "Entrypoint": list(self.entrypoint),
            "Env": list(self.env),
            "WorkingDir": self.working_dir,
            "User": self.user,
            "StopSignal": self.stop_signal,
            "ExposedPorts": {port: {} for port in self.exposed_ports},
            "Labels": dict(self.labels),
        }
        return {
            "architecture": architecture,
            "os": "linux",
            "created": CREATED,
            "config": {key: value for key, value in named.items() if value},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": CREATED, "created_by": "conformance/images"} for _ in layers],
        }


class Layout:
    """A layout being written at `root`. `add_image` and `add_index` name what they add; `finish` writes index.json."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._named: list[dict[str, Any]] = []
        (root / "blobs" / "sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def scratch(self) -> Path:
        """Where a layer is written before its digest is known."""
        path = self.root / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def keep(self, layer: Layer) -> Layer:
        """The layer among the blobs, where several images can have it."""
        kept = replace(layer, path=self._blob(layer.digest))
        if layer.path != kept.path:
            os.replace(layer.path, kept.path)
        return kept

    def add_image(
        self, tag: str, layers: Sequence[Layer], config: Config, *, docker: bool = False, architecture: str = "amd64"
    ) -> dict[str, Any]:
        """Adds an image; with an empty `tag` only its blobs, for an index to point at. Returns its descriptor."""
        layers = [self.keep(layer) for layer in layers]
        config_type = DOCKER_CONFIG if docker else OCI_CONFIG
        manifest_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self._document(config.document(layers, architecture), config_type),
            "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers],
        }
        descriptor = self._document(manifest, manifest_type)
        return self._name(descriptor, tag)

    def add_index(self, tag: str, images: Sequence[tuple[dict[str, Any], dict[str, str]]]) -> dict[str, Any]:
        """Adds an index of (manifest descriptor, platform) pairs."""
        manifests = [{**descriptor, "platform": platform} for descriptor, platform in images]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        return self._name(self._document(index, OCI_INDEX), tag)

    def finish(self) -> Path:
        scratch = self.scratch()
        for left in scratch.iterdir():
            left.unlink()
        scratch.rmdir()
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self._named}
        (self.root / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        return self.root

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _document(self, document: dict[str, Any], media_type: str) -> dict[str, Any]:
        data = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def _name(self, descriptor: dict[str, Any], tag: str) -> dict[str, Any]:
        if tag:
            self._named.append({**descriptor, "annotations": {REF_NAME: tag}})
        return descriptor
