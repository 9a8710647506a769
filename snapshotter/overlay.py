"""The snapshotter on overlayfs: committed layers by chain id, writable snapshots by key, mounts as data.

    root/                0700
      layers/N/fs        a committed layer (N: a short number, so that mount options stay short)
      layers/.N.…/fs     one that is being made
      active/N/{upper,work}
      active/.N.…
      empty/             stands below an image without layers: overlayfs wants a lower directory
      trash/             on its way out

It refuses to mount anything, to trust a directory that has no record, and to enter a mount when it removes one.
Invariant: a layer is recorded only once its files and the directory's name are on disk; a directory without a record
is garbage; no lock is held while files are made, synced or deleted (threats O38, O43, O45, R14).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.linux.failpoint import failpoint
from runtime.linux.files import sync_directory
from runtime.linux.inode_flags import FS_TOPDIR_FL, add_inode_flags
from runtime.linux.libc import KernelError
from runtime.linux.mount import FsMount
from snapshotter import protocol
from snapshotter.durable import Syncer
from snapshotter.looks import copy_looks
from snapshotter.model import AlreadyExists, Config, NotFound, SnapshotError, SnapshotInfo, UnpackError, Usage
from snapshotter.mounts import boot_id, has_lowerdir_plus, overlay_mount, settle_volatile
from snapshotter.pool import Pool
from snapshotter.records import ActiveRecord, LayerRecord, Records
from snapshotter.trash import Trash
from snapshotter.usage import measure

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Each round follows links that the round before could not know of; more than this is no image.
_ROUNDS = 4
# fsconfig(2) takes at most 255 bytes of value; what follows the root is "/layers/4294967295/fs" at most.
_MAX_ROOT = 230
_FAILURES = 256


class _Flight:
    """A layer that is being unpacked: equal calls wait for it."""

    __slots__ = ("parent", "started", "error", "done", "cancelled")

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self.started = time.monotonic()
        self.error: BaseException | None = None
        self.done = False
        self.cancelled = False


class Overlay:
    """`cri.interfaces.Snapshots` and `imagestore.model.Unpacker`. `db` is this object's alone; autocommit, WAL.

    One Overlay a root, and one process: whoever constructs it sees to that.
    """

    def __init__(self, root: Path, db: sqlite3.Connection, config: Config | None = None) -> None:
        self._root = Path(os.path.abspath(root))
        if len(os.fsencode(self._root)) > _MAX_ROOT:
            raise SnapshotError(f"snapshotter root {self._root} is longer than {_MAX_ROOT} bytes; choose a shorter one")
        self._config = config or Config()
        for directory in (self._root, *(self._root / name for name in ("layers", "active", "empty", "trash"))):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)  # set-id files of images are nothing for this machine's users (threats S24)
        (self._root / "empty").chmod(0o755)
        for name in ("layers", "active"):
            spread(self._root / name)
        self._fd = os.open(self._root, _DIRECTORY)
        self._syncer = Syncer(self._fd)
        self._trash = Trash(self._root / "trash")
        self._changed = threading.Condition()
        self._records = Records(db)
        self._flights: dict[str, _Flight] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self._making: dict[str, str | None] = {}
        self._pool = Pool(self._config.workers, self._config.worker_idle_s)
        self._closed = False
        self._boot = boot_id()
        self._plus = has_lowerdir_plus(self._root / "empty")
        self._next = self._recover()
        self._trash.sweep()

    def close(self) -> None:
        """Ends the workers; calls that are unpacking fail with SnapshotError. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._pool.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._flights)
        self._trash.close()
        os.close(self._fd)

    # ------------------------------------------------------------------------------------------------- snapshots

    def prepare(self, key: str, parent: str | None) -> FsMount:
        """See cri.interfaces.Snapshots.prepare."""
        with self._changed:
            if key in self._records.active or key in self._making:
                raise AlreadyExists(f"snapshot {key} exists already")
            top = self._chain(parent)[0] if parent is not None else None
            self._making[key] = parent  # holds the chain: nobody removes its layers meanwhile
            number = self._number()
        hidden, final = self._hidden("active", number), self._root / "active" / str(number)
        try:
            hidden.mkdir(0o700)
            (hidden / "work").mkdir(0o700)
            self._make_upper(hidden / "upper", top)
            hidden.rename(final)
            failpoint("snapshots.prepare.renamed")
            record = ActiveRecord(key, parent, number, time.time_ns(), self._boot)
            with self._changed:
                self._records.add_active(record)
        except BaseException as error:
            self._undo(error, hidden, final)
            raise
        finally:
            with self._changed:
                del self._making[key]
        return self._mount(record)

    def mount(self, key: str) -> FsMount:
        """See cri.interfaces.Snapshots.mount. With `volatile`, a snapshot that was mounted in an earlier boot is
        refused: nobody can tell whether its files survived the way down (overlayfs.rst, "Volatile mount")."""
        record = self._active(key)
        work = self._root / "active" / str(record.number) / "work"
        settle_volatile(work, key, same_boot=record.boot_id == self._boot)
        return self._mount(record)

    def remove(self, key: str) -> None:
        """See cri.interfaces.Snapshots.remove. When it fails the key stays in `list`, and the next call goes on."""
        with self._changed:
            record = self._records.active.get(key)
            if record is None:
                return
            if not record.removing:
                self._records.start_removing(key)
        self._trash.discard(self._root / "active" / str(record.number), name=f"active-{record.number}")
        with self._changed:
            self._records.remove_active(key)

    def usage(self, key: str) -> Usage:
        """See cri.interfaces.Snapshots.usage."""
        record = self._active(key)
        try:
            fd = os.open(self._root / "active" / str(record.number) / "upper", _DIRECTORY)
        except FileNotFoundError:
            raise NotFound(f"snapshot {key} does not exist") from None
        try:
            return measure(fd)
        finally:
            os.close(fd)

    def list(self) -> Sequence[SnapshotInfo]:
        """See cri.interfaces.Snapshots.list: those whose removal failed half-way are among them."""
        with self._changed:
            return [
                SnapshotInfo(record.key, record.parent, record.created_ns) for record in self._records.active.values()
            ]

    def lower_directories(self, parent: str) -> Sequence[Path]:
        """See cri.interfaces.Snapshots.lower_directories."""
        with self._changed:
            chain = self._chain(parent)
        found = []
        for layer in chain:
            found.append(self._layer_path(layer.number))
            if layer.opaque:  # overlayfs ignores an opaque root, so what it hides is left out here
                break
        return found

    # -------------------------------------------------------------------------------------------------- unpacker

    def has_layer(self, chain_id: str) -> bool:
        """See imagestore.model.Unpacker.has_layer."""
        with self._changed:
            return self._records.chain(chain_id) is not None

    def unpack_layer(self, blob: Path, media_type: str, diff_id: str, chain_id: str, parent: str | None) -> None:
        """See imagestore.model.Unpacker.unpack_layer.

        A layer that is ready holds its thread until the parent is there: give parents theirs first.
        """
        while True:
            with self._changed:
                if self._closed:
                    raise SnapshotError("the snapshotter was closed")
                if self._records.chain(chain_id) is not None:
                    return
                flight = self._flights.get(chain_id)
                if flight is None:
                    flight = self._flights[chain_id] = _Flight(parent)
                    self._failures.pop(chain_id, None)
                    break
                self._changed.wait_for(lambda flight=flight: flight.done)  # type: ignore[misc]
                if flight.error is not None:
                    raise _again(flight.error)
        try:
            self._make_layer(blob, media_type, diff_id, chain_id, flight)
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._changed:
                flight.done = True
                del self._flights[chain_id]
                if flight.error is not None:
                    self._failures[chain_id] = (time.monotonic(), str(flight.error))
                    if len(self._failures) > _FAILURES:
                        del self._failures[next(iter(self._failures))]
                self._changed.notify_all()

    def cancel(self, chain_id: str) -> None:
        """Ends the wait of an `unpack_layer` of `chain_id` for its parent, for a caller who knows that the parent will
        not come; an unpacking under way goes on to that point. Unknown: no-op."""
        with self._changed:
            flight = self._flights.get(chain_id)
            if flight is not None:
                flight.cancelled = True
                self._changed.notify_all()

    def remove_layers_except(self, keep: frozenset[str]) -> int:
        """See imagestore.model.Unpacker.remove_layers_except. Layers below a kept one, below a snapshot or below a
        layer that is being unpacked stay."""
        with self._changed:
            wanted = {
                *keep,
                *self._flights,
                *(flight.parent for flight in self._flights.values()),
                *(record.parent for record in self._records.active.values()),
                *self._making.values(),
            }
            kept: set[str] = set()
            for chain_id in wanted:
                at = chain_id
                while at is not None and at not in kept and (layer := self._records.layers.get(at)):
                    kept.add(at)
                    at = layer.parent
            gone = [layer for layer in self._records.layers.values() if layer.chain_id not in kept]
            for layer in gone:
                self._records.remove_layer(layer.chain_id)
        self._trash.retry()
        failure: OSError | None = None
        failpoint("snapshots.layers.unrecorded")
        names = [self._trash.take(self._root / "layers" / str(layer.number)) for layer in gone]
        # Whatever of this a power cut undoes, no record may come to stand on a half deleted directory.
        sync_directory(self._root / "layers")
        for name in names:
            try:
                self._trash.delete(name)
            except OSError as error:  # the others first; this one is found again by the next call or start
                failure = failure or error
        if failure is not None:
            raise failure
        return len(gone)

    def layers_usage(self) -> Usage:
        """The sum over all committed layers, as computed when they were unpacked."""
        with self._changed:
            layers = tuple(self._records.layers.values())
        return Usage(sum(layer.bytes for layer in layers), sum(layer.inodes for layer in layers))

    # --------------------------------------------------------------------------------------------------- the rest

    def _make_layer(self, blob: Path, media_type: str, diff_id: str, chain_id: str, flight: _Flight) -> None:
        parent = flight.parent
        with self._changed:
            number = self._number()
        hidden, final = self._hidden("layers", number), self._root / "layers" / str(number)
        blob_fd = os.open(blob, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            made = self._extract(blob_fd, hidden, media_type, diff_id, flight)
            failpoint("snapshots.layer.extracted")
            hidden.rename(final)
            self._syncer.sync()
            failpoint("snapshots.layer.synced")
            record = LayerRecord(chain_id, diff_id, parent, number, made.size, made.inodes, made.opaque, time.time_ns())
            with self._changed:
                if parent is not None and self._records.chain(parent) is None:
                    raise SnapshotError(f"layer {chain_id}: its parent {parent} was removed meanwhile")
                self._records.add_layer(record)
        except BaseException as error:
            self._undo(error, hidden, final)
            raise
        finally:
            os.close(blob_fd)

    def _extract(self, blob_fd: int, hidden: Path, media_type: str, diff_id: str, flight: _Flight) -> protocol.Done:
        """Unpacks into `hidden`/fs and finishes it on the parent's chain."""
        aliases: dict[bytes, bytes] = {}
        for _ in range(_ROUNDS):
            hidden.mkdir(0o700)
            layer_fd = _make_root(hidden / "fs")
            try:
                request = protocol.Unpack(media_type, diff_id, flight.parent is None, aliases, self._config.limits)
                made = self._pool.ask(request, blob_fd, layer_fd)
                if flight.parent is not None and not self.has_layer(flight.parent):
                    self._syncer.sync()  # it has to wait anyway: what it wrote may as well go to disk meanwhile
                lowers = self._wait_for_parent(flight)
                more = self._pool.ask(protocol.Finish(lowers, made.implied, made.links), layer_fd).aliases
            finally:
                os.close(layer_fd)
            if not more:
                return made
            aliases.update(zip(more[::2], more[1::2], strict=True))
            self._trash.discard(hidden)
        raise UnpackError(f"layer goes through links of the layers below in more than {_ROUNDS} steps")

    def _undo(self, error: BaseException, *paths: Path) -> None:
        """Takes away what a failed call made; what goes wrong with that is a note on its error."""
        for path in paths:
            try:
                self._trash.discard(path)
            except OSError as undoing:
                error.add_note(f"and removing {path} failed, the next start will: {undoing}")

    def _wait_for_parent(self, flight: _Flight) -> Sequence[str]:
        """The lower directories, once the parent is committed. Fails with the parent's failure, or when nobody has
        been unpacking it for `parent_wait_s`."""
        parent = flight.parent
        if parent is None:
            return []
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
        return [str(path) for path in self.lower_directories(parent)]

    def _chain(self, chain_id: str) -> Sequence[LayerRecord]:
        chain = self._records.chain(chain_id)
        if chain is None:
            raise NotFound(f"layer {chain_id} does not exist")
        return chain

    def _active(self, key: str) -> ActiveRecord:
        with self._changed:
            record = self._records.active.get(key)
        if record is None or record.removing:
            raise NotFound(f"snapshot {key} does not exist")
        return record

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _hidden(self, directory: str, number: int) -> Path:
        # The random part makes ext4 choose another block group even when numbers start anew (see spread).
        return self._root / directory / f".{number}.{os.urandom(4).hex()}"

    def _layer_path(self, number: int) -> Path:
        return self._root / "layers" / str(number) / "fs"

    def _make_upper(self, upper: Path, top: LayerRecord | None) -> None:
        """The upper directory is the container's "/" itself, so it looks as the chain's root does."""
        target = _make_root(upper)
        try:
            if top is not None:
                source = os.open(self._layer_path(top.number), _DIRECTORY)
                try:
                    copy_looks(source, target, os.fstat(source))
                finally:
                    os.close(source)
        finally:
            os.close(target)

    def _mount(self, record: ActiveRecord) -> FsMount:
        lowers = self.lower_directories(record.parent) if record.parent is not None else [self._root / "empty"]
        return overlay_mount(
            lowers, self._root / "active" / str(record.number), volatile=self._config.volatile, plus=self._plus
        )

    def _recover(self) -> int:
        """Makes records and directories agree after a crash: a record without its directory goes, and the layers
        that stood on it; a directory without a record goes to the trash. Returns the highest number seen."""
        records = self._records
        for layer in [*records.layers.values()]:
            if not self._layer_path(layer.number).is_dir():
                records.remove_layer(layer.chain_id)
        for layer in [*records.layers.values()]:
            if records.chain(layer.chain_id) is None:
                records.remove_layer(layer.chain_id)
        for snapshot in [*records.active.values()]:
            if not snapshot.removing and not (self._root / "active" / str(snapshot.number) / "work").is_dir():
                records.remove_active(snapshot.key)
        numbers = {
            "layers": {str(layer.number) for layer in records.layers.values()},
            "active": {str(snapshot.number) for snapshot in records.active.values()},
        }
        highest = max((int(number) for known in numbers.values() for number in known), default=0)
        for directory, known in numbers.items():
            for name in os.listdir(self._root / directory):
                digits = name.lstrip(".").partition(".")[0]
                highest = max(highest, int(digits) if digits.isdecimal() else 0)
                if name not in known:
                    try:
                        self._trash.take(self._root / directory / name)
                    except OSError:  # a mount point: it keeps its number, and nothing else needs it
                        continue
        sync_directory(self._root)
        return highest


def spread(directory: Path) -> None:
    """Tells ext4 that what is made in `directory` are trees that have nothing to do with one another (chattr +T): it
    gives each its own block group instead of the parent's. On an ext4 without journal, making 6,600 files next to as
    many that were removed less than a minute ago took 2.2 s, and 0.08 s with this: ext4 will not use an inode again
    at once, and looks at every one of them for each file. Other filesystems know no such thing."""
    fd = os.open(directory, _DIRECTORY)
    try:
        add_inode_flags(fd, FS_TOPDIR_FL)
    except KernelError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise
    finally:
        os.close(fd)


def _make_root(path: Path) -> int:
    """A new directory, 0755 and root's whatever umask, set-gid bit or default ACL the parent has; its fd."""
    path.mkdir(0o700)
    fd = os.open(path, _DIRECTORY)
    try:
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o755)
        for name in os.listxattr(fd):
            if name.startswith("system.posix_acl_"):
                os.removexattr(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


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
