"""runtime.linux.dataclass: the standard library's promises, each held by both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from typing import Any, ClassVar

import pytest

from runtime.linux import dataclass as ours

BOTH = pytest.mark.parametrize("dataclass", [dataclasses.dataclass, ours.dataclass])
Decorator = Callable[..., Callable[[type], Any]]


def _point(dataclass: Decorator, **how: bool) -> Any:
    @dataclass(**how)
    class Point:
        x: int
        y: int = 2
        names: list[str] = field(default_factory=list)
        secret: str = field(default="", repr=False, compare=False)
        KIND: ClassVar[str] = "point"

        def sum(self) -> int:
            return self.x + self.y

    return Point


HOWS = pytest.mark.parametrize(
    "how",
    [{}, {"frozen": True}, {"slots": True}, {"frozen": True, "slots": True}],
    ids=lambda how: "-".join(how) or "plain",
)


@BOTH
@HOWS
def test_fields_defaults_and_factories(dataclass: Decorator, how: dict[str, bool]) -> None:
    kind = _point(dataclass, **how)
    one, other = kind(1), kind(x=1, y=5)
    assert (one.x, one.y, one.names, one.secret, one.sum()) == (1, 2, [], "", 3)
    assert one.names is not other.names
    assert [item.name for item in dataclasses.fields(one)] == ["x", "y", "names", "secret"]
    assert dataclasses.is_dataclass(kind) and kind.KIND == "point"
    assert dataclasses.asdict(other) == {"x": 1, "y": 5, "names": [], "secret": ""}
    assert dataclasses.replace(one, y=7) == kind(1, 7)
    match one:
        case kind(x, 2):
            assert x == 1
        case _:
            pytest.fail("no match by position")


@BOTH
@HOWS
def test_what_is_equal(dataclass: Decorator, how: dict[str, bool]) -> None:
    kind = _point(dataclass, **how)
    assert kind(1) == kind(1) and kind(1) != kind(2)
    assert kind(1, secret="a") == kind(1, secret="b")
    assert kind(1) != _point(dataclass, **how)(1), "another class is another value"
    assert kind(1).__eq__(1) is NotImplemented


@BOTH
def test_what_is_hashed(dataclass: Decorator) -> None:
    @dataclass(frozen=True, slots=True)
    class Key:
        a: int
        b: str = ""
        note: dict[str, str] = field(default_factory=dict, hash=False)

    @dataclass(frozen=True)
    class Empty:
        pass

    assert {Key(1, "x", {"k": "v"})} == {Key(1, "x", {"k": "v"})}
    assert hash(Key(1)) == hash(Key(1, note={"k": "v"})) and Key(1) != Key(1, note={"k": "v"})
    assert hash(Empty()) == hash(Empty()) and Empty() == Empty()
    with pytest.raises(TypeError, match="unhashable"):
        hash(_point(dataclass)(1))


@BOTH
@HOWS
def test_what_is_printed(dataclass: Decorator, how: dict[str, bool]) -> None:
    kind = _point(dataclass, **how)
    assert repr(kind(1, secret="hidden")).endswith("Point(x=1, y=2, names=[])")
    assert "hidden" not in repr(kind(1, secret="hidden"))


@BOTH
@pytest.mark.parametrize("slots", [False, True])
def test_frozen_is_frozen(dataclass: Decorator, slots: bool) -> None:
    one = _point(dataclass, frozen=True, slots=slots)(1)
    for name in ("x",) if slots else ("x", "unknown"):  # the standard one has a TypeError for what no slot is for
        with pytest.raises(FrozenInstanceError, match=f"'{name}'"):
            setattr(one, name, 3)
    with pytest.raises(FrozenInstanceError, match="'x'"):
        del one.x
    assert one.x == 1


@BOTH
def test_others_can_change_and_slots_are_all_there_is(dataclass: Decorator) -> None:
    one = _point(dataclass, slots=True)(1)
    one.x = 3
    assert one.x == 3 and not hasattr(one, "__dict__")
    with pytest.raises(AttributeError):
        one.unknown = 1


@BOTH
@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "missing 1 required positional argument: 'x'"),
        ((1, 2, [], "", 5), {}, "takes from 2 to 5 positional arguments but 6 were given"),
        ((1,), {"z": 1}, "got an unexpected keyword argument 'z'"),
        ((1,), {"x": 1}, "got multiple values for argument 'x'"),
    ],
)
def test_wrong_arguments(dataclass: Decorator, args: tuple[Any, ...], kwargs: dict[str, Any], said: str) -> None:
    kind = _point(dataclass, frozen=True, slots=True)
    for _ in range(2):  # the first object, and any other
        with pytest.raises(TypeError, match=r"Point\.__init__\(\) ") as caught:
            kind(*args, **kwargs)
        assert said in str(caught.value)


@BOTH
def test_what_the_class_writes_itself_stays(dataclass: Decorator) -> None:
    @dataclass(slots=True)
    class Own:
        """Documented."""

        a: int
        later: int = field(init=False)
        fixed: int = field(default=4, init=False)
        made: list[int] = field(default_factory=list, init=False)

        def __post_init__(self) -> None:
            self.later = self.a + 1

        def __repr__(self) -> str:
            return "mine"

    one = Own(1)
    assert (one.later, one.fixed, one.made, repr(one)) == (2, 4, [], "mine")
    assert Own.__doc__ == "Documented."
    with pytest.raises(TypeError):
        Own(1, later=2)


@BOTH
def test_a_subclass_is_made_as_its_parent(dataclass: Decorator) -> None:
    kind = _point(dataclass, frozen=True)

    class Below(kind):  # type: ignore[misc]
        pass

    assert (Below(1).x, Below(1).sum(), kind(1) == Below(1)) == (1, 3, False)


@BOTH
def test_what_is_mutable_is_no_default(dataclass: Decorator) -> None:
    with pytest.raises(ValueError, match="mutable default"):

        @dataclass(frozen=True)
        class Wrong:
            a: list[int] = []  # noqa: RUF012


def test_what_is_compiled() -> None:
    """Why there is a second one. In functions that are compiled from text, which no machine blurs."""
    compiled: list[str] = []

    def counting(text: str, *rest: Any) -> None:
        compiled.append(text)
        real(text, *rest)

    real = exec
    for module in (dataclasses, ours):
        module.exec = counting  # type: ignore[attr-defined]
    try:
        kind = _point(ours.dataclass, frozen=True, slots=True)
        assert not compiled
        kind(1), kind(2)
        assert len(compiled) == 1
        _point(dataclasses.dataclass, frozen=True, slots=True)
        assert len(compiled) == 7
    finally:
        for module in (dataclasses, ours):
            del module.exec  # type: ignore[attr-defined]


@HOWS
def test_all_can_be_compiled_ahead(how: dict[str, bool]) -> None:
    """As a dump has them: then an object's making compiles nothing, and is as before."""
    kind = _point(ours.dataclass, **how)
    before = kind.__init__
    ours.compile_all()
    made_of = kind.__init__
    assert made_of is not before and not ours._uncompiled
    one = kind(1, secret="s")
    assert kind.__init__ is made_of and (one.x, one.y, one.names, one.secret) == (1, 2, [], "s")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        kind()
