"""Functions that the interpreter takes for warm when they are called for the first time.

CPython 3.11 rewrites the byte code of a function in place, for what it meets there, once it has been called eight times
(PEP 659). A process that is to be forked many times wants this done before: each page that it is done in later is a
copy. Instead of eight calls of everything, the counter in each code object is put to its last step.

Refuses other interpreters than those that count where this looks, which is tried on a function of its own: then nothing
is warm, and who comes here calls everything as often as it takes. Invariant: what was not called is as it was before.
"""

from __future__ import annotations

import gc

from runtime.linux import foreign as ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

# Include/cpython/code.h of CPython 3.11: co_warmup, a short, counts from -8 up to 0, where byte code is rewritten.
_AT = 52
_COLD, _LAST = -8, -1


class Warmed:
    """While it is entered, all functions that were there when it was are warm at their next call. Of one thread."""

    def __init__(self) -> None:
        self._before: list[tuple[CodeType, int]] = []

    def __enter__(self) -> bool:
        """Whether this interpreter is one that it is written for."""
        if AVAILABLE:
            for code in _all_code():
                counter = _counter(code)
                if _COLD <= counter.value < _LAST:
                    self._before.append((code, counter.value))
                    counter.value = _LAST
        return AVAILABLE

    def __exit__(self, *_: object) -> None:
        for code, value in self._before:
            counter = _counter(code)
            if counter.value == _LAST:
                counter.value = value
        self._before.clear()


def _counter(code: CodeType) -> ctypes.c_int16:
    return ctypes.c_int16.from_address(id(code) + _AT)


def _all_code() -> Iterator[CodeType]:
    """That of all functions, and of those that these would make; not of modules, which run once. The collector knows
    all functions but those that were frozen (gc.freeze)."""
    kind = type(_all_code)
    left = [one.__code__ for one in gc.get_objects() if type(one) is kind]
    seen = set()
    while left:
        code = left.pop()
        if id(code) not in seen:
            seen.add(id(code))
            yield code
            left += [one for one in code.co_consts if type(one) is type(code)]


def _counts() -> bool:
    """Whether the counter is where this looks for it."""

    def tried() -> None:
        pass

    counter = _counter(tried.__code__)
    found = [counter.value]
    tried()
    return [*found, counter.value] == [_COLD, _COLD + 1]


AVAILABLE = _counts()
