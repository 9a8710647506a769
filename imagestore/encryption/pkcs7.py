"""PKCS #7 enveloped data (RFC 2315, 5652) of a layer's options: RSA for the recipients, AES for the content.

Reads AES-GCM as ocicrypt's library puts it into enveloped data (nonce and tag length as parameters, the tag at the end
of the content), and AES-CBC as openssl writes it; writes AES-256-CBC. Refuses other ciphers, DES among them. What comes
out of CBC is not authenticated: it is JSON or nothing, and the layer's HMAC decides. Invariant: a recipient is found by
trying, so a certificate beside the key is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagestore.der import INTEGER, OCTETS, OID, SEQUENCE, SET, Value, context, octets, oid, parse
from imagestore.model import ContentInvalid

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from imagestore.encryption.keys import PrivateKey

_ENVELOPED = oid("1.2.840.113549.1.7.3")
_RSA = oid("1.2.840.113549.1.1.1")
_OAEP = oid("1.2.840.113549.1.1.7")
_AES = "2.16.840.1.101.3.4.1"
_GCM = {oid(f"{_AES}.{arc}"): size for arc, size in ((6, 16), (26, 24), (46, 32))}
_CBC = {oid(f"{_AES}.{arc}"): size for arc, size in ((2, 16), (22, 24), (42, 32))}
_RECIPIENTS = 128


class Packet:
    """A message, parsed once for however many keys are tried. Raises ContentInvalid."""

    def __init__(self, data: bytes, what: str) -> None:
        try:
            self._read(parse(data))
        except (ValueError, IndexError) as error:
            raise ContentInvalid(f"{what}: no PKCS #7 enveloped data that we can read ({error})") from None

    def _read(self, top: Value) -> None:
        kind, wrapped = top.values()
        if kind.expect(OID).content != _ENVELOPED:
            raise ValueError("another kind of message")
        (envelope,) = wrapped.values(context(0))
        parts = envelope.values()
        at = [part.tag for part in parts].index(SET)  # originatorInfo may stand before it
        recipients, content = parts[at], parts[at + 1].values()
        listed = recipients.values(SET)
        if len(listed) > _RECIPIENTS:
            raise ValueError(f"{len(listed)} recipients")
        # Only KeyTransRecipientInfo is a plain SEQUENCE: version, who, algorithm, encrypted key.
        self._wrapped = [_wrapped(one.values()) for one in listed if one.tag == SEQUENCE]
        cipher = content[1].values()
        self._cipher = cipher[0].expect(OID).content
        self._parameters = cipher[1]
        self._sealed = octets(content[2], context(0, constructed=False))
        if self._cipher not in _GCM | _CBC:
            raise ValueError("its cipher is not AES-GCM or AES-CBC")

    def unwrap(self, key: PrivateKey) -> bytes | None:
        """The plain text, None where the message is not for `key`."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding, rsa

        if not isinstance(key, rsa.RSAPrivateKey):
            return None
        for algorithm, wrapped in self._wrapped:
            how: padding.AsymmetricPadding
            if algorithm == _OAEP:
                how = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
            elif algorithm == _RSA:
                how = padding.PKCS1v15()
            else:
                continue
            try:
                plain = self._open(key.decrypt(wrapped, how))
            except ValueError:
                continue
            if plain is not None:
                return plain
        return None

    def _open(self, key: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.padding import PKCS7

        if len(key) != (_GCM | _CBC)[self._cipher]:
            return None
        try:
            if self._cipher in _GCM:
                return AESGCM(key).decrypt(_gcm_nonce(self._parameters), self._sealed, None)
            decryptor = Cipher(algorithms.AES(key), modes.CBC(self._parameters.expect(OCTETS).content)).decryptor()
            unpadder = PKCS7(128).unpadder()
            plain = unpadder.update(decryptor.update(self._sealed) + decryptor.finalize()) + unpadder.finalize()
        except (InvalidTag, ValueError):
            return None
        # A key that is not its own makes noise, which now and then ends like a padding.
        return plain if plain.startswith(b"{") and plain.endswith(b"}") else None


def _gcm_nonce(parameters: Value) -> bytes:
    """RFC 5084 has a SEQUENCE of nonce and tag length. ocicrypt's library packs that into one more that is marked as
    not constructed, and calls the nonce [4]. Raises ValueError."""
    if parameters.tag == SEQUENCE & 0x1F:
        parameters = parse(parameters.content)
    nonce, *length = parameters.values()
    if length and length[0].expect(INTEGER).content != b"\x10":
        raise ValueError("a tag that is not of 16 bytes")
    return nonce.content if nonce.tag == context(4, constructed=False) else nonce.expect(OCTETS).content


def _wrapped(parts: Sequence[Value]) -> tuple[bytes, bytes]:
    algorithm = parts[2].values()[0].expect(OID).content
    return algorithm, parts[3].expect(OCTETS).content


def wrap(plain: bytes, certificates: Sequence[Certificate]) -> bytes:
    """`plain` for whoever has the private key to one of `certificates`."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7EnvelopeBuilder, PKCS7Options

    builder = PKCS7EnvelopeBuilder().set_data(plain).set_content_encryption_algorithm(AES256)
    for certificate in certificates:
        builder = builder.add_recipient(certificate)
    return builder.encrypt(Encoding.DER, [PKCS7Options.Binary])
