"""RFC 3161: a time-stamping authority that the node trusts says that a signature was there at a time.

    token ─▶ signed by an authority's certificate, good at that time, for time-stamping ─▶ over this very signature

The message is read and its signature checked by rfc3161-client, whose checks are those of sigstore's own verifiers.
Refuses authorities that the configuration does not name: that a token brings its certificate along proves nothing. All
of it works offline. Invariant: a time that comes from here was signed by such an authority.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagestore.certificates import parse_chain
from imagestore.model import PolicyInvalid
from imagestore.policy import Material
from runtime.linux.dataclass import dataclass

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from rfc3161_client import TimeStampRequest, Verifier


class Untimed(Exception):
    """The token proves no time; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Authorities:
    """Who is trusted about times: authorities' own certificates where tokens may lack them, and what they lead to."""

    leaves: tuple[Certificate, ...]
    between: tuple[Certificate, ...]
    roots: tuple[Certificate, ...]


def authorities(material: Material | None) -> Authorities | None:
    """The certificates in a file of PEM; None where none is named. Raises PolicyInvalid."""
    if material is None:
        return None
    leaves, between, roots = [], [], []
    try:
        for certificate in parse_chain(material.read()):
            if not _is_authority(certificate):
                leaves.append(certificate)
            elif certificate.subject == certificate.issuer:
                roots.append(certificate)
            else:
                between.append(certificate)
    except ValueError as error:
        raise PolicyInvalid(f"{material}: {error}") from None
    if not roots:
        raise PolicyInvalid(f"{material}: no certificate in it is a root, signed by itself")
    return Authorities(tuple(leaves), tuple(between), tuple(roots))


def time_of(token: bytes, signature: bytes, trusted: Authorities) -> int:
    """The time in `token`, in seconds since the epoch, once it is known to be about `signature`. Raises Untimed."""
    from rfc3161_client import VerificationError, decode_timestamp_response

    try:
        response = decode_timestamp_response(token)
        when: datetime.datetime = response.tst_info.gen_time
    except ValueError as error:
        raise Untimed(f"the RFC 3161 timestamp cannot be read ({str(error)[:200]})") from None
    reason = ""
    for verifier in _verifiers(trusted):
        try:
            verifier.verify_message(response, signature)
        except (VerificationError, ValueError) as error:
            reason = str(error)[:200]
            continue
        return int(when.timestamp())
    at = when.strftime("%Y-%m-%d %H:%M:%S UTC")
    raise Untimed(f"the RFC 3161 timestamp of {at} is by no authority that the node trusts, or not of this: {reason}")


def query(signature: bytes) -> TimeStampRequest:
    """What an authority is asked about `signature`; its own certificate shall come along."""
    from rfc3161_client import TimestampRequestBuilder

    return TimestampRequestBuilder().data(signature).nonce(nonce=True).cert_request(cert_request=True).build()


def check_answer(token: bytes, asked: TimeStampRequest) -> None:
    """Raises Untimed where an authority has answered something else, or that it will not. Who it is, is for those to
    ask who verify."""
    from rfc3161_client import decode_timestamp_response

    try:
        info = decode_timestamp_response(token).tst_info
    except ValueError as error:
        raise Untimed(f"the RFC 3161 timestamp cannot be read ({str(error)[:200]})") from None
    if (info.message_imprint.message, info.nonce) != (asked.message_imprint.message, asked.nonce):
        raise Untimed("the RFC 3161 timestamp is of something else than was asked about")


def _verifiers(trusted: Authorities) -> Iterator[Verifier]:
    """One for tokens that bring their certificate, and one for each authority whose tokens need not."""
    from rfc3161_client import VerifierBuilder

    for leaf in (None, *trusted.leaves):
        yield VerifierBuilder(
            tsa_certificate=leaf, intermediates=list(trusted.between), roots=list(trusted.roots)
        ).build()


def _is_authority(certificate: Certificate) -> bool:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
