"""policy.json of the containers ecosystem (containers-policy.json(5)): which images may run here, as values.

    {"default": [REQUIREMENT, …], "transports": {"docker": {SCOPE: [REQUIREMENT, …], …}, …}}

All requirements of the scope that fits best must be met; scopes.py says which that is. Refuses what containers/image
refuses: unknown and duplicate keys, a missing default, an empty list of requirements, key sources that contradict one
another. Pure but for `Material.read`. Invariant: a policy that was parsed leaves no image undecided.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from imagestore.identity import DEFAULT, Identity, parse_identity
from imagestore.model import ContentInvalid, PolicyInvalid
from imagestore.scopes import Subject, check_scope
from imagestore.signatures import from_base64
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass
from runtime.linux.files import AT_FDCWD, read_bounded

_VALUES = 200_000
_FILE_LIMIT = 4 << 20
_MATERIAL_LIMIT = 1 << 20
_MANY = 4096


@dataclass(frozen=True, slots=True)
class Material:
    """A key or certificates that a policy points at, or holds itself."""

    key: str
    path: Path | None = None
    data: bytes = b""

    def read(self) -> bytes:
        """Raises PolicyInvalid, naming the file."""
        if self.path is None:
            return self.data
        try:
            return read_bounded(AT_FDCWD, str(self.path), _MATERIAL_LIMIT)
        except OSError as error:
            raise PolicyInvalid(f"signature policy: {self}: {error}") from None

    def __str__(self) -> str:
        return f"{self.key} {self.path}" if self.path else self.key


@dataclass(frozen=True, slots=True)
class Accept:
    """insecureAcceptAnything"""

    type: str = "insecureAcceptAnything"


@dataclass(frozen=True, slots=True)
class Reject:
    """reject; and what the format knows but nobody implements, with the reason."""

    reason: str = "the policy rejects all images of this scope"
    type: str = "reject"


@dataclass(frozen=True, slots=True)
class SignedBy:
    """signedBy: an OpenPGP signature (simple signing) by one of the keys."""

    keys: tuple[Material, ...]
    identity: Identity
    type: str = "signedBy"


@dataclass(frozen=True, slots=True)
class Fulcio:
    """Certificates that are issued for one signature to whom an OIDC issuer vouches for."""

    roots: Material
    issuer: str
    email: str


@dataclass(frozen=True, slots=True)
class Pki:
    """Certificates of an authority of one's own."""

    roots: Material
    intermediates: Material | None
    email: str
    hostname: str


@dataclass(frozen=True, slots=True)
class SigstoreSigned:
    """sigstoreSigned: by one of the keys, or by a certificate; with `rekor`, entered in one of these logs, too. Fulcio
    always comes with a log, a PKI never."""

    keys: tuple[Material, ...]
    fulcio: Fulcio | None
    pki: Pki | None
    rekor: tuple[Material, ...]
    identity: Identity
    type: str = "sigstoreSigned"


