"""What a signature stands on, piece by piece: keys, certificates, log entries, claims. The table of kinds is in
test_trust_table.py; here is what somebody tries who has a true signature, certificate or entry of something else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imagestore import claims, rekor, sigstore, simple_signing
from imagestore.keys import load_key
from imagestore.model import ContentInvalid, PolicyInvalid
from imagestore.policy import SignedBy, SigstoreSigned, parse_policy
from imagestore.signatures import ENTRY, SIGNATURE, Bundle, Cosign, Simple, dump, from_blob, load, to_blob
from tests.trust_table import ATOMIC, COSIGN, MAIL, ROWS
from tests.vectors import ISSUER, Certificate, Maker, b64, compact, payload, tree_path, tree_root

DIGEST = "sha256:" + "1a" * 32
NAME = "registry.example/team/app:1"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    found = Maker(tmp_path_factory.mktemp("vectors"))
    yield found
    found.close()


def trusted(requirement: dict[str, object]) -> sigstore.Trusted:
    found = parse_policy(json.dumps({"default": [requirement]}).encode(), "test").default[0]
    assert isinstance(found, SigstoreSigned)
    return sigstore.trusted(found)


def refused(found: Cosign | Bundle, requirement: dict[str, object], now: float) -> str:
    with pytest.raises((sigstore.NotSigned, ContentInvalid)) as error:
        sigstore.verify(found, trusted(requirement), now)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33])
def test_a_path_leads_to_the_root_from_its_own_leaf_only(size: int) -> None:
    leaves = [hashlib.sha256(b"\0%d" % number).digest() for number in range(size)]
    root = tree_root(leaves)
    for index, leaf in enumerate(leaves):
        path = tree_path(index, leaves)
        assert rekor.root_of(leaf, index, size, path) == root
        assert rekor.root_of(b"x" * 32, index, size, path) != root
        for other in {index ^ 1, index + 1} - {index}:
            if other < size:
                assert rekor.root_of(leaf, other, size, path) != root
        if path:
            assert rekor.root_of(leaf, index, size, path[:-1]) != root
            assert rekor.root_of(leaf, index, size, [*path[:-1], b"x" * 32]) != root
        assert rekor.root_of(leaf, index, size, [*path, b"x" * 32]) != root


def test_a_path_that_fits_no_tree_leads_nowhere() -> None:
    leaf = b"l" * 32
    assert rekor.root_of(leaf, 1, 1, []) is None
    assert rekor.root_of(leaf, -1, 2, [leaf]) is None
    assert rekor.root_of(leaf, 0, 0, []) is None
    assert rekor.root_of(leaf, 0, 2, [b"short"]) is None


# ---------------------------------------------------------------------------------------------------------- the log

LOGGED = "… keyPath + rekorPublicKeyPath"


def entry_of(found: Cosign) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(found.annotations[ENTRY])
    return document


def with_entry(found: Cosign, entry: dict[str, Any]) -> Cosign:
    return replace(found, annotations={**found.annotations, ENTRY: json.dumps(entry)})


def logged(maker: Maker, name: str = NAME, log: str = "log") -> Cosign:
    return maker.cosign("good-p256", payload(COSIGN, DIGEST, name), log=log)


def test_an_entry_of_another_log(maker: Maker) -> None:
    assert "signed by no log" in refused(logged(maker, log="evil-log"), ROWS[LOGGED].requirement(maker), maker.now)


def test_an_entry_about_another_signature(maker: Maker) -> None:
    """True in itself: the log has signed it."""
    mine, other = logged(maker), logged(maker, "registry.example/other:1")
    said = refused(with_entry(mine, entry_of(other)), ROWS[LOGGED].requirement(maker), maker.now)
    assert "about another payload" in said
    again = maker._sign("good-p256", mine.payload, "p256")
    twice = {**mine.annotations, SIGNATURE: b64(again)}
    assert "about another signature" in refused(
        replace(mine, annotations=twice), ROWS[LOGGED].requirement(maker), maker.now
    )


def test_an_entry_about_another_key(maker: Maker) -> None:
    mine = logged(maker)
    signature = base64.b64decode(mine.annotations[SIGNATURE])
    record = maker.record(signature, mine.payload, maker.public("evil-p256").read_bytes())
    entry = json.loads(compact(maker.entry("log", record)))
    said = refused(with_entry(mine, entry), ROWS[LOGGED].requirement(maker), maker.now)
    assert "by another key or certificate" in said


@pytest.mark.parametrize("field", ["integratedTime", "logIndex", "logID"])
def test_an_entry_that_was_changed(maker: Maker, field: str) -> None:
    mine = logged(maker)
    entry = entry_of(mine)
    entry["Payload"][field] = "00" * 32 if field == "logID" else entry["Payload"][field] + 1
    assert "signed by no log" in refused(with_entry(mine, entry), ROWS[LOGGED].requirement(maker), maker.now)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(more=1),
        lambda entry: entry["Payload"].update(more=1),
        lambda entry: entry["Payload"].update(body="?"),
        lambda entry: entry["Payload"].update(logID='"'),
        lambda entry: entry.pop("Payload"),
        lambda entry: entry.update(SignedEntryTimestamp=""),
    ],
)
def test_an_entry_that_is_none(maker: Maker, change: Callable[[dict[str, Any]], object]) -> None:
    mine = logged(maker)
    entry = entry_of(mine)
    change(entry)
    refused(with_entry(mine, entry), ROWS[LOGGED].requirement(maker), maker.now)


def bundle_entry(found: Bundle) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads(found.data)
    return document, document["verificationMaterial"]["tlogEntries"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry, note: entry["inclusionProof"].update(logIndex="2"), "does not lead to"),
        (lambda entry, note: entry["inclusionProof"].update(hashes=[]), "does not lead to"),
        (lambda entry, note: entry["inclusionProof"].update(treeSize="8"), "of another tree"),
        (lambda entry, note: entry["inclusionProof"].update(rootHash=b64(b"r" * 32)), "of another tree"),
        (lambda entry, note: note.update(envelope=note["envelope"].replace("\n7\n", "\n8\n")), "signed by no log"),
        (lambda entry, note: note.update(envelope="nothing"), "no signed note"),
        (lambda entry, note: note.update(envelope=note["envelope"].partition("\n\n")[0] + "\n\n"), "signed by no log"),
        (lambda entry, note: entry.pop("inclusionProof"), "neither a signed timestamp nor a proof"),
    ],
)
def test_a_proof_that_proves_something_else(
    maker: Maker, change: Callable[[dict[str, Any], dict[str, Any]], object], said: str
) -> None:
    document, entry = bundle_entry(maker.bundle("good-p256", DIGEST, NAME, log="log", promise=False, proof=True))
    change(entry, entry["inclusionProof"]["checkpoint"])
    changed = Bundle(json.dumps(document).encode(), "test")
    assert said in refused(changed, ROWS[LOGGED].requirement(maker), maker.now)


def test_a_proof_that_is_there_must_hold_beside_a_promise(maker: Maker) -> None:
    document, entry = bundle_entry(maker.bundle("good-p256", DIGEST, NAME, log="log", promise=True, proof=True))
    roots = ROWS[LOGGED].requirement(maker)
    assert sigstore.verify(Bundle(json.dumps(document).encode(), "test"), trusted(roots), maker.now)
    entry["inclusionProof"]["hashes"] = []
    assert "does not lead to" in refused(Bundle(json.dumps(document).encode(), "test"), roots, maker.now)
    # Bundles of v0.1 have paths without a checkpoint: those say nothing, and the promise stands for itself.
    del entry["inclusionProof"]["checkpoint"]
    assert sigstore.verify(Bundle(json.dumps(document).encode(), "test"), trusted(roots), maker.now)
    del entry["inclusionPromise"]
    assert "no signed note" in refused(Bundle(json.dumps(document).encode(), "test"), roots, maker.now)


def test_a_proof_dates_no_certificate(maker: Maker) -> None:
    """It says that the log has the entry; when, only the promise says, and a certificate of minutes needs that."""
    row = ROWS["… fulcio caPath + rekorPublicKeyPath, bundle"]
    requirement = row.requirement(maker)
    leaf = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}")
    found = maker.bundle(leaf.key, DIGEST, NAME, certificate=leaf, log="log", promise=False, proof=True)
    assert "does not say when" in refused(found, requirement, maker.now)


# ----------------------------------------------------------------------------------------------------- certificates

FULCIO = "… fulcio caPath + rekorPublicKeyPath"


def by(maker: Maker, leaf: Certificate) -> Cosign:
    return maker.cosign(leaf.key, payload(COSIGN, DIGEST, NAME), certificate=leaf, log="log")


def test_a_certificate_for_something_else(maker: Maker) -> None:
    leaf = maker.leaf("server", "fulcio", f"email:{MAIL}", usage="serverAuth")
    assert "not for code signing" in refused(by(maker, leaf), ROWS[FULCIO].requirement(maker), maker.now)


def test_a_certificate_that_does_not_say_what_it_is_for(maker: Maker) -> None:
    """As elsewhere: an authority of one's own may leave it out; Fulcio never does."""
    leaf = maker.leaf("silent", "fulcio", f"email:{MAIL}", usage="")
    assert "does not say" in refused(by(maker, leaf), ROWS[FULCIO].requirement(maker), maker.now)
    requirement = ROWS["… pki caRootsPath, subjectEmail"].requirement(maker)
    mine = maker.leaf("mine", "pki", f"email:{MAIL}", usage="")
    assert sigstore.verify(by(maker, mine), trusted(requirement), maker.now)
    server = maker.leaf("mine-server", "pki", f"email:{MAIL}", usage="serverAuth")
    assert "not for code signing" in refused(by(maker, server), requirement, maker.now)


