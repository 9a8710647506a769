"""What is asked of a log of Rekor 2, and what it answers: POST LOG/api/v2/log/entries, in protobuf's JSON.

    {"hashedRekordRequestV002": {digest, signature}}      a hash of what was signed: of the DSSE encoding, in a bundle
    {"dsseRequestV002": {envelope, verifiers}}            the envelope itself, for keys that sign no hash (Ed25519)
    ──▶ {logIndex, logId, kindVersion, canonicalizedBody, inclusionProof: {…, checkpoint}}

Such a log signs no promise and says no time; it answers once its checkpoint has the entry in. The hash must be the one
that belongs to the key (`own_hash`): the log checks the signature by that. Pure. Refuses keys that these logs take from
nobody, and answers without a proof. Invariant: what goes into a bundle is spelled anew from what was understood here.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

from imagestore import rekor
from imagestore.certificates import parse_chain
from imagestore.claims import IN_TOTO
from imagestore.keys import der
from imagestore.model import ContentInvalid, ImageError
from imagestore.strict_json import Fields

if TYPE_CHECKING:
    from imagestore.keys import PublicKey

_RSA = (2048, 3072, 4096)
_CURVES = {256: ("P256_SHA_256", "sha256"), 384: ("P384_SHA_384", "sha384"), 521: ("P521_SHA_512", "sha512")}


def own_hash(key: PublicKey) -> str:
    """The hash with which such logs have signatures by `key`; "" for Ed25519, which has its own. Raises ImageError."""
    return _details(key)[1]


def _details(key: PublicKey) -> tuple[str, str]:
    """The name of the kind of key in sigstore's protobuf (PublicKeyDetails), and its hash."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(key, ec.EllipticCurvePublicKey):
        name, hash_ = _CURVES[key.curve.key_size]  # others are no keys of ours: keys.usable
        return f"PKIX_ECDSA_{name}", hash_
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in _RSA:
            listed = ", ".join(map(str, _RSA))
            raise ImageError(f"private key: RSA of {key.key_size} bits; logs of Rekor 2 take {listed}")
        return f"PKIX_RSA_PKCS1V15_{key.key_size}_SHA256", "sha256"
    return "PKIX_ED25519", ""


def request(signature: bytes, payload: bytes, data: bytes, key: PublicKey, certificate: bytes) -> dict[str, object]:
    """`data` is what was signed, an encoding of `payload`; `certificate` is PEM, b"" where the key stands for itself.
    Raises ImageError."""
    name, hash_ = _details(key)
    verifier: dict[str, object] = {"publicKey": {"rawBytes": _b64(der(key))}, "keyDetails": name}
    if certificate:
        verifier = {"x509Certificate": {"rawBytes": _b64(_der_of(certificate))}, "keyDetails": name}
    if hash_:
        made = {"content": _b64(signature), "verifier": verifier}
        return {"hashedRekordRequestV002": {"digest": _b64(hashlib.new(hash_, data).digest()), "signature": made}}
    envelope = {"payload": _b64(payload), "payloadType": IN_TOTO, "signatures": [{"sig": _b64(signature), "keyid": ""}]}
    return {"dsseRequestV002": {"envelope": envelope, "verifiers": [verifier]}}


def answered(answer: Fields, place: str) -> dict[str, object]:
    """A bundle's tlogEntry. Raises ContentInvalid."""
    kind = answer.object("kindVersion") or Fields({}, "kindVersion")
    entry = rekor.from_bundle(answer)
    if entry.proof is None or not entry.proof.checkpoint:
        raise ContentInvalid(f"rekor {place}: the answer has no proof of inclusion with a checkpoint")
    proof, log = entry.proof, bytes.fromhex(entry.log)
    return {
        "logIndex": str(entry.index),
        "logId": {"keyId": _b64(log)},
        "kindVersion": {"kind": kind.string("kind"), "version": kind.string("version")},
        "canonicalizedBody": _b64(entry.body),
        "inclusionProof": {
            "logIndex": str(proof.index),
            "treeSize": str(proof.size),
            "rootHash": _b64(proof.root),
            "hashes": [_b64(item) for item in proof.hashes],
            "checkpoint": {"envelope": proof.checkpoint},
        },
    }


def _der_of(certificate: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return parse_chain(certificate)[0].public_bytes(Encoding.DER)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
