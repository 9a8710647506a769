"""Our own suite for OCI runtimes: cases that see a runtime as its callers do, and the kernel as it is afterwards.

    conformance/run --runtime runc           Debian's runc, the reference: run first, it proves the suite
    conformance/run [--runtime ocirun]       ours
    conformance/run --runtime /path/to/one   any other
    conformance/run images                   images instead: beside skopeo and umoci (conformance/image_lane)

Prints a line for each case as it ends, and last "N passed, N failed, N skipped". What a runtime is known not to pass
is in expected.toml with the reason; a case of those that passes is an error too. Exit code 0: everything as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conformance.harness import abilities, pool
from conformance.harness.cases import Case, choose, load
from conformance.harness.expectations import Expectation, ExpectationError, read_file, version_of
from conformance.harness.verdicts import (
    SKIP,
    Outcome,
    Verdict,
    as_json,
    exit_code,
    explain_skipped,
    judge,
    summary,
)

EXPECTED = Path(__file__).parent / "expected.toml"


def find(runtime: str) -> str:
    """The path of a runtime that is given as a path or as a name; ours is beside this interpreter."""
    if "/" in runtime:
        path: str | None = os.path.abspath(runtime)
    elif runtime == "ocirun":
        path = str(Path(sys.executable).parent / "ocirun")
    else:
        path = shutil.which(runtime)
    if not path or not os.access(path, os.X_OK):
        raise SystemExit(f"conformance: no runtime {runtime!r}: {path or 'not in $PATH'} is not a program")
    return path


def identify(path: str) -> tuple[str, str]:
    """Name and version, as the first line of `--version` has them: "runc version 1.1.5+ds1"."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    match = re.match(r"(\S+) version (\S+)", said)
    if not match:
        raise SystemExit(f"conformance: {path} --version: expected 'NAME version VERSION', got {said[:80]!r}")
    return match[1], match[2]


class Report:
    """Prints a line for each outcome as it comes, and keeps the verdicts."""

    def __init__(self, expected: dict[str, Expectation]) -> None:
        self.verdicts: list[Verdict] = []
        self._expected = expected

    def __call__(self, outcome: Outcome) -> None:
        verdict = judge(outcome, self._expected.get(outcome.case))
        self.verdicts.append(verdict)
        print(f"{verdict.label:5} {outcome.case:62} {outcome.seconds:6.2f} s", flush=True)
        if verdict.failed or verdict.label == "known":
            for line in verdict.text.splitlines():
                print(f"      {line}", flush=True)


def run(path: str, cases: Sequence[Case], jobs: int, report: Report, expected: dict[str, Expectation]) -> None:
    """Runs what is to be run; what expected.toml takes out is reported with its reason."""
    chosen = []
    for case in cases:
        expectation = expected.get(case.name)
        if expectation and expectation.kind == "skips":
            report(Outcome(case.name, SKIP, 0.0, f"does not apply: {expectation.reason}"))
        else:
            chosen.append(case)
    pool.run(chosen, path, jobs, report)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="conformance/run", description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--runtime", default="ocirun", help="path or name of the runtime (default: ocirun)")
    made.add_argument("--group", action="append", default=[], help="only cases of this group; again for more")
    made.add_argument("-k", action="append", default=[], metavar="WORD", help="only cases with this in their name")
    made.add_argument(
        "--needs",
        action="append",
        default=[],
        metavar="ABILITY",
        help="only cases that need one of these of the machine",
    )
    made.add_argument("--list", action="store_true", help="print the cases and what they need, and run none")
    made.add_argument("--json", metavar="FILE", help="write everything to this file as well")
    made.add_argument("--jobs", type=int, default=3, help="how many cases at a time (default: 3)")
    made.add_argument("--expected", type=Path, default=EXPECTED, help="what is known not to pass, and why")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["images"]:
        from conformance.image_lane.__main__ import main as images

        return images(words[1:])
    options = parser().parse_args(words)
    every = load()
    try:
        cases = choose(every, options.group, options.k, options.needs)
    except ValueError as error:
        raise SystemExit(f"conformance: {error}") from None
    if options.list:
        for case in cases:
            lacking = abilities.missing(case.needs)
            print(
                f"{case.name:62} {' '.join(case.needs)}{f' (this machine lacks {lacking})' if lacking else ''}".rstrip()
            )
        print(f"{len(cases)} cases")
        return 0
    if os.geteuid() != 0:
        raise SystemExit("conformance: namespaces, mounts and cgroups need root")
    path = find(options.runtime)
    name, version = identify(path)
    try:
        expected = read_file(options.expected, name, version_of(version), every)
    except ExpectationError as error:
        raise SystemExit(f"conformance: {error}") from None
    print(f"{name} {version} ({path}), {len(cases)} cases")
    began = time.monotonic()
    report = Report(expected)
    run(path, cases, options.jobs, report, expected)
    print(f"\n{name} {version}: {time.monotonic() - began:.1f} s; skipped:")
    print("\n".join(explain_skipped(report.verdicts)) or "     nothing")
    for verdict in report.verdicts:
        if verdict.failed:
            print(f"FAIL  {verdict.outcome.case}")
    print(summary(report.verdicts))
    if options.json:
        written = as_json(report.verdicts, {"name": name, "version": version, "path": path})
        Path(options.json).write_text(json.dumps(written, indent=1) + "\n")
    return exit_code(report.verdicts, len(cases))


if __name__ == "__main__":
    sys.exit(main())
