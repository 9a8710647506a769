"""The table of docs/trust.md as code: every kind of requirement, and what it is met by and is not.

A row knows how its requirement is written and how signatures for it are made, with openssl and gpg (tests/vectors.py);
a column what is wrong. tests/unit/test_trust_table.py judges each cell by us, tests/peers/test_trust.py by
containers/image.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from imagestore.signatures import Bundle, Cosign, Signature, Simple
from tests.vectors import Certificate, Maker, b64, payload

MAIL = "release@example.com"
WEEK = 7 * 86400

COSIGN = "cosign container image signature"
ATOMIC = "atomic container signature"


@dataclass(frozen=True)
class Wanted:
    """What is to run: the digest of its manifest, what it is called, and the digest of something else."""

    digest: str = "sha256:" + "1a" * 32
    name: str = "registry.example/team/app:1"
    other: str = "sha256:" + "2b" * 32


Make = Callable[..., Signature]


@dataclass(frozen=True)
class Kind:
    """A row. `sign(maker, digest, name, key=…, mail=…, log=…)` makes a signature, `requirement(maker)` the policy."""

    requirement: Callable[[Maker], dict[str, object]]
    sign: Make
    certificate: bool = False
    logged: bool = False
    expires: bool = False


# ------------------------------------------------------------------------------------------------------- how to sign


def by_gpg(maker: Maker, digest: str, name: str, key: str = "good", mail: str = MAIL, log: bool = True) -> Simple:
    optional = {"creator": "gpg", "timestamp": maker.now}
    maker.gpg_key(f"{key}@example.com")
    return maker.simple(f"{key}@example.com", payload(ATOMIC, digest, name, optional))


def by_key(kind: str = "p256", logged: bool = False, bundle: bool = False, proof: bool = False) -> Make:
    def sign(maker: Maker, digest: str, name: str, key: str = "good", mail: str = MAIL, log: bool = True) -> Signature:
        entry = "log" if logged and log else ""
        if bundle:
            return maker.bundle(f"{key}-p256", digest, name, log=entry, promise=not proof, proof=proof)
        return maker.cosign(f"{key}-{kind.removesuffix('-pss')}", payload(COSIGN, digest, name), kind=kind, log=entry)

    return sign


def by_certificate(root: str, san: str = "email", bundle: bool = False, logged: bool = True) -> Make:
    def sign(maker: Maker, digest: str, name: str, key: str = "good", mail: str = MAIL, log: bool = True) -> Signature:
        authority = root if key == "good" else f"evil-{root}"
        who = (
            f"email:{mail}" if san == "email" else f"DNS:{'build.example.com' if mail == MAIL else 'evil.example.com'}"
        )
        leaf = maker.leaf(f"{authority}-{san}-{mail.partition('@')[0]}", authority, who)
        entry = "log" if logged and log else ""
        if bundle:
            return maker.bundle(leaf.key, digest, name, certificate=leaf, log=entry, promise=log)
        return maker.cosign(leaf.key, payload(COSIGN, digest, name), certificate=leaf, log=entry)

    return sign


def by_rekor_2(certified: bool, kind: str = "hashedrekord") -> Make:
    def sign(maker: Maker, digest: str, name: str, key: str = "good", mail: str = MAIL, log: bool = True) -> Signature:
        entry = "log" if log else ""
        if not certified:
            return maker.bundle_2(f"{key}-p256", digest, name, log=entry, kind=kind)
        authority = "fulcio" if key == "good" else "evil-fulcio"
        leaf = maker.leaf(f"{authority}-email-{mail.partition('@')[0]}", authority, f"email:{mail}")
        return stamped(maker, leaf, digest, name, entry, kind)

    return sign


def stamped(maker: Maker, leaf: Certificate, digest: str, name: str, log: str, kind: str = "hashedrekord") -> Bundle:
    maker.stamper("stamper", "tsa")
    return maker.bundle_2(leaf.key, digest, name, certificate=leaf, log=log, stamper="stamper", kind=kind)


def timestamp_authorities(maker: Maker) -> Path:
    """What image.timestamp_authorities names."""
    return maker.authority("tsa")


# -------------------------------------------------------------------------------------------------- what is required


def signed_by(how: str) -> Callable[[Maker], dict[str, object]]:
    def requirement(maker: Maker) -> dict[str, object]:
        good, also = maker.gpg_key("good@example.com"), maker.gpg_key("second@example.com")
        values: dict[str, object] = {
            "keyPath": str(good),
            "keyPaths": [str(also), str(good)],
            "keyData": b64(good.read_bytes()),
        }
        return {"type": "signedBy", "keyType": "GPGKeys", how: values[how]}

    return requirement


def sigstore(how: str, kind: str = "p256", rekor: str = "") -> Callable[[Maker], dict[str, object]]:
    def requirement(maker: Maker) -> dict[str, object]:
        found = {"type": "sigstoreSigned", how: material(maker, how, f"good-{kind.removesuffix('-pss')}", kind)}
        return found | ({rekor: material(maker, rekor, "log", "p256")} if rekor else {})

    return requirement


def material(maker: Maker, how: str, name: str, kind: str) -> object:
    path, other = maker.public(name, kind), maker.public("unused")
    one, two = (str(path), str(other)) if "Path" in how else (b64(path.read_bytes()), b64(other.read_bytes()))
    return [two, one] if how.endswith("s") else one


def fulcio(how: str = "caPath") -> Callable[[Maker], dict[str, object]]:
    def requirement(maker: Maker) -> dict[str, object]:
        ca = maker.authority("fulcio")
        who = {"oidcIssuer": "https://accounts.example.com", "subjectEmail": MAIL}
        where = str(ca) if how == "caPath" else b64(ca.read_bytes())
        return {
            "type": "sigstoreSigned",
            "fulcio": {how: where, **who},
            "rekorPublicKeyPath": str(maker.public("log")),
        }

    return requirement


def pki(
    how: str = "caRootsPath", who: str = "subjectEmail", between: bool = False
) -> Callable[[Maker], dict[str, object]]:
    def requirement(maker: Maker) -> dict[str, object]:
        ca = maker.authority("pki")
        fields: dict[str, object] = {how: str(ca) if how.endswith("Path") else b64(ca.read_bytes())}
        fields[who] = MAIL if who == "subjectEmail" else "build.example.com"
        if between:
            fields["caIntermediatesPath"] = str(maker.between("pki-between", "pki"))
        return {"type": "sigstoreSigned", "pki": fields}

    return requirement


def between_fulcio(maker: Maker) -> Path:
    maker.authority("fulcio")
    return maker.between("fulcio-between", "fulcio")


def fulcio_of_bundles(maker: Maker) -> dict[str, object]:
    """A bundle carries the leaf alone: the policy's roots have to hold what is between."""
    who = {"oidcIssuer": "https://accounts.example.com", "subjectEmail": MAIL}
    return {**fulcio()(maker), "fulcio": {"caPath": str(between_fulcio(maker)), **who}}


