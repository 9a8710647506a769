"""The snapshotter on overlayfs: committed layers by chain id, writable snapshots by key, mounts as data.

It refuses to mount anything, and to enter a mount when it removes a snapshot. Invariant: a snapshot is recorded once it
is whole, and its record goes last; no lock is held while files are made or deleted, so nobody waits for a removal that
hangs (threats O38, O43, R14). Layout has the drawing of the directories, Layers the road of a layer.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runtime.linux.failpoint import failpoint
from runtime.linux.mount import FsMount
from snapshotter.layers import Layers
from snapshotter.layout import DIRECTORY, Layout, make_root
from snapshotter.looks import copy_looks
from snapshotter.model import AlreadyExists, Arriving, Config, IdMap, LayerKey, NotFound, SnapshotInfo, Usage
from snapshotter.mounts import boot_id, has_lowerdir_plus, overlay_mount, settle_volatile
from snapshotter.pack import pack
from snapshotter.records import ActiveRecord, LayerRecord, Records
from snapshotter.trash import Trash
from snapshotter.usage import measure


class Overlay:
    """`cri.interfaces.Snapshots` and `imagestore.model.Unpacker`.

    `db` is this object's alone (a statement of it must not end up in another part's transaction): autocommit, WAL,
    check_same_thread=False. One Overlay a root, and one process: whoever constructs it sees to that.
    """

    def __init__(self, root: Path, db: sqlite3.Connection, config: Config | None = None) -> None:
        self._config = config or Config()
        self._layout = Layout(root)
        self._trash = Trash(self._layout.trash)
        self._changed = threading.Condition(threading.RLock())
        self._records = Records(db)
        self._making: dict[str, str | None] = {}
        self._boot = boot_id()
        self._plus = has_lowerdir_plus(self._layout.empty)
        self._layout.recover(self._records, self._trash)
        self._layers = Layers(self._layout, self._records, self._trash, self._changed, self._config)
        self._closed = False
        self._trash.sweep()

    def close(self) -> None:
        """Ends the workers; calls that are unpacking fail with SnapshotError. Idempotent. `db` stays open."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._layers.close()
        self._trash.close()

    # ------------------------------------------------------------------------------------------------- snapshots

    def prepare(self, key: str, parent: str | None, ids: IdMap | None = None) -> FsMount:
        """See cri.interfaces.Snapshots.prepare."""
        with self._changed:
            if key in self._records.active or key in self._making:
                raise AlreadyExists(f"snapshot {key} exists already")
            top = self._layers.chain(parent)[0] if parent is not None else None
            self._making[key] = parent  # holds the chain: nobody removes its layers meanwhile
            number = self._layout.number()
            record = ActiveRecord(key, parent, number, time.time_ns(), self._boot)
        hidden, final = self._layout.hidden(self._layout.active, number), self._layout.snapshot(number)
        try:
            mount = self._mount(record)
            hidden.mkdir(0o700)
            (hidden / "work").mkdir(0o700)
            self._make_upper(hidden / "upper", top, ids)
            hidden.rename(final)
            failpoint("snapshots.prepare.renamed")
            with self._changed:
                self._records.add_active(record)
        except BaseException as error:
            self._trash.undo(error, hidden, final)
            raise
        finally:
            with self._changed:
                del self._making[key]
        return mount

    def mount(self, key: str) -> FsMount:
        """See cri.interfaces.Snapshots.mount. With `volatile` it makes the snapshot ready to be mounted once more,
        and a snapshot that was mounted in an earlier boot is refused: nobody can tell whether its files survived the
        way down (overlayfs.rst, "Volatile mount")."""
        record = self._active(key)
        settle_volatile(self._layout.snapshot(record.number) / "work", key, same_boot=record.boot_id == self._boot)
        return self._mount(record)

    def remove(self, key: str) -> None:
        """See cri.interfaces.Snapshots.remove. When it fails the key stays in `list`, and the next call goes on."""
        with self._changed:
            record = self._records.active.get(key)
            if record is None:
                return
            if not record.removing:
                self._records.start_removing(key)
        self._trash.discard(self._layout.snapshot(record.number), name=f"active-{record.number}")
        with self._changed:
            self._records.remove_active(key)

    def usage(self, key: str) -> Usage:
        """See cri.interfaces.Snapshots.usage."""
        record = self._active(key)
        try:
            fd = os.open(self._layout.snapshot(record.number) / "upper", DIRECTORY)
        except FileNotFoundError:
            raise NotFound(f"snapshot {key} does not exist") from None
        try:
            return measure(fd)
        finally:
            os.close(fd)

    def pack(self, key: str, fd: int, check: Callable[[], object] = lambda: None) -> None:
        """See cri.interfaces.Snapshots.pack."""
        record = self._active(key)
        try:
            upper = os.open(self._layout.snapshot(record.number) / "upper", DIRECTORY)
        except FileNotFoundError:
            raise NotFound(f"snapshot {key} does not exist") from None
        try:
            pack(upper, fd, check)
        finally:
            os.close(upper)

    def unpack(self, key: str, fd: int) -> None:
        """See cri.interfaces.Snapshots.unpack. A worker does it, as with a layer."""
        record = self._active(key)
        upper = os.open(self._layout.snapshot(record.number) / "upper", DIRECTORY)
        try:
            self._layers.unpack_upper(fd, upper, record.parent)
        finally:
            os.close(upper)

    def list(self) -> Sequence[SnapshotInfo]:
        """See cri.interfaces.Snapshots.list: those whose removal failed half-way are among them."""
        with self._changed:
            records = tuple(self._records.active.values())
        return [SnapshotInfo(record.key, record.parent, record.created_ns) for record in records]

    def lower_directories(self, parent: str) -> Sequence[Path]:
        """See cri.interfaces.Snapshots.lower_directories."""
        return self._layers.directories(parent)

    # -------------------------------------------------------------------------------------------------- unpacker

    def has_layer(self, chain_id: str) -> bool:
        """See imagestore.model.Unpacker.has_layer."""
        return self._layers.has(chain_id)

    def unpack_layer(
        self,
        blob: Path,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        """See imagestore.model.Unpacker.unpack_layer. A layer that is ready holds its thread until the parent is
        there: give parents theirs first."""
        self._layers.unpack(blob, media_type, diff_id, chain_id, parent, key)

    def unpack_arriving(
        self,
        blob: Arriving,
        media_type: str,
        diff_id: str,
        chain_id: str,
        parent: str | None,
        key: LayerKey | None = None,
    ) -> None:
        """See imagestore.model.Early.unpack_arriving."""
        self._layers.unpack(blob, media_type, diff_id, chain_id, parent, key)

    def cancel(self, chain_id: str) -> None:
        """Ends an `unpack_layer` of `chain_id`, be it at work or waiting for a parent that will not come: every call
        for it fails with SnapshotError. Once its files are being synced it is finished all the same. Unknown: no-op."""
        self._layers.cancel(chain_id)

    def remove_layers_except(self, keep: frozenset[str]) -> int:
        """See imagestore.model.Unpacker.remove_layers_except. Layers below a kept one, below a snapshot or below a
        layer that is being unpacked stay. Takes up what earlier removals left."""
        self._trash.retry()
        return self._layers.remove_except(keep, self._parents)

    def removable_layers(self, keep: frozenset[str]) -> Sequence[tuple[str, int]]:
        """See imagestore.model.Unpacker.removable_layers."""
        sizes = self._layers.sizes()
        return [(one.chain_id, sizes.get(one.chain_id, 0)) for one in self._layers.removable(keep, self._parents)]

    def layer_sizes(self) -> Mapping[str, int]:
        """See imagestore.model.Unpacker.layer_sizes."""
        return self._layers.sizes()

    def damaged_layers(self) -> Sequence[tuple[str, str]]:
        """See imagestore.model.Unpacker.damaged_layers."""
        return self._layers.damaged()

    def damaged_snapshots(self) -> Sequence[tuple[str, str]]:
        """See imagestore.model.Unpacker.damaged_snapshots."""
        with self._changed:
            active = [record for record in self._records.active.values() if not record.removing]
        found = []
        for record in active:
            place = self._layout.snapshot(record.number)
            gone = [name for name in ("upper", "work") if not (place / name).is_dir()]
            if record.parent is not None and not self.has_layer(record.parent):
                gone.append(f"layer {record.parent}")
            with self._changed:
                if gone and self._records.active.get(record.key) == record:  # else it was removed meanwhile
                    found.append((record.key, f"{', '.join(gone)}: gone"))
        return found

    def forget_layers(self, chain_ids: frozenset[str]) -> Sequence[str]:
        """See imagestore.model.Unpacker.forget_layers."""
        return self._layers.forget(chain_ids, self._parents)

    def _parents(self) -> Sequence[str | None]:
        """What snapshots stand on, those that are being made included. With the lock held."""
        return [*self._making.values(), *(record.parent for record in self._records.active.values())]

    def layers_usage(self) -> Usage:
        """What all committed layers take on disk together."""
        return self._layers.usage()

    # --------------------------------------------------------------------------------------------------- the rest

    def _active(self, key: str) -> ActiveRecord:
        with self._changed:
            record = self._records.active.get(key)
        if record is None or record.removing:
            raise NotFound(f"snapshot {key} does not exist")
        return record

    def _make_upper(self, upper: Path, top: LayerRecord | None, ids: IdMap | None) -> None:
        """The upper directory is the container's "/" itself, so it looks as the chain's root does."""
        target = make_root(upper)
        try:
            if top is not None:
                source = os.open(self._layout.layer(top.number), DIRECTORY)
                try:
                    copy_looks(source, target, os.fstat(source))
                finally:
                    os.close(source)
            if ids is not None:
                status = os.fstat(target)
                os.fchown(target, *ids.outside(status.st_uid, status.st_gid))
        finally:
            os.close(target)

    def _mount(self, record: ActiveRecord) -> FsMount:
        lowers = self._layers.directories(record.parent) if record.parent is not None else [self._layout.empty]
        directory = self._layout.snapshot(record.number)
        return overlay_mount(lowers, directory, volatile=self._config.volatile, plus=self._plus)
