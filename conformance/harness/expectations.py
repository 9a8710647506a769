"""conformance/expected.toml: which cases a runtime is expected to fail, or does not take part in, and why.

    [[runtime]]
    name = "runc"
    versions = "<1.2"             # optional: comparisons, all of which must hold
    [runtime.fails]               # run, and must fail: a pass is an error, so that the list stays true
    "mounts/idmap" = "idmapped mounts are newer than 1.1.5"
    [runtime.skips]               # not run at all: it would hang, or it asks for what is ours alone
    "cli/…" = "…"

Refuses an entry without a reason, one that names no case, and two that name the same case for one version.
"""

from __future__ import annotations

import operator
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
KINDS = ("fails", "skips")


class ExpectationError(Exception):
    """expected.toml says something that cannot be."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """`kind` is "fails" or "skips"."""

    kind: str
    reason: str


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, as in "1.1.5+ds1"."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    if not match:
        raise ExpectationError(f"not a version: {text!r}")
    return tuple(int(part) for part in match[0].split("."))


def in_range(version: tuple[int, ...], versions: str) -> bool:
    """True when `version` fulfils every comparison of `versions` ("<1.2", ">=1.1, <1.3"); an empty one always holds."""
    for comparison in filter(None, (part.strip() for part in versions.split(","))):
        match = re.fullmatch(r"(<=|>=|==|<|>)\s*(\S+)", comparison)
        if not match:
            raise ExpectationError(f"versions: expected a comparison such as '<1.2', got {comparison!r}")
        if not _COMPARE[match[1]](version, version_of(match[2])):
            return False
    return True


def read(text: str, name: str, version: tuple[int, ...], cases: Collection[str]) -> dict[str, Expectation]:
    """What is expected of that version of a runtime. `cases` are the names there are."""
    found: dict[str, Expectation] = {}
    for entry in tomllib.loads(text).get("runtime", []):
        unknown = entry.keys() - {"name", "versions", *KINDS}
        if unknown or "name" not in entry:
            raise ExpectationError(
                f"[[runtime]] needs a name and knows versions, fails and skips, not {sorted(unknown)}"
            )
        applies = entry["name"] == name and in_range(version, entry.get("versions", ""))
        for kind in KINDS:
            for case, reason in _entries(entry, kind).items():
                if case not in cases:
                    raise ExpectationError(f"{entry['name']}: {case}: there is no such case")
                if applies and case in found:
                    raise ExpectationError(f"{entry['name']}: {case} is listed twice")
                if applies:
                    found[case] = Expectation(kind, reason)
    return found


def _entries(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    listed: dict[str, str] = entry.get(kind, {})
    for case, reason in listed.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ExpectationError(f"{entry['name']}: {case}: a reason is needed")
    return listed


def read_file(path: Path, name: str, version: tuple[int, ...], cases: Collection[str]) -> dict[str, Expectation]:
    """`read`, of a file."""
    try:
        return read(path.read_text(), name, version, cases)
    except (ExpectationError, tomllib.TOMLDecodeError) as error:
        raise ExpectationError(f"{path.name}: {error}") from None
