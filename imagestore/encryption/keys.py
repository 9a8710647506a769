"""Private keys that open layers, and recipients that layers are encrypted for, from files.

    FILE                        a private key, PEM or DER: RSA, or a curve of NIST
    FILE:PASSWORD               one that is encrypted, as skopeo has it
    FILE:pass=… :file=… :fd=…   the same; the password on the command line, in a file, from a descriptor
    jwe:FILE  pkcs7:FILE        a recipient: a public key, a certificate
    provider:NAME[:PARAMETER]   either: a program that has the key (key_providers.py)

Refuses kinds of keys that ocicrypt has and we have not, by name (PGP, PKCS #11), and RSA below 2048 bits. Invariant: no
key and no password is in a message or in a repr.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from imagestore.content import errno_text
from imagestore.encryption.key_providers import PROVIDER, named
from imagestore.model import DecryptionRefused, KeyFile
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
    from cryptography.x509 import Certificate

    PrivateKey: TypeAlias = RSAPrivateKey | EllipticCurvePrivateKey
    PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey

_KEY_BYTES = 64 << 10
_KEYS = 256
_LEAST_RSA = 2048
# SHA-256 of files whose key this process has found sound. Whether the numbers of an RSA key belong together takes 65 ms
# to see with 2048 bits and 370 with 4096, and keys are read for each image and each container that may want one.
_sound: set[bytes] = set()


@dataclass(frozen=True, slots=True)
class Recipients:
    """Whoever has the private key to one of these may read what is encrypted."""

    keys: tuple[PublicKey, ...] = ()
    """For JWE."""
    certificates: tuple[Certificate, ...] = ()
    """For PKCS #7."""
    providers: tuple[KeyFile, ...] = ()
    """As options name them: what each of these programs is told."""

    def __bool__(self) -> bool:
        return bool(self.keys or self.certificates or self.providers)


# ------------------------------------------------------------------------------------------------------- private keys


def key_files(options: Iterable[str]) -> tuple[KeyFile, ...]:
    """What the options `--decryption-key` name, read. Raises DecryptionRefused."""
    found = []
    for option in options:
        if option.startswith(PROVIDER):
            found.append(_provider(option))
            continue
        name, _, said = option.partition(":")
        found.append(KeyFile(name, _read(Path(name), "decryption key"), _password(said) if said else None))
        private_key(found[-1], required=True)
    return tuple(found)


def keys_below(directory: Path | None) -> tuple[KeyFile, ...]:
    """Every file below `directory` that is a private key without a password; none where it is not there. Links lead
    nowhere. Raises DecryptionRefused where it cannot be read."""
    if directory is None:
        return ()
    found: list[KeyFile] = []
    try:
        for top, directories, files in os.walk(directory, onerror=_refuse):
            directories.sort()
            for name in sorted(files):
                path = Path(top) / name
                if not path.is_file() or path.is_symlink():
                    continue
                key = KeyFile(str(path), _read(path, "decryption key"))
                if private_key(key) is not None:
                    found.append(key)
                if len(found) > _KEYS:
                    raise DecryptionRefused(f"decryption keys: more than {_KEYS} in {directory}")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise DecryptionRefused(f"decryption keys in {directory}: {errno_text(error)}") from error
    return tuple(found)


