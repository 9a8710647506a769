"""What a descriptor says of an encrypted layer, and the key that opens it, found with the private keys there are.

    mediaType    …+encrypted
    annotations  org.opencontainers.image.enc.keys.jwe, .pkcs7   the private options, wrapped; base64, comma, base64 …
                 org.opencontainers.image.enc.keys.provider.NAME the same, by a program of the node (key_providers.py)
                 org.opencontainers.image.enc.pubopts            cipher and HMAC; base64 of JSON

Refuses other ciphers than AES_256_CTR_HMAC_SHA256, and more attempts than `_ATTEMPTS` for one image: a registry may
name as many recipients as it likes. Invariant: nobody gets at what a key has unpacked by naming its diff id. An
encrypted layer's chain id is one of its own (`seal`), made of the blob and of the very annotations that were opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagestore.encryption.key_providers import KeyProviders, parameters
from imagestore.encryption.keys import keys_below, private_key
from imagestore.errands import Errand
from imagestore.model import ContentInvalid, DecryptionRefused, Descriptor, KeyFile, Layer, LayerKey
from imagestore.strict_json import parse_object
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from imagestore.encryption.keys import PrivateKey

ENCRYPTED = "+encrypted"
ANNOTATIONS = "org.opencontainers.image.enc."
PUBLIC = f"{ANNOTATIONS}pubopts"
WRAPPED = f"{ANNOTATIONS}keys."
CIPHER = "AES_256_CTR_HMAC_SHA256"
_PROVIDER = "provider."
_READ = ("jwe", "pkcs7")
_ATTEMPTS = 4096
_PACKETS = 4
"""For one provider, of one layer: each is a program that is run, and may take its time."""
_VALUES = 100


def is_encrypted(layer: Descriptor) -> bool:
    return layer.media_type.endswith(ENCRYPTED)


def plain_type(layer: Descriptor) -> str:
    """The media type of the plain text."""
    return layer.media_type.removesuffix(ENCRYPTED)


def own_annotations(annotations: Mapping[str, str]) -> dict[str, str]:
    """Those that are about encryption."""
    return {name: value for name, value in annotations.items() if name.startswith(ANNOTATIONS)}


def seal(layer: Descriptor) -> str:
    """What a chain id of the layer has to depend on besides the diff id; "" for a plain one. Diff ids stand in the
    config for everybody to read: were they enough, whoever writes a manifest with the diff id of somebody's secret
    layer would be given it, unpacked. Other annotations for the same blob are another layer, with a key of its own to
    be proven by the HMAC."""
    if not is_encrypted(layer):
        return ""
    said = json.dumps([layer.digest, *sorted(own_annotations(layer.annotations).items())])
    return hashlib.sha256(said.encode()).hexdigest()


class Opener:
    """The keys of this node, and those that callers bring. Any thread may ask."""

    def __init__(self, directory: Path | None, providers: Path | None = None) -> None:
        """`providers` is the file of key_providers.py."""
        self._directory = directory
        self._providers = KeyProviders(providers)

    def open(
        self, layers: Sequence[Layer], given: Iterable[KeyFile] = (), errand: Errand | None = None
    ) -> dict[str, LayerKey]:
        """The keys of the encrypted ones of `layers`, by chain id; providers are asked on `errand`, or on one that
        nobody ends. Raises DecryptionRefused where no key opens one; ContentInvalid where its annotations are not what
        they should be."""
        sealed = [layer for layer in layers if is_encrypted(layer.blob)]
        if not sealed:
            return {}
        files = tuple(given)
        keys = [key for file in (*files, *keys_below(self._directory)) if (key := private_key(file)) is not None]
        attempts = _Attempts(keys, self._providers, parameters(files), errand or Errand())
        return {layer.chain_id: self._open(layer.blob, attempts).key for layer in sealed}

    def open_blob(self, blob: Descriptor, given: Iterable[KeyFile], errand: Errand | None = None) -> Opened:
        """The same for one descriptor and the given keys and providers alone."""
        files = tuple(given)
        keys = [key for file in files if (key := private_key(file)) is not None]
        told = parameters(files)
        return self._open(blob, _Attempts(keys, self._providers, told, errand or Errand(), only=frozenset(told)))

    def _open(self, blob: Descriptor, attempts: _Attempts) -> Opened:
        found = attempts.unwrap(blob)
        if found is None:
            schemes = sorted(name.removeprefix(WRAPPED) for name in blob.annotations if name.startswith(WRAPPED))
            what = f"layer {blob.digest}: encrypted ({', '.join(schemes) or 'no scheme'})"
            if not any(scheme in _READ or scheme.startswith(_PROVIDER) for scheme in schemes):
                raise DecryptionRefused(
                    f"{what}, which no key opens here: {', '.join(_READ)} and key providers are read"
                )
            hint = f"; give one, or put it into {self._directory}" if self._directory else ""
            count = len(attempts.keys)
            why = f"none of the {count} private keys opens it" if count else f"there is no private key to open it{hint}"
            if attempts.refusals:
                why += f" ({'; '.join(attempts.refusals[:4])})"
            raise DecryptionRefused(f"{what}, and {why}")
        return _opened(blob, found)


@dataclass(frozen=True, slots=True)
class Opened:
    """A layer's key, and the digest that the plain blob has: "" where that is not said."""

    key: LayerKey
    digest: str


