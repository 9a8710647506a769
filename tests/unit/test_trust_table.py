"""docs/trust.md's table: every kind of requirement, met by what it should be met by and by nothing else.

Each cell is a test with signatures that openssl and gpg made (tests/vectors.py); the last test compares the table in
the documentation with the cells that are here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imagestore.policy import parse_policy
from imagestore.reference import parse
from imagestore.scopes import in_registry
from imagestore.signatures import Bundle, Cosign, Signature, Simple
from imagestore.verdict import Verdict, judge
from tests.vectors import Maker, b64, payload

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "1a" * 32
OTHER = "sha256:" + "2b" * 32
NAME = "registry.example/team/app:1"
MAIL = "release@example.com"
DAY = 86400

COSIGN = "cosign container image signature"
ATOMIC = "atomic container signature"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    yield found
    found.close()


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
    how: str = "caRootsPath", who: str = "subjectEmail", between: bool = False, rekor: bool = False
) -> Callable[[Maker], dict[str, object]]:
    def requirement(maker: Maker) -> dict[str, object]:
        ca = maker.authority("pki")
        fields: dict[str, object] = {how: str(ca) if how.endswith("Path") else b64(ca.read_bytes())}
        fields[who] = MAIL if who == "subjectEmail" else "build.example.com"
        if between:
            fields["caIntermediatesPath"] = str(maker.between("pki-between", "pki"))
        found: dict[str, object] = {"type": "sigstoreSigned", "pki": fields}
        return found | ({"rekorPublicKeyPath": str(maker.public("log"))} if rekor else {})

    return requirement


def between_fulcio(maker: Maker) -> Path:
    maker.authority("fulcio")
    return maker.between("fulcio-between", "fulcio")


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
        # A bundle carries the leaf alone: the policy's roots have to hold what is between.
        lambda maker: {
            **fulcio()(maker),
            "fulcio": {
                "caPath": str(between_fulcio(maker)),
                "oidcIssuer": "https://accounts.example.com",
                "subjectEmail": MAIL,
            },
        },
        by_certificate("fulcio", bundle=True),
        certificate=True,
        logged=True,
    ),
    "… pki caRootsPath, subjectEmail": Kind(pki(), by_certificate("pki", logged=False), certificate=True),
    "… pki caRootsData, subjectHostname": Kind(
        pki("caRootsData", "subjectHostname"), by_certificate("pki", "host", logged=False), certificate=True
    ),
    "… pki caIntermediatesPath": Kind(
        pki(between=True), without_chain(by_certificate("pki", logged=False)), certificate=True
    ),
    "… pki + rekorPublicKeyPath": Kind(pki(rekor=True), by_certificate("pki"), certificate=True, logged=True),
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


def judged(requirement: dict[str, object], signatures: list[Signature], now: float, name: str = NAME) -> Verdict:
    policy = parse_policy(json.dumps({"default": [requirement]}).encode(), "test")
    return judge(policy, in_registry(parse(name)), (DIGEST,), signatures, now)


def altered(found: Signature) -> Signature:
    """The same signature over a payload with another digest in it, of equal length."""
    if isinstance(found, Cosign):
        return replace(found, payload=found.payload.replace(OTHER.encode(), DIGEST.encode()))
    if isinstance(found, Bundle):
        document = json.loads(found.data)
        inner = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(OTHER[7:].encode(), DIGEST[7:].encode())
        document["dsseEnvelope"]["payload"] = b64(inner)
        return replace(found, data=json.dumps(document).encode())
    return found


def altered_message(maker: Maker) -> Signature:
    """An OpenPGP message with one byte of its content changed; uncompressed, so that the content lies in it."""
    optional = {"creator": "gpg", "timestamp": maker.now}
    maker.gpg_key("good@example.com")
    content = payload(ATOMIC, OTHER, NAME, optional)
    message = maker._gpg_run("--local-user", "good@example.com", "-z", "0", "--sign", data=content)
    assert OTHER.encode() in message
    return Simple(message.replace(OTHER.encode(), DIGEST.encode()), "test")


def signatures_of(maker: Maker, row: str, column: str) -> tuple[list[Signature], float]:
    """What is there, and the time of the judgement."""
    kind, now = ROWS[row], float(maker.now + 60)
    sign = kind.sign
    if column == "wrong key":
        return [sign(maker, DIGEST, NAME, key="evil")], now
    if column == "wrong identity":
        if kind.certificate:
            return [sign(maker, DIGEST, NAME, mail="somebody@example.com")], now
        return [sign(maker, DIGEST, NAME.replace(":1", ":2"))], now
    if column == "altered payload":
        return [altered_message(maker) if sign is by_gpg else altered(sign(maker, OTHER, NAME))], now
    if column == "another image":
        return [sign(maker, OTHER, NAME)], now
    if column == "replay from another repository":
        return [sign(maker, DIGEST, NAME.replace("app", "other"))], now
    if column == "missing proof":
        return [sign(maker, DIGEST, NAME, log=False)], now
    if column == "expired" and kind.certificate and "fulcio" in row:
        # Logged a week after the certificate's only day: what counts is when it was used, not now.
        return [logged_late(maker, bundle="bundle" in row)], now
    return [sign(maker, DIGEST, NAME)], now + (8 * DAY if column == "expired" else 0)


def logged_late(maker: Maker, *, bundle: bool) -> Signature:
    leaf, late = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}"), maker.now + 7 * DAY
    if bundle:
        return maker.bundle(leaf.key, DIGEST, NAME, certificate=leaf, log="log", at=late)
    return maker.cosign(leaf.key, payload(COSIGN, DIGEST, NAME), certificate=leaf, log="log", at=late)


REASONS = {
    "wrong key": ("no good", "unable to get", "by a log that", "not good at"),
    "wrong identity": ("the policy wants", "is not for the host", "does not accept"),
    "altered payload": ("no good", "about another payload"),
    "another image": ("for another image",),
    "replay from another repository": ("does not accept",),
    "expired": ("expired",),
    "missing proof": ("no log entry", "neither a signed timestamp nor a proof"),
}


@pytest.mark.parametrize(
    ("row", "column"), [(row, column) for row in ROWS for column in COLUMNS if cell(row, column) != NOTHING]
)
def test_cell(maker: Maker, row: str, column: str) -> None:
    requirement = ROWS[row].requirement(maker)
    if column == "expired" and ROWS[row].expires:
        verdict = expired_gpg(maker, requirement)
    else:
        signatures, now = signatures_of(maker, row, column)
        verdict = judged(requirement, signatures, now)
    said = verdict.outcomes[0].sentence()
    assert verdict.accepted is (column == "good"), said
    if column != "good":
        assert any(reason in said for reason in REASONS[column]), said


def expired_gpg(maker: Maker, requirement: dict[str, object]) -> Verdict:
    """A key of one week in 2020 signs within that week; today it is no key any more."""
    key = maker.gpg_key("old@example.com", expires="1w", at="20200101T000000")
    optional = {"creator": "gpg", "timestamp": 1577923200}
    signature = maker.simple("old@example.com", payload(ATOMIC, DIGEST, NAME, optional), at="20200102T000000")
    kept = {name: value for name, value in requirement.items() if not name.startswith("keyP") and name != "keyData"}
    then = judged({**kept, "keyPath": str(key)}, [signature], 1577926800)
    assert then.accepted, then.outcomes[0].sentence()
    return judged({**kept, "keyPath": str(key)}, [signature], maker.now)


def table() -> str:
    head = ["requirement", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join([row, *(cell(row, column) for column in COLUMNS)]) + " |" for row in ROWS]
    return "\n".join(lines)


def test_the_documentation_has_this_table() -> None:
    text = (ROOT / "docs/trust.md").read_text()
    inside = text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert inside == table(), f"docs/trust.md should have:\n{table()}"