def test_a_certificate_by_another_issuer_of_identities(maker: Maker) -> None:
    leaf = maker.leaf("elsewhere", "fulcio", f"email:{MAIL}", issuer="https://evil.example.com")
    said = refused(by(maker, leaf), ROWS[FULCIO].requirement(maker), maker.now)
    assert "OIDC issuer is 'https://evil.example.com'" in said and ISSUER in said


def test_a_certificate_without_an_issuer_of_identities(maker: Maker) -> None:
    leaf = maker.leaf("nobody", "fulcio", f"email:{MAIL}", issuer="")
    assert "names no OIDC issuer" in refused(by(maker, leaf), ROWS[FULCIO].requirement(maker), maker.now)


def test_a_signer_is_no_authority(maker: Maker) -> None:
    """Somebody with a true certificate makes one for somebody else with it."""
    real = maker.leaf("real", "fulcio", "email:somebody@example.com")
    (maker.directory / "real.ca.pem").write_bytes(real.pem)
    extensions = f"keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\nsubjectAltName=email:{MAIL}\n"
    extensions += f"1.3.6.1.4.1.57264.1.1=DER:{ISSUER.encode().hex()}\n"
    made = Certificate("forged", maker._issue("forged", "real", "/CN=x", extensions, "1"), real.pem + real.chain)
    said = refused(by(maker, made), ROWS[FULCIO].requirement(maker), maker.now)
    assert "is not good at" in said and "CA" in said


