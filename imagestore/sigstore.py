"""sigstore signatures, the old form (a claim and annotations) and the new (a bundle), against one sigstoreSigned.

    who signed       keys of the policy, or a certificate that its roots lead to (certificates.py)
    since when       an entry of a log that the policy trusts (rekor.py), a time-stamping authority's word
                     (timestamps.py); without either, for keys, any time will do
    what was signed  a claim (claims.py), read only after its signature was verified

Refuses a certificate where the policy has keys, and the other way round. All of it works offline. Invariant: a claim
that comes from here passed each of the steps that its requirement names.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from imagestore import rekor
from imagestore.certificates import Untrusted, by_fulcio, by_pki, leaf_of, parse_chain
from imagestore.claims import IN_TOTO, Claim, cosign, statement
from imagestore.keys import der, fingerprint, load_key, pem, verifies
from imagestore.policy import Material, SigstoreSigned
from imagestore.signatures import CERTIFICATE, CHAIN, ENTRY, SIGNATURE, Bundle, Cosign, decoded, from_base64
from imagestore.strict_json import Fields, parse_object
from imagestore.timestamps import Authorities, Untimed, authorities, time_of
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from imagestore.keys import PublicKey

_VALUES = 10_000
_ENTRIES = 8


class NotSigned(Exception):
    """The signature does not meet the requirement; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A requirement with its keys loaded."""

    requirement: SigstoreSigned
    keys: tuple[PublicKey, ...]
    logs: tuple[PublicKey, ...]
    authorities: Authorities | None = None


@dataclass(frozen=True, slots=True)
class _Signed:
    """A signature taken apart. `data` is what the signature is over; `payload` what is in there."""

    signature: bytes
    data: bytes
    payload: bytes
    leaf: bytes
    """PEM, b"" where there is no certificate."""
    chain: bytes
    entry: rekor.Entry | None
    envelope: bool
    tokens: tuple[bytes, ...] = ()
    """RFC 3161 responses."""


def trusted(requirement: SigstoreSigned, timestamps: Material | None = None) -> Trusted:
    """`timestamps` is where the certificates of time-stamping authorities are. Raises PolicyInvalid."""
    return Trusted(requirement, _keys(requirement.keys), _keys(requirement.rekor), authorities(timestamps))


def _keys(materials: tuple[Material, ...]) -> tuple[PublicKey, ...]:
    return tuple(load_key(material.read(), f"signature policy: {material}") for material in materials)


def verify(found: Cosign | Bundle, roots: Trusted, now: float) -> tuple[tuple[Claim, ...], str]:
    """What was signed, and by whom. Raises NotSigned, ContentInvalid, PolicyInvalid."""
    signed = _from_annotations(found) if isinstance(found, Cosign) else _from_bundle(found)
    try:
        key, who = _signer(signed, roots, now)
    except (Untrusted, rekor.Unproven) as error:
        raise NotSigned(str(error)) from None
    if not verifies(key, signed.signature, signed.data):
        raise NotSigned(f"no good signature by {who}")
    return statement(signed.payload) if signed.envelope else (cosign(signed.payload),), who


def in_log(found: Cosign | Bundle, logs: tuple[PublicKey, ...], signers: tuple[bytes, ...]) -> None:
    """Raises NotSigned, ContentInvalid unless one of `logs` has this signature by one of `signers`."""
    signed = _from_annotations(found) if isinstance(found, Cosign) else _from_bundle(found)
    if signed.entry is None:
        raise NotSigned("it has no log entry")
    about = rekor.Logged(signers, signed.signature, signed.payload, signed.data, signed.envelope)
    try:
        rekor.check(signed.entry, logs, about)
    except rekor.Unproven as error:
        raise NotSigned(str(error)) from None


def _signer(signed: _Signed, roots: Trusted, now: float) -> tuple[PublicKey, str]:
    """The key that must have signed. Raises NotSigned, Untrusted, Unproven."""
    requirement = roots.requirement
    if requirement.fulcio is None and requirement.pki is None:
        for key in roots.keys:
            if verifies(key, signed.signature, signed.data):
                _, logged = _logged(signed, roots, (pem(key), der(key)))
                return key, fingerprint(key) + logged
        names = ", ".join(fingerprint(key) for key in roots.keys[:4])
        raise NotSigned(f"no good signature by {names}")
    if not signed.leaf:
        raise NotSigned("it has no certificate, and the policy wants one")
    leaf = leaf_of(signed.leaf)
    chain = _chain(signed.chain)
    when, logged = _logged(signed, roots, (signed.leaf,))
    if requirement.fulcio is not None:
        times = [] if when is None else [when]
        stamped = _stamped(signed, roots, needed=not times)
        for at in (*times, *stamped):  # it must have been good whenever somebody says that it was used
            key, who = by_fulcio(leaf, chain, requirement.fulcio, at)
        logged += ", with the time of an authority" if stamped else ""
    else:
        assert requirement.pki is not None  # one of the three is there: policy.py
        key, who = by_pki(leaf, chain, requirement.pki, int(now))
    return key, who + logged


def _stamped(signed: _Signed, roots: Trusted, *, needed: bool) -> list[int]:
    """The times that trusted authorities have signed. Raises NotSigned where one is `needed` and there is none."""
    found, reason = [], "it has no RFC 3161 timestamp"
    if roots.authorities is None:
        reason = "no time-stamping authority is trusted (image.timestamp_authorities)"
    else:
        for token in signed.tokens:
            try:
                found.append(time_of(token, signed.signature, roots.authorities))
            except Untimed as error:
                reason = str(error)
    if needed and not found:
        raise NotSigned(
            "the log's proof does not say when it was made, so a certificate of minutes proves nothing: " + reason
        )
    return found


def _logged(signed: _Signed, roots: Trusted, signers: tuple[bytes, ...]) -> tuple[int | None, str]:
    """When a trusted log took it, and that in words; the policy may not ask for a log. Raises NotSigned, Unproven."""
    if not roots.logs:
        return None, ""
    if signed.entry is None:
        raise NotSigned("it has no log entry, and the policy wants one (rekorPublicKey)")
    about = rekor.Logged(signers, signed.signature, signed.payload, signed.data, signed.envelope)
    when = rekor.check(signed.entry, roots.logs, about)
    return when, f", logged as number {signed.entry.index}"


def _chain(data: bytes) -> list[Certificate]:
    try:
        return parse_chain(data)
    except ValueError as error:
        raise NotSigned(f"its chain of certificates cannot be read ({error})") from None


# ------------------------------------------------------------------------------------------------------- the old form


def _from_annotations(found: Cosign) -> _Signed:
    notes = found.annotations
    if SIGNATURE not in notes:
        raise NotSigned(f"it has no annotation {SIGNATURE}")
    entry = notes.get(ENTRY, "")
    return _Signed(
        _base64(notes[SIGNATURE]),
        found.payload,
        found.payload,
        notes.get(CERTIFICATE, "").encode(),
        notes.get(CHAIN, "").encode(),
        rekor.from_annotation(entry) if entry else None,
        envelope=False,
    )


# ------------------------------------------------------------------------------------------------------- the new form


def _from_bundle(found: Bundle) -> _Signed:
    document = parse_object(found.data, "sigstore bundle", _VALUES)
    kind = document.string("mediaType")
    if not kind.startswith("application/vnd.dev.sigstore.bundle"):
        raise NotSigned(f"the media type {kind[:100]!r} is no sigstore bundle")
    material = document.object("verificationMaterial") or Fields({}, "verificationMaterial")
    envelope = document.object("dsseEnvelope")
    if envelope is None:
        raise NotSigned("the bundle has no DSSE envelope, so it signs no image")
    if envelope.string("payloadType") != IN_TOTO:
        raise NotSigned(f"the envelope holds {envelope.string('payloadType')[:100]!r}, expected {IN_TOTO}")
    payload = decoded(envelope, "payload")
    signatures = list(envelope.objects("signatures", 1))
    if not signatures:
        raise NotSigned("the envelope is not signed")
    entries = [rekor.from_bundle(item) for item in material.objects("tlogEntries", _ENTRIES)]
    leaf, chain = _certificates(material)
    return _Signed(
        decoded(signatures[0], "sig"),
        _pae(envelope.string("payloadType"), payload),
        payload,
        leaf,
        chain,
        entries[0] if entries else None,
        envelope=True,
        tokens=_tokens(material),
    )


def _tokens(material: Fields) -> tuple[bytes, ...]:
    found = material.object("timestampVerificationData")
    listed = found.objects("rfc3161Timestamps", _ENTRIES) if found else ()
    return tuple(dict.fromkeys(decoded(item, "signedTimestamp") for item in listed))


def _certificates(material: Fields) -> tuple[bytes, bytes]:
    """The signer's certificate and those behind it, as PEM."""
    single, several = material.object("certificate"), material.object("x509CertificateChain")
    if single is not None:
        return _pem(decoded(single, "rawBytes")), b""
    if several is not None:
        found = [_pem(decoded(item, "rawBytes")) for item in several.objects("certificates", 16)]
        return (found[0], b"".join(found[1:])) if found else (b"", b"")
    return b"", b""


def _pem(data: bytes) -> bytes:
    text = base64.encodebytes(data).replace(b"\n", b"")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])


def _pae(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed is the payload with its type."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def pae(payload: bytes) -> bytes:
    """What a signature of an in-toto statement is over."""
    return _pae(IN_TOTO, payload)


def _base64(text: str) -> bytes:
    try:
        return from_base64(text)
    except ValueError:
        raise NotSigned(f"the annotation {SIGNATURE} is not base64") from None
