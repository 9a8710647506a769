"""The records of pods and containers: a dict to read from, one SQLite database to survive with.

Refuses to compute a phase and to make a reader wait: reads come from memory and take no lock (threats R14); writes go
through one thread that commits together what came meanwhile. Invariant: what a caller awaited is in the database; a
fact that could not be written (disk full, threats O19) stays in memory and is written with the next that can.

Connections of pods and containers are `synchronous=NORMAL`: in WAL mode a kill -9 of this process loses nothing,
since the pages are the kernel's by then; only a power cut can take the last transactions, and a power cut ends every
pod anyway. Images and snapshots are durable things and use `durable=True` (FULL).
See https://www.sqlite.org/pragma.html#pragma_synchronous.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from cri.records import Container, Pod

log = logging.getLogger(__name__)

BUSY_S = 30.0
# sqlite3.h: SQLITE_CORRUPT, SQLITE_NOTADB, and SQLITE_IOERR_SHORT_READ for a file cut in a page.
_DAMAGE = frozenset({11, 26, 522})
_SCHEMA = 1

Record = TypeVar("Record", Pod, Container)
_TABLES: dict[type[Any], str] = {Pod: "pods", Container: "containers"}
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "bytes": "BLOB"}
_CHECKS = {"str": str, "int": int, "bytes": bytes}


def open_database(path: Path, durable: bool) -> sqlite3.Connection:
    """A connection to `path` in WAL mode, usable from any thread (one at a time), in autocommit mode. The file is
    made 0600 where it is missing."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        db.execute("PRAGMA foreign_keys=ON")
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return code in _DAMAGE or code & 0xFF in (11, 26)


def _create(db: sqlite3.Connection) -> None:
    for kind, table in _TABLES.items():
        columns = ", ".join(f"{item.name} {_SQL_TYPES[str(item.type)]} NOT NULL" for item in fields(kind))
        db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY (id)) STRICT")
        have = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for item in fields(kind):
            if item.name not in have:  # an older version did not know it, and had what is the default now
                default = "x''" if item.type == "bytes" else repr(item.default)
                kind_of = _SQL_TYPES[str(item.type)]
                db.execute(f"ALTER TABLE {table} ADD COLUMN {item.name} {kind_of} NOT NULL DEFAULT {default}")
    db.execute("CREATE TABLE IF NOT EXISTS cri_schema (version INTEGER NOT NULL) STRICT")
    row = db.execute("SELECT version FROM cri_schema").fetchone()
    if row is None:
        db.execute("INSERT INTO cri_schema VALUES (?)", (_SCHEMA,))
    elif row[0] > _SCHEMA:
        raise sqlite3.DatabaseError(f"the database is of a newer ocid (schema {row[0]}, this one knows {_SCHEMA})")


def open_sound(path: Path) -> sqlite3.Connection:
    """The database at `path`, checked. A damaged one is set aside as PATH.damaged-TIME, and a fresh one begun with
    the rows of all parts that can still be read from it (threats O44). Raises sqlite3.Error for any other trouble: a
    locked or unreadable file is not a damaged one."""
    try:
        return _open_checked(path)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        for suffix in ("", "-wal", "-shm"):
            try:
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
            except FileNotFoundError:
                pass
        log.error("database %s is damaged (%s): set aside as %s; what can be read of it is kept", path, error, aside)
    db = _open_checked(path)
    _salvage(aside, db)
    return db


def _open_checked(path: Path) -> sqlite3.Connection:
    db = open_database(path, durable=False)
    try:
        verdict = [row[0] for row in db.execute("PRAGMA integrity_check(4)")]
        if verdict != ["ok"]:
            error = sqlite3.DatabaseError("; ".join(verdict))
            error.sqlite_errorcode = 11
            raise error
        _create(db)
    except BaseException:
        db.close()
        raise
    return db


