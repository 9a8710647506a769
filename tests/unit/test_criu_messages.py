"""criu's protobuf by hand: bytes as the encoding's own documentation has them, and what is no message is refused."""

from __future__ import annotations

import pytest

from runtime import criu
from runtime.errors import RuntimeFailure


def test_numbers_texts_and_lists_are_encoded() -> None:
    assert criu.message((1, 150)) == bytes.fromhex("089601")
    assert criu.message((2, "testing")) == bytes.fromhex("120774657374696e67")
    assert criu.message((4, True), (5, False)) == bytes.fromhex("20012800")
    assert criu.message((3, criu.message((1, 150)))) == bytes.fromhex("1a03089601")
    assert criu.message((16, ["a", "b"])) == bytes.fromhex("820101618201") + b"\x01b"


def test_a_negative_number_takes_ten_bytes() -> None:
    assert criu.message((1, -1)) == bytes.fromhex("08ffffffffffffffffff01")


def test_options_go_by_name_and_empty_ones_stay_out() -> None:
    assert criu.options(pid=7, log_file="", external=[], shell_job=False) == criu.message((2, 7), (7, False))


def test_what_is_encoded_is_read_again() -> None:
    data = criu.message((1, 6), (2, True), (5, criu.message((1, "post-dump"), (2, 300))))
    found = criu.fields(data)
    assert (found[1], found[2]) == (6, 1)
    inner = found[5]
    assert isinstance(inner, bytes) and criu.fields(inner) == {1: b"post-dump", 2: 300}


def test_fields_of_other_kinds_are_passed_over() -> None:
    # 1: fixed64, 2: fixed32, 3: varint
    assert criu.fields(bytes([0o11, *range(8), 0o25, *range(4), 0o30, 9])) == {3: 9}


@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\x08", b"\x08" + b"\xff" * 11, b"\x0b", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RuntimeFailure, match="no message of its protocol"):
        criu.fields(data)
