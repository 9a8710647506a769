"""Which images there are and what they are called: two SQLite tables, and index.json in step with them.

    image       a config digest with the manifest that it was last pulled by
    image_name  "host/path:tag" or "host/path@sha256:…" -> image, and the digest under which the registry served it

The connection belongs to this module alone; any thread may call. Refuses to record what the caller has not made
durable first: that is the caller's promise. Invariant: names, images and index.json change together or not at all;
writers of several processes take turns through SQLite's write lock.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from imagestore import indexes, origins
from imagestore.model import Descriptor, ImageError
from imagestore.origins import Origin
from imagestore.reference import Reference
from runtime.linux.dataclass import dataclass
from runtime.linux.failpoint import failpoint

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS image (
    id            TEXT PRIMARY KEY,
    manifest      TEXT NOT NULL,
    manifest_type TEXT NOT NULL,
    manifest_size INTEGER NOT NULL,
    pulled_ns     INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS image_name (
    name          TEXT PRIMARY KEY,
    repository    TEXT NOT NULL,
    image_id      TEXT NOT NULL REFERENCES image(id) ON DELETE CASCADE,
    manifest      TEXT NOT NULL,
    manifest_type TEXT NOT NULL,
    manifest_size INTEGER NOT NULL,
    served        TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS image_name_image ON image_name(image_id);
"""
_NAME_COLUMNS = "name, repository, image_id, manifest_type, manifest, manifest_size, served"


