"""The runtime's value classes: what they take, what they refuse, and that they are values."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.linux.record import Record


class Base(Record):
    name: str
    size: int = 3


class More(Base):
    extra: tuple[int, ...] = ()


def test_fields_come_by_place_by_name_or_by_default() -> None:
    one = More("x", extra=(1,))
    assert (one.name, one.size, one.extra) == ("x", 3, (1,)) and repr(one) == "More(name='x', size=3, extra=(1,))"
    assert one == More(name="x", size=3, extra=(1,)) and hash(one) == hash(More("x", 3, (1,)))
    assert one.changed(size=4) == More("x", 4, (1,)) and one.size == 3
    assert More("x") != Base("x")
    with pytest.raises(AttributeError, match="More is frozen: size"):
        one.size = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "More: field 'name' is missing"),
        ((), {"size": 1, "other": 2}, "More: field 'other' is unknown"),
        (("x",), {"other": 2}, "More: field 'other' is unknown"),
        (("x",), {"name": "y"}, "More: field 'name' is given twice"),
        (("x", 1, (), 2), {}, "More takes 3 fields, got 4"),
    ],
)
def test_what_does_not_fit_is_named(args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        More(*args, **kwargs)
