"""Frozen value classes without the import bill: dataclasses and typing cost 20 ms, as much as all of a start.

A subclass of `Record` lists its fields as annotations, defaults included, as a frozen dataclass does, and mypy checks
it as one (PEP 681). Refuses mutable magic: no default factories, no ordering. Invariant: equal fields, equal records.
"""

from __future__ import annotations

TYPE_CHECKING = False  # mypy takes the name for typing's own
if TYPE_CHECKING:
    from typing import Any, ClassVar, NoReturn, TypeVar, dataclass_transform

    _R = TypeVar("_R", bound="Record")
else:

    def dataclass_transform(**_):
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Record:
    """Base of the runtime's values. Fields are read-only; `changed` gives a copy with some of them replaced."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _names: ClassVar[frozenset[str]] = frozenset()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        cls._fields = (*cls._fields, *(name for name in cls.__annotations__ if name not in cls._fields))
        cls._names = frozenset(cls._fields)
        cls._defaults = {name: getattr(cls, name) for name in cls._fields if hasattr(cls, name)}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A config.json becomes eighty of these while somebody waits: what does not fit is found out once it is known.
        kind, values = type(self), self.__dict__
        values.update(kind._defaults)
        if args:
            given = dict(zip(kind._fields, args, strict=False))
            values.update(given)
            if len(args) > len(given) or not given.keys().isdisjoint(kwargs):
                self._refuse(args, kwargs)
        values.update(kwargs)
        if values.keys() != kind._names:
            self._refuse(args, kwargs)

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        kind, fields = type(self), self._fields
        if len(args) > len(fields):
            raise TypeError(f"{kind.__name__} takes {len(fields)} fields, got {len(args)}")
        given = fields[: len(args)]
        for name in kwargs:
            if name in given:
                raise TypeError(f"{kind.__name__}: field {name!r} is given twice")
        have = {*self.__dict__, *kwargs}
        odd = next((name for name in kwargs if name not in fields), "")
        problem = f"{odd!r} is unknown" if odd else f"{next(n for n in fields if n not in have)!r} is missing"
        raise TypeError(f"{kind.__name__}: field {problem}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name}")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def _values(self) -> tuple[object, ...]:
        return tuple(self.__dict__[name] for name in self._fields)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"

    def changed(self: _R, **fields: Any) -> _R:
        """A copy with `fields` replaced."""
        return type(self)(**{**self.__dict__, **fields})
