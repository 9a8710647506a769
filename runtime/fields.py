"""The edge of JSON: reads fields with a type and a range, and names a bad one by its path.

`linux.resources.memory.limit: expected integer, got "1G"`. Refuses duplicate keys, NaN, absurd depth and size, and
coerces nothing (true is no integer, "5" is no number). Invariant: null reads as absent, as the ecosystem's Go
programs write it; behind a parser that uses this nobody sees a dict.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_scanner

from runtime.errors import RuntimeFailure

TYPE_CHECKING = False  # typing itself costs more to import than all of this module
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    Text = str  # inside the class `str`, `int` and `bool` are methods
    Integer = int
    Truth = bool

MAX_DOCUMENT = 16 << 20
_INT64 = 1 << 63
_BLANKS = " \t\r\n"


class FieldError(RuntimeFailure):
    """A field is not what it must be: `str()` is "path: expected …, got …"."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path or 'the document'}: {problem}", step="config", code="invalid_argument")
        self.path = path


class _Scanner:
    """What the JSON scanner of the interpreter wants to be told; json.loads would bring `re` along, 8 ms of imports."""

    strict = True
    object_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    def __init__(self) -> None:
        self.object_pairs_hook = _unique
        self.parse_constant = _no_constant


def decode(raw: bytes, what: str = "the document", limit: int = MAX_DOCUMENT) -> object:
    """JSON text as Python objects. Raises FieldError on syntax, duplicate keys, NaN, depth or size (threats P7).

    Bytes inside strings that are no UTF-8 live on as surrogate escapes, so an environment survives as it is (P8)."""
    if len(raw) > limit:
        raise FieldError(what, f"{len(raw)} bytes, at most {limit} are read")
    text = raw.decode("utf-8", "surrogateescape")
    begin = len(text) - len(text.lstrip(_BLANKS))
    try:
        value, end = _scan(text, begin)
    except StopIteration as stop:
        raise FieldError(what, f"not valid JSON at character {stop.value}") from None
    except RecursionError:
        raise FieldError(what, "nested too deeply") from None
    except ValueError as error:
        raise FieldError(what, f"not valid JSON: {error}") from None
    if text[end:].strip(_BLANKS):
        raise FieldError(what, f"not valid JSON: something follows at character {end}")
    return value


def _scan(text: str, begin: int) -> tuple[object, int]:
    scanner = make_scanner(_Scanner())  # type: ignore[arg-type]  # typeshed asks for itself
    try:
        return scanner(text, begin)
    except SystemError:
        # The scanner words syntax errors with a class of json.decoder, and fails without a word where that was never
        # imported. Said again with it, since an error is worth the time; inside a container there is no import.
        try:
            import json.decoder  # noqa: F401
        except ImportError:
            raise ValueError("the syntax is wrong") from None
        return scanner(text, begin)


def encode(value: object) -> bytes:
    """Compact JSON of str, int, float, bool, None, dicts, lists and tuples."""
    pieces: list[str] = []
    _encode(value, pieces)
    return "".join(pieces).encode("ascii")


