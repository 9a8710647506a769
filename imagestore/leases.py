"""What must not be collected while it is in use: blobs and layers of running pulls, here and in other processes.

    ROOT/ingest/.pulls-PID-RANDOM   flock(2)ed by a process while it pulls; free: its process is dead
    ROOT/ingest/.collect            held shared while such a file is made, exclusively while somebody collects

Refuses to collect while another process pulls: its leases cannot be seen from here, and garbage can wait. Invariant: a
blob or layer that a pull has leased stays, even if it was garbage a moment before.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PULLS = ".pulls-"


class Leases:
    """The leases of one store in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._blobs: Counter[str] = Counter()
        self._layers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._sweeping = threading.Lock()
        self._presence = -1
        self._presence_path: Path | None = None
        self._pulls = 0
        self._collecting = False
        # Given back while a collection runs: whether an image has them now is not in what the collection has read.
        self._recent: set[str] = set()

    def enter(self) -> None:
        """A pull begins: other processes must see that this one pulls. Blocks while one of them collects."""
        with self._lock:
            if self._pulls == 0:
                self._show_presence()
            self._pulls += 1

    def leave(self, blobs: set[str], layers: set[str]) -> None:
        """A pull has ended, with these leases."""
        with self._lock:
            self._blobs -= Counter(blobs)
            if self._collecting:
                self._recent |= blobs
            self._layers -= Counter(layers)
            self._pulls -= 1
            if self._pulls == 0:
                self._hide_presence()

    def lease_blob(self, digest: str, mine: set[str]) -> None:
        """From now on the blob stays. `mine` remembers it for `leave`."""
        with self._lock:
            if digest not in mine:
                mine.add(digest)
                self._blobs[digest] += 1

    def lease_layers(self, chain_ids: set[str], mine: set[str]) -> None:
        """From now on these layers stay. Waits for a removal of layers that has begun without knowing of them."""
        with self._sweeping, self._lock:
            for chain_id in chain_ids - mine:
                mine.add(chain_id)
                self._layers[chain_id] += 1

    def holders(self, chain_id: str) -> int:
        """How many pulls of this process have leased the layer."""
        with self._lock:
            return self._layers[chain_id]

    @contextmanager
    def sweeping_layers(self) -> Iterator[frozenset[str]]:
        """Yields the leased layers; no other becomes leased meanwhile."""
        with self._sweeping:
            with self._lock:
                leased = frozenset(self._layers)
            yield leased

    @contextmanager
    def removing_blob(self, digest: str) -> Iterator[bool]:
        """Yields whether the blob is free to go, and keeps it so."""
        with self._lock:
            yield self._blobs[digest] == 0 and digest not in self._recent

    @contextmanager
    def collecting(self) -> Iterator[bool]:
        """Yields False when another process pulls or collects; nobody else begins a pull or a collection meanwhile."""
        gate = self._gate()
        try:
            # Under the lock, so that a pull of ours that begins now either waits for neither or sees `_collecting`.
            with self._lock:
                try:
                    fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._collecting = True
                except BlockingIOError:
                    busy = True
                else:
                    busy = False
            if busy:
                yield False
                return
            try:
                yield not self._others_pull()
            finally:
                with self._lock:
                    self._collecting = False
                    self._recent.clear()
        finally:
            os.close(gate)

    def _gate(self) -> int:
        return os.open(self._directory / ".collect", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _show_presence(self) -> None:
        gate = self._gate()
        try:
            if not self._collecting:  # our own collection sees our leases, and may take long: do not wait for it
                fcntl.flock(gate, fcntl.LOCK_SH)
            path = self._directory / f"{_PULLS}{os.getpid()}-{os.urandom(6).hex()}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
            self._presence, self._presence_path = fd, path
        finally:
            os.close(gate)

    def _hide_presence(self) -> None:
        if self._presence_path is not None:
            self._presence_path.unlink(missing_ok=True)
            os.close(self._presence)
            self._presence, self._presence_path = -1, None

    def _others_pull(self) -> bool:
        others = False
        for entry in os.scandir(self._directory):
            if not entry.name.startswith(_PULLS) or entry.path == str(self._presence_path):
                continue
            try:
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)  # nobody holds it: its process died
            except BlockingIOError:
                others = True
            except FileNotFoundError:
                continue
            finally:
                os.close(fd)
        return others