def _salvage(aside: Path, fresh: sqlite3.Connection) -> None:
    """Copies what is readable, table by table. Each part looks at its rows before it believes them."""
    try:
        old = sqlite3.connect(aside, isolation_level=None)
        tables = old.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
    except sqlite3.Error as error:
        log.error("database %s: nothing can be read of it: %s", aside, error)
        return
    for name, sql in tables:
        copied, trouble = 0, ""
        try:
            if not fresh.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone():
                fresh.execute(sql)
            rows = old.execute(f'SELECT * FROM "{name}"')
            while (row := rows.fetchone()) is not None:
                marks = ", ".join("?" * len(row))
                copied += fresh.execute(f'INSERT OR IGNORE INTO "{name}" VALUES ({marks})', row).rowcount
        except (sqlite3.Error, UnicodeError) as error:
            trouble = f", then: {error}"
        log.warning("database %s: %d rows of %s kept%s", aside, copied, name, trouble)
    old.close()


def _load(db: sqlite3.Connection, kind: type[Record]) -> list[Record]:
    """The sound rows of a table. Others are logged and deleted: their names are free, and recovery sweeps what they
    told of (threats O46)."""
    names = [item.name for item in fields(kind)]
    records, bad = [], []
    db.text_factory = bytes  # so that bytes that are no UTF-8 spoil their row and not the whole table
    try:
        for rowid, *row in db.execute(f"SELECT rowid, {', '.join(names)} FROM {_TABLES[kind]}"):
            try:
                records.append(_record(kind, row))
            except (ValueError, TypeError, DecodeError) as error:
                log.error("database: row %d of %s is damaged and left out: %s", rowid, _TABLES[kind], error)
                bad.append(rowid)
    finally:
        db.text_factory = str
    db.executemany(f"DELETE FROM {_TABLES[kind]} WHERE rowid = ?", [(rowid,) for rowid in bad])
    return records


def _record(kind: type[Record], row: Sequence[Any]) -> Record:
    values: dict[str, Any] = {}
    for item, value in zip(fields(kind), row, strict=True):
        if item.type == "str" and isinstance(value, bytes):
            value = value.decode()
        if not isinstance(value, _CHECKS[str(item.type)]):
            raise ValueError(f"{item.name}: expected {item.type}, got {type(value).__name__}")
        values[item.name] = value
    record = kind(**values)
    if len(record.id) != 64 or not set(record.id) <= set("0123456789abcdef"):
        raise ValueError(f"id {record.id[:80]!r} is no id")
    _ = record.request  # a request that does not parse is damage too
    return record


def _write(db: sqlite3.Connection, record: Pod | Container) -> None:
    names = [item.name for item in fields(record)]
    values = [getattr(record, name) for name in names]
    marks = ", ".join("?" * len(names))
    db.execute(f"INSERT OR REPLACE INTO {_TABLES[type(record)]} ({', '.join(names)}) VALUES ({marks})", values)


