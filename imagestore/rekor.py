"""Entries of a transparency log: is this signature in a log that the policy trusts, and since when?

    promise   the log's signature over {body, integratedTime, logID, logIndex} (a SET): says when
    proof     a Merkle path from the body to a root that the log has signed (a checkpoint): says that, not when

Logs of Rekor 1 give both, those of Rekor 2 the proof alone (timestamps.py tells the time there). One of both must hold,
and of what is there both; a path without a checkpoint, as in bundles of v0.1, says nothing. Refuses entries about other
signatures, other keys or other payloads. All of it works offline. Invariant: a time that comes from here was signed by
the log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagestore.keys import verifies
from imagestore.model import ContentInvalid
from imagestore.signatures import decoded
from imagestore.strict_json import Fields, parse_object
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from imagestore.keys import PublicKey

_EVER = (1 << 63) - 1
_VALUES = 10_000
_PATH = 64
_NOTE = 64 << 10
_SIGNERS = 64
_HASHES = {"SHA2_256": "sha256", "SHA2_384": "sha384", "SHA2_512": "sha512"}


class Unproven(Exception):
    """The entry proves nothing; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A path to a root. `checkpoint` is a signed note: origin, size, root, an empty line, signatures."""

    index: int
    size: int
    root: bytes
    hashes: tuple[bytes, ...]
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it came with a signature. `promise` is b"" and `proof` None where there is none."""

    body: bytes
    time: int
    index: int
    log: str
    promise: bytes
    proof: Proof | None


@dataclass(frozen=True, slots=True)
class Logged:
    """What an entry must be about: any of the spellings of who signed, the signature, what was signed."""

    signers: tuple[bytes, ...]
    """PEM or DER: a certificate, or a public key."""
    signature: bytes
    payload: bytes
    data: bytes
    """What the signature is over: the payload, or an envelope's pre-authentication encoding of it."""
    envelope: bool


def from_annotation(text: str) -> Entry:
    """cosign's: {"SignedEntryTimestamp": …, "Payload": {"body", "integratedTime", "logIndex", "logID"}}."""
    document = parse_object(text.encode(), "log entry", _VALUES).only("SignedEntryTimestamp", "Payload")
    payload = document.object("Payload")
    if payload is None:
        raise ContentInvalid(f"{document.path}.Payload: missing")
    payload.only("body", "integratedTime", "logIndex", "logID")
    return Entry(
        decoded(payload, "body"),
        payload.integer("integratedTime", 0, _EVER),
        payload.integer("logIndex", 0, _EVER),
        payload.string("logID"),
        decoded(document, "SignedEntryTimestamp"),
        None,
    )


def from_bundle(fields: Fields) -> Entry:
    """One of a bundle's tlogEntries; numbers are strings in protobuf's JSON."""
    promise, proof, log = fields.object("inclusionPromise"), fields.object("inclusionProof"), fields.object("logId")
    return Entry(
        decoded(fields, "canonicalizedBody"),
        _number(fields, "integratedTime"),
        _number(fields, "logIndex"),
        decoded(log, "keyId").hex() if log else "",
        decoded(promise, "signedEntryTimestamp") if promise else b"",
        _proof(proof) if proof else None,
    )


def _proof(fields: Fields) -> Proof:
    note = fields.object("checkpoint")
    hashes = fields.strings("hashes")
    if len(hashes) > _PATH:
        raise ContentInvalid(f"{fields.path}.hashes: {len(hashes)}, no tree is deeper than {_PATH}")
    text = note.string("envelope") if note else ""
    return Proof(
        _number(fields, "logIndex"),
        _number(fields, "treeSize"),
        decoded(fields, "rootHash"),
        tuple(_base64(item) for item in hashes),
        text[:_NOTE],
    )


