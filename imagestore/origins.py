"""Where an image came from, and the signatures it came with: what a later look at the policy stands on.

    image_origin   image, transport and name -> the digests that were verified, and the signatures as text

Tables for imagestore.records, which owns the connection. Refuses nothing: evidence is judged each time it is used, by
the policy of that day. Invariant: an origin lives and dies with its image; its digests are those of the manifest that
was pulled, and of the index that led to it.
"""

from __future__ import annotations

import sqlite3

from runtime.linux.dataclass import dataclass

SCHEMA = """
CREATE TABLE IF NOT EXISTS image_origin (
    image_id   TEXT NOT NULL REFERENCES image(id) ON DELETE CASCADE,
    transport  TEXT NOT NULL,
    name       TEXT NOT NULL,
    digests    TEXT NOT NULL,
    signatures TEXT NOT NULL,
    PRIMARY KEY (image_id, transport, name)
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """One way by which an image came here. `name` is a reference where the transport is docker, else a path."""

    transport: str
    name: str
    digests: tuple[str, ...]
    signatures: str
    """imagestore.signatures.dump"""


def put(db: sqlite3.Connection, image_id: str, origin: Origin) -> None:
    """Records it, in the place of an earlier pull of the same name."""
    db.execute(
        "INSERT OR REPLACE INTO image_origin (image_id, transport, name, digests, signatures) VALUES (?, ?, ?, ?, ?)",
        (image_id, origin.transport, origin.name, " ".join(origin.digests), origin.signatures),
    )


def of(db: sqlite3.Connection, image_id: str) -> tuple[Origin, ...]:
    """All of an image's, by name."""
    rows = db.execute(
        "SELECT transport, name, digests, signatures FROM image_origin WHERE image_id = ? ORDER BY transport, name",
        (image_id,),
    )
    return tuple(Origin(row[0], row[1], tuple(row[2].split()), row[3]) for row in rows)
