"""signedIdentity of policy.json: does what a signature says it is for fit what somebody wants to run?

    matchExact               the same repository and the same tag or digest
    matchRepoDigestOrExact   as above; for an image asked for by digest the same repository
    matchRepository          the same repository
    exactReference           what the policy names, whatever is asked for
    exactRepository          a tag or digest of the repository that the policy names
    remapIdentity            matchRepoDigestOrExact, after a prefix was exchanged: for mirrors

Pure. Refuses names that are no references, and a signature for a bare repository where a tag matters. Invariant: a
signature made for one repository fits another only where the policy says so, by name (replay, docs/trust.md).
"""

from __future__ import annotations

from imagestore.model import ContentInvalid, ReferenceInvalid
from imagestore.reference import Reference, parse, split_port
from imagestore.strict_json import Fields
from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Named:
    """A normalised name: the repository, and ":TAG", "@DIGEST", both or nothing behind it."""

    repository: str
    rest: str

    def __str__(self) -> str:
        return self.repository + self.rest


def named(text: str) -> Named | None:
    """What `text` names, None when it is no reference. Unlike `parse` it adds no tag and drops none."""
    try:
        reference = parse(text)
    except ReferenceInvalid:
        return None
    head, at, digest = text.partition("@")
    tag = head.rpartition(":")[2] if ":" in head.rpartition("/")[2] else ""
    return Named(reference.repository, (f":{tag}" if tag else "") + at + digest)


def to_sign(text: str) -> str:
    """What a signature may say that an image is called: a name with a tag. "" where `text` is none."""
    found = named(text)
    return "" if found is None or not found.rest or "@" in found.rest else str(found)


def of(reference: Reference) -> Named:
    """A reference that was parsed: it always has a tag or a digest."""
    return Named(reference.repository, str(reference).removeprefix(reference.repository))


@dataclass(frozen=True, slots=True)
class Identity:
    """One signedIdentity. `wanted` below is what is to run, None where that has no name in a registry."""

    kind: str
    first: str = ""
    """dockerReference, dockerRepository or prefix."""
    second: str = ""
    """signedPrefix."""

    def accepts(self, wanted: Reference | None, signed: str) -> bool:
        """True when a signature that names `signed` is one for `wanted`."""
        signature = named(signed)
        if signature is None:
            return False
        if self.kind == "exactReference":
            return signature.rest != "" and signature == named(self.first)
        if self.kind == "exactRepository":
            return signature.repository == self.first
        if wanted is None:
            return False
        intended = of(wanted)
        if self.kind == "matchRepository":
            return signature.repository == intended.repository
        if self.kind == "matchExact":
            return signature.rest != "" and signature == intended
        if self.kind == "remapIdentity":
            intended = self._remapped(intended)
        return signature.rest != "" and (
            signature == intended or (intended.rest[:1] == "@" and signature.repository == intended.repository)
        )

    def _remapped(self, intended: Named) -> Named:
        name = intended.repository
        # A prefix ends where a part of the name does: "example.com/a" is none of "example.com/ab".
        if name != self.first and not name.startswith(self.first + "/"):
            return intended
        return Named(self.second + name.removeprefix(self.first), intended.rest)

    def __str__(self) -> str:
        if self.kind == "remapIdentity":
            return f"{self.kind} {self.first} -> {self.second}"
        return f"{self.kind} {self.first}".rstrip()


DEFAULT = Identity("matchRepoDigestOrExact")
_PLAIN = ("matchExact", "matchRepoDigestOrExact", "matchRepository")


def parse_identity(fields: Fields) -> Identity:
    """A signedIdentity object. Raises ContentInvalid."""
    kind = fields.string("type")
    if kind in _PLAIN:
        fields.only("type")
        return Identity(kind)
    if kind == "exactReference":
        fields.only("type", "dockerReference")
        text = fields.string("dockerReference")
        found = named(text)
        if found is None or not found.rest:
            raise ContentInvalid(f"{fields.path}.dockerReference: {text[:120]!r} is no reference with a tag or digest")
        return Identity(kind, str(found))
    if kind == "exactRepository":
        fields.only("type", "dockerRepository")
        text = fields.string("dockerRepository")
        found = named(text)
        if found is None:
            raise ContentInvalid(f"{fields.path}.dockerRepository: {text[:120]!r} is no repository")
        return Identity(kind, found.repository)
    if kind == "remapIdentity":
        fields.only("type", "prefix", "signedPrefix")
        return Identity(kind, _prefix(fields, "prefix"), _prefix(fields, "signedPrefix"))
    raise ContentInvalid(f"{fields.path}.type: {kind[:60]!r} is no kind of signedIdentity")


def _prefix(fields: Fields, key: str) -> str:
    """A host, a namespace or a repository. One that is short ("library") fits nothing, since names are compared in
    full; it is no error, as elsewhere."""
    text = fields.string(key)
    try:
        if "/" in text:
            bare = (found := named(text)) is not None and not found.rest
        else:
            bare = bool(split_port(text)[0])
    except ReferenceInvalid:
        bare = False
    if not bare:
        raise ContentInvalid(f"{fields.path}.{key}: {text[:120]!r} is no host, namespace or repository")
    return text
