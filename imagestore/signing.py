"""Signatures of our own making: `ocid sign`, for every reader of the ecosystem.

    with a key        a claim for cosign's tag or the lookaside store, or a bundle
    with a token      the same with a certificate from Fulcio for a key of a minute, and an entry of Rekor's
    with OpenPGP      a simple signing message

Refuses keys that our own verification would not take. Makes bytes and asks services; where they go is attaching.py's.
Invariant: what is made with a key was verified by what reads it before it leaves
(`checked`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from typing import TYPE_CHECKING

from imagestore import claims, sigstore
from imagestore.cosign_keys import is_cosign_key, open_cosign_key
from imagestore.keys import der, load_key, pem, usable, verifies
from imagestore.model import ImageError
from imagestore.signatures import BUNDLE_TYPE, CERTIFICATE, CHAIN, ENTRY, SIGNATURE, Bundle, Cosign, Simple
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    from imagestore.keys import PublicKey

    PrivateKey = EllipticCurvePrivateKey | RSAPrivateKey | Ed25519PrivateKey

CREATOR = "ocid"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a log answered: cosign's annotation, "" where the log makes none, and a bundle's tlogEntry."""

    annotation: str
    bundled: dict[str, object]


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate for one signature, PEM, with what leads to its root."""

    leaf: bytes
    chain: bytes


class Signer:
    """A private key."""

    def __init__(self, key: PrivateKey) -> None:
        self._key = key
        self.public: PublicKey = usable(key.public_key())

    def sign(self, data: bytes, hash_: str = "sha256") -> bytes:
        """`hash_` is for curves; cosign signs SHA-256 whatever the curve is."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            made = self._key.sign(data, ec.ECDSA(getattr(hashes, hash_.upper())()))
        elif isinstance(self._key, rsa.RSAPrivateKey):
            made = self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        else:
            made = self._key.sign(data)
        assert verifies(self.public, made, data)
        return made

    def request(self) -> bytes:
        """A request for a certificate, PEM: that it is signed proves that the key is ours."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import Encoding

        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        how = None if isinstance(self._key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return builder.sign(self._key, how).public_bytes(Encoding.PEM)

    @property
    def pem(self) -> bytes:
        return pem(self.public)


def load_signer(data: bytes, password: bytes | None) -> Signer:
    """A private key in PEM, as openssl or cosign writes it. Raises ImageError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

    try:
        if is_cosign_key(data):
            return Signer(load_der_private_key(open_cosign_key(data, password), None))  # type: ignore[arg-type]
        return Signer(load_pem_private_key(data, password))  # type: ignore[arg-type]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ImageError(f"private key: cannot be used ({error})") from None


def new_signer() -> Signer:
    """A key that is gone with the process."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return Signer(ec.generate_private_key(ec.SECP256R1()))


def claim(digest: str, name: str) -> bytes:
    """What is signed for a cosign tag."""
    return claims.cosign_payload(digest, name, CREATOR, int(time.time()))


def statement(digest: str, name: str) -> bytes:
    """What is signed for a bundle."""
    return claims.statement_payload(digest, name)


def annotated(payload: bytes, signature: bytes, certified: Certified | None, entry: Entry | None) -> Cosign:
    """A signature as cosign attaches it."""
    notes = {SIGNATURE: base64.b64encode(signature).decode()}
    if certified is not None:
        notes[CERTIFICATE] = certified.leaf.decode()
        notes[CHAIN] = certified.chain.decode()
    if entry is not None:
        notes[ENTRY] = entry.annotation
    return Cosign(payload, notes, "made here")


def attachment(signer: Signer, digest: str, name: str) -> Cosign:
    """A signature by a key, as cosign attaches it. Raises ImageError."""
    payload = claim(digest, name)
    made = annotated(payload, signer.sign(payload), None, None)
    checked(made, signer, digest, name)
    return made


def bundled(
    payload: bytes,
    signature: bytes,
    signer: Signer,
    certified: Certified | None,
    entry: Entry | None,
    stamp: bytes = b"",
) -> Bundle:
    """The same as a sigstore bundle. `stamp` is an RFC 3161 response."""
    material: dict[str, object] = {"publicKey": {"hint": _hint(signer)}}
    if certified is not None:
        material = {"certificate": {"rawBytes": _der(certified.leaf)}}
    material["tlogEntries"] = [] if entry is None else [entry.bundled]  # some readers want the field
    if stamp:
        times = [{"signedTimestamp": base64.b64encode(stamp).decode()}]
        material["timestampVerificationData"] = {"rfc3161Timestamps": times}
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": claims.IN_TOTO,
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    document = {"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return Bundle(json.dumps(document, separators=(",", ":")).encode(), "made here")


def _hint(signer: Signer) -> str:
    return base64.b64encode(hashlib.sha256(der(signer.public)).digest()).decode()


def _der(certificate: bytes) -> str:
    return "".join(line for line in certificate.decode().splitlines() if not line.startswith("-----"))


def to_be_signed(payload: bytes, *, bundle: bool) -> bytes:
    """The bytes that the key signs."""
    return sigstore.pae(payload) if bundle else payload


def simple(secret: bytes, password: bytes | None, digest: str, name: str) -> Simple:
    """A simple signing message by the OpenPGP key in `secret`. Raises ImageError."""
    from pysequoia import SignatureMode, Tsk, sign

    payload = claims.simple_payload(digest, name, CREATOR, int(time.time()))
    try:
        key = Tsk.from_bytes(secret)
        signer = key.signer(password.decode()) if password else key.signer()
        return Simple(bytes(sign(signer, payload, mode=SignatureMode.INLINE, armor=False)), "made here")
    except Exception as error:  # the library raises its own errors as bare exceptions
        raise ImageError(f"OpenPGP key: cannot sign with it ({' '.join(str(error).split())[:200]})") from None


def checked(made: Cosign | Bundle, signer: Signer, digest: str, name: str) -> None:
    """Raises ImageError unless the signature says what it should to those who verify it by the key."""
    from imagestore.identity import DEFAULT
    from imagestore.policy import Material, SigstoreSigned

    if isinstance(made, Bundle) or CERTIFICATE not in made.annotations:
        roots = sigstore.trusted(SigstoreSigned((Material("key", data=signer.pem),), None, None, (), DEFAULT))
        found, _ = sigstore.verify(made, roots, time.time())
        if claims.Claim(digest, name) not in found:
            raise ImageError("the signature that was made does not verify")


def checked_entry(made: Cosign | Bundle, signer: Signer, certified: Certified | None, log: bytes) -> None:
    """Raises ImageError unless the log with the public key `log`, PEM, has taken this very signature."""
    known = (load_key(log, "the log's public key"),)
    who = (certified.leaf,) if certified else (signer.pem, der(signer.public))
    try:
        sigstore.in_log(made, known, who)
    except (sigstore.NotSigned, ImageError) as error:
        raise ImageError(f"the log's answer does not verify: {error}") from None
