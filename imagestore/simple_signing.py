"""Simple signing: an OpenPGP message whose content says which digest may be called what (containers-signature(5)).

The OpenPGP itself is Sequoia's (pysequoia, imported when a policy first needs it; docs/decisions/0008), which is given
no packet that grows (openpgp_packets). Refuses keys that are expired or revoked today, whatever they were when they
signed. Invariant: the claim that comes from here is the content that was verified, never a copy read beside it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagestore.claims import Claim, simple
from imagestore.model import PolicyInvalid
from imagestore.openpgp_packets import unwrapped
from imagestore.policy import SignedBy

if TYPE_CHECKING:
    from pysequoia import Cert

_CONTENT = 1 << 20


class NotSigned(Exception):
    """The message proves nothing; `str()` says why."""


def keyring(requirement: SignedBy) -> list[Cert]:
    """The certificates of the policy. Raises PolicyInvalid."""
    from pysequoia import Cert

    found: list[Cert] = []
    for material in requirement.keys:
        data = material.read()
        try:
            found += Cert.split_bytes(data)
        except Exception as error:  # the library raises its own errors as bare exceptions
            raise PolicyInvalid(f"signature policy: {material}: no OpenPGP keys in it ({_words(error)})") from None
    if not found:
        raise PolicyInvalid("signature policy: signedBy: no OpenPGP keys in its key files")
    return found


def verify(message: bytes, keys: Sequence[Cert], now: float) -> tuple[Claim, str]:
    """What was signed, and by whom. Raises NotSigned, ContentInvalid (well signed, but no claim)."""
    from pysequoia import verify as verify_message

    try:
        message = unwrapped(message, _CONTENT)
    except ValueError as error:
        raise NotSigned(f"no OpenPGP message that is read here: {error}") from None
    try:
        found = verify_message(bytes=message, store=lambda ids: list(keys))
    except Exception as error:
        raise NotSigned(f"no good OpenPGP signature by a key of the policy ({_words(error)})") from None
    signers = {signature.certificate for signature in found.valid_sigs}
    good = [cert for cert in keys if cert.fingerprint in signers]
    if not good or found.bytes is None:
        raise NotSigned("no good OpenPGP signature by a key of the policy")
    reasons = [reason for reason in (_unusable(cert, now) for cert in good) if reason]
    if len(reasons) == len(good):
        raise NotSigned("; ".join(reasons))
    content = bytes(found.bytes)
    signer = next(cert for cert in good if not _unusable(cert, now))
    names = ", ".join(str(user) for user in signer.user_ids[:2])
    return simple(content), f"OpenPGP key {signer.fingerprint}" + (f" ({names})" if names else "")


def _unusable(cert: Cert, now: float) -> str:
    if cert.is_revoked:
        return f"the OpenPGP key {cert.fingerprint} is revoked"
    if cert.expiration is not None and cert.expiration.timestamp() <= now:
        at = cert.expiration.astimezone(datetime.UTC).strftime("%Y-%m-%d")
        return f"the OpenPGP key {cert.fingerprint} has expired on {at}"
    return ""


def _words(error: Exception) -> str:
    # With RUST_BACKTRACE in the environment the library tells where in its own code it was as well.
    said = str(error).partition("Stack backtrace:")[0]
    return " ".join(said.split())[:200] or type(error).__name__