def _number(fields: Fields, key: str) -> int:
    text = fields.string(key, "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ContentInvalid(f"{fields.path}.{key}: no number")
    return int(text)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ContentInvalid("log entry: not base64") from None


# ------------------------------------------------------------------------------------------------------------ verify


def check(entry: Entry, logs: Sequence[PublicKey], about: Logged) -> int | None:
    """The time at which a trusted log took the entry, None where only a proof says that it did. Raises Unproven,
    ContentInvalid."""
    when = None
    if entry.promise:
        signed = _promised(entry)
        if not any(verifies(key, entry.promise, signed) for key in logs):
            raise Unproven("the log entry's timestamp is signed by no log that the policy trusts")
        when = entry.time
    if entry.proof is not None and (entry.proof.checkpoint or not entry.promise):
        _check_proof(entry.body, entry.proof, logs)
    elif not entry.promise:
        raise Unproven("the log entry has neither a signed timestamp nor a proof of inclusion")
    _check_body(entry.body, about)
    return when


def _promised(entry: Entry) -> bytes:
    """RFC 8785 of the four fields: keys in order, no blanks; the texts are base64 and hex, which need no escapes."""
    log = entry.log
    if not (log.isascii() and log.isalnum()):
        raise ContentInvalid("log entry: logID is no hexadecimal number")
    document = {
        "body": base64.b64encode(entry.body).decode(),
        "integratedTime": entry.time,
        "logID": log,
        "logIndex": entry.index,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _check_proof(body: bytes, proof: Proof, logs: Sequence[PublicKey]) -> None:
    size, root = _checkpoint(proof.checkpoint, logs)
    if (size, root) != (proof.size, proof.root):
        raise Unproven("the log's signed checkpoint is of another tree than the proof of inclusion")
    leaf = hashlib.sha256(b"\x00" + body).digest()
    if root_of(leaf, proof.index, proof.size, proof.hashes) != root:
        raise Unproven("the proof of inclusion does not lead to the log's signed root")


def root_of(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """RFC 9162 2.1.3.2: the root that a leaf and its path come to; None where the path does not fit the tree."""
    if not 0 <= index < size or any(len(item) != 32 for item in path):
        return None
    node, at, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            return None
        if at & 1 or at == last:
            node = hashlib.sha256(b"\x01" + sibling + node).digest()
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            node = hashlib.sha256(b"\x01" + node + sibling).digest()
        at, last = at >> 1, last >> 1
    return node if last == 0 else None


def _checkpoint(note: str, logs: Sequence[PublicKey]) -> tuple[int, bytes]:
    """Size and root of a signed note, once a trusted log has signed it."""
    text, blank, signatures = note.partition("\n\n")
    lines = text.split("\n")
    if not blank or len(lines) < 3 or not (lines[1].isascii() and lines[1].isdecimal() and len(lines[1]) <= 18):
        raise Unproven("the log's checkpoint is no signed note")
    signed = (text + "\n").encode()
    for line in signatures.split("\n")[:_SIGNERS]:  # witnesses have signed it, too
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "\u2014":
            continue
        try:
            made = base64.b64decode(parts[2], validate=True)
        except (binascii.Error, ValueError):
            continue
        # The first four bytes hint at the key; ours are few, so each is tried.
        if len(made) > 4 and any(verifies(key, made[4:], signed) for key in logs):
            return int(lines[1]), _base64(lines[2])
    raise Unproven("the log's checkpoint is signed by no log that the policy trusts")


def _check_body(body: bytes, about: Logged) -> None:
    """The entry must be about this signature: a true entry about another proves nothing."""
    document = parse_object(body, "log entry's body", _VALUES)
    kind = (document.string("kind"), document.string("apiVersion"))
    spec = document.object("spec") or Fields({}, "spec")
    if kind[1] == "0.0.2":
        _check_body_2(kind[0], spec, about)
        return
    wanted = ("dsse", "0.0.1") if about.envelope else ("hashedrekord", "0.0.1")
    if kind != wanted:
        raise Unproven(f"the log entry is a {kind[0][:40]} {kind[1][:20]}, expected {wanted[0]} {wanted[1]}")
    if about.envelope:
        digest = spec.object("payloadHash")
        made = [(decoded(item, "signature"), decoded(item, "verifier")) for item in spec.objects("signatures", 16)]
    else:
        data, signature = spec.object("data"), spec.object("signature")
        digest = data.object("hash") if data else None
        key = signature.object("publicKey") if signature else None
        made = [(decoded(signature, "content"), decoded(key, "content"))] if signature and key else []
    if digest is None or digest.string("algorithm") != "sha256":
        raise Unproven("the log entry has no sha256 of what was signed")
    if digest.string("value") != hashlib.sha256(about.payload).hexdigest():
        raise Unproven("the log entry is about another payload")
    _check_signer(made, about)


def _check_body_2(kind: str, spec: Fields, about: Logged) -> None:
    """Rekor 2: hashes and signers are protobuf messages; an envelope may be logged by the hash of what was signed."""
    if kind == "hashedrekord":
        inner = spec.object("hashedRekordV002") or Fields({}, "hashedRekordV002")
        digest, listed, signed = inner.object("data"), inner.object("signature"), about.data
        signatures = [listed] if listed else []
    elif kind == "dsse" and about.envelope:
        inner = spec.object("dsseV002") or Fields({}, "dsseV002")
        digest, signatures, signed = inner.object("payloadHash"), list(inner.objects("signatures", 16)), about.payload
    else:
        raise Unproven(f"the log entry is a {kind[:40]} 0.0.2, expected hashedrekord or dsse")
    hash_ = _HASHES.get(digest.string("algorithm")) if digest else None
    if digest is None or hash_ is None:
        raise Unproven("the log entry has no SHA-2 of what was signed")
    if decoded(digest, "digest") != hashlib.new(hash_, signed).digest():
        raise Unproven("the log entry is about another payload")
    _check_signer([(decoded(one, "content"), _verifier_of(one)) for one in signatures], about)


def _verifier_of(signature: Fields) -> bytes:
    """The DER of a certificate or of a public key."""
    verifier = signature.object("verifier")
    holders = [verifier.object(name) for name in ("x509Certificate", "publicKey")] if verifier else []
    return next((decoded(holder, "rawBytes") for holder in holders if holder), b"")


def _check_signer(made: Sequence[tuple[bytes, bytes]], about: Logged) -> None:
    """Signatures with who made them, as an entry has them."""
    if all(signature != about.signature for signature, _ in made):
        raise Unproven("the log entry is about another signature")
    signers = {_inner(one) for one in about.signers}
    if all(_inner(signer) not in signers for signature, signer in made if signature == about.signature):
        raise Unproven("the log entry is about a signature by another key or certificate")


def _inner(data: bytes) -> bytes:
    """The DER of one PEM block, whatever its label says; what is no PEM stands for itself."""
    text = data.strip()
    if not text.startswith(b"-----BEGIN "):
        return data
    lines = text.split(b"\n")
    if sum(line.startswith(b"-----BEGIN ") for line in lines) != 1 or not lines[-1].startswith(b"-----END "):
        raise Unproven("more than one certificate or key where one is expected")
    try:
        return base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
    except (binascii.Error, ValueError):
        raise Unproven("the log entry's key is no PEM") from None