class Store:
    """All pods and containers. Reading: `pods`, `containers`, `containers_of`, plain and immediate.

    One event loop uses it; `db` is used by its own writer thread only."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._writer = ThreadPoolExecutor(1, "store")
        self._changes: dict[str, Pod | Container | tuple[type[Any], str]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._flusher: asyncio.Task[None] | None = None
        self.pods: dict[str, Pod] = {}
        self.containers: dict[str, Container] = {}
        self._names: dict[tuple[object, ...], str] = {}
        self._members: dict[str, dict[str, None]] = {}
        # Hears of each change of a record: what it was, and what it is or None. Called in the order of the changes.
        self.changed: Callable[[Pod | Container, Pod | Container | None], None] = lambda old, new: None
        self.reload()

    def reload(self) -> None:
        """Memory anew from the database: at the start, and where another process may have written."""
        self.pods = {pod.id: pod for pod in _load(self._db, Pod)}
        self.containers = {}
        self._names = {pod.key: pod.id for pod in self.pods.values()}
        self._members = {pod_id: {} for pod_id in self.pods}
        for container in _load(self._db, Container):
            if container.pod_id not in self.pods:
                log.error("database: container %s is of no known pod and left out", container.id)
                continue
            self._index(container)

    def _index(self, record: Pod | Container) -> None:
        self._names[record.key] = record.id
        if isinstance(record, Pod):
            self.pods[record.id] = record
            self._members.setdefault(record.id, {})
        else:
            self.containers[record.id] = record
            self._members[record.pod_id][record.id] = None

    def _unindex(self, record: Pod | Container) -> None:
        self._names.pop(record.key, None)
        if isinstance(record, Pod):
            self.pods.pop(record.id, None)
            self._members.pop(record.id, None)
        else:
            self.containers.pop(record.id, None)
            self._members.get(record.pod_id, {}).pop(record.id, None)

    def named(self, key: tuple[object, ...]) -> str | None:
        """The id of the record with this `key`."""
        return self._names.get(key)

    def containers_of(self, pod_id: str) -> list[Container]:
        """The pod's containers, oldest first."""
        return [self.containers[id_] for id_ in self._members.get(pod_id, ())]

    async def add(self, record: Pod | Container) -> None:
        """A new record: its name is taken from now on; on failure it is as if it had never been."""
        self._index(record)
        self._changes[record.id] = record
        try:
            await self._saved()
        except BaseException:
            self._unindex(record)
            self._changes[record.id] = (type(record), record.id)
            raise

    def note_pod(self, pod_id: str, **facts: Any) -> Pod | None:
        """New facts of a pod, in memory at once and on disk soon. None when it is gone."""
        old = self.pods.get(pod_id)
        if old is None:
            return None
        self.pods[pod_id] = self._changes[pod_id] = pod = replace(old, **facts)
        self._flush_soon()
        self.changed(old, pod)
        return pod

    def note_container(self, container_id: str, **facts: Any) -> Container | None:
        """New facts of a container, in memory at once and on disk soon. None when it is gone."""
        old = self.containers.get(container_id)
        if old is None:
            return None
        self.containers[container_id] = self._changes[container_id] = container = replace(old, **facts)
        self._flush_soon()
        self.changed(old, container)
        return container

    async def change_pod(self, pod_id: str, **facts: Any) -> Pod:
        """`note_pod`, and on disk when it returns. Raises KeyError when it is gone."""
        pod = self.note_pod(pod_id, **facts)
        if pod is None:
            raise KeyError(pod_id)
        await self._saved()
        return pod

    async def change_container(self, container_id: str, **facts: Any) -> Container:
        """`note_container`, and on disk when it returns. Raises KeyError when it is gone."""
        container = self.note_container(container_id, **facts)
        if container is None:
            raise KeyError(container_id)
        await self._saved()
        return container

    async def remove(self, record: Pod | Container) -> None:
        """Forgets it, and frees its name. On failure it is still there."""
        current = self.pods.get(record.id) or self.containers.get(record.id)
        if current is None:
            return
        # Out of memory first: a fact that arrives while the row is being deleted must not write it again.
        self._unindex(current)
        self._changes[current.id] = (type(current), current.id)
        try:
            await self._saved()
        except BaseException:
            self._index(current)
            self._changes[current.id] = current
            raise
        self.changed(current, None)

    async def _saved(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._flush_soon()
        await waiter

    def _flush_soon(self) -> None:
        if self._flusher is None:
            self._flusher = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._changes or self._waiters:
                changes, self._changes = self._changes, {}
                waiters, self._waiters = self._waiters, []
                try:
                    await loop.run_in_executor(self._writer, self._commit, list(changes.values()))
                except Exception as error:
                    # Facts stay facts: what nobody wrote since is tried again with the next change.
                    self._changes = changes | self._changes
                    log.error("database: cannot write %d records, they are kept in memory: %s", len(changes), error)
                    _settle(waiters, error)
                    if not self._waiters:
                        return
                else:
                    _settle(waiters, None)
        finally:
            self._flusher = None

    def _commit(self, changes: list[Pod | Container | tuple[type[Any], str]]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                if isinstance(change, tuple):
                    self._db.execute(f"DELETE FROM {_TABLES[change[0]]} WHERE id = ?", (change[1],))
                else:
                    _write(self._db, change)
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                path = self._db.execute("PRAGMA database_list").fetchone()[2]
                raise OSError(f"write the records in {path}: ENOSPC no space left on device") from error
            raise

    async def settle(self) -> None:
        """Returns once nothing waits to be written, or the writing failed; tries again what failed before."""
        if self._changes or self._flusher is not None:
            try:
                await self._saved()
            except Exception as error:
                log.error("database: facts kept in memory only: %s", error)

    async def close(self) -> None:
        """Writes what is left and closes the database."""
        await self.settle()
        await asyncio.get_running_loop().run_in_executor(self._writer, self._db.close)
        self._writer.shutdown(wait=False)


def _settle(waiters: list[asyncio.Future[None]], error: Exception | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
