"""Image references and digests: what the whole ecosystem accepts, and nothing else.

    reference = [domain "/"] path [":" tag] ["@" digest]      grammar: distribution/reference, read strictly

Refuses everything that the patterns below do not match as a whole, before any path or URL is made of it (threats R8,
S43). Invariant: `parse(str(r)) == r`, and a `Reference` always names one domain, one path and a tag or a digest.
"""

from __future__ import annotations

import re

from imagestore.model import ReferenceInvalid
from runtime.linux.dataclass import dataclass

# re.ASCII everywhere: \w and [0-9] must not take other scripts' letters and digits (threats P6).
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:]+\])"
_DOMAIN = re.compile(rf"({_HOST})(?::([0-9]{{1,5}}))?", re.ASCII)
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{3,64}", re.ASCII)
_LOOPBACK_V4 = re.compile(r"127(?:\.[0-9]{1,3}){3}", re.ASCII)

_NAME_LIMIT = 255
_TEXT_LIMIT = 1024
DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised reference. With a digest the tag says nothing and is dropped, as everywhere in the ecosystem."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """ "docker.io/library/busybox"."""
        return f"{self.domain}/{self.path}"

    @property
    def target(self) -> str:
        """The tag or the digest: what the registry is asked for."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"


def is_digest(text: str) -> bool:
    """True for "sha256:" and 64 lower-case hexadecimal digits, nothing before or after."""
    return _DIGEST.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """The reference that `text` means. Raises ReferenceInvalid with the part that is wrong."""
    shown = text[:120]
    if not text or len(text) > _TEXT_LIMIT:
        raise ReferenceInvalid(f"image reference {shown!r}: expected 1 to {_TEXT_LIMIT} characters")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise ReferenceInvalid(f"image reference {shown!r}: the digest is not sha256: and 64 lower-case hex digits")
    rest, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise ReferenceInvalid(f"image reference {shown!r}: the tag is not 1 to 128 of A-Z a-z 0-9 _ . -")
    domain, path = _split_domain(rest)
    _check_domain(domain, shown)
    if not _PATH.fullmatch(path):
        hint = ": the repository must be lower case" if path != path.lower() else ": the repository name is malformed"
        raise ReferenceInvalid(f"image reference {shown!r}{hint}")
    if len(domain) + 1 + len(path) > _NAME_LIMIT:
        raise ReferenceInvalid(f"image reference {shown!r}: the name is longer than {_NAME_LIMIT} characters")
    if "/" not in rest and re.fullmatch(r"[0-9a-f]{64}", rest, re.ASCII):
        raise ReferenceInvalid(f"image reference {shown!r}: 64 hex digits are an image id, not a name")
    if at:
        return Reference(domain, path, "", digest)
    return Reference(domain, path, DEFAULT_TAG if tag is None else tag)


def _split_tag(text: str) -> tuple[str, str | None]:
    """A colon after the last slash starts the tag; one before it belongs to the port."""
    head, colon, tail = text.rpartition(":")
    return (head, tail) if colon and "/" not in tail else (text, None)


def is_qualified(text: str) -> bool:
    """True when the text names its registry. The first part is a domain when it could not be a path: a dot, a colon,
    a capital, or "localhost"."""
    first, slash, _ = text.partition("/")
    return bool(slash) and bool(set(first) & set(".:[") or first == "localhost" or first != first.lower())


def _split_domain(text: str) -> tuple[str, str]:
    first, _, rest = text.partition("/")
    if not is_qualified(text):
        first, rest = DEFAULT_DOMAIN, text
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _check_domain(domain: str, shown: str) -> None:
    match = _DOMAIN.fullmatch(domain)
    if not match:
        raise ReferenceInvalid(f"image reference {shown!r}: the registry is not host or host:port")
    if match[2] is not None and not 1 <= int(match[2]) <= 65535:
        raise ReferenceInvalid(f"image reference {shown!r}: the port is not 1 to 65535")


def split_port(domain: str) -> tuple[str, int | None]:
    """Host (IPv6 in its brackets) and port of a domain that was parsed."""
    match = _DOMAIN.fullmatch(domain)
    if not match:
        raise ReferenceInvalid(f"registry {domain[:120]!r}: expected host or host:port")
    return match[1], int(match[2]) if match[2] else None


def is_loopback(host: str) -> bool:
    """True when `host`, as written, can only be this machine: never decided by what a name resolves to (S28)."""
    if host == "localhost" or host in ("[::1]", "::1"):
        return True
    return bool(_LOOPBACK_V4.fullmatch(host)) and all(int(part) <= 255 for part in host.split("."))


def id_prefix(text: str) -> str | None:
    """The hex digits when `text` can be an image id or the beginning of one: "sha256:" optional, 3 to 64 digits."""
    digits = text.removeprefix("sha256:")
    return digits if _HEX.fullmatch(digits) else None
