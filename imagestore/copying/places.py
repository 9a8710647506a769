"""Where images lie, in skopeo's words: `docker://REF`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`,
`docker-archive:FILE[:REF]`, `dir:DIR`, and ours for the store, `ocid:NAME`.

Pure. Refuses a text without one of these in front: a bare name could be a file or an image.
"""

from __future__ import annotations

from pathlib import Path

from imagestore.model import ReferenceInvalid
from runtime.linux.dataclass import dataclass

KINDS = ("docker", "oci", "oci-archive", "docker-archive", "dir", "ocid")


@dataclass(frozen=True, slots=True)
class Place:
    """`name` is the reference, or what the image is called inside of `path`; "" where nothing was said."""

    kind: str
    path: Path
    name: str

    def __str__(self) -> str:
        if self.kind in ("docker", "ocid"):
            return f"{self.kind}:{'//' if self.kind == 'docker' else ''}{self.name}"
        return f"{self.kind}:{self.path}" + (f":{self.name}" if self.name else "")


def parse_place(text: str) -> Place:
    """Raises ReferenceInvalid."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        listed = ", ".join("docker://" if name == "docker" else f"{name}:" for name in KINDS)
        raise ReferenceInvalid(f"{text[:120]!r}: expected one of {listed} in front")
    if "\0" in text:
        raise ReferenceInvalid(f"{text[:120]!r}: a NUL is in no name")
    if kind == "docker":
        if not rest.startswith("//"):
            raise ReferenceInvalid(f"{text[:120]!r}: expected docker://REFERENCE")
        return Place(kind, Path(), rest[2:])
    if kind == "ocid":
        return Place(kind, Path(), rest)
    path, _, name = (rest, "", "") if kind == "dir" else rest.partition(":")
    if not path:
        raise ReferenceInvalid(f"{text[:120]!r}: expected a path after {kind}:")
    return Place(kind, Path(path), name)
