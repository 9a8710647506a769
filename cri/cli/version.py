"""`ocid version`: of ocid, of the CRI it speaks, of the interpreter."""

from __future__ import annotations

import argparse
import platform

from cri.cli import output
from cri.version import VERSION


def arguments(parser: argparse.ArgumentParser) -> None:
    output.format_argument(parser)


def run(args: argparse.Namespace) -> int:
    facts = {"ocid": VERSION, "cri": "v1", "python": platform.python_version(), "kernel": platform.release()}
    if args.format == "json":
        output.as_json(facts)
    else:
        for key, value in facts.items():
            print(f"{key} {value}")
    return 0
