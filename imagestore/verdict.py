"""From a policy, an image and its signatures to a decision, with the reason for each part of it.

    requirements of the best scope ── each ──> met by this signature of that signer, or not, and why
                                   └─ all met ──> accepted

No network. An image from an index is known by two digests, its manifest's and the index's: a signature of either speaks
for it, since either names every byte of it. Refuses by default: no requirement, no signature, no key that can be read.
Invariant: `accepted` means that every requirement was met, by a claim about one of the digests and a name that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imagestore.claims import Claim
from imagestore.identity import Identity
from imagestore.model import ContentInvalid, SignatureRefused
from imagestore.policy import Accept, Material, Policy, Reject, Requirement, SignedBy, SigstoreSigned
from imagestore.scopes import Subject
from imagestore.signatures import Signature, Simple
from runtime.linux.dataclass import dataclass

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """One requirement: met by `by` with the signature from `origin`, or the `reasons` why by none."""

    requirement: Requirement
    met: bool
    by: str = ""
    origin: str = ""
    claim: Claim | None = None
    reasons: tuple[str, ...] = ()

    def sentence(self) -> str:
        kind = self.requirement.type
        if not self.met:
            return f"{kind}: {'; '.join(self.reasons[:_SHOWN])}" + ("; …" if len(self.reasons) > _SHOWN else "")
        if self.claim is None:
            return f"{kind}: accepts any image, signed or not"
        name = f" as {self.claim.name}" if self.claim.name else ""
        return f"{kind}: signed by {self.by}: {self.claim.digest}{name} ({self.origin})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about one image under one name."""

    subject: Subject
    digests: tuple[str, ...]
    scope: str
    outcomes: tuple[Outcome, ...]

    @property
    def accepted(self) -> bool:
        return bool(self.outcomes) and all(outcome.met for outcome in self.outcomes)

    def require(self) -> None:
        """Raises SignatureRefused unless accepted."""
        if not self.accepted:
            unmet = " and ".join(outcome.sentence() for outcome in self.outcomes if not outcome.met)
            where = f"by the requirements of {self.scope}"
            raise SignatureRefused(f"the signature policy refuses {self.subject} {where}: {unmet}")


def needs_signatures(requirements: Sequence[Requirement]) -> bool:
    """False where signatures would change nothing: all is accepted, or rejected whatever there is."""
    return any(not isinstance(one, Accept | Reject) for one in requirements) and not any(
        isinstance(one, Reject) for one in requirements
    )


def judge(
    policy: Policy,
    subject: Subject,
    digests: tuple[str, ...],
    signatures: Sequence[Signature],
    now: float,
    *,
    unnamed: bool = False,
    timestamps: Material | None = None,
) -> Verdict:
    """`now` in seconds since the epoch; `unnamed` accepts bundles that name no repository; `timestamps` are the
    certificates of time-stamping authorities. Raises PolicyInvalid."""
    scope, requirements = policy.requirements(subject)
    outcomes = tuple(_outcome(one, subject, digests, signatures, now, unnamed, timestamps) for one in requirements)
    return Verdict(subject, digests, scope, outcomes)


def _outcome(
    requirement: Requirement,
    subject: Subject,
    digests: tuple[str, ...],
    signatures: Sequence[Signature],
    now: float,
    unnamed: bool,
    timestamps: Material | None,
) -> Outcome:
    if isinstance(requirement, Accept):
        return Outcome(requirement, met=True)
    if isinstance(requirement, Reject):
        return Outcome(requirement, met=False, reasons=(requirement.reason,))
    simple = isinstance(requirement, SignedBy)
    fitting = [one for one in signatures if isinstance(one, Simple) is simple]
    if not fitting:
        kind = "simple signing" if simple else "sigstore"
        others = f" ({len(signatures)} of another kind)" if signatures else ""
        return Outcome(requirement, met=False, reasons=(f"there is no {kind} signature{others}",))
    reasons: list[str] = []
    for found, claims, who in _verified(requirement, fitting, now, reasons, timestamps):
        for claim in claims:
            wrong = _mismatch(claim, subject, digests, requirement.identity, unnamed)
            if not wrong:
                return Outcome(requirement, True, who, found.origin, claim)
            reasons.append(f"{found.origin}: signed by {who}, but {wrong}")
        if not claims:
            reasons.append(f"{found.origin}: signed by {who}, but about nothing with a sha256 digest")
    return Outcome(requirement, met=False, reasons=tuple(reasons))


def _verified(
    requirement: SignedBy | SigstoreSigned,
    signatures: Sequence[Signature],
    now: float,
    reasons: list[str],
    timestamps: Material | None,
) -> Iterator[tuple[Signature, tuple[Claim, ...], str]]:
    """The signatures that are good, with what they say and who made them; why others are not goes to `reasons`."""
    from imagestore import sigstore, simple_signing  # with the libraries behind them: only where a policy asks for it

    keys = simple_signing.keyring(requirement) if isinstance(requirement, SignedBy) else None
    roots = None if isinstance(requirement, SignedBy) else sigstore.trusted(requirement, timestamps)
    for found in signatures:
        try:
            if isinstance(found, Simple):
                claim, who = simple_signing.verify(found.data, keys or (), now)
                yield found, (claim,), who
            elif roots is not None:
                claims, who = sigstore.verify(found, roots, now)
                yield found, claims, who
        except (simple_signing.NotSigned, sigstore.NotSigned, ContentInvalid) as error:
            reasons.append(f"{found.origin}: {error}")


def _mismatch(claim: Claim, subject: Subject, digests: tuple[str, ...], identity: Identity, unnamed: bool) -> str:
    """ "" when the claim is about this image under a name that fits, or what is wrong."""
    if claim.digest not in digests:
        return f"for another image, {claim.digest}"
    if not claim.name:
        # What names no repository stands for the one that it was found in, where that is all the policy asks for.
        if unnamed and subject.transport == "docker" and identity.kind in ("matchRepository", "matchRepoDigestOrExact"):
            return ""
        return (
            "for no repository in particular: it would be as good for a copy anywhere "
            "(image.accept_unnamed_bundles takes that)"
        )
    if not identity.accepts(subject.reference, claim.name):
        return f"for {claim.name[:200]!r}, which {identity} does not accept"
    return ""
