"""Which files a command's dump was made of, beside it, so that others than the command can tell that it is stale.

A resumed process looks at the same files before all else and starts the slow way when one has changed
(runtime/resumable.py): this is for whoever could make a new dump then. Refuses nothing: where there is no dump, none
can become stale. Invariant: what is told of a dump that the command does not use is that it is not there.
"""

from __future__ import annotations

import json
import os

from runtime.linux.processor import processor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FILE = "made-of"


def told(dump: str, files: Sequence[tuple[str, int, int]], processor: str = "") -> bytes:
    """The file: the dump's name, and path, modification time in ns and size of what it was made of; and which processor
    (runtime.linux.processor) it is for, where it is not for all."""
    return json.dumps({"dump": dump, "files": files, "processor": processor}).encode()


def stale(library: Path) -> str:
    """Why the dump in `library` (PREFIX/lib/NAME) is not used any more; "" while it is, or where there is none."""
    try:
        known = json.loads((library / FILE).read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f"{library / FILE} cannot be read: {error}"
    if not (library / known["dump"]).is_file():
        return f"{library / known['dump']} is gone"
    if known.get("processor") and known["processor"] != processor():
        return "it was made for another processor"
    for path, mtime, size in known["files"]:
        try:
            status = os.stat(path)
        except OSError:
            return f"{path} is gone"
        if (status.st_mtime_ns, status.st_size) != (mtime, size):
            return f"{path} has changed"
    return ""
