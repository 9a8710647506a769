"""Tables for people, JSON for programs.

Refuses colours and progress in a pipe. Invariant: `--format json` prints one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

FORMATS = ("table", "json")


def format_argument(parser: argparse.ArgumentParser, *, templates: bool = False) -> None:
    """The `--format` option of every listing; with `templates` also a Go template for each row."""
    if templates:
        parser.add_argument(
            "--format",
            type=_form,
            metavar="table|json|TEMPLATE",
            default="table",
            help="how to print (default: table); a Go template is filled in for each row, such as '{{.Repository}}'",
        )
    else:
        parser.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: table)")


def _form(text: str) -> str:
    if text not in FORMATS and "{{" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is neither of {', '.join(FORMATS)}, nor a template")
    return text


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be, two blanks apart."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        print("  ".join(plain(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plain(text: str) -> str:
    """`text` for a terminal: names come from images and other people's pods, and may hold escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in text)


def as_json(value: Any) -> None:
    """One document, indented."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=True)
    print()


def size(count: int) -> str:
    """Bytes in decimal units, as image listings show them."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def age(nanoseconds: int) -> str:
    """How long ago a point in time (ns since the epoch) was."""
    if nanoseconds <= 0:
        return "-"
    seconds = max(0, int(time.time() - nanoseconds / 1e9))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
