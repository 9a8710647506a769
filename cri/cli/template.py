"""Go templates for `--format`, as far as people write them there: fields, ranges, conditions, a handful of functions.

    {{.Digest}}   {{.Labels.version}}   {{index .Labels "a.b"}}   {{json .}}   {{len .Layers}}   {{.Os | upper}}
    {{range .Env}}…{{else}}…{{end}}   {{range $i, $x := .Env}}…{{end}}   {{if eq .Os "linux"}}…{{else if …}}…{{end}}
    {{with .Labels}}…{{end}}   {{printf "%s-%d" .Os 1}}   {{/* nothing */}}   {{- trimmed -}}

Refuses all else by its name, before anything is printed. Invariant: a value is printed as Go prints it (`[a b]`,
`map[k:v]`, `<no value>`), and a field that a document could not have is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cri.cli.main import CommandError
from runtime.linux.dataclass import dataclass

_ACTION = re.compile(r"\{\{(-\s)?\s*(/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|[^\"`])*?)\s*(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?[0-9]+)|(?P<variable>\$\w*)|(?P<fields>(?:\.\w+)+|\.)'
    r"|(?P<word>\w+)|(?P<mark>:=|[|(),]))"
)
_VERB = re.compile(r"%([a-z%])")
MISSING = object()


class Time(str):
    """An RFC 3339 time, which Go prints in its own way."""

    __slots__ = ()

    def printed(self) -> str:
        date, _, rest = self.partition("T")
        found = re.fullmatch(r"([0-9:.]+)(Z|[+-][0-9]{2}:[0-9]{2})", rest)
        if found is None:
            return str(self)
        zone = "+0000 UTC" if found[2] == "Z" else f"{found[2].replace(':', '')} {found[2].replace(':', '')}"
        return f"{date} {found[1]} {zone}"


def printed(value: object) -> str:
    """As Go's %v."""
    if value is MISSING:
        return "<no value>"
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Time):
        return value.printed()
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{printed(value[key])}' for key in sorted(value))}]"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(printed, value))}]"
    return str(value)


def render(text: str, document: Mapping[str, Any]) -> str:
    """`text` filled in from a document. Raises CommandError."""
    return Template(text).render(document)


@dataclass(frozen=True, slots=True)
class _Block:
    """`kind` is "text", "print", "if", "range" or "with"; `words` is the text, or the tokens of what is asked."""

    kind: str
    words: Any
    body: tuple[_Block, ...] = ()
    other: tuple[_Block, ...] = ()


Tokens = list[tuple[str, str]]
_CONTROL = frozenset({"if", "range", "with"})
_ENDS = frozenset({"end", "else"})


class Template:
    """A template that was read. Raises CommandError."""

    def __init__(self, text: str) -> None:
        # What a shell hands over as two characters; docker and skopeo do the same.
        self._parts = _parts(text.replace("\\t", "\t").replace("\\n", "\n"))
        self._blocks, end = self._read()
        if end:
            raise _wrong(f"{{{{{end[0][1]}}}}} without a beginning")

    def _read(self) -> tuple[tuple[_Block, ...], Tokens]:
        """Blocks until an end that is none of theirs, and that; nothing where the text ends."""
        found: list[_Block] = []
        for kind, words in self._parts:
            first = words[0][1] if kind == "action" and words[0][0] == "word" else ""
            if kind == "text":
                found.append(_Block("text", words))
            elif first in _ENDS:
                return tuple(found), words
            elif first in _CONTROL:
                found.append(self._control(first, words[1:]))
            else:
                found.append(_Block("print", words))
        return tuple(found), []

    def _control(self, kind: str, words: Tokens) -> _Block:
        body, end = self._read()
        other: tuple[_Block, ...] = ()
        if end and end[0][1] == "else":
            if len(end) > 1:  # {{else if …}} is an if within the else, and shares its end
                return _Block(kind, words, body, (self._control(end[1][1], end[2:]),))
            other, end = self._read()
        if not end or end[0][1] != "end":
            raise _wrong(f"{{{{{kind} …}}}} without {{{{end}}}}")
        return _Block(kind, words, body, other)

    def render(self, document: Mapping[str, Any]) -> str:
        return "".join(_run(self._blocks, _Scope(document, document, {"$": document})))


