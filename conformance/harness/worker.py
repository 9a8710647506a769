"""One worker: runs the cases that it is told, one after the other, in namespaces that are its own.

    python -m conformance.isolated conformance.harness.worker RUNTIME DIRECTORY CGROUP

The pool (harness/pool.py) writes the name of a case to its stdin, a line each, and reads one JSON line with the outcome
for it from its stdout. pid 1 of the worker's pid namespace (conformance/isolated.py) reaps what cases orphan; the
worker's death takes everything that still runs with it. A case that passes and leaves something behind has failed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from conformance.harness import abilities
from conformance.harness.box import Box
from conformance.harness.cases import Case, Skip, load
from conformance.harness.verdicts import FAIL, PASS, SKIP, Outcome


def run_case(case: Case, runtime: str, directory: Path, cgroup: str) -> Outcome:
    """Runs a case in a fresh box and looks what it left."""
    began = time.monotonic()
    lacking = abilities.missing(case.needs)
    if lacking:
        return Outcome(case.name, SKIP, 0.0, f"this machine lacks {lacking}")
    directory.mkdir()
    # Root of a user namespace walks through here to its rootfs.
    directory.chmod(0o711)
    box = Box(runtime, directory, cgroup)
    result, message = PASS, ""
    try:
        case.body(box)
    except Skip as reason:
        result, message = SKIP, str(reason)
    except Exception as error:
        result, message = FAIL, _describe(error)
        if box.last and repr(box.last) not in message:
            message += f"\nlast command: {box.last!r}"
    try:
        left = box.close()
    except Exception as error:
        left = [f"clean-up: {_describe(error)}"]
    if left:
        message = "\n".join(filter(None, (message, *(f"left behind: {what}" for what in left))))
        result = FAIL if result == PASS else result
    shutil.rmtree(directory, ignore_errors=True)
    return Outcome(case.name, result, time.monotonic() - began, message)


def _describe(error: Exception) -> str:
    """What failed, and the line of the case that found out."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if "/conformance/runtime/" in frame.filename] or frames[-1:]
    place = places[-1]
    said = str(error) or place.line or ""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{Path(place.filename).name}:{place.lineno}: {kind}{said}"


def main(arguments: list[str]) -> int:
    runtime, directory, cgroup = arguments
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a case or a child of it prints by mistake must not look like an outcome.
    os.dup2(2, 1)
    cases = load()
    # What a shell of root has, whoever started the suite.
    os.umask(0o022)
    for number, line in enumerate(sys.stdin):
        case = cases[line.strip()]
        outcome = run_case(case, runtime, Path(directory) / f"{number}", f"{cgroup}/{number}")
        answers.write(json.dumps([outcome.case, outcome.result, outcome.seconds, outcome.message]) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