def without_chain(make: Make) -> Make:
    def sign(*words: object, **how: object) -> Signature:
        found = make(*words, **how)
        assert isinstance(found, Cosign)
        kept = {key: value for key, value in found.annotations.items() if not key.endswith("/chain")}
        return replace(found, annotations=kept)

    return sign


ROWS = {
    "signedBy keyPath": Kind(signed_by("keyPath"), by_gpg, expires=True),
    "signedBy keyPaths": Kind(signed_by("keyPaths"), by_gpg, expires=True),
    "signedBy keyData": Kind(signed_by("keyData"), by_gpg, expires=True),
    "sigstoreSigned keyPath, ECDSA P-256": Kind(sigstore("keyPath"), by_key()),
    "sigstoreSigned keyPath, ECDSA P-384": Kind(sigstore("keyPath", "p384"), by_key("p384")),
    "sigstoreSigned keyPath, RSA PKCS #1": Kind(sigstore("keyPath", "rsa"), by_key("rsa")),
    "sigstoreSigned keyPath, RSA PSS": Kind(sigstore("keyPath", "rsa-pss"), by_key("rsa-pss")),
    "sigstoreSigned keyPath, Ed25519": Kind(sigstore("keyPath", "ed25519"), by_key("ed25519")),
    "sigstoreSigned keyPath, bundle": Kind(sigstore("keyPath"), by_key(bundle=True)),
    "sigstoreSigned keyPaths": Kind(sigstore("keyPaths"), by_key()),
    "sigstoreSigned keyData": Kind(sigstore("keyData"), by_key()),
    "sigstoreSigned keyDatas": Kind(sigstore("keyDatas"), by_key()),
    "… keyPath + rekorPublicKeyPath": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyPath"), by_key(logged=True), logged=True
    ),
    "… keyPath + rekorPublicKeyPaths": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyPaths"), by_key(logged=True), logged=True
    ),
    "… keyPath + rekorPublicKeyData": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyData"), by_key(logged=True), logged=True
    ),
    "… keyPath + rekorPublicKeyDatas": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyDatas"), by_key(logged=True), logged=True
    ),
    "… keyPath + rekorPublicKeyPath, bundle with promise": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyPath"), by_key(logged=True, bundle=True), logged=True
    ),
    "… keyPath + rekorPublicKeyPath, bundle with proof": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyPath"), by_key(logged=True, bundle=True, proof=True), logged=True
    ),
    "… fulcio caPath + rekorPublicKeyPath": Kind(fulcio(), by_certificate("fulcio"), certificate=True, logged=True),
    "… fulcio caData + rekorPublicKeyPath": Kind(
        fulcio("caData"), by_certificate("fulcio"), certificate=True, logged=True
    ),
    "… fulcio caPath + rekorPublicKeyPath, bundle": Kind(
        fulcio_of_bundles,
        by_certificate("fulcio", bundle=True),
        certificate=True,
        logged=True,
    ),
    "… keyPath + rekorPublicKeyPath, bundle of Rekor 2": Kind(
        sigstore("keyPath", rekor="rekorPublicKeyPath"), by_rekor_2(certified=False), logged=True
    ),
    "… fulcio caPath + rekorPublicKeyPath, bundle of Rekor 2 with RFC 3161 time": Kind(
        fulcio_of_bundles, by_rekor_2(certified=True), certificate=True, logged=True
    ),
    "… the same bundle, logged as dsse": Kind(
        fulcio_of_bundles, by_rekor_2(certified=True, kind="dsse"), certificate=True, logged=True
    ),
    "… pki caRootsPath, subjectEmail": Kind(pki(), by_certificate("pki", logged=False), certificate=True),
    "… pki caRootsData, subjectHostname": Kind(
        pki("caRootsData", "subjectHostname"), by_certificate("pki", "host", logged=False), certificate=True
    ),
    "… pki caIntermediatesPath": Kind(
        pki(between=True), without_chain(by_certificate("pki", logged=False)), certificate=True
    ),
}
ACCEPTED, REFUSED, NOTHING = "accepted", "refused", "–"
COLUMNS = (
    "good",
    "wrong key",
    "wrong identity",
    "altered payload",
    "another image",
    "replay from another repository",
    "expired",
    "missing proof",
)


