"""A blob that is one file, as a tar of that file: so it goes through the walker and the extractor as every layer does.

Refuses nothing: names are judged where those of all entries are. Invariant: what stands around the content depends on
the name and the size alone, so the content's digest says all about the layer.
"""

from __future__ import annotations

TYPE = "application/vnd.ocid.file;name="
_BLOCK = 512


def around(media_type: str, size: int) -> tuple[bytes, bytes]:
    """What stands before and behind `size` bytes of content."""
    from snapshotter.tar_out import Item, headers  # of what layers are made of, nothing is written

    name = media_type.removeprefix(TYPE).encode("utf-8", "surrogateescape")
    return headers(Item(name, size=size, mode=0o644)), bytes(-size % _BLOCK + 2 * _BLOCK)
