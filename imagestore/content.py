"""Blobs on disk: written hidden, hashed while they are written, synced, and only then given their name.

    ROOT/blobs/sha256/HEX          whole, verified, durable; never changed, only removed
    ROOT/ingest/.HEX.part          on its way in; flock(2)ed by the process that writes it; may be resumed

Blocking calls for worker threads. Refuses a digest that is not strict before a path is made of it (threats R8, S43) and
every byte beyond the announced size. Invariant: what has a name under blobs/ has that digest, also after a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagestore.growth import Growth
from imagestore.model import ContentInvalid, Descriptor, ImageError
from imagestore.reference import is_digest
from runtime.linux.failpoint import failpoint
from runtime.linux.files import AT_FDCWD, read_bounded, remove_tree, sync_directory, write_all, write_durable
from runtime.linux.libc import KernelError
from runtime.linux.verity import NOT_HERE, enable_verity, measure_verity

_READ = 1 << 20


def errno_text(error: OSError) -> str:
    """ "ENOSPC no space left on device"."""
    code = error.errno or 0
    if code not in errno.errorcode:
        return f"{type(error).__name__} {str(error).lower()}"
    return f"{errno.errorcode[code]} {os.strerror(code).lower()}"


class Blobs:
    """The blob directories of one store."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._ingest = root / "ingest"
        self._sealable = True

    def create(self) -> None:
        """Makes the directories, for root alone: layers hold set-uid programs (CVE-2021-41103)."""
        for directory in (self._blobs.parent.parent, self._blobs.parent, self._blobs, self._ingest):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_directory(directory.parent)

    def path(self, digest: str) -> Path:
        """Where the blob is once it is whole."""
        if not is_digest(digest):
            raise ContentInvalid(f"{digest[:100]!r} is not sha256: and 64 lower-case hex digits")
        return self._blobs / digest[7:]

    def has(self, blob: Descriptor) -> bool:
        """True when the blob is there with its size. One with another size was not written by us: it goes."""
        path = self.path(blob.digest)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return False
        if stat.S_ISREG(found.st_mode) and found.st_size == blob.size:
            return True
        _take_away(path)
        return False

    def is_sound(self, blob: Descriptor) -> bool:
        """As `has`, but by what is in it. A damaged one goes, or it would be taken for whole for ever (threats O49)."""
        if not self.has(blob):
            return False
        path = self.path(blob.digest)
        with open(path, "rb", buffering=0) as file:
            try:
                if hashlib.file_digest(file, "sha256").hexdigest() == blob.digest[7:]:
                    return True
            except OSError as error:
                if error.errno != errno.EIO:  # which a sealed one is damaged by
                    raise
        _take_away(path)
        return False

    def read(self, digest: str, limit: int) -> bytes:
        """A small blob, checked against its digest again. Raises ContentInvalid, OSError."""
        data = read_bounded(AT_FDCWD, str(self.path(digest)), limit)
        if hashlib.sha256(data).hexdigest() != digest[7:]:
            raise ContentInvalid(f"blob {digest}: damaged on disk")
        return data

    def put(self, digest: str, data: bytes) -> None:
        """Stores a small blob that is in memory. Raises ContentInvalid when `digest` is not its own, ImageError."""
        if hashlib.sha256(data).hexdigest() != digest[7:]:
            raise ContentInvalid(f"blob {digest}: the content has another digest")
        try:
            write_durable(self.path(digest), data)
        except OSError as error:
            raise ImageError(f"write blob {digest}: {errno_text(error)}") from error

    def seal(self, digest: str) -> bool:
        """Has the kernel check whatever is read of a blob from now on (fs-verity). False where it is not sealed, which
        is no reason to do without the blob: the filesystem has no such thing, or no space for the hashes. Raises
        ImageError where the disk does not give back what was written."""
        if not self._sealable:
            return False
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                enable_verity(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in NOT_HERE:
                self._sealable = False
            elif error.errno == errno.EIO:
                raise ImageError(f"seal blob {digest}: {errno_text(error)}") from error
            return error.errno == errno.EEXIST
        return True

    def is_sealed(self, digest: str) -> bool | None:
        """Whether the kernel checks what is read of a blob; None where the filesystem has no such thing. Raises
        OSError."""
        fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return measure_verity(fd) is not None
        except KernelError as error:
            if error.errno in NOT_HERE:
                return None
            raise
        finally:
            os.close(fd)

    def digests(self) -> Iterator[str]:
        """Every blob with a proper name."""
        for entry in os.scandir(self._blobs):
            if is_digest(f"sha256:{entry.name}"):
                yield f"sha256:{entry.name}"

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Every blob with a proper name, and what it takes on disk."""
        for digest in self.digests():
            try:
                yield digest, os.lstat(self.path(digest)).st_blocks * 512
            except FileNotFoundError:
                continue

    def old_ingests(self, age_s: float) -> Iterator[tuple[str, int, float]]:
        """Name, space and age of the partial files that `remove_old_ingests` would take if nobody writes them."""
        now = time.time()
        for entry in os.scandir(self._ingest):
            if entry.name.startswith(".") and entry.name.endswith(".part"):
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if found.st_mtime <= now - age_s:
                    yield entry.name, found.st_blocks * 512, now - found.st_mtime

    def remove(self, digest: str) -> None:
        """Unlinks a blob; gone is gone."""
        _take_away(self.path(digest))

    def remove_old_ingests(self, age_s: float) -> None:
        """Removes partial files that nobody writes and that nobody has touched for `age_s`, and stray temporaries."""
        oldest = time.time() - age_s  # compared with mtimes, which are wall-clock too
        for directory, suffix in ((self._ingest, ".part"), (self._blobs, "")):
            for entry in os.scandir(directory):
                if not entry.name.startswith(".") or not entry.name.endswith(suffix):
                    continue
                try:
                    old = os.lstat(entry.path).st_mtime <= oldest
                except FileNotFoundError:
                    continue  # whole by now, or given up
                if old:
                    _unlink_unlocked(entry.path)

    def ingest(self, blob: Descriptor) -> Ingest | None:
        """The partial file of `blob`, locked, with what an earlier attempt left in it; None while another process
        writes it. Raises ImageError."""
        path = self._ingest / f".{self.path(blob.digest).name}.part"
        try:
            while True:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(path, flags, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    return None
                if is_named(fd, path):
                    return Ingest(fd, path, self.path(blob.digest), blob)
                os.close(fd)  # its writer renamed or removed it between open and flock
        except OSError as error:
            raise ImageError(f"write blob {blob.digest}: {errno_text(error)}") from error


def _take_away(path: Path) -> None:
    """Whatever has a blob's name: a directory is nothing of ours, and would be in the way for ever."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        remove_tree(path)


def is_named(fd: int, path: Path) -> bool:
    try:
        named = os.lstat(path)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _unlink_unlocked(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(fd)


class Ingest:
    """One blob on its way in. Ends with `finish`, with `discard`, or with `close`, which keeps it to be resumed.

    Its calls exclude one another: `close` after a cancelled pull waits for the write that a thread has under way.
    """

    def __init__(self, take_fd: int, path: Path, final: Path, blob: Descriptor) -> None:
        self._fd = take_fd
        self._path = path
        self._final = final
        self._blob = blob
        self._hash = hashlib.sha256()
        self.offset = 0
        self.resumed = False
        self._busy = threading.RLock()
        self._growth: Growth | None = None

    def follow(self) -> Growth:
        """For one who reads what is written while it is. Raises OSError."""
        with self._busy:
            self._growth = Growth(self._path, self._blob, self.offset)
            return self._growth

    def load(self) -> int:
        """Hashes what an earlier attempt left; returns how many bytes that are. A partial file that cannot be part
        of this blob is emptied."""
        with self._busy:
            if os.fstat(self._fd).st_size > self._blob.size:
                self.restart()
            while piece := os.pread(self._fd, _READ, self.offset):
                self._hash.update(piece)
                self.offset += len(piece)
            self.resumed = self.offset > 0
            return self.offset

    def write(self, pieces: Sequence[bytes]) -> None:
        """Hashes and appends. Raises ContentInvalid beyond the announced size; ImageError when the disk refuses, and
        then a full disk gets its space back at once."""
        with self._busy:
            if self._fd < 0:
                raise ImageError(f"write blob {self._blob.digest}: it was given up")
            before = self.offset
            for piece in pieces:
                if self.offset + len(piece) > self._blob.size:
                    raise ContentInvalid(f"blob {self._blob.digest}: more than the announced {self._blob.size} bytes")
                self._hash.update(piece)
                try:
                    os.lseek(self._fd, self.offset, os.SEEK_SET)
                    write_all(self._fd, piece)
                except OSError as error:
                    raise self._refused(error) from error
                self.offset += len(piece)
            if self._growth is not None:
                self._growth.grew(self.offset - before)

    def restart(self) -> None:
        """Forgets all of it: the source begins anew."""
        with self._busy:
            if self.offset:
                self._let_go()
            os.ftruncate(self._fd, 0)
            self._hash = hashlib.sha256()
            self.offset = 0
            self.resumed = False

    def check(self) -> None:
        """Raises ContentInvalid unless all of it is there and has the digest."""
        with self._busy:
            if self.offset != self._blob.size or self._hash.hexdigest() != self._blob.digest[7:]:
                got = f"sha256:{self._hash.hexdigest()}, {self.offset} bytes"
                raise ContentInvalid(
                    f"blob {self._blob.digest}: wrong content ({got}; announced {self._blob.size} bytes)"
                )

    def finish(self) -> None:
        """Verifies size and digest, makes the bytes durable, then visible. Raises ContentInvalid, ImageError; either
        way the partial file is gone."""
        with self._busy:
            try:
                self.check()
            except ContentInvalid:
                self.discard()
                raise
            if self._growth is not None:
                self._growth.verify()
            try:
                failpoint("images.blob.verified")
                os.fsync(self._fd)
                os.rename(self._path, self._final)
                failpoint("images.blob.named")
                sync_directory(self._final.parent)
            except OSError as error:
                raise self._refused(error) from error
            self.close()

    def _let_go(self) -> None:
        growth, self._growth = self._growth, None
        if growth is not None:
            growth.give_up()

    def _refused(self, error: OSError) -> ImageError:
        self.discard()
        return ImageError(f"write blob {self._blob.digest}: {errno_text(error)}")

    def discard(self) -> None:
        """Removes the partial file. Closes."""
        with self._busy:
            if self._fd >= 0:
                self._path.unlink(missing_ok=True)
                self.close()

    def close(self) -> None:
        """Lets go of the file and of its lock; an empty one is not worth keeping."""
        with self._busy:
            self._let_go()
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            try:
                if self.offset == 0 and is_named(fd, self._path):
                    self._path.unlink(missing_ok=True)
            finally:
                os.close(fd)
