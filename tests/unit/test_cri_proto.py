"""Our descriptor is the interface: every service, message, enum and field as the reference says.

The reference lies beside the repository (../shared/cri/cri-v1.json); where it does not, the test says so by skipping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from cri.api import api_pb2

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "cri" / "cri-v1.json"

_SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    if not REFERENCE.exists():
        pytest.skip(f"no {REFERENCE}: the descriptor is compared with it only where it is")
    return dict(json.loads(REFERENCE.read_text()))


def _type_of(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        entry = field.message_type
        if entry.GetOptions().map_entry:
            return f"map<{_type_of(entry.fields_by_name['key'])},{_type_of(entry.fields_by_name['value'])}>"
        return str(entry.name)
    if field.enum_type is not None:
        return str(field.enum_type.name)
    return _SCALARS[field.type]


def _fields(message: Descriptor) -> list[dict[str, Any]]:
    found = []
    for field in message.fields:
        item: dict[str, Any] = {"n": field.number, "name": field.name, "type": _type_of(field)}
        if field.is_repeated and not item["type"].startswith("map<"):
            item["repeated"] = True
        if field.GetOptions().deprecated:
            item["deprecated"] = True
        found.append(item)
    return found


def test_services_are_the_interface(reference: dict[str, Any]) -> None:
    ours: dict[str, dict[str, Any]] = {}
    for name, service in api_pb2.DESCRIPTOR.services_by_name.items():
        ours[name] = {}
        for method in service.methods:
            assert not method.client_streaming
            ours[name][method.name] = {"request": method.input_type.name, "response": method.output_type.name}
            if method.server_streaming:
                ours[name][method.name]["server_streaming"] = True
    assert api_pb2.DESCRIPTOR.package == reference["package"]
    assert ours == reference["services"]
    assert sum(map(len, ours.values())) == 43


def test_messages_are_the_interface(reference: dict[str, Any]) -> None:
    messages = api_pb2.DESCRIPTOR.message_types_by_name
    assert set(messages) == set(reference["messages"])
    for name, fields in reference["messages"].items():
        by_number = sorted(fields, key=lambda field: field["n"])
        assert sorted(_fields(messages[name]), key=lambda field: field["n"]) == by_number, name


def test_enums_are_the_interface(reference: dict[str, Any]) -> None:
    ours = {
        name: {value.name: value.number for value in enum.values}
        for name, enum in api_pb2.DESCRIPTOR.enum_types_by_name.items()
    }
    assert ours == reference["enums"]
    # Nested in its message, so not in the reference's flat list.
    profile = api_pb2.SecurityProfile.ProfileType
    assert dict(profile.items()) == {"RuntimeDefault": 0, "Unconfined": 1, "Localhost": 2}
