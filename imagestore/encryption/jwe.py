"""JSON Web Encryption (RFC 7516) of a layer's options, for several recipients at once: the JSON serializations.

RSA-OAEP and RSA-OAEP-256, ECDH-ES with AES key wrap; AES-GCM for the content, and for reading AES-CBC with HMAC (RFC
7518). Refuses compression (an oracle, and a bomb), critical headers, the direct use of a shared secret, and other
algorithms. Invariant: plain text comes out only after its tag was found right.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagestore.model import ContentInvalid
from imagestore.strict_json import Fields, parse_object

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

    from imagestore.encryption.keys import PrivateKey, PublicKey

_VALUES = 10_000
_RECIPIENTS = 128
_CONTENT = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32, "A128CBC-HS256": 32, "A192CBC-HS384": 48, "A256CBC-HS512": 64}
_WRAP = {"ECDH-ES+A128KW": 16, "ECDH-ES+A192KW": 24, "ECDH-ES+A256KW": 32}
_CURVES = {"P-256": "secp256r1", "P-384": "secp384r1", "P-521": "secp521r1"}
_CBC_HASH = {32: "sha256", 48: "sha384", 64: "sha512"}


class Packet:
    """A message, parsed once for however many keys are tried. Raises ContentInvalid."""

    def __init__(self, data: bytes, what: str) -> None:
        self._fields = fields = parse_object(data, what, _VALUES)
        self._protected = fields.string("protected")
        header = parse_object(_decode(self._protected, f"{what}.protected"), f"{what}.protected", _VALUES)
        shared = fields.object("unprotected")
        listed = tuple(fields.objects("recipients", _RECIPIENTS)) or (fields,)
        self._recipients = [_Recipient(header, shared, one) for one in listed]

    def unwrap(self, key: PrivateKey) -> bytes | None:
        """The plain text, None where the message is not for `key`. Raises ContentInvalid."""
        for recipient in self._recipients:
            content_key = recipient.content_key(key)
            if content_key is not None:
                plain = self._open(recipient, content_key)
                if plain is not None:
                    return plain
        return None

    def _open(self, recipient: _Recipient, key: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        fields = self._fields
        nonce, sealed, tag = (_decode(fields.string(name), name) for name in ("iv", "ciphertext", "tag"))
        aad = self._protected.encode()
        if fields.has("aad"):
            aad += b"." + fields.string("aad").encode()
        if len(key) != recipient.key_size:
            return None
        try:
            if "CBC" in recipient.content:
                return _open_cbc(key, nonce, sealed, tag, aad)
            return AESGCM(key).decrypt(nonce, sealed + tag, aad) if len(tag) == 16 else None
        except (InvalidTag, ValueError):
            return None


class _Recipient:
    """What a recipient's headers say together."""

    def __init__(self, protected: Fields, shared: Fields | None, own: Fields) -> None:
        self._headers = [one for one in (protected, shared, own.object("header")) if one is not None]
        self._wrapped = _decode(own.string("encrypted_key"), "encrypted_key")
        for header in self._headers:
            for refused in ("zip", "crit"):
                if header.has(refused):
                    raise ContentInvalid(f"{header.path}.{refused}: not supported")
        self._algorithm = self._string("alg")
        self.content = self._string("enc")
        self.key_size = _CONTENT.get(self.content, 0)

    def _string(self, name: str) -> str:
        return next((header.string(name) for header in self._headers if header.has(name)), "")

    def content_key(self, key: PrivateKey) -> bytes | None:
        """The key of the content, None where it is not for `key`. The content's tag tells whether it is right."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding, rsa
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

        try:
            if isinstance(key, rsa.RSAPrivateKey):
                found: dict[str, hashes.HashAlgorithm] = {"RSA-OAEP": hashes.SHA1(), "RSA-OAEP-256": hashes.SHA256()}
                hash_ = found.get(self._algorithm)
                if hash_ is None:
                    return None
                return key.decrypt(self._wrapped, padding.OAEP(padding.MGF1(hash_), hash_, None))
            shared = self._agree(key)
            return aes_key_unwrap(shared, self._wrapped) if shared is not None else None
        except (ValueError, InvalidUnwrap):
            return None

    def _agree(self, key: EllipticCurvePrivateKey) -> bytes | None:
        from cryptography.hazmat.primitives.asymmetric import ec

        size = _WRAP.get(self._algorithm)
        given = next((found for header in self._headers if (found := header.object("epk")) is not None), None)
        if size is None or given is None or _CURVES.get(given.string("crv")) != key.curve.name:
            return None
        x, y = (int.from_bytes(_decode(given.string(name), name), "big") for name in ("x", "y"))
        theirs = ec.EllipticCurvePublicNumbers(x, y, key.curve).public_key()  # ValueError for what is not on the curve
        parties = [_decode(self._string(name), name) for name in ("apu", "apv")]
        return _concat_kdf(key.exchange(ec.ECDH(), theirs), self._algorithm, size, *parties)


def _concat_kdf(secret: bytes, algorithm: str, size: int, apu: bytes = b"", apv: bytes = b"") -> bytes:
    """RFC 7518, 4.6.2."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

    info = b"".join(len(part).to_bytes(4, "big") + part for part in (algorithm.encode(), apu, apv))
    return ConcatKDFHash(hashes.SHA256(), size, info + (size * 8).to_bytes(4, "big")).derive(secret)


