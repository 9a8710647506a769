"""The directories of the snapshotter, and the numbers that name what is in them.

    root/                0700
      layers/N/fs        a committed layer (N: a short number, so that mount options stay short)
      layers/.N.…/fs     one that is being made
      active/N/{upper,work}
      active/.N.…
      empty/             stands below an image without layers: overlayfs wants a lower directory
      trash/             on its way out

It refuses to trust a directory that has no record. Invariant: a number is given out once.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from runtime.linux.files import sync_directory
from runtime.linux.inode_flags import FS_TOPDIR_FL, add_inode_flags
from runtime.linux.libc import KernelError
from snapshotter.model import SnapshotError
from snapshotter.records import Records
from snapshotter.trash import Trash

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# fsconfig(2) takes at most 255 bytes of value; what follows the root is "/layers/4294967295/fs" at most.
_MAX_ROOT = 230


class Layout:
    """Makes the directories where they are missing. `number` is called with the snapshotter's lock held."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        if len(os.fsencode(self.root)) > _MAX_ROOT:
            raise SnapshotError(f"snapshotter root {self.root} is longer than {_MAX_ROOT} bytes; choose a shorter one")
        self.layers, self.active, self.empty = (self.root / name for name in ("layers", "active", "empty"))
        self.trash = self.root / "trash"
        for directory in (self.root, self.layers, self.active, self.trash, self.empty):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)  # set-id files of images are nothing for this machine's users (threats S24)
        self.empty.chmod(0o755)
        for directory in (self.layers, self.active):
            spread(directory)
        self._number = 0

    def number(self) -> int:
        """One that nobody has."""
        self._number += 1
        return self._number

    def layer(self, number: int) -> Path:
        """The files of a committed layer."""
        return Path(self.layer_path(number))

    def layer_path(self, number: int) -> str:
        """The same by name alone."""
        return f"{self.layers}/{number}/fs"

    def snapshot(self, number: int) -> Path:
        """What holds upper and work of a snapshot."""
        return self.active / str(number)

    @staticmethod
    def hidden(directory: Path, number: int) -> Path:
        """The name of what is being made. The random part makes ext4 choose another block group even when numbers
        start anew (see `spread`)."""
        return directory / f".{number}.{os.urandom(4).hex()}"

    def recover(self, records: Records, trash: Trash) -> None:
        """Makes records and directories agree after a crash: a record without its directory goes, and the layers
        that stood on it; a directory without a record goes to the trash."""
        for layer in [*records.layers.values()]:
            if not self.layer(layer.number).is_dir():
                records.remove_layer(layer.chain_id)
        for layer in [*records.layers.values()]:
            if records.chain(layer.chain_id) is None:
                records.remove_layer(layer.chain_id)
        for snapshot in [*records.active.values()]:
            if not snapshot.removing and not (self.snapshot(snapshot.number) / "work").is_dir():
                records.remove_active(snapshot.key)
        for directory, known in (
            (self.layers, {layer.number for layer in records.layers.values()}),
            (self.active, {snapshot.number for snapshot in records.active.values()}),
        ):
            self._number = max(self._number, *known, 0)
            self._sweep(directory, {str(number) for number in known}, trash)
        sync_directory(self.root)

    def _sweep(self, directory: Path, known: set[str], trash: Trash) -> None:
        for name in os.listdir(directory):
            digits = name.lstrip(".").partition(".")[0]
            self._number = max(self._number, int(digits) if digits.isdecimal() else 0)
            if name not in known:
                try:
                    trash.take(directory / name)
                except OSError:  # a mount point: it keeps its number, and nothing else needs it
                    continue


def spread(directory: Path) -> None:
    """Tells ext4 that what is made in `directory` are trees that have nothing to do with one another (chattr +T): it
    gives each its own block group instead of the parent's. On an ext4 without journal, making 6,600 files next to as
    many that were removed less than a minute ago took 2.2 s, and 0.08 s with this: ext4 will not use an inode again
    at once, and looks at every one of them for each file. Other filesystems know no such thing."""
    fd = os.open(directory, DIRECTORY)
    try:
        add_inode_flags(fd, FS_TOPDIR_FL)
    except KernelError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise
    finally:
        os.close(fd)


def make_root(path: Path) -> int:
    """A new directory, 0755 and root's whatever umask, set-gid bit or default ACL the parent has; its fd."""
    path.mkdir(0o700)
    fd = os.open(path, DIRECTORY)
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
