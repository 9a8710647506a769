"""`conformance/run images [-k WORD]`: runs the cases one after another and prints a line for each."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from conformance.harness.verdicts import FAIL, PASS, Outcome, judge, summary
from conformance.image_lane import carrying, cases
from conformance.image_lane.bench import CaseFailed, bench

PEERS = ("skopeo", "umoci", "docker-registry")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conformance/run images", description=__doc__)
    parser.add_argument("-k", action="append", default=[], metavar="WORD", help="only cases with this in their name")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        raise SystemExit("conformance: layers are unpacked as root")
    missing = [name for name in PEERS if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"conformance: {', '.join(missing)} not found; hack/setup installs them")
    chosen = [
        case
        for case in (*cases.CASES, *carrying.CASES)
        if not options.k or any(word in case.__name__ for word in options.k)
    ]
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="ocid-images-", dir="/var/tmp") as name, bench(Path(name)) as made:
        for case in chosen:
            began = time.monotonic()
            try:
                case(made)
                result, message = PASS, ""
            except (CaseFailed, subprocess.SubprocessError, OSError) as error:
                result, message = FAIL, f"{error}"
            except Exception:
                result, message = FAIL, traceback.format_exc()
            verdict = judge(Outcome(f"images/{case.__name__}", result, time.monotonic() - began, message), None)
            verdicts.append(verdict)
            print(f"{verdict.label:5} {verdict.outcome.case:62} {verdict.outcome.seconds:6.2f} s", flush=True)
            if verdict.failed:
                print(f"      {message}", flush=True)
    print(summary(verdicts))
    return 1 if not verdicts or any(verdict.failed for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
