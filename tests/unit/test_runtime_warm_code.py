"""Byte code that is rewritten at the first call, seen in the byte code itself (PEP 659, `dis` with adaptive=True)."""

from __future__ import annotations

import dis
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from runtime.linux import warm_code
from runtime.linux.warm_code import Warmed

ROOT = Path(__file__).parents[2]
needs_counters = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="needs an interpreter that counts calls")


def plus(one: Any, other: Any) -> Any:
    return one + other


def fresh() -> Callable[[Any, Any], Any]:
    """A function that nobody has called."""
    return FunctionType(plus.__code__.replace(), {})


def is_special(function: Callable[[Any, Any], Any]) -> bool:
    """Whether it has been rewritten for integers."""
    names = {one.opname for one in dis.get_instructions(function, adaptive=True)}
    return "BINARY_OP_ADD_INT" in names


def calls_until_special(function: Callable[[Any, Any], Any]) -> int:
    for number in range(1, 20):
        function(1, 2)
        if is_special(function):
            return number
    raise AssertionError("never")


@needs_counters
def test_a_call_is_enough_and_what_was_not_called_is_as_cold_as_ever() -> None:
    as_ever = calls_until_special(fresh())
    called, not_called, half_way = fresh(), fresh(), fresh()
    half_way(1, 2)
    with Warmed() as is_warm:
        assert is_warm
        assert calls_until_special(called) == 1
    assert calls_until_special(not_called) == as_ever > 2
    assert calls_until_special(half_way) == as_ever - 1
    assert calls_until_special(fresh()) == as_ever  # what is made later is none of its business


@needs_counters
def test_functions_that_functions_make_are_warm_too() -> None:
    def maker() -> Callable[[Any, Any], Any]:
        def made(one: Any, other: Any) -> Any:
            return one + other

        return made

    with Warmed():
        assert calls_until_special(maker()) == 1


@needs_counters
def test_what_is_rewritten_for_one_kind_still_does_what_it_says_for_others() -> None:
    function = fresh()
    with Warmed():
        function(1, 2)
    assert (function(2, 3), function("a", "b"), function([1], [2])) == (5, "ab", [1, 2])


def test_where_the_counter_is_elsewhere_nothing_is_written() -> None:
    """In a process of its own, which looks in a wrong place from the beginning."""
    source = Path(warm_code.__file__).read_text().replace("_AT = 52", "_AT = 48", 1)
    assert "_AT = 48" in source
    program = f"""
import sys
sys.path.append({str(ROOT)!r})
space = {{"__name__": "elsewhere"}}
exec({source!r}, space)
def function(): pass
before = function.__code__.co_flags  # what is there
with space["Warmed"]() as is_warm:
    assert not is_warm and not space["AVAILABLE"]
    assert function.__code__.co_flags == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
