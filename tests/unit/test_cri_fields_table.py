"""The audit of the CRI's fields: each that a request or an answer may have is in the table, and what that says is
there."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from google.protobuf.descriptor import Descriptor

from conformance.cri_fields import DOCUMENT, KINDS, PEERS, ROOT, Field, load, load_answers, load_calls, rendered
from cri.api import api_pb2 as pb

TABLE = load()


def carried(side: str) -> dict[str, list[str]]:
    """The fields of every message that a request (input_type) or an answer (output_type) may hold, but for those of
    Windows."""
    found: dict[str, list[str]] = {}

    def walk(message: Descriptor) -> None:
        if message.name in found or "Windows" in message.name:
            return
        found[message.name] = [field.name for field in message.fields]
        for field in message.fields:
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                walk(field.message_type)

    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            walk(getattr(method, side))
    return {name: fields for name, fields in found.items() if fields}


@functools.cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_field_has_a_row_and_every_row_a_field() -> None:
    assert {name: sorted(fields) for name, fields in TABLE.items()} == {
        name: sorted(fields) for name, fields in carried("input_type").items()
    }


def test_every_answers_field_has_a_row_with_a_test_that_is_there() -> None:
    answers = load_answers()
    assert {name: sorted(fields) for name, fields in answers.items()} == {
        name: sorted(set(fields) - {"windows"}) for name, fields in carried("output_type").items()
    }
    for message, fields in answers.items():
        for name, row in fields.items():
            path, _, function = row.test.partition("::")
            assert path and function in functions_of(path), f"{message}.{name}: no test {row.test!r}"
            assert row.peers in PEERS, f"{message}.{name}"


@pytest.mark.parametrize(
    ("name", "row"), [(f"{message}.{name}", row) for message, fields in TABLE.items() for name, row in fields.items()]
)
def test_a_row_says_what_is_there(name: str, row: Field) -> None:
    assert row.what in KINDS and row.peers in PEERS
    if row.what == "moot":
        assert len(row.note) > 30 and not row.where and not row.test
        return
    source = (ROOT / row.where).read_text()
    whole_call = row.where == "cri/service.py"
    assert whole_call or re.search(rf"\b{name.partition('.')[2]}\b", source), f"{row.where} does not name it"
    if whole_call:
        from cri.service import STREAMS, VERBS

        call = name.partition("Request.")[0]
        assert call not in VERBS and call not in STREAMS, f"{call} is there now: say where its fields are read"
    path, _, function = row.test.partition("::")
    assert function in functions_of(path), f"no test {row.test}"


def test_every_call_has_a_row_that_says_what_is_there() -> None:
    from cri.service import STREAMS, VERBS

    calls = load_calls()
    assert set(calls) == {method.name for one in pb.DESCRIPTOR.services_by_name.values() for method in one.methods}
    for name, call in calls.items():
        assert (call.what == "honoured") == (name in VERBS or name in STREAMS), name
        path, _, function = call.test.partition("::")
        assert call.peers in PEERS and function in functions_of(path), name


def test_the_document_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(TABLE, load_calls(), load_answers()), (
        "run python -m conformance.cri_fields"
    )
