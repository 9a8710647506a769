"""What a run of critest means: each spec that did not pass must be listed in expected.toml, with the reason, and each
that is listed must not pass; as many specs must have run as ever.

Refuses a skip that nobody gave a reason for. Invariant: no verdict depends on another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conformance.critest.tool import PASSED, SKIPPED, Run, Spec
from conformance.harness.expectations import Expectation

APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wrong` are sentences, none when all is as it should be; `known` and `skipped` are names with their reasons."""

    passed: tuple[Spec, ...]
    known: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    wrong: tuple[str, ...]

    @property
    def executed(self) -> int:
        return len(self.passed) + len(self.known)

    def __str__(self) -> str:
        known = f", {len(self.known)} failed as known" if self.known else ""
        return f"{len(self.passed)} passed{known}, {len(self.skipped)} skipped, {len(self.wrong)} wrong"


def judge(run: Run, expected: Mapping[str, Expectation], least: int) -> Verdict:
    """`least` is how many specs must have been executed."""
    passed, known, skipped, wrong = [], [], [], []
    for spec in sorted(run.specs, key=lambda spec: spec.name):
        expectation = expected.get(spec.name)
        kind = expectation.kind if expectation else ""
        reason = expectation.reason if expectation else ""
        if spec.state == PASSED:
            passed.append(spec)
            if kind:
                wrong.append(f"{spec.name}: passes, and expected.toml says it {kind}: {reason}")
        elif spec.state == SKIPPED:
            reason = reason if kind == "skips" else lacking(spec)
            skipped.append((spec.name, reason or spec.text))
            if not reason:
                wrong.append(f"{spec.name}: skips itself: {spec.text}")
        elif kind == "fails":
            known.append((spec.name, reason))
        else:
            wrong.append(f"{spec.name}: {spec.state}: {spec.text}")
    executed = sum(spec.state != SKIPPED for spec in run.specs)
    if executed < least:
        wrong.append(f"{executed} specs were executed, and {least} are expected")
    return Verdict(tuple(passed), tuple(known), tuple(skipped), tuple(wrong))


def lacking(spec: Spec) -> str:
    """What this machine lacks for a spec, as far as we can see for ourselves."""
    if not spec.name.startswith("AppArmor "):
        return ""
    enabled = APPARMOR.read_text().startswith("Y") if APPARMOR.exists() else False
    return "" if enabled else "this kernel has no AppArmor"


def compare(ours: Verdict, theirs: Verdict) -> tuple[int, float, float]:
    """How many specs both passed, and how many seconds those took each of them."""
    seconds = {spec.name: spec.seconds for spec in theirs.passed}
    both = [spec for spec in ours.passed if spec.name in seconds]
    return len(both), sum(spec.seconds for spec in both), sum(seconds[spec.name] for spec in both)
