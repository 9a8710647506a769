"""What crictl prints, made the same from run to run, so that a transcript that is made anew can be read as a diff.

Ids, times, ports, pids, MAC addresses and the directory of the run get fixed values, each its own in the order of their
appearance; figures of use become `#`; tables are set anew, since their columns are as wide as what was in them. Refuses
to change anything else.
"""

from __future__ import annotations

import hashlib
import re

_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_SHORT = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,13}(?![0-9a-f])")
_PLAIN = (
    (re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), ""),
    # What crictl's logger says once more, with a time and a line of its source.
    (re.compile(r"^[EW]\d{4} .*\n?", re.MULTILINE), ""),
    (re.compile(r'^time="[^"]*" level=\w+ msg=', re.MULTILINE), ""),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"), "2026-01-01T12:00:00.000000001Z"),
    (re.compile(r"(?<!\d)1[78]\d{17}(?!\d)"), "1767268800000000001"),
    (re.compile(r"Less than a second ago|About a minute ago|\d+ (?:second|minute)s? ago"), "a moment ago"),
    (re.compile(r'("pid": )\d+'), r"\g<1>4711"),
)
_NAMED = (  # each with what stands in its place
    (re.compile(r"(?<=127\.0\.0\.1:)\d+"), "5000{}"),
    (re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b"), "02:00:00:00:00:0{}"),
    (re.compile(r"\boc[0-9a-f]{10}\b"), "oc000000000{}"),
)
_FIGURE = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?:[kKMGT]?i?B)?(?![\w.-])")
_MOST = 160  # characters of a line


class Stable:
    """One transcript's worth of names. `words` are replaced as they are, longest first."""

    def __init__(self, words: dict[str, str]) -> None:
        self._words = words
        self._ids: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def text(self, raw: str, *, figures: bool = False) -> str:
        """`raw` with something fixed for everything that a run happens to have put there."""
        found = _ID.sub(lambda match: self._id(match[0]), raw)
        found = _SHORT.sub(lambda match: self._short(match[0]), found)
        for word in sorted(self._words, key=len, reverse=True):
            found = found.replace(word, self._words[word])
        for pattern, instead in _PLAIN:
            found = pattern.sub(instead, found)
        for pattern, form in _NAMED:
            found = pattern.sub(lambda match, form=form: self._name(match[0], form), found)  # type: ignore[misc]
        if figures:
            found = _FIGURE.sub("#", found)
        return "\n".join(line if len(line) <= _MOST else f"{line[:_MOST]}…" for line in _set(found.splitlines()))

    def _id(self, value: str) -> str:
        if value in self._ids.values():
            return value
        return self._ids.setdefault(value, hashlib.sha256(b"%d" % len(self._ids)).hexdigest())

    def _short(self, value: str) -> str:
        """The beginning of an id that was seen whole."""
        return next((new[: len(value)] for old, new in self._ids.items() if old.startswith(value)), value)

    def _name(self, value: str, form: str) -> str:
        if value in self._names.values():
            return value
        alike = sum(1 for name in self._names.values() if name.startswith(form.partition("{")[0]))
        return self._names.setdefault(value, form.format(alike + 1))


def _set(lines: list[str]) -> list[str]:
    """A table with columns as wide as they need to be; anything else as it is."""
    rows = [re.split(r" {2,}|\t+", line.strip()) for line in lines]
    if len(rows) < 2 or len(rows[0]) < 3 or not rows[0][0].isupper() or len({len(row) for row in rows}) != 1:
        return lines
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
