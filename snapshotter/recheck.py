"""Are the unpacked layers of an image still what its diff ids say? They are unpacked once more, beside, and compared.

    blob ─▶ inflate, hash: the diff id ─▶ a second tree ─▶ entry by entry against the tree that containers use

A tar cannot be made anew from a tree, so its digest is taken of the blob and the trees are compared. Refuses nothing
and changes nothing in the snapshotter; works while a daemon does. Invariant: the second tree stands on none of the
files that are in question.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path

from runtime.linux.dataclass import dataclass
from runtime.linux.files import open_beneath, remove_tree
from snapshotter.model import Config, LayerKey
from snapshotter.overlay import Overlay

_PIECE = 1 << 20
# Files get their times from the clock's last tick.
_CLOCK_NS = 10**9
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Checked:
    """A layer to look at."""

    blob: Path
    media_type: str
    diff_id: str
    chain_id: str
    key: LayerKey | None = field(default=None, repr=False)


def directories(database: Path, root: Path) -> dict[str, Path]:
    """Where the committed layers below `root` are, by chain id, as the records say: read, and never written."""
    db = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rows = db.execute("SELECT chain_id, number FROM snapshotter_layers").fetchall()
    finally:
        db.close()
    return {str(chain): root / "layers" / str(number) / "fs" for chain, number in rows}


def recheck(scratch: Path, layers: Sequence[Checked], unpacked: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """What differs, the chain id and a sentence each: "layer sha256:…: etc/passwd: other content". `scratch` is a
    directory on a filesystem that has what the snapshotter needs; it is made, and removed. Raises UnpackError for a
    blob that is not what its diff id says, OSError."""
    scratch.mkdir(mode=0o700)
    db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    anew = Overlay(scratch, db, Config(workers=1))
    since = time.time_ns() - _CLOCK_NS
    try:
        parent = None
        for layer in layers:
            anew.unpack_layer(layer.blob, layer.media_type, layer.diff_id, layer.chain_id, parent, layer.key)
            parent = layer.chain_id
            name = f"layer {layer.diff_id}"
            there = unpacked.get(layer.chain_id)
            if there is None or not there.is_dir():
                yield layer.chain_id, f"{name}: is not unpacked"
                continue
            for path, difference in compare(_own(anew, layer.chain_id), there, since):
                yield layer.chain_id, f"{name}: {path or '/'}: {difference}"
    finally:
        anew.close()
        db.close()
        remove_tree(scratch)


def _own(anew: Overlay, chain_id: str) -> Path:
    """The layer's own files: the topmost of its chain's directories."""
    return anew.lower_directories(chain_id)[0]


def compare(right: Path, found: Path, since: int) -> Iterator[tuple[str, str]]:
    """The paths at which `found` differs from `right`, which was made after `since` (ns), and how. Follows no link."""
    fds = [os.open(path, _DIRECTORY) for path in (right, found)]
    waiting = [b""]  # not by recursion: a layer may be as deep as it likes
    linked: dict[tuple[int, int], bool] = {}
    try:
        while waiting:
            path = waiting.pop()
            with _both(fds, path, _DIRECTORY) as (one, two):
                shown = os.fsdecode(path)
                yield from ((shown, what) for what in _looks(one, two, os.fstat(one), os.fstat(two), since))
                names, there = set(os.listdir(one)), set(os.listdir(two))
                yield from ((_inside(shown, name), "is missing") for name in sorted(names - there))
                yield from ((_inside(shown, name), "is not in the layer") for name in sorted(there - names))
                for name in sorted(names & there):
                    inside = _inside(shown, name)
                    if _is_directory(one, name) and _is_directory(two, name):
                        waiting.append(os.fsencode(inside))
                    else:
                        yield from ((inside, what) for what in _entry(one, two, name, since, linked))
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def _both(roots: Sequence[int], path: bytes, flags: int) -> Iterator[tuple[int, int]]:
    opened: list[int] = []
    try:
        for root in roots:
            opened.append(open_beneath(root, path or b".", flags))
        yield opened[0], opened[1]
    finally:
        for fd in opened:
            os.close(fd)


def _inside(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _is_directory(fd: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)


def _entry(right: int, found: int, name: str, since: int, linked: dict[tuple[int, int], bool]) -> Iterator[str]:
    """`linked`: whether two files, by their inodes, have the same content; the names of one may be many."""
    one, two = (os.stat(name, dir_fd=fd, follow_symlinks=False) for fd in (right, found))
    if stat.S_IFMT(one.st_mode) != stat.S_IFMT(two.st_mode):
        yield "is of another type"
    elif stat.S_ISREG(one.st_mode):
        with _both((right, found), os.fsencode(name), _FILE) as (ours, theirs):
            yield from _files(ours, theirs, one, two, since, linked)
    else:
        yield from _common(one, two, since)
        if stat.S_ISLNK(one.st_mode) and os.readlink(name, dir_fd=right) != os.readlink(name, dir_fd=found):
            yield "leads elsewhere"
        if one.st_rdev != two.st_rdev:
            yield "is another device"


def _files(
    right: int,
    found: int,
    one: os.stat_result,
    two: os.stat_result,
    since: int,
    linked: dict[tuple[int, int], bool],
) -> Iterator[str]:
    yield from _looks(right, found, one, two, since)
    if one.st_nlink != two.st_nlink:
        yield "has another number of hard links"
    if one.st_size != two.st_size:
        yield f"has {two.st_size} bytes, not {one.st_size}"
        return
    pair = one.st_ino, two.st_ino
    same = linked.get(pair)
    if same is None:
        same = all(a == b for a, b in zip(_pieces(right), _pieces(found), strict=False))
        if one.st_nlink > 1:
            linked[pair] = same
    if not same:
        yield "has other content"


def _pieces(fd: int) -> Iterator[bytes]:
    while piece := os.read(fd, _PIECE):
        yield piece


def _looks(right: int, found: int, one: os.stat_result, two: os.stat_result, since: int) -> Iterator[str]:
    yield from _common(one, two, since)
    if _xattrs(right) != _xattrs(found):
        yield "has other extended attributes"


def _common(one: os.stat_result, two: os.stat_result, since: int) -> Iterator[str]:
    if stat.S_IMODE(one.st_mode) != stat.S_IMODE(two.st_mode):
        yield f"has mode {stat.S_IMODE(two.st_mode):04o}, not {stat.S_IMODE(one.st_mode):04o}"
    if (one.st_uid, one.st_gid) != (two.st_uid, two.st_gid):
        yield f"belongs to {two.st_uid}:{two.st_gid}, not {one.st_uid}:{one.st_gid}"
    # What the tar implies, directories and whiteouts, has the time at which it was made, in both trees.
    if one.st_mtime_ns != two.st_mtime_ns and one.st_mtime_ns < since:
        yield "has another time of modification"


def _xattrs(fd: int) -> dict[str, bytes]:
    return {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