Requirement = Accept | Reject | SignedBy | SigstoreSigned
Requirements = tuple[Requirement, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """What is required, by transport and scope."""

    default: Requirements
    transports: Mapping[str, Mapping[str, Requirements]]

    def requirements(self, subject: Subject) -> tuple[str, Requirements]:
        """The scope that decides about `subject`, in words, and what it requires: the first of the exact name, its
        parents from the longest to the shortest, wildcards, the transport's own default, the default."""
        scopes = self.transports.get(subject.transport, {})
        for scope in subject.scopes:
            if scope in scopes:
                return f"{subject.transport} {scope}", scopes[scope]
        if "" in scopes:
            return f"{subject.transport}, its default", scopes[""]
        return "the policy's default", self.default

    def materials(self) -> tuple[Material, ...]:
        """Everything on disk that the policy stands on."""
        lists = [self.default, *(found for scopes in self.transports.values() for found in scopes.values())]
        return tuple(item for found in lists for one in found for item in _materials(one) if item.path is not None)


def _materials(requirement: Requirement) -> tuple[Material, ...]:
    if isinstance(requirement, SignedBy):
        return requirement.keys
    if not isinstance(requirement, SigstoreSigned):
        return ()
    found = [*requirement.keys, *requirement.rekor]
    found += [requirement.fulcio.roots] if requirement.fulcio else []
    if requirement.pki:
        found += [requirement.pki.roots, *filter(None, [requirement.pki.intermediates])]
    return tuple(found)


ANYTHING = Policy((Accept(),), {})


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises PolicyInvalid."""
    try:
        data = read_bounded(AT_FDCWD, str(path), _FILE_LIMIT)
    except OSError as error:
        raise PolicyInvalid(f"signature policy: {error}") from None
    return parse_policy(data, str(path))


def parse_policy(data: bytes, name: str) -> Policy:
    """Raises PolicyInvalid, which begins with `name` and the path of what is wrong."""
    try:
        document = parse_object(data, f"signature policy {name}", _VALUES).only("default", "transports")
        if not document.has("default"):
            raise ContentInvalid(f"{document.path}.default: missing; it decides where no scope does")
        transports = document.object("transports") or Fields({}, "transports")
        return Policy(
            _requirements(document, "default"), {name: _scopes(transports, name) for name in transports.names()}
        )
    except ContentInvalid as error:
        raise PolicyInvalid(str(error)) from None


def _scopes(transports: Fields, transport: str) -> dict[str, Requirements]:
    scopes = transports.object(transport)
    if scopes is None:
        raise ContentInvalid(f"{transports.path}.{transport}: expected an object of scopes")
    for scope in scopes.names():
        wrong = check_scope(transport, scope)
        if wrong:
            raise ContentInvalid(f"{scopes.path}: scope {scope[:120]!r}: {wrong}")
    return {scope: _requirements(scopes, scope) for scope in scopes.names()}


def _requirements(fields: Fields, key: str) -> Requirements:
    found = tuple(_requirement(item) for item in fields.objects(key, _MANY))
    if not found:
        raise ContentInvalid(
            f"{fields.path}.{key}: an empty list of requirements accepts nothing; say reject if so meant"
        )
    return found


def _requirement(fields: Fields) -> Requirement:
    kind = fields.string("type")
    if kind == "insecureAcceptAnything":
        fields.only("type")
        return Accept()
    if kind == "reject":
        fields.only("type")
        return Reject()
    if kind == "signedBy":
        return _signed_by(fields)
    if kind == "signedBaseLayer":
        fields.only("type", "baseLayerIdentity")
        identity = fields.object("baseLayerIdentity")
        if identity is None:
            raise ContentInvalid(f"{fields.path}.baseLayerIdentity: missing")
        parse_identity(identity)
        return Reject("signedBaseLayer is part of the format, and no implementation of it exists", kind)
    if kind == "sigstoreSigned":
        return _sigstore_signed(fields)
    raise ContentInvalid(f"{fields.path}.type: {kind[:60]!r} is no kind of requirement")


def _signed_by(fields: Fields) -> Requirement:
    fields.only("type", "keyType", "keyPath", "keyPaths", "keyData", "signedIdentity")
    kind = fields.string("keyType")
    if kind not in ("GPGKeys", "signedByGPGKeys", "X509Certificates", "signedByX509CAs"):
        raise ContentInvalid(f"{fields.path}.keyType: {kind[:60]!r} is no type of key")
    keys = _sources(fields, "key", plural_data=False)
    identity = _identity(fields)
    if len(keys) != 1:
        raise ContentInvalid(f"{fields.path}: expected exactly one of keyPath, keyPaths and keyData")
    if kind != "GPGKeys":
        return Reject(f"keyType {kind} is part of the format, and no implementation of it exists", "signedBy")
    return SignedBy(keys[0], identity)


def _sigstore_signed(fields: Fields) -> SigstoreSigned:
    rekor_keys = ("rekorPublicKeyPath", "rekorPublicKeyPaths", "rekorPublicKeyData", "rekorPublicKeyDatas")
    fields.only("type", "keyPath", "keyPaths", "keyData", "keyDatas", "fulcio", "pki", "signedIdentity", *rekor_keys)
    keys = _sources(fields, "key")
    rekor = _sources(fields, "rekorPublicKey")
    fulcio, pki = fields.object("fulcio"), fields.object("pki")
    if len(keys) + (fulcio is not None) + (pki is not None) != 1:
        raise ContentInvalid(
            f"{fields.path}: expected exactly one of keyPath, keyPaths, keyData, keyDatas, fulcio and pki"
        )
    if len(rekor) > 1:
        raise ContentInvalid(f"{fields.path}: expected at most one of {', '.join(rekor_keys)}")
    if pki is not None and rekor:
        raise ContentInvalid(f"{fields.path}: {', '.join(rekor_keys)} do not go with pki, as elsewhere")
    if fulcio is not None and not rekor:
        raise ContentInvalid(
            f"{fields.path}: fulcio needs one of {', '.join(rekor_keys)}: only a log says when a certificate was used"
        )
    return SigstoreSigned(
        keys[0] if keys else (),
        _fulcio(fulcio) if fulcio else None,
        _pki(pki) if pki else None,
        rekor[0] if rekor else (),
        _identity(fields),
    )


def _fulcio(fields: Fields) -> Fulcio:
    fields.only("caPath", "caData", "oidcIssuer", "subjectEmail")
    issuer, email = fields.string("oidcIssuer"), fields.string("subjectEmail")
    if not issuer or not email:
        raise ContentInvalid(f"{fields.path}: oidcIssuer and subjectEmail are needed: a CA vouches for everybody")
    return Fulcio(_one(fields, "ca"), issuer, email)


def _pki(fields: Fields) -> Pki:
    fields.only(
        "caRootsPath", "caRootsData", "caIntermediatesPath", "caIntermediatesData", "subjectEmail", "subjectHostname"
    )
    email, hostname = fields.string("subjectEmail"), fields.string("subjectHostname")
    if not email and not hostname:
        raise ContentInvalid(f"{fields.path}: subjectEmail or subjectHostname is needed: a CA vouches for everybody")
    between = fields.has("caIntermediatesPath") or fields.has("caIntermediatesData")
    return Pki(_one(fields, "caRoots"), _one(fields, "caIntermediates") if between else None, email, hostname)


def _one(fields: Fields, stem: str) -> Material:
    found = _sources(fields, stem, plural_path=False, plural_data=False)
    if len(found) != 1:
        raise ContentInvalid(f"{fields.path}: expected exactly one of {stem}Path and {stem}Data")
    return found[0][0]


def _sources(
    fields: Fields, stem: str, *, plural_path: bool = True, plural_data: bool = True
) -> list[tuple[Material, ...]]:
    """What was given as STEMPath, STEMPaths, STEMData and STEMDatas, each that is there."""
    found: list[tuple[Material, ...]] = []
    for suffix, many, known in (
        ("Path", False, True),
        ("Paths", True, plural_path),
        ("Data", False, True),
        ("Datas", True, plural_data),
    ):
        key = stem + suffix
        if not known or not fields.has(key):
            continue
        values = fields.strings(key) if many else (fields.string(key),)
        if not values or not all(values):
            raise ContentInvalid(f"{fields.path}.{key}: there is nothing in it")
        if suffix.startswith("Path"):
            found.append(tuple(Material(key, Path(value)) for value in values))
        else:
            found.append(tuple(Material(key, data=_decoded(value, f"{fields.path}.{key}")) for value in values))
    return found


def _decoded(text: str, path: str) -> bytes:
    try:
        return from_base64(text)
    except ValueError:
        raise ContentInvalid(f"{path}: not base64") from None


def _identity(fields: Fields) -> Identity:
    given = fields.object("signedIdentity")
    return DEFAULT if given is None else parse_identity(given)
