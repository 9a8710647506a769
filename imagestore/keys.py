"""Public keys and raw signatures: ECDSA, RSA (PKCS #1 v1.5 and PSS), Ed25519.

Refuses RSA keys below 2048 bits, other curves than P-256, P-384 and P-521, and other kinds of keys. The library does
all arithmetic; this says which hash and which padding. `cryptography` is imported when a policy first needs it: the
idle daemon's memory is a budget.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeAlias

from imagestore.model import PolicyInvalid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    PublicKey: TypeAlias = EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey

_LEAST_RSA = 2048


def load_key(pem: bytes, what: str) -> PublicKey:
    """A public key in PEM. Raises PolicyInvalid, beginning with `what`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return usable(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PolicyInvalid(f"{what}: no usable public key in PEM ({error})") from None


def usable(key: object) -> PublicKey:
    """The key, if it is of a kind that is accepted. Raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _LEAST_RSA:
            raise ValueError(f"RSA of {key.key_size} bits, fewer than {_LEAST_RSA}")
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
            raise ValueError(f"the curve {key.curve.name}")
        return key
    raise ValueError(f"a key of the kind {type(key).__name__}")


def verifies(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """True when `signature` is one of `data` by `key`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    tries: list[tuple[object, ...]]
    if isinstance(key, ec.EllipticCurvePublicKey):
        # cosign signs SHA-256 whatever the curve is; bundles have the hash of the curve's own size.
        own: dict[int, hashes.HashAlgorithm] = {384: hashes.SHA384(), 521: hashes.SHA512()}
        tries = [(ec.ECDSA(found),) for found in (hashes.SHA256(), own.get(key.curve.key_size)) if found]
    elif isinstance(key, rsa.RSAPublicKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
        tries = [(padding.PKCS1v15(), hashes.SHA256()), (pss, hashes.SHA256())]
    else:
        tries = [()]
    for how in tries:
        try:
            key.verify(signature, data, *how)  # type: ignore[arg-type]
        except InvalidSignature:
            continue
        return True
    return False


def der(key: PublicKey) -> bytes:
    """SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def pem(key: PublicKey) -> bytes:
    """The same in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: PublicKey) -> str:
    """How messages call a key: "key sha256:0123456789ab"."""
    return f"key sha256:{hashlib.sha256(der(key)).hexdigest()[:12]}"
