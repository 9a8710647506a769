"""JSON from outside: parsed once, strictly, into values that are asked for by name and type.

Refuses what two parsers could read differently: duplicate keys, keys that differ in case only from the one asked for,
NaN and infinities, lone surrogates, huge numbers, more values or nesting than the limit (threats P7, S25, S45).
Invariant: whatever the bytes are, the outcome is a `Fields` or a ContentInvalid that names the document and the path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from imagestore.model import ContentInvalid

_NUMBER = re.compile(r"-?[0-9]{1,19}", re.ASCII)


def parse_object(data: bytes, what: str, values_limit: int) -> Fields:
    """The top-level object of `data`. Raises ContentInvalid, beginning with `what`."""
    document = _parse(data, what, values_limit)
    if not isinstance(document, dict):
        raise ContentInvalid(f"{what}: expected a JSON object, got {_kind(document)}")
    return Fields(document, what)


def parse_array(data: bytes, what: str, values_limit: int) -> tuple[Fields, ...]:
    """The objects of the top-level array of `data`. Raises ContentInvalid, beginning with `what`."""
    document = _parse(data, what, values_limit)
    if not isinstance(document, list) or not all(isinstance(item, dict) for item in document):
        raise ContentInvalid(f"{what}: expected a JSON array of objects, got {_kind(document)}")
    return tuple(Fields(item, f"{what}[{number}]") for number, item in enumerate(document))


def _parse(data: bytes, what: str, values_limit: int) -> object:
    # Each value but the first follows one of these bytes, so counting them bounds what the parser allocates.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > values_limit:
        raise ContentInvalid(f"{what}: more than {values_limit} JSON values")
    try:
        found: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except RecursionError:
        raise ContentInvalid(f"{what}: JSON is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ContentInvalid(f"{what}: not valid JSON ({error})") from None
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:60]!r}")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _bounded_int(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"number of {len(text)} digits")
    return int(text)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer"}
    return "null" if value is None else names.get(type(value), "a number")


class Fields:
    """A JSON object behind typed questions. A missing or null field is the default, as Go's encoders write it."""

    __slots__ = ("_document", "path")

    def __init__(self, document: Mapping[str, object], path: str) -> None:
        self._document = document
        self.path = path

    def _get(self, key: str) -> object:
        value = self._document.get(key)
        if value is None and key not in self._document:
            folded = key.casefold()
            for other in self._document:
                if other.casefold() == folded:  # Go's decoder would take it, ours not: refuse the ambiguity
                    raise ContentInvalid(f"{self.path}: field {other[:60]!r} must be spelled {key!r}")
        return value

    def _wrong(self, key: str, expected: str, value: object) -> ContentInvalid:
        return ContentInvalid(f"{self.path}.{key}: expected {expected}, got {_kind(value)}")

    def only(self, *known: str) -> Fields:
        """Itself. Raises ContentInvalid for a key that is none of `known`, which somebody may have meant seriously."""
        for name in self._document:
            if name not in known:
                raise ContentInvalid(f"{self.path}: unknown key {name[:60]!r}; known here: {', '.join(known)}")
        return self

    def has(self, key: str) -> bool:
        """True when the field is there and not null."""
        return self._get(key) is not None

    def names(self) -> tuple[str, ...]:
        """The keys of an object that is a table."""
        return tuple(self._document)

    def string(self, key: str, default: str = "") -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return clean(value, f"{self.path}.{key}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer", value)
        if not low <= value <= high:
            raise ContentInvalid(f"{self.path}.{key}: {value} is outside {low} to {high}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean", value)
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "an array of strings", value)
        return tuple(clean(item, f"{self.path}.{key}") for item in value)

    def keys(self, key: str) -> tuple[str, ...]:
        """The keys of an object that is used as a set."""
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return tuple(clean(item, f"{self.path}.{key}") for item in value)

    def string_map(self, key: str) -> dict[str, str]:
        value = self._get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._wrong(key, "an object of strings", value)
        return {clean(name, f"{self.path}.{key}"): clean(item, f"{self.path}.{key}") for name, item in value.items()}

    def object(self, key: str) -> Fields | None:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Fields(value, f"{self.path}.{key}")

    def objects(self, key: str, limit: int) -> Iterator[Fields]:
        value = self._get(key)
        if value is None:
            return
        if not isinstance(value, list):
            raise self._wrong(key, "an array", value)
        if len(value) > limit:
            raise ContentInvalid(f"{self.path}.{key}: {len(value)} entries, the limit is {limit}")
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                raise self._wrong(f"{key}[{number}]", "an object", item)
            yield Fields(item, f"{self.path}.{key}[{number}]")


def clean(text: str, path: str) -> str:
    """`text` unless it holds a NUL or a lone surrogate, which no path, argv or file can. Raises ContentInvalid."""
    if "\0" in text:
        raise ContentInvalid(f"{path}: a NUL is no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ContentInvalid(f"{path}: a lone surrogate is no text") from None
    return text
