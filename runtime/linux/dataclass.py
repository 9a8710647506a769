"""`dataclass`, for the classes that every start of a command or of the daemon imports.

The standard library's compiles six functions out of text for each class, which takes half a millisecond: of 150
classes that was 45 % of the time until `ocid` had begun. Here all classes share their __eq__, __hash__, __repr__ and
the two methods that refuse changes, and __init__ is compiled once the first object is made.

Refuses what no class of ours asks for: order, kw_only, InitVar. Invariant: everything else is as there, since it is
there that the fields are found: `fields`, `replace`, `asdict`, `is_dataclass` and `match` know these classes, and
tests/unit/test_dataclass.py holds both to the same promises.
"""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, FrozenInstanceError
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


_MADE = object()  # stands in a signature for what a factory makes
_uncompiled: dict[type, None] = {}


def compile_all() -> None:
    """The __init__ of all classes that there are: for a process whose memory others go on from (runtime/dump.py)."""
    while _uncompiled:
        cls: Any = next(iter(_uncompiled))
        _compile(cls)


def _made(cls: Any, frozen: bool, slots: bool) -> Any:
    documented = cls.__doc__
    cls.__doc__ = documented or cls.__name__  # or it would be written from a signature, which costs twice the rest
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
    made.__doc__ = documented
    found = dataclasses.fields(made)
    compared = [one.name for one in found if one.compare]
    hashed = [one.name for one in found if (one.compare if one.hash is None else one.hash)]
    if "__init__" not in made.__dict__:
        made.__init__ = _first_init(made)
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
        _compile(cls)
        cls.__init__(self, *args, **kwargs)

    _uncompiled[cls] = None
    return __init__


def _compile(cls: Any) -> None:
    cls.__init__ = _init(cls)
    _uncompiled.pop(cls, None)


def _init(cls: Any) -> Callable[..., None]:
    """Compiled, so that wrong arguments are refused in the interpreter's own words, and right ones cost little."""
    scope: dict[str, Any] = {"_set": object.__setattr__, "_MADE": _MADE}
    head, body = ["self"], []
    for one in dataclasses.fields(cls):
        name = value = default = one.name
        if one.default_factory is not MISSING:
            scope[f"_make_{name}"] = one.default_factory
            default = "_MADE"
            value = f"_make_{name}() if {name} is _MADE else {name}" if one.init else f"_make_{name}()"
        elif one.default is not MISSING:
            scope[f"_default_{name}"] = one.default
            default = f"_default_{name}"
            value = name if one.init else default
        elif not one.init:
            continue  # whoever comes later gives it a value
        if one.init:
            head.append(name if default == name else f"{name}={default}")
        body.append(f"_set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    exec(f"def __init__({', '.join(head)}): {'; '.join(body) or 'pass'}", scope)  # noqa: S102 - names of our own
    scope["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    made: Callable[..., None] = scope["__init__"]
    return made