def test_a_chain_that_ends_nowhere(maker: Maker) -> None:
    leaf = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}")
    found = by(maker, replace(leaf, chain=b""))
    assert "unable to get local issuer" in refused(found, ROWS[FULCIO].requirement(maker), maker.now)


def test_two_certificates_where_one_is_expected(maker: Maker) -> None:
    leaf = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}")
    found = by(maker, replace(leaf, pem=leaf.pem + leaf.pem))
    refused(found, ROWS[FULCIO].requirement(maker), maker.now)


def test_a_host_is_matched_as_tls_does(maker: Maker) -> None:
    requirement = ROWS["… pki caRootsData, subjectHostname"].requirement(maker)
    for number, (name, good) in enumerate(
        [("build.example.com", True), ("*.example.com", True), ("*.com", False), ("example.com", False)]
    ):
        leaf = maker.leaf(f"host{number}", "pki", f"DNS:{name}")
        if good:
            assert sigstore.verify(by(maker, leaf), trusted(requirement), maker.now)
        else:
            assert "not for the host" in refused(by(maker, leaf), requirement, maker.now)


def test_a_key_is_not_taken_for_a_certificate_nor_the_other_way_round(maker: Maker) -> None:
    bare = maker.cosign("good-p256", payload(COSIGN, DIGEST, NAME), log="log")
    assert "has no certificate" in refused(bare, ROWS[FULCIO].requirement(maker), maker.now)
    leaf = maker.leaf("fulcio-email-release", "fulcio", f"email:{MAIL}")
    assert "no good signature by key" in refused(by(maker, leaf), ROWS[LOGGED].requirement(maker), maker.now)


