"""The lane's judgement of critest: what a report holds, and that nothing which goes wrong is passed over."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from conformance.critest import __main__ as lane
from conformance.critest import judge
from conformance.critest.tool import Run, RunFailed, Spec, read
from conformance.harness.expectations import Expectation, read_file

FAILS = {"pulls by digest": Expectation("fails", "no registry has it")}
SKIPS = {"has user namespaces": Expectation("skips", "newer than this one")}


def spec(name: str, state: str = "passed", text: str = "", seconds: float = 1.0) -> Spec:
    return Spec(name, state, seconds, text)


def judged(*specs: Spec, expected: dict[str, Expectation] | None = None, least: int = 0) -> judge.Verdict:
    return judge.judge(Run(specs, frozenset(), 1.0, 1), expected or {}, least)


def leaf(text: str, state: str, message: str = "", **more: Any) -> dict[str, Any]:
    failure = {"Failure": {"Message": message}} if message else {}
    report = {"LeafNodeType": "It", "ContainerHierarchyTexts": ["[k8s.io] Pod", "context"], "LeafNodeText": text}
    return {**report, "State": state, "RunTime": 2_000_000_000, **failure, **more}


def suite(*reports: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    config = {"RandomSeed": 7}
    return [{"SpecReports": reports, "SpecialSuiteFailureReasons": None, "RunTime": 3e9, "SuiteConfig": config, **more}]


def test_a_report_is_read_without_what_a_filter_took_out() -> None:
    before = {**leaf("", "passed"), "LeafNodeType": "BeforeSuite"}
    waits = leaf("benchmark", "skipped")
    found = read(suite(before, leaf("works", "passed"), waits, leaf("needs more", "skipped", "no such kernel")))
    assert [(one.name, one.state, one.seconds) for one in found.specs] == [
        ("Pod context works", "passed", 2.0),
        ("Pod context needs more", "skipped", 2.0),
    ]
    assert "Pod context benchmark" in found.names and (found.seconds, found.seed) == (3.0, 7)


def test_a_suite_that_does_not_come_to_its_specs_is_an_error() -> None:
    before = {**leaf("", "failed", "no socket"), "LeafNodeType": "BeforeSuite"}
    with pytest.raises(RunFailed, match="BeforeSuite: no socket"):
        read(suite(before))
    with pytest.raises(RunFailed, match="Interrupted"):
        read(suite(leaf("works", "passed"), SpecialSuiteFailureReasons=["Interrupted by User"]))


@pytest.mark.parametrize("state", ["failed", "panicked", "timedout", "interrupted", "aborted"])
def test_what_does_not_pass_is_wrong(state: str) -> None:
    verdict = judged(spec("one"), spec("two", state, "because"))
    assert verdict.wrong == (f"two: {state}: because",) and len(verdict.passed) == 1


def test_a_failure_that_is_listed_is_known_and_its_pass_is_wrong() -> None:
    known = judged(spec("pulls by digest", "failed"), expected=FAILS)
    assert known.known == (("pulls by digest", "no registry has it"),) and not known.wrong and known.executed == 1
    assert "passes" in judged(spec("pulls by digest"), expected=FAILS).wrong[0]
    # Nor may it no longer run.
    assert "skips itself" in judged(spec("pulls by digest", "skipped", "later"), expected=FAILS).wrong[0]


def test_a_skip_needs_a_reason_of_ours() -> None:
    assert judged(spec("has user namespaces", "skipped", "no handler"), expected=SKIPS).skipped == (
        ("has user namespaces", "newer than this one"),
    )
    assert "passes" in judged(spec("has user namespaces"), expected=SKIPS).wrong[0]
    assert judged(spec("has user namespaces", "skipped", "no handler")).wrong == (
        "has user namespaces: skips itself: no handler",
    )


@pytest.mark.parametrize(("content", "wrong"), [("Y\n", 1), ("N\n", 0), (None, 0)])
def test_apparmor_is_skipped_only_where_there_is_none(
    content: str | None, wrong: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = tmp_path / "enabled"
    if content:
        enabled.write_text(content)
    monkeypatch.setattr(judge, "APPARMOR", enabled)
    verdict = judged(spec("AppArmor blocks writes", "skipped", "AppArmor is disabled on this host"))
    assert len(verdict.wrong) == wrong and len(verdict.skipped) == 1


def test_fewer_specs_than_ever_are_wrong() -> None:
    specs = [spec("one"), spec("AppArmor two", "skipped", "disabled"), spec("pulls by digest", "failed")]
    assert not judged(*specs, expected=FAILS, least=2).wrong
    assert judged(*specs, expected=FAILS, least=3).wrong == ("2 specs were executed, and 3 are expected",)


def test_times_are_compared_over_what_both_pass() -> None:
    ours = judged(spec("a", seconds=1), spec("b", seconds=2), spec("c", "failed"), spec("d", seconds=9))
    theirs = judged(spec("a", seconds=3), spec("b", seconds=4), spec("c", seconds=5), spec("d", "failed"))
    assert judge.compare(ours, theirs) == (2, 3, 7)


def test_every_entry_of_the_list_has_a_reason_and_every_runtime_a_number() -> None:
    document = lane.EXPECTED.read_text()
    names = re.findall(r'^"([^"]+)" = ', document, re.MULTILINE)
    for runtime, version in (("ocid", (0, 1)), ("containerd", (1, 6, 20))):
        assert all(entry.reason for entry in read_file(lane.EXPECTED, runtime, version, names).values())
    assert set(tomllib.loads(document)["executed"]) == set(lane.RUNTIMES)
