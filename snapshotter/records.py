"""What the snapshotter knows, in SQLite and mirrored in memory: committed layers and active snapshots.

It refuses nothing and touches no file. Invariant: every change is one statement, hence atomic, and is in the database
before it is in the mirror; the connection is nobody else's (a statement of ours must not end up in another part's
transaction). Callers hold `Overlay`'s lock.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from runtime.linux.dataclass import dataclass

_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshotter_layers (
  chain_id   TEXT PRIMARY KEY,
  diff_id    TEXT NOT NULL,
  parent     TEXT,
  number     INTEGER NOT NULL UNIQUE,
  bytes      INTEGER NOT NULL,
  inodes     INTEGER NOT NULL,
  opaque     INTEGER NOT NULL,
  created_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshotter_active (
  key        TEXT PRIMARY KEY,
  parent     TEXT,
  number     INTEGER NOT NULL UNIQUE,
  created_ns INTEGER NOT NULL,
  boot_id    TEXT NOT NULL,
  removing   INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A committed layer: its directory is layers/`number`. `bytes` is what that takes on disk, 0 until somebody has
    measured it; `opaque`: nothing below shows through its root."""

    chain_id: str
    diff_id: str
    parent: str | None
    number: int
    bytes: int
    inodes: int
    opaque: bool
    created_ns: int


@dataclass(frozen=True, slots=True)
class ActiveRecord:
    """A writable snapshot in active/`number`, made in the boot `boot_id`. `removing`: its removal began."""

    key: str
    parent: str | None
    number: int
    created_ns: int
    boot_id: str
    removing: bool = False


class Records:
    """The two tables, by chain id and by key."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        # A snapshot's record need not survive a power cut, which ends its container: no fsync on the way of a pod's
        # start (threats O62). In WAL mode the database stays whole either way.
        db.execute("PRAGMA synchronous = NORMAL")
        for statement in _SCHEMA.split(";")[:2]:
            db.execute(statement)
        self.layers: dict[str, LayerRecord] = {}
        self.active: dict[str, ActiveRecord] = {}
        for row in db.execute(
            "SELECT chain_id, diff_id, parent, number, bytes, inodes, opaque, created_ns FROM snapshotter_layers"
        ):
            chain_id, diff_id, parent, number, size, inodes, opaque, created = row
            self.layers[chain_id] = LayerRecord(chain_id, diff_id, parent, number, size, inodes, bool(opaque), created)
        for row in db.execute("SELECT key, parent, number, created_ns, boot_id, removing FROM snapshotter_active"):
            key, parent, number, created, boot, removing = row
            self.active[key] = ActiveRecord(key, parent, number, created, boot, bool(removing))

    def add_layer(self, layer: LayerRecord) -> None:
        """Durable when it returns: an image may be recorded elsewhere next, and must not outlive its layer's record."""
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            self._insert_layer(layer)
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")
        self.layers[layer.chain_id] = layer

    def _insert_layer(self, layer: LayerRecord) -> None:
        self._db.execute(
            "INSERT INTO snapshotter_layers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                layer.chain_id,
                layer.diff_id,
                layer.parent,
                layer.number,
                layer.bytes,
                layer.inodes,
                int(layer.opaque),
                layer.created_ns,
            ),
        )

    def measured(self, layer: LayerRecord, size: int) -> None:
        """Notes what a layer takes, if it is there still. On a disk that is full the database cannot take it: then it
        is measured again after a restart, and whoever asks how full the disk is has the answer all the same."""
        if self.layers.get(layer.chain_id) == layer:
            self.layers[layer.chain_id] = replace(layer, bytes=size)
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("UPDATE snapshotter_layers SET bytes = ? WHERE number = ?", (size, layer.number))

    def remove_layer(self, chain_id: str) -> None:
        self._db.execute("DELETE FROM snapshotter_layers WHERE chain_id = ?", (chain_id,))
        self.layers.pop(chain_id, None)

    def add_active(self, snapshot: ActiveRecord) -> None:
        self._db.execute(
            "INSERT INTO snapshotter_active VALUES (?, ?, ?, ?, ?, ?)",
            (
                snapshot.key,
                snapshot.parent,
                snapshot.number,
                snapshot.created_ns,
                snapshot.boot_id,
                int(snapshot.removing),
            ),
        )
        self.active[snapshot.key] = snapshot

    def start_removing(self, key: str) -> None:
        self._db.execute("UPDATE snapshotter_active SET removing = 1 WHERE key = ?", (key,))
        self.active[key] = replace(self.active[key], removing=True)

    def remove_active(self, key: str) -> None:
        self._db.execute("DELETE FROM snapshotter_active WHERE key = ?", (key,))
        self.active.pop(key, None)

    def chain(self, chain_id: str) -> Sequence[LayerRecord] | None:
        """The layers of a chain, top first; None when one is missing."""
        found: list[LayerRecord] = []
        at: str | None = chain_id
        while at is not None:
            layer = self.layers.get(at)
            if layer is None or len(found) > len(self.layers):
                return None
            found.append(layer)
            at = layer.parent
        return found
