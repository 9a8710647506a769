"""Private keys as cosign keeps them: PKCS #8, in NaCl's secretbox, under a key that scrypt makes of a password.

    -----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----     (COSIGN, in older files)
    base64 of {"kdf": {"name", "params", "salt"}, "cipher": {"name", "nonce"}, "ciphertext"}

Refuses other costs of scrypt than the three that are in use: a file must not decide how much memory its reader takes.
Invariant: neither password nor key is in a message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from imagestore.model import ContentInvalid, ImageError
from imagestore.signatures import decoded
from imagestore.strict_json import Fields, parse_object

_LABELS = tuple(f"ENCRYPTED {name} PRIVATE KEY" for name in ("SIGSTORE", "COSIGN"))
_COSTS = (1 << 15, 1 << 16, 1 << 17)
_VALUES = 100


def is_cosign_key(data: bytes) -> bool:
    return any(f"-----BEGIN {label}-----".encode() in data for label in _LABELS)


def open_cosign_key(data: bytes, password: bytes | None) -> bytes:
    """The key in DER (PKCS #8). Raises ImageError."""
    if password is None:
        raise ImageError("private key: it is encrypted, and no password is given (--password-file)")
    try:
        document = parse_object(_unwrapped(data), "private key", _VALUES)
        return _open(document, password)
    except ContentInvalid as error:
        raise ImageError(str(error)) from None


def _unwrapped(data: bytes) -> bytes:
    lines = data.strip().splitlines()
    try:
        return base64.b64decode(b"".join(line.strip() for line in lines[1:-1]), validate=True)
    except (binascii.Error, ValueError):
        raise ContentInvalid("private key: no PEM") from None


def _open(document: Fields, password: bytes) -> bytes:
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox

    kdf, cipher = (document.object(name) or Fields({}, name) for name in ("kdf", "cipher"))
    params = kdf.object("params") or Fields({}, "params")
    names = (kdf.string("name"), cipher.string("name"))
    if names != ("scrypt", "nacl/secretbox"):
        raise ContentInvalid(
            f"private key: encrypted by {' and '.join(names)[:80]}, expected scrypt and nacl/secretbox"
        )
    costs = tuple(params.integer(name, 0, 1 << 30, 0) for name in ("N", "r", "p"))
    if costs not in {(cost, 8, 1) for cost in _COSTS}:
        raise ContentInvalid(f"private key: scrypt with the costs {costs}, which nobody uses")
    count, size, parallel = costs
    key = hashlib.scrypt(
        password, salt=decoded(kdf, "salt"), n=count, r=size, p=parallel, maxmem=256 * count * size, dklen=32
    )
    try:
        return SecretBox(key).decrypt(decoded(document, "ciphertext"), decoded(cipher, "nonce"))
    except (CryptoError, ValueError):
        raise ContentInvalid("private key: cannot be used (wrong password, or damaged)") from None
