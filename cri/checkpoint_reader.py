"""The archive of a pod's checkpoint, read: criu's images and the writable layers of the containers that were asked for,
into a directory of ours.

An archive is believed nothing (threats S71). Refuses, by the entry's name, what `cri.checkpoint_archive` would not have
written: links, devices, sparse files, absolute names, `.` and `..`, names twice, containers that the caller did not
name, compression, and more entries, longer names and larger files than the limits allow. Of what describes the
container, config.dump and spec.dump are kept to be compared with the request (cri.checkpoint_match), pod.dump is not.
Invariant: every file is made by a single checked name,
exclusively, in a directory that this module made itself and holds open.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from cri.checkpoint_archive import POD_FILE
from cri.errors import InvalidArgument, LimitExceeded, NotFound
from runtime.linux.files import write_all
from snapshotter import tar
from snapshotter.model import Limits, UnpackError
from snapshotter.tar_feed import Feed

MAX_ENTRIES = 200_000  # a dozen files for each process and thread
MAX_TOLD = 1 << 20  # bytes of a file that describes, or is read over
_CHUNK = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
LAYER = "rootfs-diff.tar"
IMAGES = "checkpoint"
# What the archive says of a container: of what, and which process.
ABOUT, SPEC = "config.dump", "spec.dump"
_OVER = ("dump.log", "stats-dump")
_LIMITS = Limits(entries=MAX_ENTRIES, path_bytes=1024, pax_bytes=16 << 10, xattrs=0, sparse_regions=0)


def open_archive(field: str, text: str) -> int:
    """The file that a request names, or the one in the directory that it names, for reading; the caller's. Raises
    InvalidArgument, NotFound."""
    if not text.startswith("/") or "\0" in text or ".." in Path(text).parts:
        raise InvalidArgument(f"{field}: {text[:200]!r} is no absolute path of a file")
    try:
        fd = os.open(text, _OPEN)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            place, fd = fd, -1
            try:
                fd = os.open(POD_FILE, _OPEN, dir_fd=place)
            finally:
                os.close(place)
    except FileNotFoundError:
        raise NotFound(f"{field}: {text[:200]} is not there, or has no {POD_FILE}") from None
    except OSError as error:
        raise InvalidArgument(f"{field}: {text[:200]}: {os.strerror(error.errno or 0).lower()}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument(f"{field}: {text[:200]} is no regular file")
    return fd


def read(fd: int, target: Path, wanted: Collection[str], most: int) -> None:
    """Makes, below `target`, NAME/checkpoint/…, NAME/rootfs-diff.tar, NAME/config.dump and NAME/spec.dump for each of
    `wanted`, which may stand in paths.
    At most `most` bytes. Raises InvalidArgument, LimitExceeded, OSError; then it is half there."""
    with ExitStack() as stack:
        _Reader(fd, target, wanted, most, stack).run()


class _Reader:
    """One reading. `_places` are the containers' directories, `_images` their images', by name in the archive."""

    def __init__(self, fd: int, target: Path, wanted: Collection[str], most: int, stack: ExitStack) -> None:
        self._walker = tar.Walker(Feed(lambda: os.read(fd, _CHUNK)), _LIMITS)
        self._wanted = wanted
        self._left = self._most = most
        self._seen: set[str] = set()
        self._places: dict[str, int] = {}
        self._images: dict[str, int] = {}
        target.mkdir(0o700, parents=True)
        for name in wanted:
            for held, inside, place in (
                (self._places, f"containers/{name}", target / name),
                (self._images, f"containers/{name}/{IMAGES}", target / name / IMAGES),
            ):
                place.mkdir(0o700)
                held[inside] = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, held[inside])

    def run(self) -> None:
        try:
            for entry in self._walker:
                self._entry(entry)
        except UnpackError as error:
            raise InvalidArgument(f"checkpoint_path: {error}") from None
        for name in sorted(self._wanted):
            for file in (LAYER, f"{IMAGES}/descriptors.json", ABOUT, SPEC):
                if (needed := f"containers/{name}/{file}") not in self._seen:
                    raise InvalidArgument(f"checkpoint_path: container {name!r} is not in it: it has no {needed}")

    def _entry(self, entry: tar.Entry) -> None:
        name = self._name(entry)
        if name in self._seen:
            raise _refused(entry, "is there twice")
        self._seen.add(name)
        directory, _, last = name.rpartition("/")
        if entry.kind is tar.DIRECTORY:
            if name != "containers" and name not in self._places and name not in self._images:
                raise _refused(entry, "is no directory of a checkpoint")
        elif entry.kind is not tar.FILE or entry.regions is not None or entry.xattrs:
            raise _refused(entry, "is no plain file")
        elif name == "pod.dump" or (directory in self._places and last in (ABOUT, SPEC, *_OVER)):
            if entry.size > MAX_TOLD:
                raise _refused(entry, f"is larger than {MAX_TOLD} bytes")
            if last in (ABOUT, SPEC):
                self._keep(entry, self._places[directory], last)
        elif directory in self._places and last == LAYER:
            self._keep(entry, self._places[directory], last)
        elif directory in self._images and _IMAGE.fullmatch(last):
            self._keep(entry, self._images[directory], last)
        else:
            raise _refused(entry, "is no file of a checkpoint")

    def _name(self, entry: tar.Entry) -> str:
        """As text, when each part of it is a name and the container is one that was asked for."""
        try:
            name = entry.name.decode("ascii")
        except UnicodeDecodeError:
            raise _refused(entry, "has a name that is no text") from None
        if entry.kind is tar.DIRECTORY:
            name = name.removesuffix("/")
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise _refused(entry, "is no name inside of an archive")
        if parts[0] == "containers" and len(parts) > 1 and parts[1] not in self._wanted:
            raise _refused(entry, "is of a container that container_configs does not have")
        return name

    def _keep(self, entry: tar.Entry, place: int, name: str) -> None:
        self._left -= entry.stored
        if self._left < 0:
            raise LimitExceeded(
                f"checkpoint_path: the archive is larger than {self._most} bytes (checkpoint.archive_bytes)"
            )
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=place)
        try:
            for piece in self._walker.data():
                write_all(fd, bytes(piece))
        finally:
            os.close(fd)


def _refused(entry: tar.Entry, what: str) -> InvalidArgument:
    return InvalidArgument(f"checkpoint_path: entry {entry.name[:200]!r} {what}")
