"""conformance/run fields [--row NAME]… [--changed [COMMIT]] [--only unit|kernel] [--verbose]

Shows that the tests of the CRI's fields can fail. Each row of conformance/cri_fields.toml and
cri_answers.toml names the test that shows its field. Here that test is played as it is, and must pass; then with the
field taken out of every request, or of every answer, and must fail: else it shows nothing, and the field might as well
be ignored; for answers once more with something else in the field, and must fail: else any value would do; then as it
is again. A row is reported when its test passes without the field or with a wrong one, and when no message of the test
ever had it. Rows whose tests stand on fakes are `unit`, the others `kernel`.

Runs in namespaces of its own. The last line is "N passed, N failed"; the exit code is 0 only if none has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conformance.cri_fields import ANSWERS, ROOT, SOURCE, load, load_answers
from conformance.images import layouts
from conformance.isolated import reenter
from cri.api import api_pb2 as pb

UNIT = "tests/unit/"


@dataclass(frozen=True, slots=True)
class Play:
    """A test without a field, or with a wrong one."""

    test: str
    field: str  # as tests/without.py wants it: what is done, then the field's name


@dataclass(slots=True)
class Told:
    """What became of all cases of a play."""

    outcomes: list[str] = field(default_factory=list)
    said: str = ""
    met: int = 0
    seconds: float = 0.0


def plays() -> Iterator[tuple[Play, set[str]]]:
    """Of every row that has a test, with what the row goes by: its names, its files."""
    for message, fields in load().items():
        for name, row in fields.items():
            if row.test:
                yield _play("request", message, name, row.test, row.where)
    for message, answers in load_answers().items():
        for name, answer in answers.items():
            yield _play("answer", message, name, answer.test)
            if not _is_message(message, name):
                yield _play("altered", message, name, answer.test)


def _is_message(message: str, name: str) -> bool:
    """Whether a field is a single message, whose own fields are altered instead of it."""
    field = pb.DESCRIPTOR.message_types_by_name[message].fields_by_name[name]
    return field.message_type is not None and not field.is_repeated


def _play(side: str, message: str, name: str, test: str, *files: str) -> tuple[Play, set[str]]:
    return Play(test, f"{side} {message}.{name}"), {f"{message}.{name}", message, test.partition("::")[0], *files}


def changed(since: str) -> set[str]:
    """The files that differ from those of a commit, and the fields whose rows do."""
    asked = ["git", "-C", str(ROOT), "diff", "--name-only", since, "--"]
    found = set(subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    for source in (SOURCE, ANSWERS):
        asked = ["git", "-C", str(ROOT), "show", f"{since}:{source.relative_to(ROOT)}"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)  # it may not have been there
        before = tomllib.loads(done.stdout)
        for message, fields in tomllib.loads(source.read_text()).items():
            rows = before.get(message, {})
            found |= {f"{message}.{name}" for name, row in fields.items() if rows.get(name) != row}
    return found


def chosen(options: argparse.Namespace) -> list[Play]:
    """The plays that were asked for."""
    rows = list(plays())
    if options.row:
        if unknown := set(options.row) - {name for _, names in rows for name in names}:
            raise SystemExit(f"no row with a test is named {', '.join(sorted(unknown))}")
        rows = [row for row in rows if not row[1].isdisjoint(options.row)]
    if options.changed:
        different = changed(options.changed)
        rows = [row for row in rows if not row[1].isdisjoint(different)]
    wanted = [play for play, _ in rows]
    if options.only:
        wanted = [play for play in wanted if play.test.startswith(UNIT) == (options.only == "unit")]
    return wanted


def played(wanted: Collection[Play]) -> dict[Play, Told]:
    """What pytest tells of each play, and of each test as it is."""
    by_test: dict[str, list[str]] = defaultdict(list)
    for play in wanted:
        by_test[play.test].append(play.field)
    environment = {key: value for key, value in os.environ.items() if key != "OCID_REQUIRE_ALL"}
    with tempfile.TemporaryDirectory(prefix="ocid-fields-") as name:
        file = Path(name, "plays.json")
        file.write_text(json.dumps({"plays": by_test}))
        words = [
            "-p",
            "tests.without",
            "--without",
            str(file),
            "-p",
            "no:cacheprovider",
            "-q",
            "--tb=no",
            "--no-header",
        ]
        command = [sys.executable, "-m", "pytest", *words, *sorted(by_test)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):  # 1: tests have failed, as they should
            print(done.stdout + done.stderr)
            raise SystemExit(f"[fields] pytest exits with {done.returncode} and tells nothing")
        entries = json.loads(file.with_suffix(".told").read_text())
    told: dict[Play, Told] = defaultdict(Told)
    for entry in entries:
        one = told[Play(entry["test"], entry["field"])]
        one.outcomes.append(entry["outcome"])
        one.met += entry["met"]
        one.seconds += entry["seconds"]
        if entry["outcome"] != "passed":
            one.said = entry["said"]
    return told


def problem(whole: Told, without: Told) -> str:
    """What is wrong with a row; "" when its test has noticed."""
    if not whole.outcomes or set(whole.outcomes) != {"passed"}:
        return f"no verdict, the test as it is: {', '.join(sorted(set(whole.outcomes)))} {whole.said}"
    if not without.met:
        return "no message of the test has the field"
    if "failed" not in without.outcomes:
        return f"its test does not notice: {', '.join(sorted(set(without.outcomes)))}"
    return ""


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="conformance/run fields")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="Message.field, or all of a Message")
    parser.add_argument("--changed", nargs="?", const="origin/main", metavar="COMMIT", help="rows, files that differ")
    parser.add_argument("--only", choices=("unit", "kernel"))
    parser.add_argument("--verbose", action="store_true", help="also what the tests say that fail")
    options = parser.parse_args(words)
    if options.only != "unit":
        layouts(["busybox"])  # before the namespaces: its packages come over the network
    reenter("conformance.fields", words)
    began = time.monotonic()
    wanted = chosen(options)
    if not wanted:
        print("[fields] nothing to be played")
        return 0
    told = played(wanted)
    failed = 0
    for play in wanted:
        wrong = problem(told[Play(play.test, "")], told[play])
        failed += bool(wrong)
        if wrong:
            print(f"[fields] {play.field} ({play.test}): {wrong}")
        elif options.verbose:
            print(f"[fields] {play.field.partition(' ')[2]}: {told[play].seconds:.1f} s: {told[play].said}")
    print(f"{len(wanted) - failed} passed, {failed} failed ({time.monotonic() - began:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
