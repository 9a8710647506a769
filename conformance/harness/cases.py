"""What a case is, and where all of them are found.

A case is a function that gets a `Box` and asserts. A module of conformance/runtime/ makes a `Group` and decorates its
functions; a case's name is the group's and the function's, with dashes. Refuses two cases of one name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conformance.harness.abilities import ABILITIES

if TYPE_CHECKING:
    from conformance.harness.box import Box

CASES_PACKAGE = "conformance.runtime"
# What one case may take; a stuck runtime costs this once. The machine may be busy with other things.
LIMIT_S = 60.0

Body = Callable[["Box"], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One behaviour. `needs` are abilities of the machine (harness/abilities.py)."""

    name: str
    group: str
    body: Body
    needs: tuple[str, ...]
    limit_s: float


class Skip(Exception):
    """Raised by a case that finds out while it runs that this machine cannot show it; says why."""


_known: dict[str, Case] = {}


class Group:
    """Cases about one thing."""

    def __init__(self, name: str, *needs: str) -> None:
        self.name = name
        self._needs = needs

    def case(self, *needs: str, limit_s: float = LIMIT_S) -> Callable[[Body], Body]:
        """Registers the decorated function."""
        unknown = [ability for ability in needs if ability not in ABILITIES]
        if unknown:
            raise ValueError(f"{self.name}: unknown ability {unknown[0]!r}: one of {sorted(ABILITIES)}")

        def register(body: Body) -> Body:
            name = f"{self.name}/{body.__name__.replace('_', '-')}"
            if name in _known:
                raise ValueError(f"two cases are called {name}")
            _known[name] = Case(name, self.name, body, (*self._needs, *needs), limit_s)
            return body

        return register


def load() -> dict[str, Case]:
    """Every case by its name, in the order they are written in."""
    package = importlib.import_module(CASES_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{CASES_PACKAGE}.{module.name}")
    return dict(_known)


def choose(
    cases: dict[str, Case], groups: Sequence[str], words: Sequence[str], needs: Sequence[str] = ()
) -> list[Case]:
    """The cases of any of `groups` that need any of `needs` and whose name holds every one of `words`; all of them,
    without any of these."""
    known = {case.group for case in cases.values()}
    for group in groups:
        if group not in known:
            raise ValueError(f"no group is called {group!r}: one of {', '.join(sorted(known))}")
    return [
        case
        for case in cases.values()
        if (not groups or case.group in groups)
        and (not needs or set(needs) & set(case.needs))
        and all(word in case.name for word in words)
    ]
