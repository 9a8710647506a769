"""A layer's file encrypted for recipients, or decrypted by a key: what `ocid copy` does on the way.

Blocking, for worker threads. Refuses to name a decrypted file before its HMAC, and its digest where that is said, were
found right. Invariant: the key of a layer is new for each encryption, and is nowhere but in what is wrapped.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from imagestore.encryption import jwe, pkcs7
from imagestore.encryption.key_providers import KeyProviders, parameters
from imagestore.encryption.keys import Recipients
from imagestore.encryption.layers import (
    ENCRYPTED,
    PUBLIC,
    WRAPPED,
    Opener,
    plain_type,
    private_options,
    public_options,
)
from imagestore.errands import Errand
from imagestore.model import ContentInvalid, Descriptor, KeyFile

_PIECE = 1 << 20


def encrypt(
    source: Path, layer: Descriptor, recipients: Recipients, target: Path, providers: Path | None, errand: Errand
) -> Descriptor:
    """Writes the plain layer in `source` to `target`, encrypted; its descriptor there. `providers` is the file of
    key_providers.py, asked on `errand`. Raises DecryptionRefused, OSError."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    key, nonce = os.urandom(32), os.urandom(16)
    encryptor = Cipher(AES(key), CTR(nonce)).encryptor()
    mac, digest, size = hmac.new(key, digestmod=hashlib.sha256), hashlib.sha256(), 0
    with open(source, "rb") as file, _private(target) as out:
        while piece := file.read(_PIECE):
            data = encryptor.update(piece)
            mac.update(data)
            digest.update(data)
            size += len(data)
            out.write(data)
    private = private_options(key, nonce, layer.digest)
    annotations = {PUBLIC: public_options(mac.digest())}
    if recipients.keys:
        annotations[f"{WRAPPED}jwe"] = base64.b64encode(jwe.wrap(private, recipients.keys)).decode()
    if recipients.certificates:
        annotations[f"{WRAPPED}pkcs7"] = base64.b64encode(pkcs7.wrap(private, recipients.certificates)).decode()
    told = parameters(recipients.providers)
    for name in told:
        packet = KeyProviders(providers).wrap(name, told, private, errand)
        annotations[f"{WRAPPED}provider.{name}"] = base64.b64encode(packet).decode()
    return Descriptor(layer.media_type + ENCRYPTED, f"sha256:{digest.hexdigest()}", size, annotations)


def decrypt(
    source: Path, layer: Descriptor, keys: Sequence[KeyFile], target: Path, providers: Path | None, errand: Errand
) -> Descriptor:
    """Writes the encrypted layer in `source` to `target`, plain; `providers` as above. Raises DecryptionRefused,
    ContentInvalid, OSError."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    opened = Opener(None, providers).open_blob(layer, keys, errand)
    key, nonce, expected = opened.key
    decryptor = Cipher(AES(key), CTR(nonce)).decryptor()
    mac, digest, size = hmac.new(key, digestmod=hashlib.sha256), hashlib.sha256(), 0
    with open(source, "rb") as file, _private(target) as out:
        while piece := file.read(_PIECE):
            mac.update(piece)
            data = decryptor.update(piece)
            digest.update(data)
            size += len(data)
            out.write(data)
    found = f"sha256:{digest.hexdigest()}"
    if not hmac.compare_digest(mac.digest(), expected):
        raise ContentInvalid(f"layer {layer.digest}: its HMAC is another than announced")
    if opened.digest not in ("", found):
        raise ContentInvalid(f"layer {layer.digest}: decrypts to {found}, announced as {opened.digest[:80]}")
    return Descriptor(plain_type(layer), found, size)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "wb")
