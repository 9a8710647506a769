"""Wrapped keys come from registries: whatever stands there is opened, or is a ContentInvalid, or is for nobody."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from imagestore.der import Value, context, oid, parse
from imagestore.encryption import jwe, pkcs7
from imagestore.encryption.keys import private_key
from imagestore.encryption.layers import Opener
from imagestore.model import ContentInvalid, DecryptionRefused, Descriptor, KeyFile

RSA = rsa.generate_private_key(65537, 2048)
CURVE = ec.generate_private_key(ec.SECP256R1())
KEYS = (RSA, CURVE)
PLAIN = b'{"symkey":"","digest":"","cipheroptions":{}}'

texts = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=20)
headers = st.fixed_dictionaries(
    {},
    optional={
        "alg": st.sampled_from(["RSA-OAEP", "RSA-OAEP-256", "ECDH-ES+A256KW", "ECDH-ES", "dir", "none", ""]),
        "enc": st.sampled_from(["A256GCM", "A128CBC-HS256", "A512GCM", ""]),
        "epk": st.fixed_dictionaries({"crv": st.sampled_from(["P-256", "P-384", "X25519"])}, optional={"x": texts}),
        "zip": st.just("DEF"),
        "apu": texts,
    },
)


def encoded(document: object) -> str:
    return jwe._encode(json.dumps(document).encode())


def tried(packet: jwe.Packet | pkcs7.Packet) -> list[bytes | None]:
    return [packet.unwrap(key) for key in KEYS]


@given(headers, headers, texts, texts, texts)
def test_any_jwe(protected: dict[str, Any], own: dict[str, Any], key: str, nonce: str, tag: str) -> None:
    document = {"protected": encoded(protected), "iv": nonce, "tag": tag, "ciphertext": "AAAA"}
    document["recipients"] = [{"header": own, "encrypted_key": key}]  # type: ignore[assignment]
    try:
        assert tried(jwe.Packet(json.dumps(document).encode(), "test")) == [None, None]
    except ContentInvalid:
        return


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    for reader in (jwe.Packet, pkcs7.Packet):
        with pytest.raises(ContentInvalid):
            reader(data, "test")
    try:
        assert parse(data).whole == data
    except ValueError:
        return


@given(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=4))
def test_a_jwe_that_was_altered_is_for_nobody(at: int, other: bytes) -> None:
    made = jwe.wrap(PLAIN, [RSA.public_key(), CURVE.public_key()])
    assert tried(jwe.Packet(made, "test")) == [PLAIN, PLAIN]
    at %= len(made)
    altered = made[:at] + other + made[at + len(other) :]
    try:
        # Spaces and the like may change: then it says what it said.
        assert set(tried(jwe.Packet(altered, "test"))) <= {PLAIN, None}
    except ContentInvalid:
        return


@pytest.mark.parametrize("name", ["zip", "crit"])
def test_headers_that_would_change_the_meaning_are_refused(name: str) -> None:
    made = json.loads(jwe.wrap(PLAIN, [RSA.public_key(), CURVE.public_key()]))
    for place in (made.setdefault("unprotected", {}), made["recipients"][1]["header"]):
        place[name] = "DEF" if name == "zip" else ["exp"]
        with pytest.raises(ContentInvalid, match=name):
            jwe.Packet(json.dumps(made).encode(), "test")
        del place[name]
    assert jwe.Packet(json.dumps(made).encode(), "test").unwrap(RSA) == PLAIN


def test_the_derivation_of_rfc_7518() -> None:
    """Appendix C: the secret, the parties, and the key that comes of them."""
    secret = bytes(
        [158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156]
        + [251, 49, 110, 163, 218, 128, 106, 72, 246, 218, 167, 121, 140, 254, 144, 196]
    )
    assert jwe._encode(jwe._concat_kdf(secret, "A128GCM", 16, b"Alice", b"Bob")) == "VqqN6vgjbSBcIijNcacQGg"


@pytest.mark.parametrize(
    "data",
    [
        b"\x30\x80\x00\x00",
        b"\x30\x81\x05\x02\x01\x00",
        b"\x30\x82\x00\x05\x02\x01\x00",
        b"\x3f\x81\x01\x00",
        b"\x30\x05\x02",
    ],
)
def test_der_has_one_spelling(data: bytes) -> None:
    with pytest.raises(ValueError, match="DER"):
        parse(data)


def test_der_values() -> None:
    assert oid("1.2.840.113549.1.7.3").hex() == "2a864886f70d010703"
    assert context(0) == 0xA0 and context(4, constructed=False) == 0x84
    assert parse(b"\x30\x03\x02\x01\x05").values() == [Value(2, b"\x05", b"\x02\x01\x05")]


@pytest.mark.parametrize(("symkey", "nonce", "hmac"), [(31, 16, 32), (32, 12, 32), (32, 16, 0), (0, 0, 0)])
def test_options_of_another_cipher(symkey: int, nonce: int, hmac: int) -> None:
    def b64(count: int) -> str:
        return base64.b64encode(bytes(count)).decode()

    private = {"symkey": b64(symkey), "digest": "", "cipheroptions": {"nonce": b64(nonce)}}
    public = {"cipher": "AES_256_CTR_HMAC_SHA256", "hmac": b64(hmac), "cipheroptions": {}}
    annotations = {
        "org.opencontainers.image.enc.keys.jwe": base64.b64encode(
            jwe.wrap(json.dumps(private).encode(), [RSA.public_key()])
        ).decode(),
        "org.opencontainers.image.enc.pubopts": base64.b64encode(json.dumps(public).encode()).decode(),
    }
    der = RSA.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    blob = Descriptor("application/vnd.oci.image.layer.v1.tar+encrypted", "sha256:" + "0" * 64, 1, annotations)
    with pytest.raises(ContentInvalid, match="is not one of"):
        Opener(None).open_blob(blob, [KeyFile("test", der)])
    with pytest.raises(DecryptionRefused):
        Opener(None).open_blob(blob, [])


def test_a_key_whose_numbers_do_not_belong_together_is_refused_however_often() -> None:
    """A key that was found sound is not looked through again; one that was not is."""

    def file(key: rsa.RSAPrivateKey) -> KeyFile:
        return KeyFile("test", key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))

    numbers = RSA.private_numbers()
    changed = {name: getattr(numbers, name) for name in ("p", "q", "dmp1", "dmq1", "iqmp")}
    wrong = rsa.RSAPrivateNumbers(d=numbers.d + 2, public_numbers=numbers.public_numbers, **changed)
    for _ in range(2):
        found = private_key(file(RSA), required=True)
        assert isinstance(found, rsa.RSAPrivateKey) and found.private_numbers() == numbers
        with pytest.raises(DecryptionRefused, match="no usable private key"):
            private_key(file(wrong.private_key(unsafe_skip_rsa_key_validation=True)), required=True)
