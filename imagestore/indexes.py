"""Indexes that are kept in full, for machines of other platforms than this one's: which, and all that they name.

    image_index    image, digest -> an index of which every manifest and every blob is kept as long as the image is

Blocking. A table for imagestore.records, which owns the connection, and a walk over what lies in the store. Refuses to
walk deeper or wider than the limits. Invariant: an index is recorded after the last blob that it names is durable.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from imagestore.config import StoreConfig
from imagestore.content import Blobs
from imagestore.copying.contents import read
from imagestore.model import ContentInvalid, Descriptor
from imagestore.registry import Document

SCHEMA = """
CREATE TABLE IF NOT EXISTS image_index (
    image_id   TEXT NOT NULL REFERENCES image(id) ON DELETE CASCADE,
    digest     TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size       INTEGER NOT NULL,
    kept_ns    INTEGER NOT NULL,
    PRIMARY KEY (image_id, digest)
) STRICT;
"""


def put(db: sqlite3.Connection, image_id: str, index: Descriptor, now_ns: int) -> None:
    """Records that all of `index` is here."""
    db.execute(
        "INSERT OR REPLACE INTO image_index (image_id, digest, media_type, size, kept_ns) VALUES (?, ?, ?, ?, ?)",
        (image_id, index.digest, index.media_type, index.size, now_ns),
    )


def of(db: sqlite3.Connection, image_id: str) -> tuple[Descriptor, ...]:
    """Those of an image, the one that was pulled last at the end."""
    rows = db.execute(
        "SELECT media_type, digest, size FROM image_index WHERE image_id = ? ORDER BY kept_ns, digest", (image_id,)
    )
    return tuple(Descriptor(row[0], row[1], row[2]) for row in rows)


def below(index: Descriptor, blobs: Blobs, config: StoreConfig) -> Iterator[Descriptor]:
    """The index, and every document and blob that it leads to, each once. What is damaged or gone is told as well, but
    what it would lead to is not known."""
    seen: set[str] = set()
    waiting = [(index, 0)]
    while waiting:
        document, depth = waiting.pop()
        if document.digest in seen:
            continue
        seen.add(document.digest)
        yield document
        if depth > config.index_depth or len(seen) > config.index_manifests:
            continue  # what is recorded was within the limits of its day
        try:
            data = blobs.read(document.digest, config.manifest_bytes)
            contents = read(Document(data, document.media_type, document.digest), config)
        except (OSError, ContentInvalid):
            continue
        waiting += [(child, depth + 1) for child in contents.children]
        for blob in contents.blobs:
            if blob.digest not in seen:
                seen.add(blob.digest)
                yield blob
