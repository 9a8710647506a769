"""The reading of a kubelet's log: what counts as an error, and what explains one. The words of the lane's systemd."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from conformance.kubelet.log_scan import Absence, scan
from conformance.kubelet.logind import read_value, with_value

NOON = datetime(datetime.now().year, 11, 26, 12)


def line(severity: str, message: str, when: datetime = NOON) -> str:
    return f"{severity}{when:%m%d %H:%M:%S}.000000      49 remote_runtime.go:567] {message}\n"


def test_errors_are_found_once_with_their_count() -> None:
    text = line("E", 'failed err="it is broken" pod="a1b2c3d4e5"') + line("I", "fine")
    text += line("E", 'failed err="it is broken" pod="ffffffff00"') + "a line of something else\n"
    assert scan(text, []) == ['2 × E remote_runtime.go failed err="it is broken" pod="a1b2c3d4e5"']


def test_an_error_of_a_call_counts_at_any_severity() -> None:
    assert len(scan(line("I", 'hm err="rpc error: code = Internal desc = no"'), [])) == 1


def test_what_is_allowed_is_allowed() -> None:
    assert scan(line("E", 'Failed to read data from checkpoint err="checkpoint is not found"'), []) == []


def test_a_message_may_have_more_lines_than_one() -> None:
    mount = line("E", "Mount failed: exit status 32")
    assert scan(f"{mount}Mounting arguments: -t tmpfs -o noswap tmpfs /tmp/x\n", []) == []
    assert scan(f"{mount}Mounting arguments: -t tmpfs tmpfs /tmp/x\n{line('I', 'tmpfs noswap')}", [])


def test_a_runtime_that_is_away_may_not_answer_and_nothing_else() -> None:
    away = Absence(NOON, NOON + timedelta(seconds=5))
    unanswered = 'x err="rpc error: code = Unavailable desc = connection error: connect: connection refused"'
    assert scan(line("E", unanswered), [away]) == []
    assert scan(line("E", unanswered, NOON + timedelta(seconds=6)), [away])
    assert scan(line("E", 'x err="rpc error: code = Internal desc = no"'), [away])


@pytest.mark.parametrize("before", range(9))
def test_values_of_a_message_are_read_where_they_were_written(before: int) -> None:
    values: list[tuple[str, str | int]] = [("s", "text"), ("u", 7), ("g", "su"), ("o", "/a"), ("i", -1), ("b", 1)]
    data = bytes(before)
    for letter, value in values:
        data = with_value(data, letter, value)
    at = before
    for letter, value in values:
        found, at = read_value(data, at, letter)
        assert found == value
    assert at == len(data)


def test_a_variant_of_a_string_by_the_specification() -> None:
    assert with_value(b"", "v", "hi") == b"\x01s\0\0" + b"\x02\0\0\0" + b"hi\0"