def cell(row: str, column: str) -> str:
    """What must come out; "–" where there is nothing that could expire or be proven."""
    kind = ROWS[row]
    if column == "expired" and not (kind.certificate or kind.expires):
        return NOTHING
    if column == "missing proof" and not kind.logged:
        return NOTHING
    return ACCEPTED if column == "good" else REFUSED


def altered(found: Signature, wanted: Wanted) -> Signature:
    """The same signature over a payload with another digest in it, of equal length."""
    if isinstance(found, Cosign):
        return replace(found, payload=found.payload.replace(wanted.other.encode(), wanted.digest.encode()))
    if isinstance(found, Bundle):
        document = json.loads(found.data)
        inner = base64.b64decode(document["dsseEnvelope"]["payload"])
        inner = inner.replace(wanted.other[7:].encode(), wanted.digest[7:].encode())
        document["dsseEnvelope"]["payload"] = b64(inner)
        return replace(found, data=json.dumps(document).encode())
    return found


def altered_message(maker: Maker, wanted: Wanted) -> Signature:
    """An OpenPGP message with one byte of its content changed; uncompressed, so that the content lies in it."""
    optional = {"creator": "gpg", "timestamp": maker.now}
    maker.gpg_key("good@example.com")
    content = payload(ATOMIC, wanted.other, wanted.name, optional)
    message = maker.gpg("--local-user", "good@example.com", "-z", "0", "--sign", data=content)
    assert wanted.other.encode() in message
    return Simple(message.replace(wanted.other.encode(), wanted.digest.encode()), "test")


