"""Private keys in cosign's own encryption. The file here was made by the Go package that cosign makes them with
(go-securesystemslib's encrypted, v0.11.1), for a key that was made for this test; the password is "horse"."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from imagestore.model import ImageError
from imagestore.signing import load_signer

KEY = b"""-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----
eyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6
OCwicCI6MX0sInNhbHQiOiJvSzlVU1VoanB0WTlMWnVxdTFEYkFmbVhrdFNpakdC
bmp2V29XQUdpZkZRPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94
Iiwibm9uY2UiOiJpNStJalpmTmxJQmd1cmF3VnNORXJTWGg1ZW9hVmZhdCJ9LCJj
aXBoZXJ0ZXh0IjoiclIzYlJqdVIxUERnYllzY1dKNHM4NGtOcnNrTzUydXpOdC9I
OFJwblZhakZLSjlZYk54UnNXY1UwSkNudXVrZDYzbTdhendta1NNbHV3QnNyYXF3
U1Jvd0ZRY3o5djlNdnA2alg2UHNMbU40ZlZvODVCc3ArQTZyQjlkcHVRTlBYb29U
ZDVoUWJTVHdHeG1JOWhKWGxQdmE1K0g3ZW9OMVl0Q0RtNHpOWUc1SmJjR3pxaTNO
Y281eEZ4NnBTbEtweXc1akdLVS9ZSGROTnc9PSJ9
-----END ENCRYPTED SIGSTORE PRIVATE KEY-----
"""
PUBLIC = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE/3JGmf/YPL1xAi4wMn6CrJcBbu0f
DG1yT2s4UL/fHLqTnrh/t3kXRXopqNrsx8sHP1KhJQcBTRax7jP/EXy04g==
-----END PUBLIC KEY-----
"""


def edited(edit: Callable[[dict[str, Any]], None]) -> bytes:
    first, *lines, last = KEY.splitlines()
    document = json.loads(base64.b64decode(b"".join(lines)))
    edit(document)
    return b"\n".join([first, base64.b64encode(json.dumps(document).encode()), last])


@pytest.mark.parametrize("label", [b"SIGSTORE", b"COSIGN"])
def test_what_cosign_writes(label: bytes) -> None:
    assert load_signer(KEY.replace(b"SIGSTORE", label), b"horse").pem == PUBLIC


def damaged(document: dict[str, Any]) -> None:
    data = bytearray(base64.b64decode(document["ciphertext"]))
    data[-1] ^= 1
    document["ciphertext"] = base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("data", "password", "says"),
    [
        (KEY, b"donkey", "wrong password"),
        (KEY, b"", "wrong password"),
        (KEY, None, "no password is given"),
        (edited(damaged), b"horse", "damaged"),
        (edited(lambda it: it["kdf"]["params"].update(N=1 << 28)), b"horse", "costs"),
        (edited(lambda it: it["kdf"]["params"].update(r=1 << 20)), b"horse", "costs"),
        (edited(lambda it: it["kdf"].pop("params")), b"horse", "costs"),
        (edited(lambda it: it["kdf"].update(name="argon2")), b"horse", "expected scrypt"),
        (edited(lambda it: it["cipher"].update(nonce="AAAA")), b"horse", "cannot be used"),
        (KEY.replace(b"eyJr", b"!!!!"), b"horse", "no PEM"),
    ],
)
def test_what_cannot_be_used(data: bytes, password: bytes | None, says: str) -> None:
    with pytest.raises(ImageError, match=says) as error:
        load_signer(data, password)
    assert "horse" not in str(error.value) and "donkey" not in str(error.value)
