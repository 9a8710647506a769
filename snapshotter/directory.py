"""A blob that is a packed directory, as `oras push` makes one of a directory: a tar whose names all begin with its own.

    application/vnd.ocid.directory+gzip;name=models/small        +tar and +zstd likewise; "." is the tree's root

Stricter than layers are: refuses names and links that lead out of the directory, names through links, and names that
would hide files of others (whiteouts); leaves out devices, sockets and pipes, and extended attributes, as oras does.
Invariant: whatever comes out of `Inside` has a name below the directory's.
"""

from __future__ import annotations

import posixpath

from snapshotter import tar
from snapshotter.model import Limits, UnpackError
from snapshotter.tar_feed import Feed
from snapshotter.tree import WHITEOUT_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_TYPE = "application/vnd.ocid.directory+"
_TAR = "application/vnd.oci.image.layer.v1.tar"
_KINDS = (tar.FILE, tar.DIRECTORY, tar.LINK, tar.SYMLINK)


def parse(media_type: str) -> tuple[str, bytes] | None:
    """The type of the tar and the directory's name; None where the blob is no packed directory."""
    if not media_type.startswith(_TYPE):
        return None
    kind, _, name = media_type.removeprefix(_TYPE).partition(";name=")
    return _TAR if kind == "tar" else f"{_TAR}+{kind}", name.encode("utf-8", "surrogateescape")


class Inside(tar.Walker):
    """The entries of such a tar."""

    def __init__(self, feed: Feed, limits: Limits, name: bytes) -> None:
        super().__init__(feed, limits)
        self._top = _clean(name)
        self._through: set[bytes] = set()
        self._through_bytes = 0

    def __iter__(self) -> Iterator[tar.Entry]:
        for entry in super().__iter__():
            path = _clean(entry.name)
            if not self._is_inside(path):
                raise UnpackError(f"tar entry {entry.name!r} is outside of {self._top!r}, the directory it belongs to")
            if any(part.startswith(WHITEOUT_PREFIX) for part in path.split(b"/")):
                raise UnpackError(f"tar entry {entry.name!r} would hide other files")
            if self._through and any(above in self._through for above in _above(path)):
                raise UnpackError(f"tar entry {entry.name!r} leads through a symbolic link")
            if entry.kind not in _KINDS:
                continue
            if entry.kind in (tar.LINK, tar.SYMLINK):
                self._check_link(entry, path)
            self._remember(entry, path)
            entry.xattrs = None
            yield entry

    def _is_inside(self, path: bytes) -> bool:
        if self._top == b".":
            return not path.startswith(b"../") and path != b".."
        return path == self._top or path.startswith(self._top + b"/")

    def _check_link(self, entry: tar.Entry, path: bytes) -> None:
        target = entry.link
        if entry.kind == tar.SYMLINK and not target.startswith(b"/"):
            target = posixpath.join(posixpath.dirname(path), target)
        if entry.link.startswith(b"/") or not self._is_inside(_clean(target)):
            raise UnpackError(f"tar entry {entry.name!r}: a link to {entry.link!r}, outside of {self._top!r}")

    def _remember(self, entry: tar.Entry, path: bytes) -> None:
        """What is a link, until something else takes its name."""
        if entry.kind != tar.SYMLINK:
            self._through.discard(path)
        elif path not in self._through:
            self._through.add(path)
            self._through_bytes += len(path)
            if self._through_bytes > self.limits.directory_bytes:
                raise UnpackError(
                    f"tar: links' paths take more than {self.limits.directory_bytes} bytes (limit directory_bytes)"
                )


def _clean(name: bytes) -> bytes:
    """As text, relative: a leading slash means nothing in a tar."""
    return posixpath.normpath(name.lstrip(b"/") or b".")


def _above(path: bytes) -> Iterator[bytes]:
    while path := posixpath.dirname(path):
        yield path
