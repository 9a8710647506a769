"""python hack/locked.py WORD…: pip, for a lock file that names the hash of each file.

An index tells every file that a project ever had, tens of thousands for this lock, and pip makes a candidate of each:
half of the time of an installation. Here those whose hash is not in the lock, which it would refuse anyway, are passed
over as they are read. Nothing is trusted for it: pip checks the hash of what it fetches as ever, and an index that
tells no hashes is read in full. Reaches into pip; where its inside is another, this is pip and no more.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pip._internal.cli.main import main


def only(wanted: frozenset[str]) -> None:
    """Makes pip blind for files of an index with another hash."""
    from pip._internal.models.link import Link

    whole = Link.from_json

    def from_json(told: dict[str, Any], page: str) -> Link | None:
        digest = told.get("hashes", {}).get("sha256")
        return None if digest and digest not in wanted else whole(told, page)

    Link.from_json = from_json  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    locks = [word for before, word in zip(sys.argv, sys.argv[1:], strict=False) if before == "-r"]
    hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", "".join(Path(lock).read_text() for lock in locks))
    if hashes:
        try:
            only(frozenset(hashes))
        except (ImportError, AttributeError):
            pass
    sys.exit(main())
