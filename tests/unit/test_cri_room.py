"""The files of the database that are handed from one opening to the next, on a real filesystem."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cri.room import PASSING, STAYING, Room
from cri.store import open_database, open_sound


def _in_a_process(work: Callable[[], object]) -> None:
    """Locks are a process's, and so is a crash: `work` may end it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def _session(path: Path, *, ahead: int = PASSING, crash: bool = False, insert: bytes = b"") -> list[int]:
    room = Room(path, ahead)
    db = room.opened(lambda: open_sound(path))
    second = open_database(path, durable=True)
    db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, v BLOB)")
    have = [row[0] for row in second.execute("SELECT n FROM t ORDER BY n")]
    second.execute("INSERT INTO t (v) VALUES (?)", (insert,))
    if crash:
        os._exit(0)
    second.close()
    db.close()
    room.closed()
    return have


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "ocid.db"


def _inodes(path: Path) -> dict[str, int]:
    return {kind: path.with_name(f".{path.name}-{kind}").stat().st_ino for kind in ("wal", "shm")}


def test_blocks_are_kept_from_one_opening_to_the_next(path: Path) -> None:
    _session(path)
    kept = _inodes(path)
    wal, shm = (path.with_name(f".ocid.db-{kind}").stat() for kind in ("wal", "shm"))
    assert wal.st_blocks * 512 >= PASSING and shm.st_blocks * 512 >= 32768
    assert not path.with_name("ocid.db-wal").exists() and not path.with_name("ocid.db-shm").exists()
    room = Room(path, PASSING)
    db = room.opened(lambda: open_sound(path))
    live = {kind: path.with_name(f"ocid.db-{kind}").stat().st_ino for kind in ("wal", "shm")}
    db.close()
    room.closed()
    assert live == kept == _inodes(path)


def test_index_is_not_made_empty_in_between(path: Path) -> None:
    """SQLite truncates it for whoever is first, which would set its blocks free."""
    _session(path)
    shm = path.with_name(".ocid.db-shm")
    os.pwrite(fd := os.open(shm, os.O_RDWR), b"mark", 32000)  # in a table that the first write to the log makes anew
    os.close(fd)
    room = Room(path, PASSING)
    db = room.opened(lambda: open_database(path, durable=False))
    assert db.execute("SELECT count(*) FROM t").fetchone() == (1,)
    db.close()
    room.closed()
    assert shm.read_bytes()[32000:32004] == b"mark"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_committed_is_there(path: Path, seed: int) -> None:
    """Through orderly ends, crashes, and strangers who take the names away."""
    dice, expected = random.Random(seed), list[int]()
    for _ in range(40):
        kind = dice.choice(["orderly", "orderly", "crash", "stranger"])
        size, ahead = dice.choice([10, 5000, 60000]), dice.choice([PASSING, STAYING])

        def work(kind: str = kind, size: int = size, ahead: int = ahead) -> None:
            if kind == "stranger":
                with open_database(path, durable=False) as db:
                    db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, v BLOB)")
                    db.execute("INSERT INTO t (v) VALUES (?)", (os.urandom(size),))
                db.close()
                return
            assert _session(path, ahead=ahead, crash=kind == "crash", insert=os.urandom(size)) == expected

        _in_a_process(work)
        expected.append(len(expected) + 1)
    db = sqlite3.connect(path)
    assert [row[0] for row in db.execute("SELECT n FROM t ORDER BY n")] == expected
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_reader_beside_keeps_its_index(path: Path) -> None:
    """Who reads the database while a process starts after a crash has the index open that would be made anew."""
    _in_a_process(lambda: _session(path, crash=True, insert=b"x"))
    ready, go = os.pipe(), os.pipe()
    reader = os.fork()
    if reader == 0:
        code = 1
        try:
            db = sqlite3.connect(path, isolation_level=None)
            db.execute("BEGIN")
            assert db.execute("SELECT count(*) FROM t").fetchone() == (1,)
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            assert db.execute("SELECT count(*) FROM t").fetchone() == (1,)
            db.execute("COMMIT")
            assert db.execute("SELECT count(*) FROM t").fetchone() == (2,)
            code = 0
        finally:
            os._exit(code)
    try:
        assert os.read(ready[0], 1) == b"1"
        _in_a_process(lambda: _session(path, insert=b"y"))
    finally:
        os.write(go[1], b"1")
        status = os.waitpid(reader, 0)[1]
        for fd in (*ready, *go):
            os.close(fd)
    assert status == 0


def test_log_that_went_aside_is_not_used_again(path: Path) -> None:
    _in_a_process(lambda: _session(path, crash=True, insert=b"x"))
    aside = path.with_name("ocid.db.damaged-1-wal")
    path.with_name("ocid.db-wal").rename(aside)
    path.with_name("ocid.db-shm").unlink()
    path.unlink()
    before = aside.read_bytes()
    assert _session(path) == []
    assert aside.read_bytes() == before
    assert path.with_name(".ocid.db-wal").stat().st_ino != aside.stat().st_ino
    assert _session(path) == [1]


def test_pages_are_free_in_the_database(path: Path) -> None:
    """So that what a log holds of a full disk's records finds its place when it is written back."""
    _session(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA freelist_count").fetchone()[0] >= 24
    db.close()
    assert path.stat().st_blocks * 512 >= path.stat().st_size