def pack(files: Iterable[KeyFile]) -> bytes:
    """The private keys of `files` for another process of this machine: small, and without their passwords."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    found = []
    for file in files:
        if file.name.startswith(PROVIDER):
            found.append((file.name, base64.b64encode(file.data).decode()))
        elif (key := private_key(file)) is not None:
            data = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            found.append((file.name, base64.b64encode(data).decode()))
    return json.dumps(found, separators=(",", ":")).encode()


def unpack(data: bytes) -> tuple[KeyFile, ...]:
    """What `pack` made. Raises DecryptionRefused."""
    try:
        found = tuple(KeyFile(str(name), base64.b64decode(text, validate=True)) for name, text in json.loads(data))
    except (ValueError, TypeError, RecursionError):
        raise DecryptionRefused("decryption keys: not what ocid packs") from None
    for file in found:
        if not file.name.startswith(PROVIDER):
            private_key(file, required=True)
    return found


def private_key(file: KeyFile, *, required: bool = False) -> PrivateKey | None:
    """The key in a file; None for a certificate or for what is no key, unless one is `required`: PKCS #7 wants the
    certificate given, too, elsewhere; and for a provider. Raises DecryptionRefused for a key that cannot be used."""
    if file.name.startswith(PROVIDER):
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

    pem = b"-----BEGIN" in file.data
    if pem and b"PRIVATE KEY" not in file.data:
        if required and b"CERTIFICATE" not in file.data:
            raise DecryptionRefused(f"decryption key {file.name}: no private key")
        return None
    load = load_pem_private_key if pem else load_der_private_key
    digest = hashlib.sha256(file.data).digest()
    try:
        key = _usable(load(file.data, file.password, unsafe_skip_rsa_key_validation=digest in _sound))
    except TypeError:  # a password that is missing, or one that nothing is encrypted with
        why = "it has no password" if file.password else "it is encrypted, and no password is given"
    except (ValueError, UnsupportedAlgorithm) as error:
        why = "wrong password" if file.password else f"no usable private key ({str(error)[:200]})"
    else:
        if len(_sound) >= _KEYS:
            _sound.clear()
        _sound.add(digest)
        return key
    if required:
        raise DecryptionRefused(f"decryption key {file.name}: {why}")
    return None


def _provider(option: str) -> KeyFile:
    name, parameter = named(option)
    return KeyFile(PROVIDER + name, parameter)


def _usable(key: object) -> PrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _LEAST_RSA:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ("secp256r1", "secp384r1", "secp521r1"):
        return key
    raise ValueError("only RSA of 2048 bits and more, P-256, P-384 and P-521 are")


def _password(said: str) -> bytes:
    kind, equals, value = said.partition("=")
    if not equals or kind not in ("pass", "file", "fd"):
        return said.encode()
    if kind == "pass":
        return value.encode()
    if kind == "file":
        return _read(Path(value), "password").rstrip(b"\r\n")
    try:
        return os.read(int(value), _KEY_BYTES).rstrip(b"\r\n")
    except (ValueError, OSError):
        raise DecryptionRefused(f"password: fd={value[:20]} is no descriptor that can be read") from None


def _read(path: Path, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_KEY_BYTES + 1)
    except OSError as error:
        raise DecryptionRefused(f"{what} {path}: {errno_text(error)}") from error
    if len(data) > _KEY_BYTES:
        raise DecryptionRefused(f"{what} {path}: more than {_KEY_BYTES} bytes")
    return data


def _refuse(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------------------- recipients


def recipients(options: Iterable[str]) -> Recipients:
    """What the options `--encryption-key` name. Raises DecryptionRefused."""
    keys: list[PublicKey] = []
    certificates: list[Certificate] = []
    providers: list[KeyFile] = []
    for option in options:
        if option.startswith(PROVIDER):
            providers.append(_provider(option))
        else:
            _add(option, keys, certificates)
    return Recipients(tuple(keys), tuple(certificates), tuple(providers))


def _add(option: str, keys: list[PublicKey], certificates: list[Certificate]) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm

    scheme, colon, name = option.partition(":")
    if scheme in ("pgp", "pkcs11"):
        raise DecryptionRefused(f"encryption key {option}: {scheme} is not supported; jwe, pkcs7 and provider are")
    if not colon or scheme not in ("jwe", "pkcs7"):
        raise DecryptionRefused(f"encryption key {option!r}: expected jwe:FILE, pkcs7:FILE or provider:NAME")
    data = _read(Path(name), "encryption key")
    try:
        if scheme == "jwe":
            keys.append(_public(data))
        else:
            certificates.append(_certificate(data))
    except (ValueError, UnsupportedAlgorithm) as error:
        kind = "public key" if scheme == "jwe" else "certificate with an RSA key"
        raise DecryptionRefused(f"encryption key {name}: no usable {kind} ({str(error)[:200]})") from None


def _public(data: bytes) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

    key = load_pem_public_key(data) if b"-----BEGIN" in data else load_der_public_key(data)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1", "secp521r1"):
        return key
    raise ValueError("only RSA of 2048 bits and more, P-256, P-384 and P-521 are")


def _certificate(data: bytes) -> Certificate:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificate

    found = load_pem_x509_certificate(data) if b"-----BEGIN" in data else load_der_x509_certificate(data)
    key = found.public_key()
    if not isinstance(key, RSAPublicKey) or key.key_size < _LEAST_RSA:
        raise ValueError("PKCS #7 wraps keys by RSA")
    return found
