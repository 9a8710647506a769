"""The real image store on a fake registry and a fake unpacker, ready to pull: what the store's tests begin with."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from imagestore.config import StoreConfig
from imagestore.keyring import KeyringConfig
from imagestore.model import Credentials, Image, Unpacker
from imagestore.platforms import Platform
from imagestore.store import Store
from tests.fakes.unpacker import MemoryUnpacker
from tests.support import SOON_S

T = TypeVar("T")

# Patience for tests: a failure that comes after retries comes within a second.
QUICK = StoreConfig(
    platform=Platform("linux", "amd64"),
    hosts_directories=(),
    keyring=KeyringConfig(()),
    retries=2,
    backoff_s=0.01,
    backoff_limit_s=0.02,
    retry_after_limit_s=1.0,
    connect_timeout_s=5.0,
    answer_timeout_s=0.6,
    stall_timeout_s=0.3,
    stall_bytes=4096,
    cancel_wait_s=5.0,
)


def run(work: Coroutine[Any, Any, T], seconds: float = SOON_S) -> T:
    """Runs a coroutine on a loop of its own, and not for ever."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(bounded())


class Bench:
    """A store in `directory` with everything around it. `hosts` is where tests write hosts.toml."""

    def __init__(self, directory: Path, unpacker: Unpacker | None = None, **changes: Any) -> None:
        self.directory = directory
        self.root = directory / "images"
        self.hosts = directory / "certs.d"
        self.unpacker = unpacker or MemoryUnpacker()
        self.config = replace(QUICK, hosts_directories=(self.hosts,), **changes)
        self.open()

    def open(self) -> None:
        """As a daemon does at its start: also to see what a restart would see."""
        self.db = sqlite3.connect(self.directory / "state.db", check_same_thread=False, isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.store = Store(self.root, self.db, self.unpacker, self.config)

    def close(self) -> None:
        self.db.close()

    def pull(self, reference: str, credentials: Credentials | None = None) -> Image:
        return run(self.store.pull(reference, credentials))

    def hosts_toml(self, domain: str, text: str) -> None:
        path = self.hosts / domain / "hosts.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def blobs(self) -> set[str]:
        return {f"sha256:{path.name}" for path in (self.root / "blobs/sha256").iterdir() if path.name[0] != "."}

    def ingests(self) -> set[str]:
        """Partial files that a later pull resumes."""
        return {path.name for path in (self.root / "ingest").iterdir() if path.name.endswith(".part")}

    def strays(self) -> set[str]:
        """Anything else that a failed pull must not leave."""
        hidden = {path.name for path in (self.root / "blobs/sha256").iterdir() if path.name[0] == "."}
        odd = {
            path.name
            for path in (self.root / "ingest").iterdir()
            if not path.name.endswith(".part") and path.name not in (".collect", ".reserve")
        }
        return hidden | odd | {path.name for path in self.root.iterdir() if path.name.startswith(".")}