def _parts(text: str) -> Iterator[tuple[str, Any]]:
    at, trim = 0, False
    for found in _ACTION.finditer(text):
        plain = text[at : found.start()]
        plain = plain.lstrip() if trim else plain
        yield "text", plain.rstrip() if found[1] else plain
        at, trim = found.end(), bool(found[3])
        if not found[2].startswith("/*"):
            yield "action", _tokens(found[2])
    if "{{" in text[at:]:
        raise _wrong("an action that begins with {{ and does not end")
    yield "text", text[at:].lstrip() if trim else text[at:]


def _tokens(text: str) -> Tokens:
    found: Tokens = []
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _wrong(f"{text[at : at + 40]!r} is not understood")
        assert token.lastgroup is not None
        kind, word = token.lastgroup, token[token.lastgroup]
        # ").Name" and "$x.Name" are of what stands before; with a blank between it is another value.
        before = found[-1] if found and token.start(kind) == at else ("", "")
        if kind == "fields" and (before[0] == "variable" or before == ("mark", ")")):
            kind = "chain"
        found.append((kind, word))
        at = token.end()
    if not found:
        raise _wrong("an empty action {{}}")
    return found


def _wrong(what: str) -> CommandError:
    return CommandError(f"--format: {what}")


@dataclass(frozen=True, slots=True)
class _Scope:
    """`root` is the document, `dot` what `.` means."""

    root: Any
    dot: Any
    variables: Mapping[str, Any]


def _run(blocks: Sequence[_Block], scope: _Scope) -> Iterator[str]:
    for block in blocks:
        if block.kind == "text":
            yield block.words
        elif block.kind == "print":
            yield printed(_pipeline([*block.words], scope))
        elif block.kind == "range":
            yield from _range(block, scope)
        else:
            names, words = _bound(block.words)
            value = _pipeline(words, scope)
            dot = value if block.kind == "with" and _true(value) else scope.dot
            inner = _Scope(scope.root, dot, {**scope.variables, **dict.fromkeys(names, value)})
            yield from _run(block.body if _true(value) else block.other, inner)


def _bound(words: Tokens) -> tuple[list[str], Tokens]:
    """The variables in front of `:=`, and what stands behind it."""
    if ("mark", ":=") not in words:
        return [], [*words]
    at = words.index(("mark", ":="))
    return [word for kind, word in words[:at] if kind == "variable"], words[at + 1 :]


def _range(block: _Block, scope: _Scope) -> Iterator[str]:
    names, words = _bound(block.words)
    value = _pipeline(words, scope)
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = [(key, value[key]) for key in sorted(value)]
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    elif value is MISSING or value is None:
        items = []
    else:
        raise _wrong(f"range over {printed(value)[:60]!r}, which is no list")
    for key, item in items:
        bound = dict(zip(names, (key, item) if len(names) > 1 else (item,), strict=False))
        yield from _run(block.body, _Scope(scope.root, item, {**scope.variables, **bound}))
    if not items:
        yield from _run(block.other, scope)


def _true(value: Any) -> bool:
    return value is not MISSING and bool(value)


def _pipeline(words: Tokens, scope: _Scope) -> Any:
    """The value of `command | command …`, until the words end or a parenthesis closes; takes them away."""
    value = _command(words, scope, ())
    while words and words[0] == ("mark", "|"):
        words.pop(0)
        value = _command(words, scope, (value,))
    return value