def _encode(value: object, out: list[str]) -> None:
    if isinstance(value, str):
        out.append(encode_basestring_ascii(value))
    elif value is None or isinstance(value, bool):
        out.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int | float):
        out.append(repr(value))
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            out.append(("," if index else "{") + encode_basestring_ascii(key) + ":")
            _encode(item, out)
        out.append("}" if value else "{}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            out.append("," if index else "[")
            _encode(item, out)
        out.append("]" if value else "[]")
    else:
        raise TypeError(f"{type(value).__name__} has no JSON form")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r:.80}")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _is_text(text: str) -> bool:
    """What `_check_text` takes, for the many that are plain: their path need not be made."""
    return text.isascii() and "\0" not in text


def _check_text(path: str, text: str) -> None:
    """A string that C and the file system can take: no NUL, and back to the bytes that it came from."""
    if "\0" in text:
        raise FieldError(path, "holds a NUL byte")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FieldError(path, "holds half of a surrogate pair") from None


def shown(value: object) -> str:
    """A value as an error shows it: like JSON, cut short."""
    if isinstance(value, str):
        text = '"' + value.encode("unicode_escape").decode() + '"'
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "an object"
    elif isinstance(value, list):
        text = "an array"
    elif isinstance(value, int) and abs(value) >= 1 << 256:
        text = "a number of too many digits"  # int to str refuses more than 4300 digits
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Fields:
    """A JSON object at `path`. Every reader takes a key and a default for when it is absent or null."""

    __slots__ = ("_object", "path")

    def __init__(self, obj: object, path: Text = "") -> None:
        if not isinstance(obj, dict):
            raise FieldError(path, f"expected object, got {shown(obj)}")
        self._object: dict[Text, object] = obj
        self.path = path

    def at(self, key: Text) -> Text:
        """The path of `key`."""
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: Text, problem: Text) -> FieldError:
        """The error to raise about `key` ("" for the object itself)."""
        return FieldError(self.at(key) if key else self.path, problem)

    def has(self, key: Text) -> Truth:
        """True when the key is there and not null."""
        return self._object.get(key) is not None

    def names(self) -> Iterator[Text]:
        """The keys that are there, in the order of the document."""
        return iter(self._object)

    def raw(self, key: Text) -> object:
        """Whatever is there; None when absent."""
        return self._object.get(key)

    def _wrong(self, key: Text, expected: Text) -> FieldError:
        return self.error(key, f"expected {expected}, got {shown(self._object.get(key))}")

    def _missing(self, key: Text) -> FieldError:
        return self.error(key, "is required")

    def str(
        self, key: Text, default: Text = "", *, required: Truth = False, choices: Collection[Text] | None = None
    ) -> Text:
        """A string without NUL; `choices` bounds it, `required` refuses absence and ""."""
        value = self._object.get(key)
        if value is None or (value == "" and required):
            if required:
                raise self._missing(key)
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "string")
        if not _is_text(value):
            _check_text(self.at(key), value)
        if choices is not None and value not in choices:
            raise self._wrong(key, f"one of {', '.join(sorted(choices))}")
        return value

    def optional_int(self, key: Text, lo: Integer = -_INT64, hi: Integer = _INT64 - 1) -> Integer | None:
        """An integer in lo..hi, or None when absent."""
        value = self._object.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "integer")
        if not lo <= value <= hi:
            raise self._wrong(key, f"integer from {lo} to {hi}")
        return value

    def int(
        self,
        key: Text,
        lo: Integer = -_INT64,
        hi: Integer = _INT64 - 1,
        default: Integer = 0,
        *,
        required: Truth = False,
    ) -> Integer:
        """An integer in lo..hi."""
        value = self.optional_int(key, lo, hi)
        if value is None:
            if required:
                raise self._missing(key)
            return default
        return value

    def optional_bool(self, key: Text) -> Truth | None:
        """A boolean, or None when absent."""
        value = self._object.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "boolean")
        return value

    def bool(self, key: Text, default: Truth = False) -> Truth:
        """A boolean."""
        value = self.optional_bool(key)
        return default if value is None else value

    def list(self, key: Text) -> list[object]:
        """An array of anything; empty when absent."""
        value = self._object.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "array")
        return value

    def strs(self, key: Text, *, choices: Collection[Text] | None = None) -> tuple[Text, ...]:
        """An array of strings without NUL."""
        items = self.list(key)
        for index, item in enumerate(items):
            if isinstance(item, str) and _is_text(item) and (choices is None or item in choices):
                continue
            if not isinstance(item, str):
                raise FieldError(f"{self.at(key)}[{index}]", f"expected string, got {shown(item)}")
            _check_text(f"{self.at(key)}[{index}]", item)
            if choices is not None and item not in choices:
                wanted = ", ".join(sorted(choices))
                raise FieldError(f"{self.at(key)}[{index}]", f"expected one of {wanted}, got {shown(item)}")
        return tuple(items)  # type: ignore[arg-type]  # each was looked at

    def ints(self, key: Text, lo: Integer = -_INT64, hi: Integer = _INT64 - 1) -> tuple[Integer, ...]:
        """An array of integers, each in lo..hi."""
        found = []
        for index, item in enumerate(self.list(key)):
            if not isinstance(item, int) or isinstance(item, bool) or not lo <= item <= hi:
                problem = f"expected integer from {lo} to {hi}, got {shown(item)}"
                raise FieldError(f"{self.at(key)}[{index}]", problem)
            found.append(item)
        return tuple(found)

    def object(self, key: Text) -> Fields | None:
        """The object at `key`, or None when absent."""
        value = self._object.get(key)
        return None if value is None else Fields(value, self.at(key))

    def required_object(self, key: Text) -> Fields:
        """The object at `key`. Absent is an error."""
        value = self.object(key)
        if value is None:
            raise self._missing(key)
        return value

    def objects(self, key: Text) -> tuple[Fields, ...]:
        """An array of objects."""
        return tuple(Fields(item, f"{self.at(key)}[{index}]") for index, item in enumerate(self.list(key)))

    def mapping(self, key: Text) -> dict[Text, Text]:
        """An object whose values are all strings, none of them or of the keys holding a NUL."""
        inner = self.object(key)
        return {} if inner is None else {name: inner.str(name) for name in inner.names()}

    def refuse(self, *keys: Text, why: Text = "is not supported by this runtime yet") -> None:
        """Refuses the first of `keys` that is there and asks for something (not null, false, 0, "", [] or {})."""
        for key in keys:
            if self._object.get(key):
                raise self.error(key, why)
