"""What is known of an image without its layers: its config in skopeo's form, its tags, and what refers to it.

Event loop only. Refuses answers beyond the limits of the configuration. Invariant: what is told of an image comes from
a manifest and a config whose digests were checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imagestore.attached import fallback_tag
from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.copying.contents import read
from imagestore.manifest import OCI_INDEX
from imagestore.model import ContentInvalid, Descriptor, ImageNotFound
from imagestore.registry import Repository
from imagestore.resolve import resolve
from imagestore.source import Source
from imagestore.strict_json import Fields, parse_object
from imagestore.threads import Threads


async def inspect(
    source: Source, name: str, known: Sequence[str], scratch: Path, threads: Threads, config: StoreConfig
) -> dict[str, Any]:
    """The image in the words of `skopeo inspect`; `Digest` is that of what the name leads to, `known` the tags of its
    repository."""
    top = await source.top()
    document, _ = await resolve(source, top, threads, config)
    contents = read(document, config)
    assert contents.config is not None  # resolve ends at a manifest
    data = await _small(source, contents.config, scratch, threads, config)
    found = parse_object(data, f"config {contents.config.digest}", config.json_values)
    run = found.object("config") or Fields({}, "config")
    return {
        "Name": name,
        "Digest": top.digest,
        "RepoTags": list(known),
        "Created": found.string("created") or None,
        "DockerVersion": found.string("docker_version"),
        "Labels": run.string_map("Labels") or None,
        "Architecture": found.string("architecture"),
        "Variant": found.string("variant"),
        "Os": found.string("os"),
        "Layers": [layer.digest for layer in contents.layers],
        "LayersData": [
            {"MIMEType": layer.media_type, "Digest": layer.digest, "Size": layer.size} for layer in contents.layers
        ],
        "Env": list(run.strings("Env")),
    }


async def _small(source: Source, blob: Descriptor, scratch: Path, threads: Threads, config: StoreConfig) -> bytes:
    blobs = Blobs(Path(tempfile.mkdtemp(prefix="config-", dir=scratch)))
    blobs.create()
    ingest = await threads.io(blobs.ingest, blob)
    assert ingest is not None  # the directory is ours alone
    try:
        await source.blob(blob, ingest, lambda _: None)
        await threads.io(ingest.finish)
    finally:
        await threads.io(ingest.close)
    return await threads.io(blobs.read, blob.digest, config.config_bytes)


async def config_of(source: Source, scratch: Path, threads: Threads, config: StoreConfig) -> bytes:
    """The image's config, byte by byte."""
    document, _ = await resolve(source, await source.top(), threads, config)
    found = read(document, config).config
    assert found is not None  # resolve ends at a manifest
    return await _small(source, found, scratch, threads, config)


async def tags(repository: Repository, config: StoreConfig) -> list[str]:
    """All tags of a repository, as the registry orders them. Raises ImageError and its kinds."""
    found: list[str] = []
    for data in await repository.pages("/tags/list", "list of tags"):
        found += parse_object(data, "list of tags", config.json_values).strings("tags")
    return found


async def referrers(repository: Repository, digest: str, kind: str, config: StoreConfig) -> list[dict[str, Any]]:
    """What the registry says refers to the manifest `digest`, of the artifact type `kind` ("" for any): by the API of
    distribution-spec 1.1, or by the tag that stands in for it. Raises ImageError and its kinds."""
    wanted = f"?artifactType={quote(kind, safe='')}" if kind else ""
    what = f"referrers of {digest}"
    documents: list[Fields] = []
    try:
        pages = await repository.pages(f"/referrers/{digest}{wanted}", what, OCI_INDEX)
        documents = [parse_object(data, what, config.json_values) for data in pages]
    except (ImageNotFound, ContentInvalid):
        pass  # a registry that knows no referrers may answer what it likes
    if not documents or not documents[0].has("manifests"):
        try:
            data = (await repository.manifest(fallback_tag(digest))).data
        except ImageNotFound:
            return []
        documents = [parse_object(data, what, config.json_values)]
    found: list[dict[str, Any]] = []
    for document in documents:
        for item in document.objects("manifests", config.index_manifests):
            entry = {
                "mediaType": item.string("mediaType"),
                "digest": item.string("digest"),
                "size": item.integer("size", 0, 1 << 62),
                "artifactType": item.string("artifactType"),
                "annotations": item.string_map("annotations"),
            }
            # A registry need not filter; and the tag knows no filter at all.
            if not kind or entry["artifactType"] == kind:
                found.append(entry)
    return found
