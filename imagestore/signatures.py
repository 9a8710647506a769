"""Signatures as they were found, unverified: bytes with where they come from, and their form on disk.

    Simple   an OpenPGP message around a claim (simple signing)
    Cosign   a claim, its signature and what proves it in annotations (cosign's tags, lookaside)
    Bundle   a sigstore bundle: a DSSE envelope with an in-toto statement (referrers)

Pure. Refuses nothing here but what is no form at all. Invariant: nothing in here has been believed yet.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping

from imagestore.model import ContentInvalid
from imagestore.strict_json import Fields, parse_array, parse_object
from runtime.linux.dataclass import dataclass

COSIGN_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
CERTIFICATE = "dev.sigstore.cosign/certificate"
CHAIN = "dev.sigstore.cosign/chain"
ENTRY = "dev.sigstore.cosign/bundle"

_MAGIC = b"\x00sigstore-json\n"
_VALUES = 4096


@dataclass(frozen=True, slots=True)
class Simple:
    """An OpenPGP message."""

    data: bytes
    origin: str


@dataclass(frozen=True, slots=True)
class Cosign:
    """`payload` is what was signed."""

    payload: bytes
    annotations: Mapping[str, str]
    origin: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A sigstore bundle as JSON."""

    data: bytes
    origin: str


Signature = Simple | Cosign | Bundle


def from_blob(data: bytes, origin: str) -> Signature:
    """A file of a lookaside store. Raises ContentInvalid."""
    if not data.startswith(b"\x00"):
        return Simple(data, origin)
    if not data.startswith(_MAGIC):
        raise ContentInvalid(f"{origin}: a signature of an unknown form")
    fields = parse_object(data[len(_MAGIC) :], origin, _VALUES).only("mimeType", "payload", "annotations")
    payload = decoded(fields, "payload")
    if fields.string("mimeType") == BUNDLE_TYPE:
        return Bundle(payload, origin)
    return Cosign(payload, fields.string_map("annotations"), origin)


def to_blob(signature: Signature) -> bytes:
    """As a file of a lookaside store."""
    if isinstance(signature, Simple):
        return signature.data
    bundle = isinstance(signature, Bundle)
    document = {
        "mimeType": BUNDLE_TYPE if bundle else COSIGN_TYPE,
        "payload": _encoded(signature.data if isinstance(signature, Bundle) else signature.payload),
        "annotations": {} if isinstance(signature, Bundle) else dict(signature.annotations),
    }
    return _MAGIC + json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def dump(signatures: Iterable[Signature]) -> str:
    """All of them as one text, to be kept beside the image."""
    return json.dumps([{"origin": one.origin, "blob": _encoded(to_blob(one))} for one in signatures])


def load(text: str) -> tuple[Signature, ...]:
    """What `dump` wrote. Raises ContentInvalid."""
    items = parse_array(text.encode(), "kept signatures", _VALUES)
    return tuple(from_blob(decoded(item, "blob"), item.string("origin")) for item in items)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """Strictly, but for the ends of lines that some programs put in, and others read over. Raises ValueError."""
    try:
        return base64.b64decode(text.replace("\n", "").replace("\r", ""), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def decoded(fields: Fields, key: str) -> bytes:
    """The bytes of a base64 field, which must be there. Raises ContentInvalid."""
    try:
        found = from_base64(fields.string(key))
    except ValueError:
        raise ContentInvalid(f"{fields.path}.{key}: not base64") from None
    if not found:
        raise ContentInvalid(f"{fields.path}.{key}: missing")
    return found
