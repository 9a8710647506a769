"""Small values of Kubernetes: quantities, names, references to variables; and the rule that nothing is passed over.

Pure. Refuses by path. Invariant: a field that says something and that nobody reads is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from runtime.fields import FieldError, Fields

_UNITS = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    **{unit: Fraction(1000**power) for power, unit in enumerate("kMGTPE", 1)},
    **{unit: Fraction(1024**power) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
}
_QUANTITY = re.compile(
    r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(?:([eE][+-]?[0-9]{1,2})|([a-zA-Z]{0,2}))", re.ASCII
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z0-9_.-]+)\)", re.ASCII)


def only(fields: Fields, *known: str) -> Fields:
    """`fields`, which may say nothing but what is known; null, false, "", [] and {} say nothing."""
    for name in fields.names():
        if name not in known and fields.raw(name) not in (None, False, "", [], {}):
            raise fields.error(name, "is not supported by ocid pod play")
    return fields


def name(fields: Fields, key: str = "name") -> str:
    """A DNS label. Raises FieldError."""
    text = fields.str(key, required=True)
    if not _NAME.fullmatch(text):
        raise fields.error(key, f"{text[:80]!r} is not made of a-z, 0-9 and '-' (at most 63)")
    return text


def quantity(fields: Fields, key: str) -> Fraction | None:
    """The amount that "500m", "1.5", "64Mi" or 2 stands for; None when absent."""
    value = fields.raw(key)
    if value is None:
        return None
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else fields.str(key)
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[3] or "") not in _UNITS:
        raise fields.error(key, f"{text[:40]!r} is no quantity such as 500m, 1.5 or 64Mi")
    factor = Fraction(10) ** int(match[2][1:]) if match[2] else _UNITS[match[3] or ""]
    amount = Fraction(match[1] if match[1][-1] != "." else match[1][:-1]) * factor
    if amount >= 1 << 62:
        raise fields.error(key, f"{text[:40]!r} is out of range")
    return amount


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) as the value of a known variable, and as it is where there is none; $$ as $."""
    return _VARIABLE.sub(lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


def unique(path: str, names: list[str]) -> None:
    """Raises FieldError where a name comes twice."""
    for index, one in enumerate(names):
        if one in names[:index]:
            raise FieldError(f"{path}[{index}].name", f"{one!r} is there already")
