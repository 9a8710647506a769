"""What a signature says, once its bytes are known to be signed: this digest, under this name.

    simple signing   {"critical": {"type": "atomic container signature", "image": {"docker-manifest-digest": D},
                                   "identity": {"docker-reference": NAME}}, "optional": …}
    cosign           the same with its own type
    in-toto          {"_type": …, "subject": [{"digest": {"sha256": HEX}, "name": NAME}], "predicateType": …}

Pure. Refuses keys that it does not know in `critical`: somebody meant them to be understood. Invariant: nothing is
parsed before its signature was verified, so what is refused here was signed by somebody trusted.
"""

from __future__ import annotations

import json

from imagestore.model import ContentInvalid
from imagestore.reference import is_digest
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass

SIMPLE = "atomic container signature"
COSIGN = "cosign container image signature"
IN_TOTO = "application/vnd.in-toto+json"
STATEMENTS = ("https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1")
SIGN = "https://sigstore.dev/cosign/sign/v1"

_VALUES = 10_000
_SUBJECTS = 1024
_EVER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Claim:
    """One signed pair; `name` is "" where a bundle names no repository."""

    digest: str
    name: str


def simple(data: bytes) -> Claim:
    """Raises ContentInvalid."""
    document = parse_object(data, "signed payload", _VALUES).only("critical", "optional")
    optional = document.object("optional")
    if optional is None:
        raise ContentInvalid("signed payload.optional: missing")
    optional.string("creator")
    optional.integer("timestamp", 0, _EVER, 0)
    return _critical(document, SIMPLE)


def cosign(data: bytes) -> Claim:
    """Raises ContentInvalid."""
    # Unlike `signed payload`s of simple signing, `optional` may be null or anything else: it means nothing to us.
    return _critical(parse_object(data, "signed payload", _VALUES).only("critical", "optional"), COSIGN)


def _critical(document: Fields, kind: str) -> Claim:
    critical = _object(document, "critical").only("type", "image", "identity")
    if critical.string("type") != kind:
        raise ContentInvalid(f"{critical.path}.type: {critical.string('type')[:60]!r}, expected {kind!r}")
    digest = _object(critical, "image").only("docker-manifest-digest").string("docker-manifest-digest")
    if not is_digest(digest):
        raise ContentInvalid(f"{critical.path}.image.docker-manifest-digest: {digest[:100]!r} is no sha256 digest")
    name = _object(critical, "identity").only("docker-reference").string("docker-reference")
    if not name:
        raise ContentInvalid(f"{critical.path}.identity.docker-reference: missing")
    return Claim(digest, name)


def _object(fields: Fields, key: str) -> Fields:
    found = fields.object(key)
    if found is None:
        raise ContentInvalid(f"{fields.path}.{key}: missing")
    return found


def statement(data: bytes) -> tuple[Claim, ...]:
    """What a signed in-toto statement says to be signed. One about anything else (provenance, an SBOM) is no signature
    of the image: who builds may not be who releases. Raises ContentInvalid."""
    document = parse_object(data, "signed statement", _VALUES)
    if document.string("_type") not in STATEMENTS:
        raise ContentInvalid(f"{document.path}._type: {document.string('_type')[:60]!r} is no in-toto statement")
    if document.string("predicateType") != SIGN:
        kind = document.string("predicateType")
        raise ContentInvalid(f"{document.path}.predicateType: {kind[:100]!r} attests something, it is no signature")
    found = []
    for subject in document.objects("subject", _SUBJECTS):
        digest = f"sha256:{_object(subject, 'digest').string('sha256')}"
        if is_digest(digest):
            found.append(Claim(digest, subject.string("name")))
    return tuple(found)


def simple_payload(digest: str, name: str, creator: str, timestamp: int) -> bytes:
    """What an OpenPGP signature is made of."""
    return _payload(SIMPLE, digest, name, {"creator": creator, "timestamp": timestamp})


def cosign_payload(digest: str, name: str, creator: str, timestamp: int) -> bytes:
    """What a signature for a cosign tag is made of."""
    return _payload(COSIGN, digest, name, {"creator": creator, "timestamp": timestamp})


def _payload(kind: str, digest: str, name: str, optional: dict[str, object]) -> bytes:
    critical = {
        "type": kind,
        "image": {"docker-manifest-digest": digest},
        "identity": {"docker-reference": name},
    }
    return json.dumps({"critical": critical, "optional": optional}, separators=(",", ":")).encode()


def statement_payload(digest: str, name: str) -> bytes:
    """What a bundle's envelope holds."""
    document = {
        "_type": STATEMENTS[0],
        "subject": [{"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": SIGN,
        "predicate": {},
    }
    return json.dumps(document, separators=(",", ":")).encode()