def case(maker: Maker, row: str, column: str, wanted: Wanted) -> tuple[dict[str, object], Signature]:
    """The requirement, and the one signature that is there."""
    kind, sign = ROWS[row], ROWS[row].sign
    requirement = kind.requirement(maker)
    if column == "expired":
        return expired(maker, row, requirement, wanted)
    if column == "wrong key":
        return requirement, sign(maker, wanted.digest, wanted.name, key="evil")
    if column == "wrong identity" and kind.certificate:
        return requirement, sign(maker, wanted.digest, wanted.name, mail="somebody@example.com")
    if column == "wrong identity":
        return requirement, sign(maker, wanted.digest, wanted.name.removesuffix(":1") + ":2")
    if column == "altered payload":
        made = (
            altered_message(maker, wanted)
            if sign is by_gpg
            else altered(sign(maker, wanted.other, wanted.name), wanted)
        )
        return requirement, made
    if column == "another image":
        return requirement, sign(maker, wanted.other, wanted.name)
    if column == "replay from another repository":
        return requirement, sign(maker, wanted.digest, wanted.name.replace("/app:", "/other:"))
    return requirement, sign(maker, wanted.digest, wanted.name, log=column != "missing proof")


def expired(
    maker: Maker, row: str, requirement: dict[str, object], wanted: Wanted
) -> tuple[dict[str, object], Signature]:
    claim = payload(COSIGN, wanted.digest, wanted.name)
    if ROWS[row].expires:
        # A key of one week in 2020 signs within that week; today it is no key any more.
        key = maker.gpg_key("old@example.com", expires="1w", at="20200101T000000")
        optional = {"creator": "gpg", "timestamp": 1577923200}
        message = payload(ATOMIC, wanted.digest, wanted.name, optional)
        kept = {name: value for name, value in requirement.items() if not name.startswith("key") or name == "keyType"}
        return {**kept, "keyPath": str(key)}, maker.simple("old@example.com", message, at="20200102T000000")
    if "Rekor 2" in row or "dsse" in row:
        # Stamped today, with a certificate of one day in 2020: openssl stamps at no other time.
        leaf = maker.leaf("fulcio-old", "fulcio", f"email:{MAIL}", days_of_2020=True)
        return requirement, stamped(maker, leaf, wanted.digest, wanted.name, "log")
    if "fulcio" in row:
        # Logged a week after the certificate's only day: what counts is when it was used, not now.
        leaf, late = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}"), maker.now + WEEK
        if "bundle" in row:
            return requirement, maker.bundle(leaf.key, wanted.digest, wanted.name, certificate=leaf, log="log", at=late)
        return requirement, maker.cosign(leaf.key, claim, certificate=leaf, log="log", at=late)
    san = "DNS:build.example.com" if "subjectHostname" in row else f"email:{MAIL}"
    leaf = maker.leaf(f"pki-old-{san[:3]}", "pki", san, days_of_2020=True)
    return requirement, maker.cosign(leaf.key, claim, certificate=leaf, log="log")