def _open_cbc(key: bytes, nonce: bytes, sealed: bytes, tag: bytes, aad: bytes) -> bytes | None:
    """RFC 7518, 5.2.2.2: the tag first."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    half = len(key) // 2
    said = aad + nonce + sealed + (len(aad) * 8).to_bytes(8, "big")
    if not hmac.compare_digest(hmac.digest(key[:half], said, _CBC_HASH[len(key)])[:half], tag):
        return None
    decryptor = Cipher(algorithms.AES(key[half:]), modes.CBC(nonce)).decryptor()
    unpadder = PKCS7(128).unpadder()
    return unpadder.update(decryptor.update(sealed) + decryptor.finalize()) + unpadder.finalize()


# ------------------------------------------------------------------------------------------------------------- writing


def wrap(plain: bytes, keys: Sequence[PublicKey]) -> bytes:
    """`plain` for whoever has the private key to one of `keys`, as ocicrypt chooses algorithms: RSA-OAEP, ECDH-ES with
    A256KW, A256GCM."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    content_key, nonce = os.urandom(32), os.urandom(12)
    made = [_wrapped(content_key, key) for key in keys]
    # One recipient in the flattened form, as everybody reads it; several may not share an algorithm.
    header: dict[str, Any] = {"enc": "A256GCM", **(made[0][0] if len(made) == 1 else {})}
    protected = _encode(json.dumps(header, separators=(",", ":")).encode())
    sealed = AESGCM(content_key).encrypt(nonce, plain, protected.encode())
    document: dict[str, Any] = {"protected": protected}
    if len(made) == 1:
        document["encrypted_key"] = made[0][1]
    else:
        document["recipients"] = [{"header": header, "encrypted_key": wrapped} for header, wrapped in made]
    document.update(iv=_encode(nonce), ciphertext=_encode(sealed[:-16]), tag=_encode(sealed[-16:]))
    return json.dumps(document, separators=(",", ":")).encode()


def _wrapped(content_key: bytes, key: PublicKey) -> tuple[dict[str, Any], str]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap

    if isinstance(key, rsa.RSAPublicKey):
        oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
        return {"alg": "RSA-OAEP"}, _encode(key.encrypt(content_key, oaep))
    own = ec.generate_private_key(key.curve)
    shared = _concat_kdf(own.exchange(ec.ECDH(), key), "ECDH-ES+A256KW", 32)
    return {"alg": "ECDH-ES+A256KW", "epk": _jwk(own.public_key())}, _encode(aes_key_wrap(shared, content_key))


def _jwk(key: EllipticCurvePublicKey) -> dict[str, str]:
    numbers, size = key.public_numbers(), (key.curve.key_size + 7) // 8
    curve = next(name for name, known in _CURVES.items() if known == key.curve.name)
    x, y = (_encode(number.to_bytes(size, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": curve, "x": x, "y": y}


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)
    except (binascii.Error, ValueError):
        raise ContentInvalid(f"{what}: not base64url") from None