# ---------------------------------------------------------------------------------------------------------- OpenPGP


def signed_by(maker: Maker, message: bytes) -> tuple[claims.Claim, str]:
    requirement = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(maker.gpg_key("good@example.com"))}
    found = parse_policy(json.dumps({"default": [requirement]}).encode(), "test").default[0]
    assert isinstance(found, SignedBy)
    return simple_signing.verify(message, simple_signing.keyring(found), maker.now)


@pytest.mark.parametrize("compression", ["none", "zip", "zlib", "bzip2"])
@pytest.mark.parametrize("length", [0, 100_000])
def test_whatever_gpg_compresses_with(maker: Maker, compression: str, length: int) -> None:
    """Long ones come in parts."""
    maker.gpg_key("good@example.com")
    data = payload(ATOMIC, DIGEST, NAME, {"creator": "c" * length, "timestamp": 1})
    message = maker.gpg("-u", "good@example.com", "--compress-algo", compression, "--sign", data=data)
    assert signed_by(maker, message)[0] == claims.Claim(DIGEST, NAME)
    for cut in (1, len(message) // 2, len(message) - 1):
        with pytest.raises(simple_signing.NotSigned):
            signed_by(maker, message[:cut])


def test_where_in_its_own_code_a_library_failed_is_told_nobody() -> None:
    error = RuntimeError("no valid signatures found.\n\nStack backtrace:\n   0: <anyhow::Error>::msg")
    assert simple_signing._words(error) == "no valid signatures found."


@pytest.mark.parametrize("compression", ["zip", "zlib", "bzip2"])
def test_s31_a_message_that_grows(maker: Maker, compression: str) -> None:
    """16 MiB that are well signed, in a few KiB: refused before any library has them in memory."""
    maker.gpg_key("good@example.com")
    message = maker.gpg("-u", "good@example.com", "--compress-algo", compression, "--sign", data=bytes(16 << 20))
    assert len(message) < 1 << 17
    with pytest.raises(simple_signing.NotSigned, match="inflates to more than"):
        signed_by(maker, message)


def test_messages_in_another_wrapping(maker: Maker) -> None:
    maker.gpg_key("good@example.com")
    data = payload(ATOMIC, DIGEST, NAME, {"creator": "c", "timestamp": 1})
    armoured = maker.gpg("-u", "good@example.com", "--armor", "--sign", data=data)
    with pytest.raises(simple_signing.NotSigned, match="no binary OpenPGP"):
        signed_by(maker, armoured)
    clear = maker.gpg("-u", "good@example.com", "--clearsign", data=data)
    with pytest.raises(simple_signing.NotSigned, match="no binary OpenPGP"):
        signed_by(maker, clear)
    message = maker.gpg("-u", "good@example.com", "--compress-algo", "zlib", "--sign", data=data)
    within = b"\xa3\x00" + message  # a compressed packet, of no compression, around a compressed one
    with pytest.raises(simple_signing.NotSigned, match="compression within"):
        signed_by(maker, within)
    detached = maker.gpg("-u", "good@example.com", "--detach-sign", data=data)
    with pytest.raises(simple_signing.NotSigned):
        signed_by(maker, detached)
    with pytest.raises(simple_signing.NotSigned):
        signed_by(maker, maker.gpg("--store", data=data))  # literal data that nobody has signed


# ------------------------------------------------------------------------------------------------------------- keys


def test_keys_that_are_too_weak_or_none(maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(PolicyInvalid, match="RSA of 1024 bits"):
        load_key(maker.public("weak", "small").read_bytes(), "key")
    with pytest.raises(PolicyInvalid, match="no usable public key"):
        load_key(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "key")
    with pytest.raises(PolicyInvalid, match="no usable public key"):
        load_key(maker.private("good-p256").read_bytes(), "key")


def test_base64_may_have_ends_of_lines(maker: Maker) -> None:
    """As openssl writes it, and as others read it."""
    found = maker.cosign("good-p256", payload(COSIGN, DIGEST, NAME))
    lines = base64.encodebytes(base64.b64decode(found.annotations[SIGNATURE])).decode()
    assert lines.count("\n") > 1
    requirement = {
        "type": "sigstoreSigned",
        "keyData": base64.encodebytes(maker.public("good-p256").read_bytes()).decode(),
    }
    assert sigstore.verify(replace(found, annotations={SIGNATURE: lines}), trusted(requirement), maker.now)


@pytest.mark.parametrize("spoil", ["", "?", "AAAA"])
def test_signatures_that_are_none(maker: Maker, spoil: str) -> None:
    found = replace(maker.cosign("good-p256", payload(COSIGN, DIGEST, NAME)), annotations={SIGNATURE: spoil})
    refused(found, {"type": "sigstoreSigned", "keyPath": str(maker.public("good-p256"))}, 0)


# ----------------------------------------------------------------------------------------------------------- claims

GOOD = {"type": COSIGN, "image": {"docker-manifest-digest": DIGEST}, "identity": {"docker-reference": NAME}}


@pytest.mark.parametrize(
    "document",
    [
        {"critical": GOOD, "optional": None, "more": 1},
        {"critical": {**GOOD, "more": 1}},
        {"critical": {**GOOD, "type": ATOMIC}},
        {"critical": {**GOOD, "image": {"docker-manifest-digest": DIGEST, "more": 1}}},
        {"critical": {**GOOD, "image": {"docker-manifest-digest": "sha256:short"}}},
        {"critical": {**GOOD, "identity": {"docker-reference": ""}}},
        {"critical": {**GOOD, "identity": {}}},
        {"Critical": GOOD},
        [],
    ],
)
def test_claims_that_say_something_else(document: object) -> None:
    with pytest.raises(ContentInvalid):
        claims.cosign(json.dumps(document).encode())


def test_a_claim_twice_in_one(maker: Maker) -> None:
    data = json.dumps({"critical": GOOD}).encode()
    assert claims.cosign(data) == claims.Claim(DIGEST, NAME)
    with pytest.raises(ContentInvalid, match="duplicate key"):
        claims.cosign(data[:-1] + b', "critical": {}}')


def test_provenance_is_no_signature(maker: Maker) -> None:
    found = maker.bundle("good-p256", DIGEST, NAME, predicate="https://slsa.dev/provenance/v1")
    requirement = {"type": "sigstoreSigned", "keyPath": str(maker.public("good-p256"))}
    assert "it is no signature" in refused(found, requirement, maker.now)


def test_a_bundle_of_a_file_is_none_of_an_image(maker: Maker) -> None:
    document = json.loads(maker.bundle("good-p256", DIGEST, NAME).data)
    document["messageSignature"] = document.pop("dsseEnvelope")
    requirement = {"type": "sigstoreSigned", "keyPath": str(maker.public("good-p256"))}
    assert "signs no image" in refused(Bundle(json.dumps(document).encode(), "test"), requirement, maker.now)


# ---------------------------------------------------------------------------------------------------- forms on disk


def test_what_is_kept_is_read_again_as_it_was(maker: Maker) -> None:
    found = (
        Simple(b"\x90openpgp", "here"),
        maker.cosign("good-p256", payload(COSIGN, DIGEST, NAME)),
        maker.bundle("good-p256", DIGEST, NAME),
    )
    assert load(dump(found)) == found
    for one in found:
        assert from_blob(to_blob(one), one.origin) == one
    with pytest.raises(ContentInvalid, match="unknown form"):
        from_blob(b"\0something else", "here")
