"""The judgement of the runner: what is expected, the summary line, the exit code, and workers that are stuck."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from conformance import run
from conformance.harness import abilities, kernel, pool
from conformance.harness.cases import Case, Group, choose, load
from conformance.harness.expectations import Expectation, ExpectationError, in_range, read, version_of
from conformance.harness.verdicts import (
    FAIL,
    PASS,
    SKIP,
    Outcome,
    as_json,
    exit_code,
    explain_skipped,
    judge,
    summary,
)

KNOWN = Expectation("fails", "newer than 1.1.5")


def outcome(result: str, name: str = "a/b") -> Outcome:
    return Outcome(name, result, 0.5, "why" if result != PASS else "")


@pytest.mark.parametrize(
    ("result", "expectation", "label"),
    [
        (PASS, None, "ok"),
        (FAIL, None, "FAIL"),
        (SKIP, None, "skip"),
        (FAIL, KNOWN, "known"),
        (PASS, KNOWN, "FAIL"),
        (SKIP, KNOWN, "skip"),
    ],
)
def test_an_outcome_is_held_against_what_was_expected(result: str, expectation: Expectation | None, label: str) -> None:
    assert judge(outcome(result), expectation).label == label


def test_an_unexpected_pass_says_which_reason_is_out_of_date() -> None:
    assert "newer than 1.1.5" in judge(outcome(PASS), KNOWN).text


def test_the_summary_and_the_exit_code() -> None:
    good = [judge(outcome(PASS), None), judge(outcome(FAIL), KNOWN), judge(outcome(SKIP), None)]
    assert summary(good) == "1 passed, 0 failed, 2 skipped"
    assert exit_code(good, 3) == 0
    assert exit_code(good, 4) == 1, "a case without a verdict"
    assert exit_code([], 0) == 1, "a suite that ran nothing shows nothing"
    for bad in (judge(outcome(FAIL), None), judge(outcome(PASS), KNOWN)):
        assert exit_code([*good, bad], 4) == 1
        assert summary([*good, bad]) == "1 passed, 1 failed, 2 skipped"
    assert explain_skipped(good) == ["   1 expected to fail: newer than 1.1.5", "   1 why"]
    written = as_json(good, {"name": "runc"})
    assert json.loads(json.dumps(written))["summary"] == summary(good)


@pytest.mark.parametrize(
    ("version", "versions", "holds"),
    [
        ("1.1.5+ds1", "<1.2", True),
        ("1.2.0-rc.1", "<1.2", False),
        ("1.1.5", ">=1.1, <1.1.5", False),
        ("1.1.5", "==1.1.5", True),
        ("1.10", ">1.9", True),
        ("0.1.0", "", True),
    ],
)
def test_ranges_of_versions(version: str, versions: str, holds: bool) -> None:
    assert in_range(version_of(version), versions) is holds


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ExpectationError, match="expected a comparison"):
        in_range((1, 1), "1.1")


def test_expectations_are_those_of_the_runtime_and_its_version() -> None:
    text = """
        [[runtime]]
        name = "runc"
        versions = "<1.2"
        fails = { "a/b" = "old" }
        [[runtime]]
        name = "runc"
        versions = ">=1.2"
        skips = { "a/b" = "hangs" }
    """
    assert read(text, "runc", (1, 1, 5), {"a/b"}) == {"a/b": Expectation("fails", "old")}
    assert read(text, "runc", (1, 3), {"a/b"}) == {"a/b": Expectation("skips", "hangs")}
    assert read(text, "ocirun", (0, 1), {"a/b"}) == {}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('fails = { "a/gone" = "x" }', "no such case"),
        ('fails = { "a/b" = " " }', "a reason is needed"),
        ('fails = { "a/b" = "x" }\nskips = { "a/b" = "y" }', "listed twice"),
        ('failures = { "a/b" = "x" }', "not \\['failures'\\]"),
    ],
)
def test_expectations_that_are_refused(entry: str, words: str) -> None:
    with pytest.raises(ExpectationError, match=words):
        read(f'[[runtime]]\nname = "runc"\n{entry}', "runc", (1, 1), {"a/b"})


def test_the_file_of_this_tree_can_be_read_for_every_runtime() -> None:
    cases = load()
    for name in ("runc", "crun", "ocirun"):
        for expectation in run.read_file(run.EXPECTED, name, (1, 1, 5), cases).values():
            assert expectation.reason


def test_cases_are_chosen_by_group_and_by_words() -> None:
    def body(_: object) -> None: ...

    cases = {name: Case(name, name.split("/")[0], body, (), 1.0) for name in ("a/one-two", "a/two", "b/two")}
    cases["b/two"] = replace(cases["b/two"], needs=("root", "magic"))
    assert [case.name for case in choose(cases, [], [], ["magic", "more"])] == ["b/two"]
    assert [case.name for case in choose(cases, ["a"], ["two"])] == ["a/one-two", "a/two"]
    assert len(choose(cases, [], [])) == 3
    with pytest.raises(ValueError, match="no group is called 'c'"):
        choose(cases, ["c"], [])


def test_a_case_may_ask_only_for_abilities_that_there_are() -> None:
    with pytest.raises(ValueError, match="unknown ability 'magic'"):
        Group("nowhere").case("magic")
    assert abilities.missing(()) == ""


def test_mount_tables_are_read_with_odd_names() -> None:
    line = "36 35 98:0 /a\\040b /mnt\\134x rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"
    [point] = kernel.parse_mountinfo(line)
    assert (point.root, point.target, point.kind, point.source) == ("/a b", "/mnt\\x", "ext3", "/dev/root")
    assert point.options == {"rw", "noatime"} and point.propagation == {"master", "shared"}
    assert "errors=continue" in point.superblock


def test_runtimes_say_who_they_are(tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.write_text("#!/bin/sh\necho fake version 1.4.2-dev\necho more\n")
    fake.chmod(0o755)
    assert run.identify(run.find(str(fake))) == ("fake", "1.4.2-dev")
    fake.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(SystemExit, match="expected 'NAME version VERSION'"):
        run.identify(str(fake))
    with pytest.raises(SystemExit, match="no runtime"):
        run.find(str(tmp_path / "none"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_runtime_that_does_nothing_fails_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The suite can fail: a program that answers everything with success passes nothing that looks at effects."""
    fake = tmp_path / "nothing"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo nothing version 1\nexit 0\n')
    fake.chmod(0o755)
    report = tmp_path / "report.json"
    chosen = ["-k", "state-of", "--group", "lifecycle"]
    assert run.main(["--runtime", str(fake), "--json", str(report), *chosen]) == 1
    said = capsys.readouterr().out.splitlines()
    cases = json.loads(report.read_text())["cases"]
    assert said[-1] == f"0 passed, {len(cases)} failed, 0 skipped" and len(cases) >= 5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_case_that_is_stuck_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    fake = tmp_path / "hanging"
    fake.write_text("#!/bin/sh\nsleep 1000\n")
    fake.chmod(0o755)
    first, second = choose(load(), ["lifecycle"], ["unknown-container"])[:2]
    outcomes: list[Outcome] = []
    cases = [replace(case, limit_s=2.0 - pool.GRACE_S) for case in (first, second)]
    pool.run(cases, str(fake), 1, outcomes.append)
    assert [(found.case, found.result) for found in outcomes] == [(first.name, FAIL), (second.name, FAIL)]
    assert all("not within" in found.message for found in outcomes)
    assert not [pid for pid in kernel.processes() if str(fake) in _command(pid)]


def _command(pid: int) -> str:
    try:
        return kernel.proc(pid, "cmdline")
    except FileNotFoundError:
        return ""
