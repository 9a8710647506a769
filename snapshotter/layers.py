"""Committed layers: from a blob to a record, each once, in any order, several at a time.

    extract (a worker) ─▶ wait for the parent ─▶ finish on its chain (a worker) ─▶ rename ─▶ sync ─▶ record
      └ of a blob that is still arriving: as far as it is there        └▶ wait until it is whole and verified

It refuses a layer whose parent fails or never comes, and one whose diff id is not the announced one. Invariant: a
layer is recorded only once its blob was verified, its files and its directory's name are on disk, and its parent is
recorded; after a failure
nothing of it is left but what the trash holds; no lock is held while files are made, synced or deleted (threats O43,
O45, R14).
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from runtime.linux.failpoint import failpoint
from runtime.linux.files import sync_directory
from runtime.linux.libc import KernelError
from snapshotter import protocol
from snapshotter.durable import Syncer
from snapshotter.layout import Layout, make_root
from snapshotter.model import Arriving, Config, LayerKey, NotFound, SnapshotError, UnpackError, Usage
from snapshotter.pool import Pool
from snapshotter.records import LayerRecord, Records
from snapshotter.trash import Trash
from snapshotter.usage import measure

# Each round follows links that the round before could not know of; more than this is no image.
_ROUNDS = 4
_FAILURES = 256
# How often a wait for a blob's last bytes looks whether it is still wanted.
_LOOK_S = 0.1
_PLAIN = "application/vnd.oci.image.layer.v1.tar"


class _Flight:
    """A layer that is being unpacked: equal calls wait for it."""

    __slots__ = ("parent", "started", "error", "done", "cancelled")

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self.started = time.monotonic()
        self.error: BaseException | None = None
        self.done = False
        self.cancelled = False


class _Source:
    """The blob of one unpacking, opened: whole already, or still arriving."""

    def __init__(self, blob: Path | Arriving) -> None:
        self._credit: list[int] = []
        self._arriving: Arriving | None = None
        if isinstance(blob, Path):
            self.fd = os.open(blob, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.size = os.fstat(self.fd).st_size
        else:
            self._arriving, self.size = blob, blob.size
            self.fd, credit = blob.open()
            self._credit.append(credit)
        self._all = [self.fd, *self._credit]

    def take_credit(self) -> list[int]:
        """The eventfd, once: whoever reads the blob again does so when it is whole. It is closed with the rest."""
        credit, self._credit = self._credit, []
        return credit

    def verified(self, seconds: float) -> bool:
        """See Arriving.verified."""
        return self._arriving is None or self._arriving.verified(seconds)

    def close(self) -> None:
        for fd in self._all:
            os.close(fd)


class Layers:
    """`changed` is the snapshotter's lock, which guards `records`."""

    def __init__(
        self, layout: Layout, records: Records, trash: Trash, changed: threading.Condition, config: Config
    ) -> None:
        self._layout = layout
        self._records = records
        self._trash = trash
        self._changed = changed
        self._config = config
        self._flights: dict[str, _Flight] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self._measuring = threading.Lock()
        self._fd = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._syncer = Syncer(self._fd)
        self.pool = Pool(config.workers, config.worker_idle_s, config.arriving)
        self._closed = False

    def close(self) -> None:
        """Ends the workers; calls under way fail with SnapshotError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.pool.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._flights)
        os.close(self._fd)

    def has(self, chain_id: str) -> bool:
        """The layer and all below it are committed."""
        with self._changed:
            return self._records.chain(chain_id) is not None

    def chain(self, chain_id: str) -> Sequence[LayerRecord]:
        """The layers of a chain, top first. Raises NotFound."""
        with self._changed:
            chain = self._records.chain(chain_id)
        if chain is None:
            raise NotFound(f"layer {chain_id} does not exist")
        return chain

    def directories(self, chain_id: str) -> list[Path]:
        """The directories of a chain, top first. Raises NotFound."""
        return [Path(path) for path in self._paths(chain_id)]

    def _paths(self, chain_id: str) -> list[str]:
        chain = self.chain(chain_id)
        # overlayfs ignores an opaque root, so what it hides is left out here
        end = next((number for number, layer in enumerate(chain, 1) if layer.opaque), None)
        return [self._layout.layer_path(layer.number) for layer in chain[:end]]  # a Path for each is the most of it

    def usage(self) -> Usage:
        """What all layers take on disk, to the block, with the directories that they lie in."""
        taken = sum(self.sizes().values()) + os.lstat(self._layout.layers).st_blocks * 512
        with self._changed:
            return Usage(taken, 1 + sum(1 + layer.inodes for layer in self._records.layers.values()))

    def sizes(self) -> dict[str, int]:
        """What each layer takes on disk, by chain id. Its files never change, so they are measured once: when somebody
        asks, since a pull need not wait for that, and what a filesystem has given is certain once it was synced."""
        with self._measuring:
            with self._changed:
                layers = tuple(self._records.layers.values())
            return {layer.chain_id: layer.bytes or self._measure(layer) for layer in layers}

    def _measure(self, layer: LayerRecord) -> int:
        try:
            fd = os.open(self._layout.layer(layer.number).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # removed meanwhile; of what is damaged `damaged` tells
            return 0
        try:
            size = measure(fd).bytes
        finally:
            os.close(fd)
        with self._changed:
            self._records.measured(layer, size)
        return size

    def unpack(
        self,
        blob: Path | Arriving,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        """See imagestore.model.Unpacker.unpack_layer, and Early.unpack_arriving there."""
        with self._changed:
            if self._closed:
                raise SnapshotError("the snapshotter was closed")
            if self._records.chain(chain_id) is not None:
                return
            flight = self._flights.get(chain_id)
            if flight is not None:
                self._join(flight)
                return
            flight = self._flights[chain_id] = _Flight(parent)
            self._failures.pop(chain_id, None)
        try:
            self._make(blob, media_type, diff_id, chain_id, flight, key)
        except BaseException as error:
            flight.error = error
            raise
        finally:
            self.pool.forget(flight)
            with self._changed:
                flight.done = True
                del self._flights[chain_id]
                if flight.error is not None:
                    self._failures[chain_id] = (time.monotonic(), str(flight.error))
                    if len(self._failures) > _FAILURES:
                        del self._failures[next(iter(self._failures))]
                self._changed.notify_all()

    def cancel(self, chain_id: str) -> None:
        """See Overlay.cancel."""
        with self._changed:
            flight = self._flights.get(chain_id)
            if flight is not None:
                flight.cancelled = True
                self.pool.cancel(flight)
                self._changed.notify_all()

    def remove_except(self, keep: Iterable[str], held: Callable[[], Iterable[str | None]]) -> int:
        """Removes the layers that are not in `keep` or `held` (asked for with the lock held), below one of those, or
        wanted by an unpacking under way."""
        with self._changed:
            gone = self._beyond(keep, held)
            for layer in gone:
                self._records.remove_layer(layer.chain_id)
        failpoint("snapshots.layers.unrecorded")
        names = [self._trash.take(self._layout.layer(layer.number).parent) for layer in gone]
        # Whatever of this a power cut undoes, no record may come to stand on a half deleted directory.
        sync_directory(self._layout.layers)
        failure: OSError | None = None
        for name in names:
            try:
                self._trash.delete(name)
            except OSError as error:  # the others first; this one is found again by the next call or start
                failure = failure or error
        if failure is not None:
            raise failure
        return len(gone)

    def removable(self, keep: Iterable[str], held: Callable[[], Iterable[str | None]]) -> list[LayerRecord]:
        """What `remove_except` would remove now."""
        with self._changed:
            return self._beyond(keep, held)

    def damaged(self) -> list[tuple[str, str]]:
        """Layers whose directory is gone or has another number of inodes than when it was unpacked."""
        with self._changed:
            layers = tuple(self._records.layers.values())
        found = []
        for layer in layers:
            try:
                fd = os.open(self._layout.layer(layer.number), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                found.append((layer.chain_id, f"its directory: {os.strerror(error.errno or 0).lower()}"))
                continue
            try:
                inodes = measure(fd).inodes
            except OSError as error:
                found.append((layer.chain_id, f"reading it: {os.strerror(error.errno or 0).lower()}"))
                continue
            finally:
                os.close(fd)
            if inodes != layer.inodes:
                found.append((layer.chain_id, f"{inodes} inodes, {layer.inodes} were unpacked"))
        return found

    def forget(self, chain_ids: Iterable[str], held: Callable[[], Iterable[str | None]]) -> list[str]:
        """Removes layers with those above them; returns the ones of `chain_ids` that are below a held one."""
        with self._changed:
            gone = set(chain_ids)
            while more := {one.chain_id for one in self._records.layers.values() if one.parent in gone} - gone:
                gone |= more
            others = frozenset(self._records.layers) - gone
            stay = frozenset(self._records.layers) - {layer.chain_id for layer in self._beyond(others, held)}
        self.remove_except(others, held)
        return [chain_id for chain_id in chain_ids if chain_id in stay]

    def _beyond(self, keep: Iterable[str], held: Callable[[], Iterable[str | None]]) -> list[LayerRecord]:
        """With the lock held."""
        wanted = {*keep, *held(), *self._flights, *(flight.parent for flight in self._flights.values())}
        kept: set[str] = set()
        for at in wanted:
            while at is not None and at not in kept and (layer := self._records.layers.get(at)):
                kept.add(at)
                at = layer.parent
        return [layer for layer in self._records.layers.values() if layer.chain_id not in kept]

    def unpack_upper(self, tar: int, upper: int, parent: str | None) -> None:
        """Unpacks the plain tar at `tar` into the empty directory `upper`, which lies on `parent`; both fds stay the
        caller's. Nothing is recorded or synced: a container's files are not. Raises UnpackError, OSError, NotFound."""
        lowers = [] if parent is None else self._paths(parent)
        # One description, and so one position, for what is hashed here and what a worker reads.
        os.lseek(tar, 0, os.SEEK_SET)
        with os.fdopen(os.dup(tar), "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.lseek(tar, 0, os.SEEK_SET)
        owner = object()
        size, limits = os.fstat(tar).st_size, self._config.limits
        request = protocol.Unpack(_PLAIN, size, f"sha256:{digest}", parent is None, {}, limits)
        made = self.pool.ask(owner, request, tar, upper)
        if self.pool.ask(owner, protocol.Finish(lowers, made.implied, made.links), upper).aliases:
            raise UnpackError("layer goes through links of the layers below, which no packed layer does")

    # ------------------------------------------------------------------------------------------------ one unpacking

    def _join(self, flight: _Flight) -> None:
        """Waits for an equal call, and ends as it does."""
        self._changed.wait_for(lambda: flight.done)
        if flight.error is not None:
            raise _again(flight.error)

    def _make(
        self, blob: Path | Arriving, media_type: str, diff_id: str, chain_id: str, flight: _Flight, key: LayerKey | None
    ) -> None:
        with self._changed:
            number = self._layout.number()
        hidden, final = self._layout.hidden(self._layout.layers, number), self._layout.layer(number).parent
        source = _Source(blob)
        try:
            made = self._extract(source, hidden, media_type, diff_id, flight, key)
            failpoint("snapshots.layer.extracted")
            self._wait_for_blob(source, flight)
            hidden.rename(final)
            self._syncer.sync()
            failpoint("snapshots.layer.synced")
            record = LayerRecord(chain_id, diff_id, flight.parent, number, 0, made.inodes, made.opaque, time.time_ns())
            with self._changed:
                if flight.parent is not None and self._records.chain(flight.parent) is None:
                    raise SnapshotError(f"layer {chain_id}: its parent {flight.parent} was removed meanwhile")
                self._records.add_layer(record)
        except BaseException as error:
            self._trash.undo(error, hidden, final)
            raise
        finally:
            source.close()

    def _extract(
        self, source: _Source, hidden: Path, media_type: str, diff_id: str, flight: _Flight, key: LayerKey | None
    ) -> protocol.Done:
        """Unpacks into `hidden`/fs and finishes it on the parent's chain."""
        aliases: dict[bytes, bytes] = {}
        for _ in range(_ROUNDS):
            hidden.mkdir(0o700)
            layer_fd = make_root(hidden / "fs")
            try:
                base, limits = flight.parent is None, self._config.limits
                request = protocol.Unpack(media_type, source.size, diff_id, base, aliases, limits, key)
                credit = source.take_credit()
                made = self.pool.ask(flight, request, source.fd, layer_fd, *credit, patient=bool(credit))
                lowers = self._lowers(flight)
                more = self.pool.ask(flight, protocol.Finish(lowers, made.implied, made.links), layer_fd).aliases
                if not more and (made.links or not made.inodes):
                    made = made.changed(inodes=measure(layer_fd).inodes)  # some were replaced after they were counted
            finally:
                os.close(layer_fd)
            if not more:
                return made
            aliases.update(zip(more[::2], more[1::2], strict=True))
            self._trash.discard(hidden)
            self._wait_for_blob(source, flight)
        raise UnpackError(f"layer goes through links of the layers below in more than {_ROUNDS} steps")

    def _wait_for_blob(self, source: _Source, flight: _Flight) -> None:
        """Until all that was read has been verified. Raises UnpackError when it was not what it should be."""
        while not source.verified(_LOOK_S):
            if self._closed or flight.cancelled:
                raise SnapshotError("the snapshotter was closed" if self._closed else "unpacking was cancelled")

    def _lowers(self, flight: _Flight) -> list[str]:
        """The directories below, once the parent is committed."""
        if flight.parent is None:
            return []
        if not self.has(flight.parent):
            self._syncer.sync()  # it has to wait anyway: what it wrote may as well go to disk meanwhile
            self._wait_for(flight.parent, flight)
        return self._paths(flight.parent)

    def _wait_for(self, parent: str, flight: _Flight) -> None:
        """Fails with the parent's failure, or when nobody has been unpacking it for `parent_wait_s`."""
        wait = self._config.parent_wait_s
        with self._changed:
            idle_since = time.monotonic()
            while self._records.chain(parent) is None:
                if self._closed or flight.cancelled:
                    raise SnapshotError("the snapshotter was closed" if self._closed else "unpacking was cancelled")
                failed_at, failure = self._failures.get(parent, (0.0, ""))
                if failed_at >= flight.started:
                    raise SnapshotError(f"parent layer {parent} failed: {failure}")
                if parent in self._flights:
                    idle_since = time.monotonic()
                left = idle_since + wait - time.monotonic()
                if left <= 0:
                    raise NotFound(f"parent layer {parent} was not unpacked within {wait:g} s")
                self._changed.wait(left)


def _again(error: BaseException) -> BaseException:
    """The failure of an equal call, for one more caller: an exception object must not be raised in two threads."""
    copy: BaseException
    if isinstance(error, KernelError):
        copy = KernelError(error.errno or errno.EIO, error.call, error.subject)
    elif isinstance(error, OSError):
        copy = OSError(error.errno, error.strerror, error.filename)
    elif isinstance(error, SnapshotError):
        copy = type(error)(*error.args)
    else:
        copy = SnapshotError(f"the same layer failed in another call: {error}")
    copy.__cause__ = error
    return copy
