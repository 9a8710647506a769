"""criu's logs of checkpoints and restores that failed: the directories that they are made in go, what says why stays.

    ROOT/criu-logs/CONTAINER-dump.log, CONTAINER-restore.log

Refuses to keep more than the last `_MOST`, and of one more than its end: criu says as much as there is in an archive.
Invariant: a log that an error names is there when the error is read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cri.interfaces import ContainerError

log = logging.getLogger(__name__)

_MOST = 16
_BYTES = 1 << 20


def directory(root: Path) -> Path:
    return root / "criu-logs"


@contextmanager
def kept(root: Path, container_id: str, written: Path, *, limit: str) -> Iterator[None]:
    """For calls that let criu write to `written`. An error of theirs that names it names the copy instead; so does one
    of a criu that did not end in time, of which `limit` says who has set that."""
    try:
        yield
    except ContainerError as error:
        said = str(error)
        if error.code == "deadline":
            error.hint = f"{limit} is that limit"
        if str(written) not in said and error.code != "deadline":
            raise
        try:
            copy = _keep(directory(root), f"{container_id}-{written.name}", written)
        except OSError as second:
            if not isinstance(second, FileNotFoundError):
                log.warning("container %s: criu's log is not kept: %s", container_id, second)
            raise error from None
        said = said.replace(str(written), str(copy)) if str(written) in said else f"{said}\nlog file: {copy}"
        raise ContainerError(said, code=error.code, hint=error.hint) from error


def _keep(place: Path, name: str, written: Path) -> Path:
    with written.open("rb") as source:
        source.seek(max(0, os.fstat(source.fileno()).st_size - _BYTES))
        end = source.read(_BYTES)
    place.mkdir(mode=0o700, exist_ok=True)
    copy = place / name
    copy.write_bytes(end)
    for old in sorted(place.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-_MOST]:
        old.unlink(missing_ok=True)
    return copy
