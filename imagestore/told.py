"""Failures as a caller of the store sees them: what was being done in front, and one of the public kinds.

No I/O. Invariant: what is raised to a caller is an ImageError of a kind that imagestore.model has.
"""

from __future__ import annotations

from imagestore.model import (
    AccessDenied,
    ContentInvalid,
    DecryptionRefused,
    ImageError,
    ImageNotFound,
    PolicyInvalid,
    ReferenceInvalid,
    RegistryUnavailable,
    SignatureRefused,
)

_KINDS: tuple[type[ImageError], ...] = (
    ReferenceInvalid,
    ImageNotFound,
    AccessDenied,
    RegistryUnavailable,
    ContentInvalid,
    SignatureRefused,
    PolicyInvalid,
    DecryptionRefused,
    ImageError,
)


def kind_of(error: ImageError) -> type[ImageError]:
    """The public kind of a failure."""
    return next(kind for kind in _KINDS if isinstance(error, kind))


def told(doing: str, error: ImageError) -> ImageError:
    """A failure as the caller sees it: what was being done in front, and one of the public kinds."""
    kind = kind_of(error)
    # A kubelet knows a refusal by the first word.
    word = f"{SignatureRefused.WORD}: " if kind is SignatureRefused else ""
    made = kind(f"{word}{doing}: {error}")
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made
