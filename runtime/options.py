"""Command lines as runc reads them: flags long or short, with `=` or a blank before their value.

argparse takes 15 ms to import and build; this is all that ocirun needs of it. Refuses an unknown flag by name.
Invariant: unless flags and words are asked for mixed, nothing after the first word is looked at, so a container's
command keeps its own flags.
"""

from __future__ import annotations

from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class UsageError(Exception):
    """The command line is wrong; `str()` says how."""


class Flag(Record):
    """One flag. `kind` is "bool", "str", "int" or "list"; `names` without dashes, the first is the key."""

    names: tuple[str, ...]
    kind: str
    help: str
    default: str = ""


class Values:
    """What was given, by the flag's first name."""

    __slots__ = ("_values", "words")

    def __init__(self, flags: Iterable[Flag]) -> None:
        self._values: dict[str, list[str]] = {flag.names[0]: [] for flag in flags}
        self.words: list[str] = []

    def add(self, name: str, value: str) -> None:
        self._values[name].append(value)

    def on(self, name: str) -> bool:
        """A bool flag; the last word counts."""
        return self._values[name][-1:] == ["true"]

    def text(self, name: str, default: str = "") -> str:
        """A str flag; the last word counts."""
        return self._values[name][-1] if self._values[name] else default

    def given(self, name: str) -> bool:
        """Whether the flag was there at all."""
        return bool(self._values[name])

    def number(self, name: str, default: int = 0) -> int:
        """An int flag. Raises UsageError."""
        text = self.text(name)
        if not text:
            return default
        if not (text.isascii() and text.lstrip("-").isdecimal() and len(text) < 20):
            raise UsageError(f"--{name}: {text[:40]!r} is no number")
        return int(text)

    def all(self, name: str) -> list[str]:
        """A list flag."""
        return self._values[name]


_TRUE, _FALSE = ("1", "t", "true"), ("0", "f", "false")


def parse(words: Sequence[str], flags: Sequence[Flag], *, mixed: bool = False) -> Values:
    """Reads flags up to the first word that is none, or, when they may be mixed with words, up to "--" or the end.
    Raises UsageError."""
    by_name = {name: flag for flag in flags for name in flag.names}
    values = Values(flags)
    rest = list(words)
    while rest:
        word = rest[0]
        if word == "--":
            rest.pop(0)
            break
        if not word.startswith("-") or word == "-":
            if not mixed:
                break
            values.words.append(rest.pop(0))
            continue
        rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        flag = by_name.get(name)
        if flag is None:
            raise UsageError(f"flag provided but not defined: -{name}")
        if flag.kind == "bool":
            if equals and value.lower() not in _TRUE + _FALSE:
                raise UsageError(f"--{name}: expected true or false, got {value[:40]!r}")
            values.add(flag.names[0], "false" if value.lower() in _FALSE else "true")
            continue
        if not equals:
            if not rest:
                raise UsageError(f"flag needs an argument: {word}")
            value = rest.pop(0)
        values.add(flag.names[0], value)
    values.words += rest
    return values


def describe(flags: Iterable[Flag]) -> str:
    """The flags as lines of a help text."""
    rows = []
    for flag in flags:
        names = ", ".join(f"--{name}" if len(name) > 1 else f"-{name}" for name in flag.names)
        rows.append((names + ("" if flag.kind == "bool" else " VALUE"), flag.help))
    width = max((len(names) for names, _ in rows), default=0)
    return "".join(f"  {names:<{width}}  {text}\n" for names, text in rows)
