"""From the document that a name led to, through indexes, to the manifest of the image for this platform.

Follows one path and never walks (threats S35). Refuses indexes within indexes beyond the limit, and a manifest that is
not what its index announces. Invariant: each document on the path was verified against the digest that led to it.
"""

from __future__ import annotations

from imagestore.config import StoreConfig
from imagestore.manifest import Index, Manifest, choose, parse_document
from imagestore.model import ContentInvalid
from imagestore.registry import Document
from imagestore.source import Source
from imagestore.threads import Threads


async def resolve(source: Source, top: Document, threads: Threads, config: StoreConfig) -> tuple[Document, Manifest]:
    """Raises ImageError and its kinds."""
    document, expected = top, ""
    for _ in range(config.index_depth):
        what = f"manifest {document.digest}"
        parsed = await threads.io(parse_document, document.data, document.content_type, expected, what, config)
        if isinstance(parsed, Manifest):
            return document, parsed
        document, expected = await _enter(source, parsed, what, config)
    raise ContentInvalid(f"manifest {top.digest}: indexes within indexes, deeper than {config.index_depth}")


async def _enter(source: Source, index: Index, what: str, config: StoreConfig) -> tuple[Document, str]:
    entry = choose(index, config.platform, what)
    document = await source.manifest(entry.descriptor)
    if len(document.data) != entry.descriptor.size:
        raise ContentInvalid(
            f"manifest {document.digest}: {len(document.data)} bytes, the index says {entry.descriptor.size}"
        )
    return document, entry.descriptor.media_type
