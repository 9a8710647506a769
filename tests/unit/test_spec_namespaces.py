"""linux.namespaces, mappings and offsets: what is taken, and that a refusal is one that the kernel would make."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import spec_namespaces
from runtime.fields import FieldError, Fields
from runtime.namespaces import FLAGS, Namespace
from runtime.spec_namespaces import IdMapping, TimeOffset, map_text

NUMBERS = st.integers(0, 12)
RANGES = st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(1, 4)), max_size=4)


def linux(**entries: Any) -> Fields:
    return Fields(entries, "linux")


def entries(ranges: list[tuple[int, int, int]]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in ranges]


@given(RANGES)
def test_mappings_are_taken_unless_an_id_is_in_two(ranges: list[tuple[int, int, int]]) -> None:
    inside = [number for first, _, size in ranges for number in range(first, first + size)]
    outside = [number for _, first, size in ranges for number in range(first, first + size)]
    clean = len(set(inside)) == len(inside) and len(set(outside)) == len(outside)
    try:
        found = spec_namespaces.mappings(linux(uidMappings=entries(ranges)), "uidMappings")
    except FieldError as error:
        assert not clean and "ids that are in uidMappings[" in str(error)
    else:
        assert clean and found == tuple(IdMapping(*entry) for entry in ranges)


def test_what_is_written_is_what_is_given_in_its_order() -> None:
    found = spec_namespaces.mappings(linux(gidMappings=entries([(5, 9, 1), (0, 7, 2)])), "gidMappings")
    assert map_text(found) == "5 9 1\n0 7 2\n"


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 0, 0)], "uidMappings[0].size"),
        ([(-1, 0, 1)], "uidMappings[0].containerID"),
        ([(0, 1 << 32, 1)], "uidMappings[0].hostID"),
        ([(0, 0, (1 << 32) - 1), (0, 0, 1)], "uidMappings[1]"),
        ([(2, 0, (1 << 32) - 2)], "uidMappings[0]: goes beyond the largest id"),
        ([(0, n, 1) for n in range(341)], "341 mappings"),
        ([(n, 4_000_000_000 + n, 1) for n in range(300)], "bytes of mappings"),
    ],
)
def test_s18_mappings_beyond_what_there_is(ranges: list[tuple[int, int, int]], words: str) -> None:
    with pytest.raises(FieldError) as failed:
        spec_namespaces.mappings(linux(uidMappings=entries(ranges)), "uidMappings")
    assert words in str(failed.value)


def test_every_kind_in_any_order() -> None:
    kinds = sorted(FLAGS, reverse=True)
    found = spec_namespaces.namespaces(linux(namespaces=[{"type": kind} for kind in kinds]))
    assert found == tuple(Namespace(kind) for kind in kinds)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([{"type": "mount"}, {"type": "mount"}], 'namespaces[1].type: namespace "mount" is given twice'),
        ([{"type": "mnt"}], "namespaces[0].type"),
        ([{"type": "user"}], 'a "mount" namespace is required'),
        ([{"type": "mount", "path": "/proc/1/ns/mnt"}], "namespaces[0].path: a mount namespace cannot be joined"),
        ([{"type": "mount"}, {"type": "time", "path": "ns/time"}], "namespaces[1].path: expected an absolute path"),
    ],
)
def test_namespaces_that_cannot_be(wanted: list[dict[str, str]], words: str) -> None:
    with pytest.raises(FieldError) as failed:
        spec_namespaces.namespaces(linux(namespaces=wanted))
    assert words in str(failed.value)


def test_offsets_of_both_clocks() -> None:
    given_ = {"boottime": {"secs": -5, "nanosecs": 999_999_999}, "monotonic": {}}
    found = spec_namespaces.time_offsets(linux(timeOffsets=given_))
    assert found == (TimeOffset("boottime", -5, 999_999_999), TimeOffset("monotonic", 0, 0))
    assert spec_namespaces.time_offsets(linux()) == ()