def _command(words: Tokens, scope: _Scope, piped: tuple[Any, ...]) -> Any:
    if not words:
        raise _wrong("a value is missing")
    kind, word = words[0]
    if kind == "word" and word not in _CONSTANTS:
        words.pop(0)
        function = _FUNCTIONS.get(word)
        if function is None:
            raise _wrong(f"there is no function {word!r}; there are {', '.join(sorted(_FUNCTIONS))}")
        values = []
        while words and words[0] not in (("mark", "|"), ("mark", ")")):
            values.append(_operand(words, scope))
        try:
            return function(*values, *piped)
        except IndexError:
            raise _wrong(f"{word}: there are not so many") from None
        except (TypeError, ValueError, KeyError, AttributeError):
            raise _wrong(f"{word} does not take {len(values) + len(piped)} of such values") from None
    value = _operand(words, scope)
    if piped or (words and words[0] not in (("mark", "|"), ("mark", ")"))):
        raise _wrong(f"{word!r} is no function, so it takes no values")
    return value


_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "nil": None}


def _operand(words: Tokens, scope: _Scope) -> Any:
    kind, word = words.pop(0)
    if kind == "string":
        return word[1:-1] if word[0] == "`" else _unquoted(word)
    if kind == "number":
        return int(word)
    if kind == "word" and word in _CONSTANTS:
        return _CONSTANTS[word]
    if kind == "fields":
        return _fields(scope.dot, word, scope)
    if (kind, word) == ("mark", "("):
        value = _pipeline(words, scope)
        if not words or words.pop(0) != ("mark", ")"):
            raise _wrong("a parenthesis is not closed")
    elif kind == "variable":
        if word not in scope.variables:
            raise _wrong(f"there is no variable {word}")
        value = scope.variables[word]
    else:
        raise _wrong(f"{word!r} is not understood here")
    if words and words[0][0] == "chain":
        return _fields(value, words.pop(0)[1], scope)
    return value


def _unquoted(word: str) -> str:
    try:
        return str(json.loads(word))
    except ValueError:
        raise _wrong(f"{word[:60]} is no string") from None


def _fields(value: Any, path: str, scope: _Scope) -> Any:
    for name in filter(None, path.split(".")):
        if not isinstance(value, Mapping):
            if value is MISSING or value is None:
                return MISSING
            raise _wrong(f"{printed(value)[:60]!r} has no field {name}")
        # What is not in a table of names is no value; what no document of this kind has is a mistake.
        if value is scope.root and name not in value:
            raise _wrong(f"there is no field {name}; there are {', '.join(value)}")
        value = value.get(name, MISSING)
    return value


# ----------------------------------------------------------------------------------------------------------- functions


def _json(value: Any) -> str:
    return json.dumps(None if value is MISSING else value, separators=(",", ":"), ensure_ascii=False)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key, MISSING) if isinstance(value, Mapping) else value[key]
    return value


def _print(*values: Any) -> str:
    """With a blank between two that are no strings, as Go does."""
    found = ""
    for number, value in enumerate(values):
        apart = number and not isinstance(value, str) and not isinstance(values[number - 1], str)
        found += f" {printed(value)}" if apart else printed(value)
    return found


def _printf(text: str, *values: Any) -> str:
    left = list(values)

    def one(found: re.Match[str]) -> str:
        if found[1] == "%":
            return "%"
        if found[1] not in "vsdqt":
            raise _wrong(f"printf: %{found[1]} is not known here; %v, %s, %d, %q, %t are")
        value = printed(left.pop(0))
        return json.dumps(value, ensure_ascii=False) if found[1] == "q" else value

    return _VERB.sub(one, text)


def _same(value: Any, *others: Any) -> bool:
    return any(value == other for other in others)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": _json,
    "index": _index,
    "len": len,
    "join": lambda values, between: between.join(map(printed, values)),
    "split": lambda text, between: text.split(between),
    "upper": lambda text: text.upper(),
    "lower": lambda text: text.lower(),
    "print": _print,
    "println": lambda *values: " ".join(map(printed, values)) + "\n",
    "printf": _printf,
    "eq": _same,
    "ne": lambda one, other: one != other,
    "not": lambda value: not _true(value),
    "and": lambda *values: next((value for value in values if not _true(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _true(value)), values[-1]),
}