class _Attempts:
    """Keys tried on layers, and not for ever."""

    def __init__(
        self,
        keys: Sequence[PrivateKey],
        providers: KeyProviders,
        told: Mapping[str, Sequence[bytes]],
        errand: Errand,
        only: frozenset[str] | None = None,
    ) -> None:
        """`told` is what callers have for providers; with `only`, no others are asked."""
        self.keys = list(keys)
        self.refusals: list[str] = []
        self._providers, self._told, self._only, self._errand = providers, told, only, errand
        self._left = _ATTEMPTS

    def unwrap(self, blob: Descriptor) -> bytes | None:
        """The private options, None where no key is one of a recipient's."""
        from imagestore.encryption import jwe, pkcs7

        for scheme, reader in (("jwe", jwe.Packet), ("pkcs7", pkcs7.Packet)):
            name = f"{WRAPPED}{scheme}"
            for text in filter(None, blob.annotations.get(name, "").split(",")):
                packet = reader(_decode(text, name), f"layer {blob.digest}: {name}")
                for key in self.keys:
                    self._left -= 1
                    if self._left < 0:
                        raise ContentInvalid(f"layer {blob.digest}: more than {_ATTEMPTS} attempts to find its key")
                    found = packet.unwrap(key)
                    if found is not None:
                        # The next layer is most likely for the same one.
                        self.keys.remove(key)
                        self.keys.insert(0, key)
                        return found
        return self._provided(blob)

    def _provided(self, blob: Descriptor) -> bytes | None:
        prefix = f"{WRAPPED}{_PROVIDER}"
        for name in sorted(name for name in blob.annotations if name.startswith(prefix)):
            provider = name.removeprefix(prefix)
            if self._only is not None and provider not in self._only:
                continue
            for text in [*filter(None, blob.annotations[name].split(","))][:_PACKETS]:
                try:
                    found = self._providers.unwrap(provider, _decode(text, name), self._told, self._errand)
                except DecryptionRefused as error:
                    self.refusals.append(str(error))
                    continue
                if found is not None:
                    return found
        return None


def _opened(blob: Descriptor, private: bytes) -> Opened:
    what = f"layer {blob.digest}: private options"
    secret = parse_object(private, what, _VALUES)
    public = parse_object(_decode(blob.annotations.get(PUBLIC, ""), PUBLIC), f"layer {blob.digest}: {PUBLIC}", _VALUES)
    cipher = public.string("cipher")
    if cipher != CIPHER:
        raise ContentInvalid(f"layer {blob.digest}: encrypted with {cipher[:60]!r}; {CIPHER} is supported")
    nonces = [options.string("nonce") for one in (public, secret) if (options := one.object("cipheroptions"))]
    key = _decode(secret.string("symkey"), "symkey")
    nonce = _decode(next(filter(None, nonces), ""), "nonce")
    hmac = _decode(public.string("hmac"), "hmac")
    if (len(key), len(nonce), len(hmac)) != (32, 16, 32):
        raise ContentInvalid(f"layer {blob.digest}: its key, nonce or HMAC is not one of {CIPHER}")
    return Opened((key, nonce, hmac), secret.string("digest"))


def public_options(hmac: bytes) -> str:
    """The annotation PUBLIC."""
    return _encode({"cipher": CIPHER, "hmac": base64.b64encode(hmac).decode(), "cipheroptions": {}})


def private_options(key: bytes, nonce: bytes, digest: str) -> bytes:
    """What is wrapped for the recipients."""
    options = {"nonce": base64.b64encode(nonce).decode()}
    return _json({"symkey": base64.b64encode(key).decode(), "digest": digest, "cipheroptions": options})


def _encode(document: Mapping[str, object]) -> str:
    return base64.b64encode(_json(document)).decode()


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ContentInvalid(f"{what}: not base64") from None
