"""The store: what is awaited is on disk, what cannot be written stays a fact, what is damaged costs itself only."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cri.api import api_pb2 as pb
from cri.records import Container, Pod
from cri.store import Store, open_database, open_sound


def _pod(number: int, **fields: Any) -> Pod:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name=f"pod{number}")).SerializeToString()
    return Pod(f"{number:064x}", f"pod{number}", "default", f"uid{number}", 0, "native", config, 1, **fields)


def _container(number: int, pod: Pod, **fields: Any) -> Container:
    config = pb.ContainerConfig(metadata=pb.ContainerMetadata(name=f"c{number}")).SerializeToString()
    return Container(f"{number + (1 << 200):064x}", pod.id, f"c{number}", 0, config, 1, **fields)


def _run(path: Path, body: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
    async def with_store() -> None:
        store = Store(open_sound(path))
        try:
            await body(store)
        finally:
            await store.close()

    asyncio.run(with_store())


def _on_disk(path: Path) -> Store:
    """What another process sees right now."""
    return Store(open_database(path, durable=False))


def test_what_was_awaited_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"

    async def body(store: Store) -> None:
        pod = _pod(1, ips="10.0.0.1")
        await store.add(pod)
        await store.add(container := _container(1, pod, groups="1,2"))
        assert _on_disk(path).pods == {pod.id: pod}
        changed = await store.change_container(container.id, exit_code=3, finished_ns=9)
        seen = _on_disk(path)
        assert seen.containers == {container.id: changed} and seen.containers_of(pod.id) == [changed]
        assert seen.named(pod.key) == pod.id and seen.named(container.key) == container.id
        await store.remove(container)
        assert _on_disk(path).containers == {} and store.named(container.key) is None
        await store.remove(pod)
        await store.remove(pod)
        assert _on_disk(path).pods == {}

    _run(path, body)


def test_many_at_once_are_few_commits_and_all_there(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"

    async def body(store: Store) -> None:
        await asyncio.gather(*(store.add(_pod(number)) for number in range(200)))
        await asyncio.gather(*(store.change_pod(_pod(number).id, made_ns=7) for number in range(200)))
        assert {pod.made_ns for pod in _on_disk(path).pods.values()} == {7} and len(store.pods) == 200

    _run(path, body)


def test_a_fact_that_comes_while_its_record_is_removed_does_not_bring_it_back(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"

    async def body(store: Store) -> None:
        await store.add(pod := _pod(1))
        removing = asyncio.create_task(store.remove(pod))
        await asyncio.sleep(0)
        assert store.note_pod(pod.id, lost_ns=5) is None
        await removing
        await store.settle()
        assert _on_disk(path).pods == {} and store.pods == {}

    _run(path, body)


def test_o19_a_full_disk_keeps_facts_in_memory_and_writes_them_later(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"

    async def body(store: Store) -> None:
        await store.add(pod := _pod(1))
        await store.add(container := _container(1, pod))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="ocid.db: ENOSPC no space left"):
            await store.add(_pod(2, network_result="x" * 100_000))
        assert list(store.pods) == [pod.id] and store.named(_pod(2).key) is None
        big = "m" * 100_000
        with pytest.raises(OSError, match="ocid.db: ENOSPC no space left"):
            await store.change_container(container.id, finished_ns=5, exit_code=7, message=big)
        assert store.containers[container.id].exit_code == 7
        await store.settle()
        assert _on_disk(path).containers[container.id].finished_ns == 0
        store._db.execute("PRAGMA max_page_count = 1000000")
        await store.settle()
        assert _on_disk(path).containers[container.id].exit_code == 7
        await store.add(_pod(2))

    _run(path, body)


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"

    async def body(store: Store) -> None:
        other = open_database(path, durable=True)
        other.execute("BEGIN IMMEDIATE")
        adding = asyncio.create_task(store.add(pod := _pod(1)))
        await asyncio.sleep(0.05)
        # Reading does not wait meanwhile.
        assert not adding.done() and store.pods[pod.id] == pod
        other.execute("COMMIT")
        other.close()
        await adding

    _run(path, body)


def test_modes_and_durability(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"
    db = open_database(path, durable=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert open_database(path, durable=False).execute("PRAGMA synchronous").fetchone() == (1,)


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"
    db = open_sound(path)
    db.execute("UPDATE cri_schema SET version = 99")
    db.close()
    with pytest.raises(sqlite3.DatabaseError, match="of a newer ocid"):
        open_sound(path)
    assert not list(tmp_path.glob("*damaged*"))


def test_a_database_of_an_older_version_gets_the_columns_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"
    _stocked(path)
    db = sqlite3.connect(path)
    for column in ("image_name", "signal", "resources"):
        db.execute(f"ALTER TABLE containers DROP COLUMN {column}")
    db.close()
    store = Store(open_sound(path))
    assert {(one.image_name, one.signal, one.resources) for one in store.containers.values()} == {("", 0, b"")}
    assert len(store.containers) == 30


def _stocked(path: Path) -> None:
    async def body(store: Store) -> None:
        for number in range(30):
            await store.add(pod := _pod(number, network_result="r" * 500))
            await store.add(_container(number, pod, message="m" * 300))

    _run(path, body)
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE IF NOT EXISTS other_part (key TEXT PRIMARY KEY, value BLOB)")
    db.executemany("INSERT INTO other_part VALUES (?, ?)", [(f"k{number}", b"v" * 200) for number in range(50)])
    db.commit()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def test_o44_damage_anywhere_never_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    good = tmp_path / "good.db"
    _stocked(good)
    whole = good.read_bytes()
    chance = random.Random(44)
    saved, quarantined = 0, 0
    for trial in range(60):
        path = tmp_path / f"trial{trial}" / "ocid.db"
        path.parent.mkdir()
        spoilt = bytearray(whole)
        at = chance.randrange(len(whole))
        length = chance.choice((1, 16, 400, 5000))
        action = chance.choice(("flip", "zero", "cut", "noise"))
        if action == "cut":
            del spoilt[at:]
        else:
            size = len(spoilt[at : at + length])
            made = {"zero": bytes(size), "noise": chance.randbytes(size)}
            spoilt[at : at + length] = made.get(action) or bytes(b ^ 0x10 for b in spoilt[at : at + length])
        path.write_bytes(spoilt)
        store = Store(open_sound(path))
        for container in store.containers.values():
            assert container.pod_id in store.pods
        asyncio.run(_usable(store))
        saved += len(store.pods)
        quarantined += bool(list(path.parent.glob("*.damaged-*")))
        shutil.copy(good, path)  # the next trial's disk space
    assert quarantined > 20, "the damage was not found"
    assert saved > 60 * 30 // 3, "too little was saved"


async def _usable(store: Store) -> None:
    await store.add(_pod(1000))
    await store.change_pod(_pod(1000).id, made_ns=1)
    await store.close()


def test_o44_rows_of_other_parts_are_saved_as_well(tmp_path: Path) -> None:
    path = tmp_path / "ocid.db"
    _stocked(path)
    spoilt = bytearray(path.read_bytes())
    # Some page of the containers: found by what they hold.
    at = spoilt.index(b"m" * 300)
    spoilt[at - at % 4096 : at - at % 4096 + 100] = b"\xff" * 100
    path.write_bytes(spoilt)
    db = open_sound(path)
    assert db.execute("SELECT count(*) FROM other_part").fetchone() == (50,)
    assert len(Store(db).pods) == 30
