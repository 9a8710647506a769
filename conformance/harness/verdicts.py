"""What came of a case, held against what was expected of it; and the summary of all of them.

Invariant: a case counts as failed exactly when something is not as expected: it failed and nobody said it would, or it
passed although expected.toml says that it fails. The exit code is 0 only without those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from conformance.harness.expectations import Expectation

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker says of one case: "pass", "fail" or "skip", and why unless it passed."""

    case: str
    result: str
    seconds: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`label` is what the line of the case begins with: ok, FAIL, known (an expected failure) or skip."""

    outcome: Outcome
    label: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.label == "FAIL"


def judge(outcome: Outcome, expectation: Expectation | None) -> Verdict:
    """Holds an outcome against what expected.toml says of the case, if anything."""
    if outcome.result == SKIP:
        return Verdict(outcome, "skip", outcome.message)
    if expectation is None:
        return Verdict(outcome, "ok" if outcome.result == PASS else "FAIL", outcome.message)
    if outcome.result == FAIL:
        return Verdict(outcome, "known", expectation.reason)
    return Verdict(outcome, "FAIL", f"passes, but expected.toml says that it fails: {expectation.reason}")


def summary(verdicts: Collection[Verdict]) -> str:
    """The last line. What was expected to fail and did is neither a pass nor a failure: it counts as skipped."""
    passed = sum(verdict.label == "ok" for verdict in verdicts)
    failed = sum(verdict.failed for verdict in verdicts)
    return f"{passed} passed, {failed} failed, {len(verdicts) - passed - failed} skipped"


def explain_skipped(verdicts: Collection[Verdict]) -> list[str]:
    """One line for each reason that cases are skipped for, with how many there are of it."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        if verdict.label in ("skip", "known"):
            reason = f"expected to fail: {verdict.text}" if verdict.label == "known" else verdict.text
            counts[reason] = counts.get(reason, 0) + 1
    return [f"{count:4} {reason}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def exit_code(verdicts: Collection[Verdict], expected: int) -> int:
    """0 if each of the `expected` cases has a verdict, and all are as expected."""
    return int(len(verdicts) != expected or not verdicts or any(verdict.failed for verdict in verdicts))


def as_json(verdicts: Collection[Verdict], runtime: Mapping[str, str]) -> dict[str, object]:
    """Everything, for --json."""
    return {
        "runtime": dict(runtime),
        "summary": summary(verdicts),
        "cases": [
            {
                "name": verdict.outcome.case,
                "verdict": verdict.label,
                "result": verdict.outcome.result,
                "seconds": round(verdict.outcome.seconds, 3),
                "message": verdict.outcome.message,
                "text": verdict.text,
            }
            for verdict in verdicts
        ],
    }
