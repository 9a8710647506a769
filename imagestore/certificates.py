"""Certificates of signers: does a chain lead to a root of the policy, at the time that counts, to whom it names?

    fulcio   at the time that a log gave the signature; OIDC issuer and e-mail address as the policy has them
    pki      now; e-mail address and host name as the policy has them

OpenSSL builds and checks the chain (pyOpenSSL); what a policy adds is looked at here. Refuses certificates that are not
for code signing, anywhere in the chain. Invariant: a key that comes from here belongs to a certificate that passed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagestore.keys import usable
from imagestore.model import PolicyInvalid
from imagestore.policy import Fulcio, Pki

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from imagestore.keys import PublicKey

_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_MANY = 32
# https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md: the issuer, as plain text and as a UTF8String.
_ISSUER = "1.3.6.1.4.1.57264.1.1"
_ISSUER_2 = "1.3.6.1.4.1.57264.1.8"
_CODE_SIGNING = "1.3.6.1.5.5.7.3.3"
_ANY_USE = "2.5.29.37.0"


class Untrusted(Exception):
    """The certificate proves nothing; `str()` says why."""


def parse_chain(data: bytes) -> list[Certificate]:
    """The certificates in PEM. Raises ValueError."""
    from cryptography import x509

    blocks = _BLOCK.findall(data)
    if len(blocks) > _MANY:
        raise ValueError(f"{len(blocks)} certificates, the limit is {_MANY}")
    return [x509.load_pem_x509_certificate(block) for block in blocks]


def leaf_of(data: bytes) -> Certificate:
    """The one certificate in PEM. Raises Untrusted."""
    try:
        found = parse_chain(data)
    except ValueError as error:
        raise Untrusted(f"its certificate cannot be read ({error})") from None
    if len(found) != 1:
        raise Untrusted(f"{len(found)} certificates where the signer's is expected")
    return found[0]


def by_fulcio(leaf: Certificate, chain: Sequence[Certificate], fulcio: Fulcio, when: int) -> tuple[PublicKey, str]:
    """The key and whose it is. Raises Untrusted, PolicyInvalid."""
    _check_chain(leaf, chain, _roots(fulcio.roots.read(), str(fulcio.roots)), when, said=True)
    issuer = _issuer(leaf)
    if issuer != fulcio.issuer:
        raise Untrusted(f"the certificate's OIDC issuer is {issuer[:200]!r}, the policy wants {fulcio.issuer!r}")
    _check_email(leaf, fulcio.email)
    return _key(leaf), f"{fulcio.email}, for whom {fulcio.issuer} vouched"


def by_pki(leaf: Certificate, chain: Sequence[Certificate], pki: Pki, when: int) -> tuple[PublicKey, str]:
    """The key and whose it is. Raises Untrusted, PolicyInvalid."""
    between = list(chain)
    if pki.intermediates:
        between += _roots(pki.intermediates.read(), str(pki.intermediates))
    # An authority of one's own may leave out what its certificates are for; then they are for anything.
    _check_chain(leaf, between, _roots(pki.roots.read(), str(pki.roots)), when, said=False)
    if pki.email:
        _check_email(leaf, pki.email)
    if pki.hostname and not _has_host(leaf, pki.hostname):
        raise Untrusted(f"the certificate is not for the host {pki.hostname!r}")
    who = " and ".join(filter(None, (pki.email, pki.hostname)))
    return _key(leaf), f"{who}, by the certificate {_subject(leaf)}"


def _roots(data: bytes, what: str) -> list[Certificate]:
    try:
        found = parse_chain(data)
    except ValueError as error:
        raise PolicyInvalid(f"signature policy: {what}: {error}") from None
    if not found:
        raise PolicyInvalid(f"signature policy: {what}: no certificate in PEM")
    return found


def _key(leaf: Certificate) -> PublicKey:
    try:
        return usable(leaf.public_key())
    except ValueError as error:
        raise Untrusted(f"the certificate's key is {error}") from None


def _subject(leaf: Certificate) -> str:
    return leaf.subject.rfc4514_string()[:200] or f"serial {leaf.serial_number:x}"


def _check_chain(
    leaf: Certificate, between: Sequence[Certificate], roots: Sequence[Certificate], when: int, *, said: bool
) -> None:
    """`said`: the leaf must say that it is for code signing, and not only nothing else. Raises Untrusted."""
    from OpenSSL import crypto

    store = crypto.X509Store()
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    # A policy may name an intermediate as its root: whoever it names is trusted, and nobody above.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    # OpenSSL's own clock is the process's: the time is always given, as aware UTC.
    store.set_time(datetime.datetime.fromtimestamp(when, datetime.UTC))
    context = crypto.X509StoreContext(
        store, crypto.X509.from_cryptography(leaf), [crypto.X509.from_cryptography(item) for item in between]
    )
    try:
        verified = context.get_verified_chain()
    except crypto.X509StoreContextError as error:
        reason = str(error.args[0]) if error.args else str(error)
        at = datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        raise Untrusted(f"the certificate {_subject(leaf)} is not good at {at}: {reason}") from None
    for item in verified:
        _check_use(item.to_cryptography(), said=said and item.to_cryptography() == leaf)


def _check_use(certificate: Certificate, *, said: bool) -> None:
    """Extended key usage holds for the whole chain below it. Raises Untrusted."""
    from cryptography import x509

    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        if said:
            raise Untrusted("the certificate does not say that it is for code signing") from None
        return
    except ValueError as error:
        raise Untrusted(f"an extension of the certificate cannot be read ({error})") from None
    if not {use.dotted_string for use in uses} & {_CODE_SIGNING, _ANY_USE}:
        raise Untrusted(f"the certificate {_subject(certificate)} is not for code signing")


def _names(leaf: Certificate, kind: str) -> list[str]:
    from cryptography import x509

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except ValueError as error:
        raise Untrusted(f"the certificate's names cannot be read ({error})") from None
    wanted = x509.RFC822Name if kind == "email" else x509.DNSName
    return [str(name.value) for name in names if isinstance(name, wanted)]


def _check_email(leaf: Certificate, email: str) -> None:
    found = _names(leaf, "email")
    if email not in found:
        listed = ", ".join(repr(item[:100]) for item in found[:4]) or "nobody's address"
        raise Untrusted(f"the certificate is for {listed}, the policy wants {email!r}")


def _has_host(leaf: Certificate, host: str) -> bool:
    """As TLS clients match names (RFC 6125): a wildcard stands for the whole first label."""
    wanted = host.lower().rstrip(".")
    for name in _names(leaf, "host"):
        name = name.lower().rstrip(".")
        if name == wanted or (name[:2] == "*." and wanted.partition(".")[2] == name[2:] != ""):
            return True
    return False


def _issuer(leaf: Certificate) -> str:
    """Who vouched for the signer, as Fulcio wrote it down. Raises Untrusted."""
    from cryptography import x509

    found: dict[str, str] = {}
    try:
        for extension in leaf.extensions:
            value = extension.value
            if isinstance(value, x509.UnrecognizedExtension) and value.oid.dotted_string in (_ISSUER, _ISSUER_2):
                data = value.value
                if value.oid.dotted_string == _ISSUER_2:
                    data = _utf8_string(data)
                found[value.oid.dotted_string] = data.decode("utf-8")
    except ValueError as error:
        raise Untrusted(f"the certificate's issuer extension cannot be read ({error})") from None
    if not found:
        raise Untrusted("the certificate names no OIDC issuer: it is not from Fulcio")
    if len(set(found.values())) != 1:
        raise Untrusted("the certificate names two OIDC issuers that differ")
    return next(iter(found.values()))


def _utf8_string(data: bytes) -> bytes:
    """The content of a DER UTF8String. Raises ValueError."""
    if len(data) < 2 or data[0] != 0x0C:
        raise ValueError("no UTF8String")
    length, start = data[1], 2
    if length & 0x80:
        count = length & 0x7F
        if not 1 <= count <= 2 or len(data) < 2 + count:
            raise ValueError("a length that is none")
        length, start = int.from_bytes(data[2 : 2 + count], "big"), 2 + count
    if len(data) != start + length:
        raise ValueError("another length than announced")
    return data[start:]