@dataclass(frozen=True, slots=True)
class NameRecord:
    """A name. `served` is the digest the registry gave for it (of an index, where there was one), "" for a tag that
    was made here; a digest name ends in it."""

    name: str
    repository: str
    image_id: str
    manifest: Descriptor
    served: str

    @property
    def is_tag(self) -> bool:
        return "@" not in self.name


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image with its names, as recorded; whether it is whole on disk is another question. Of `indexes` everything
    is kept, whatever platform it is for."""

    id: str
    manifest: Descriptor
    pulled_ns: int
    names: tuple[NameRecord, ...]
    indexes: tuple[Descriptor, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(name.name for name in self.names if name.is_tag)

    @property
    def digests(self) -> tuple[str, ...]:
        """Each repository with each digest it served this image under."""
        return tuple(sorted({f"{name.repository}@{name.served}" for name in self.names if name.served}))


Publish = Callable[[list[tuple[str, Descriptor]]], None]


class Records:
    """The image tables. `publish` is handed every (name, manifest) when they changed, inside the transaction;
    `spend_reserve` frees some disk space, once, and tells whether there was any."""

    def __init__(self, db: sqlite3.Connection, publish: Publish, spend_reserve: Callable[[], bool]) -> None:
        self._db = db
        self._publish = publish
        self._spend_reserve = spend_reserve
        self._lock = threading.RLock()
        with self._lock, _worded():
            # An image must be there after a power cut once a pull has said so: NORMAL would lose the WAL's tail.
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
            db.execute("PRAGMA busy_timeout=15000")
            _make_tables(db, _SCHEMA + origins.SCHEMA + indexes.SCHEMA)

    # ------------------------------------------------------------------------------------------------- questions

    def images(self) -> list[ImageRecord]:
        """All images, those pulled last at the end."""
        with self._lock, _worded():
            names: dict[str, list[NameRecord]] = {}
            for row in self._db.execute(f"SELECT {_NAME_COLUMNS} FROM image_name ORDER BY name"):
                record = _name(row)
                names.setdefault(record.image_id, []).append(record)
            rows = self._db.execute(
                "SELECT id, manifest_type, manifest, manifest_size, pulled_ns FROM image ORDER BY pulled_ns, id"
            )
            return [
                ImageRecord(
                    row[0],
                    Descriptor(row[1], row[2], row[3]),
                    row[4],
                    tuple(names.get(row[0], ())),
                    indexes.of(self._db, row[0]),
                )
                for row in rows.fetchall()
            ]

    def by_name(self, reference: Reference) -> ImageRecord | None:
        """The image with that tag, or with that digest served by that repository."""
        return self._one(self._id_by_name(reference))

    def by_id(self, hex_prefix: str) -> ImageRecord | None:
        """The image whose id begins so; None when none or more than one does."""
        with self._lock, _worded():
            # A digest sorts between its prefix and the prefix followed by a character above every hex digit.
            low = f"sha256:{hex_prefix}"
            found = self._db.execute("SELECT id FROM image WHERE id >= ? AND id < ? LIMIT 2", (low, low + "g"))
            ids = [str(row[0]) for row in found]
        return self._one(ids[0]) if len(ids) == 1 else None

    def _id_by_name(self, reference: Reference) -> str | None:
        with self._lock, _worded():
            if reference.digest:
                query = "SELECT image_id FROM image_name WHERE repository = ? AND (served = ? OR manifest = ?) LIMIT 1"
                values: tuple[str, ...] = (reference.repository, reference.digest, reference.digest)
            else:
                query, values = "SELECT image_id FROM image_name WHERE name = ?", (str(reference),)
            row = self._db.execute(query, values).fetchone()
        return str(row[0]) if row else None

    def _one(self, image_id: str | None) -> ImageRecord | None:
        if image_id is None:
            return None
        with self._lock, _worded():
            row = self._db.execute(
                "SELECT id, manifest_type, manifest, manifest_size, pulled_ns FROM image WHERE id = ?", (image_id,)
            ).fetchone()
            if row is None:
                return None
            names = self._db.execute(
                f"SELECT {_NAME_COLUMNS} FROM image_name WHERE image_id = ? ORDER BY name", (image_id,)
            )
            manifest = Descriptor(row[1], row[2], row[3])
            return ImageRecord(row[0], manifest, row[4], tuple(map(_name, names)), indexes.of(self._db, image_id))

    def origins(self, image_id: str) -> tuple[Origin, ...]:
        """Where the image came from; what was pulled before origins were recorded came from what its names say."""
        with self._lock, _worded():
            found = origins.of(self._db, image_id)
        record = None if found else self._one(image_id)
        return found or tuple(
            Origin("docker", name.name, tuple(dict.fromkeys((name.manifest.digest, name.served))), "[]")
            for name in (record.names if record else ())
            if name.served
        )

    def entries(self) -> list[tuple[str, Descriptor]]:
        """Every (name, manifest), as `publish` is handed them."""
        with self._lock, _worded():
            return self._entries()

    def damage(self) -> list[str]:
        """What SQLite finds wrong with its file and with the references between its tables."""
        with self._lock, _worded():
            said = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(20)")]
            lost = [str(row[0]) for row in self._db.execute("PRAGMA foreign_key_check")]
        return [what for what in said if what != "ok"] + [f"{table}: a row refers to nothing" for table in lost]

    # --------------------------------------------------------------------------------------------------- changes

    def put(
        self,
        reference: Reference,
        image_id: str,
        manifest: Descriptor,
        served: str,
        origin: Origin | None = None,
        index: Descriptor | None = None,
    ) -> ImageRecord:
        """Records a whole image and gives it `reference`; `served` is "" when no registry stands behind the name.

        A tag that moves away from an image leaves that its digest, so that it can still be asked for by it.
        """

        def work(db: sqlite3.Connection) -> ImageRecord:
            db.execute(
                "INSERT INTO image (id, manifest_type, manifest, manifest_size, pulled_ns) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET manifest_type = excluded.manifest_type, manifest = excluded.manifest, "
                "manifest_size = excluded.manifest_size",
                (image_id, manifest.media_type, manifest.digest, manifest.size, time.time_ns()),
            )
            _give(db, NameRecord(str(reference), reference.repository, image_id, manifest, served))
            if origin is not None:
                origins.put(db, image_id, origin)
            if index is not None:
                indexes.put(db, image_id, index, time.time_ns())
            record = self._one(image_id)
            assert record is not None  # inserted above, in this transaction
            return record

        return self._change(work)

    def tag(self, image_id: str, manifest: Descriptor, reference: Reference) -> bool:
        """Gives an image a name that no registry stands behind; False when the image is gone."""

        def work(db: sqlite3.Connection) -> bool:
            if self._one(image_id) is None:
                return False
            _give(db, NameRecord(str(reference), reference.repository, image_id, manifest, ""))
            return True

        return self._change(work)

    def remove_image(self, image_id: str) -> None:
        """Forgets the image and all its names."""
        self._change(lambda db: db.execute("DELETE FROM image WHERE id = ?", (image_id,)), shrinking=True)

    def remove_name(self, reference: Reference) -> None:
        """Forgets a tag, or all that a repository calls by that digest; and the image with its last name."""

        def work(db: sqlite3.Connection) -> None:
            image_id = self._id_by_name(reference)
            if reference.digest:
                db.execute(
                    "DELETE FROM image_name WHERE repository = ? AND (served = ? OR manifest = ?)",
                    (reference.repository, reference.digest, reference.digest),
                )
            else:
                db.execute("DELETE FROM image_name WHERE name = ?", (str(reference),))
            db.execute(
                "DELETE FROM image WHERE id = ? AND NOT EXISTS (SELECT 1 FROM image_name WHERE image_id = image.id)",
                (image_id,),
            )

        self._change(work, shrinking=True)

    def publish(self) -> None:
        """Writes index.json anew from what is recorded: at the start, and after a removal on a full disk."""
        self._change(lambda db: None, shrinking=True)

    def _change(self, work: Callable[[sqlite3.Connection], T], *, shrinking: bool = False) -> T:
        """`work` in a write transaction that ends with index.json in place. `shrinking`: a removal must work on a full
        disk, so it may spend the reserve, and an index.json that cannot be written is left for the next `publish`."""
        with self._lock, _worded():
            try:
                return self._transaction(work, lenient=shrinking)
            except sqlite3.OperationalError as error:
                if not shrinking or error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._spend_reserve():
                    raise
                return self._transaction(work, lenient=True)

    def _transaction(self, work: Callable[[sqlite3.Connection], T], *, lenient: bool) -> T:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            result = work(self._db)
            try:
                self._publish(self._entries())
            except (OSError, ImageError) as error:
                if not lenient:
                    raise ImageError(f"image records: index.json: {error}") from error
            if not lenient:
                failpoint("images.index.written")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        if not lenient:
            failpoint("images.recorded")
        return result

    def _entries(self) -> list[tuple[str, Descriptor]]:
        entries = [
            (row[0], Descriptor(row[1], row[2], row[3]))
            for row in self._db.execute("SELECT name, manifest_type, manifest, manifest_size FROM image_name")
        ]
        named = {manifest.digest for _, manifest in entries}
        for row in self._db.execute("SELECT manifest_type, manifest, manifest_size FROM image"):
            if row[1] not in named:
                entries.append(("", Descriptor(row[0], row[1], row[2])))
        return entries


def _give(db: sqlite3.Connection, name: NameRecord) -> None:
    row = db.execute(f"SELECT {_NAME_COLUMNS} FROM image_name WHERE name = ?", (name.name,)).fetchone()
    old = _name(row) if row else None
    if old and old.is_tag and old.served and old.image_id != name.image_id:
        kept = NameRecord(f"{old.repository}@{old.served}", old.repository, old.image_id, old.manifest, old.served)
        db.execute(f"INSERT OR IGNORE INTO image_name ({_NAME_COLUMNS}) VALUES (?,?,?,?,?,?,?)", _row(kept))
    db.execute(f"INSERT OR REPLACE INTO image_name ({_NAME_COLUMNS}) VALUES (?,?,?,?,?,?,?)", _row(name))


def _make_tables(db: sqlite3.Connection, schema: str) -> None:
    """Those that are missing, in one transaction: each of its own waits for the disk. Where none is, nothing is
    written, and nobody else's writing waited for."""
    wanted = set(re.findall(r"IF NOT EXISTS (\w+)", schema))
    if wanted <= {name for (name,) in db.execute("SELECT name FROM sqlite_master")}:
        return
    try:
        db.executescript(f"BEGIN IMMEDIATE;{schema}COMMIT;")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _row(name: NameRecord) -> tuple[str, str, str, str, str, int, str]:
    manifest = name.manifest
    return (
        name.name,
        name.repository,
        name.image_id,
        manifest.media_type,
        manifest.digest,
        manifest.size,
        name.served,
    )


def _name(row: tuple[str, str, str, str, str, int, str]) -> NameRecord:
    return NameRecord(row[0], row[1], row[2], Descriptor(row[3], row[4], row[5]), row[6])


@contextmanager
def _worded() -> Iterator[None]:
    """SQLite's failures as one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise ImageError(f"image records: {error}") from error
