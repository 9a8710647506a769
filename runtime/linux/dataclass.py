"""`dataclass`, for the classes that every start of a command or of the daemon imports.

The standard library's compiles six functions out of text for each class, which takes half a millisecond: of 150
classes that was 45 % of the time until `ocid` had begun. Here all classes share their __eq__, __hash__, __repr__ and
the two methods that refuse changes, and __init__ is made once the first object is.

Refuses what no class of ours asks for: order, kw_only, InitVar. Invariant: everything else is as there, since it is
there that the fields are found: `fields`, `replace`, `asdict`, `is_dataclass` and `match` know these classes, and
tests/unit/test_dataclass.py holds both to the same promises.
"""

from __future__ import annotations

import dataclasses
from dataclasses import FrozenInstanceError, field
from operator import attrgetter

TYPE_CHECKING = False  # mypy takes the name for typing's own
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as dataclass  # to mypy it is the standard one
    from typing import Any, NoReturn
else:

    def dataclass(*, frozen: bool = False, slots: bool = False) -> Callable[[type], type]:
        """A decorator, as dataclasses.dataclass with the same arguments."""
        return lambda cls: _made(cls, frozen, slots)


def _made(cls: Any, frozen: bool, slots: bool) -> Any:
    documented = cls.__doc__
    cls.__doc__ = documented or cls.__name__  # or it would be written from a signature, which costs twice the rest
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
    made.__doc__ = documented
    found = dataclasses.fields(made)
    compared = [one.name for one in found if one.compare]
    hashed = [one.name for one in found if (one.compare if one.hash is None else one.hash)]
    _give(made, "__init__", _first_init(made))
    _give(made, "__repr__", _repr([one.name for one in found if one.repr]))
    _give(made, "__eq__", _eq(_values(compared)))
    if frozen:
        made.__setattr__, made.__delattr__ = _refuse_to_set, _refuse_to_delete
        made.__hash__ = _hash(_values(hashed))
    else:
        made.__hash__ = None  # what can change is no key
    return made


def _give(cls: type, name: str, function: object) -> None:
    """What the class has written itself stays."""
    if name not in cls.__dict__:
        setattr(cls, name, function)


def _values(names: list[str]) -> Callable[[Any], object]:
    """All of them at once, as something to compare or to hash."""
    return attrgetter(*names) if names else lambda _: ()


def _eq(values: Callable[[Any], object]) -> Callable[[Any, object], bool]:
    def __eq__(self: Any, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    return __eq__


def _hash(values: Callable[[Any], object]) -> Callable[[Any], int]:
    def __hash__(self: Any) -> int:
        return hash(values(self))

    return __hash__


def _repr(names: list[str]) -> Callable[[Any], str]:
    def __repr__(self: Any) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    return __repr__


def _refuse_to_set(_self: object, name: str, _value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(_self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _first_init(cls: Any) -> Callable[..., None]:
    def __init__(self: Any, *args: object, **kwargs: object) -> None:
        cls.__init__ = _init(cls)
        cls.__init__(self, *args, **kwargs)

    return __init__


def _init(cls: Any) -> Any:
    """The standard's own: of a class with the same fields."""
    fields = [
        (one.name, one.type, field(default=one.default, default_factory=one.default_factory, init=one.init))
        for one in dataclasses.fields(cls)
    ]
    twin: Any = dataclasses.make_dataclass(
        cls.__name__,
        fields,
        namespace={name: getattr(cls, name) for name in ("__post_init__",) if hasattr(cls, name)},
        repr=False,
        eq=False,
        frozen=cls.__setattr__ is _refuse_to_set,
        slots="__slots__" in cls.__dict__,
    )
    twin.__init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return twin.__init__
