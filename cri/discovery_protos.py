"""gRPC's own protocols health (v1) and reflection (v1, v1alpha), as descriptors and message classes.

Made from a table, in a pool of their own and on first use: most daemons are never asked, and another library in this
process may have the same names. Refuses parts of the protocols that ocid does not serve. Invariant: field numbers and
types are those of grpc/health/v1/health.proto and grpc/reflection/v1/reflection.proto, which clients have compiled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
    from google.protobuf.descriptor_pool import DescriptorPool

HEALTH = "grpc.health.v1"
REFLECTIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")

# Field: number and type; a type that begins with a capital is a message of the same file, [] is repeated, and | is one
# of the alternatives.
_Message = Mapping[str, tuple[int, str]]
_REFLECTION: Mapping[str, _Message] = {
    "ServerReflectionRequest": {
        "host": (1, "string"),
        "file_by_filename": (3, "|string"),
        "file_containing_symbol": (4, "|string"),
        "file_containing_extension": (5, "|ExtensionRequest"),
        "all_extension_numbers_of_type": (6, "|string"),
        "list_services": (7, "|string"),
    },
    "ExtensionRequest": {"containing_type": (1, "string"), "extension_number": (2, "int32")},
    "ServerReflectionResponse": {
        "valid_host": (1, "string"),
        "original_request": (2, "ServerReflectionRequest"),
        "file_descriptor_response": (4, "|FileDescriptorResponse"),
        "all_extension_numbers_response": (5, "|ExtensionNumberResponse"),
        "list_services_response": (6, "|ListServiceResponse"),
        "error_response": (7, "|ErrorResponse"),
    },
    "FileDescriptorResponse": {"file_descriptor_proto": (1, "[]bytes")},
    "ExtensionNumberResponse": {"base_type_name": (1, "string"), "extension_number": (2, "[]int32")},
    "ListServiceResponse": {"service": (1, "[]ServiceResponse")},
    "ServiceResponse": {"name": (1, "string")},
    "ErrorResponse": {"error_code": (1, "int32"), "error_message": (2, "string")},
}


class Protos:
    """The files, and the classes of their messages."""

    def __init__(self) -> None:
        from google.protobuf.descriptor_pool import DescriptorPool

        self.pool: DescriptorPool = DescriptorPool()
        for file in (_health(), *(_reflection(package) for package in REFLECTIONS)):
            self.pool.Add(file)

    def message(self, name: str) -> Any:
        """The class of a message, by its full name."""
        from google.protobuf.message_factory import GetMessageClass

        return GetMessageClass(self.pool.FindMessageTypeByName(name))

    def find_file(self, name: str) -> FileDescriptor | None:
        """By file name."""
        try:
            return self.pool.FindFileByName(name)
        except KeyError:
            return None

    def find_symbol(self, symbol: str) -> FileDescriptor | None:
        """The file that defines a service, message, enumeration or method."""
        try:
            return self.pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return None


@functools.cache
def protos() -> Protos:
    """One for the process."""
    return Protos()


def _file(package: str, name: str) -> FileDescriptorProto:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    return FileDescriptorProto(name=f"{package.replace('.', '/')}/{name}.proto", package=package, syntax="proto3")


def _health() -> FileDescriptorProto:
    file = _file(HEALTH, "health")
    _add_message(file, "HealthCheckRequest", {"service": (1, "string")})
    response = file.message_type.add(name="HealthCheckResponse")
    status = response.enum_type.add(name="ServingStatus")
    for number, word in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        status.value.add(name=word, number=number)
    enumeration = f".{HEALTH}.HealthCheckResponse.ServingStatus"
    response.field.add(name="status", number=1, label=1, type=14, type_name=enumeration)
    service = file.service.add(name="Health")
    for method, streaming in (("Check", False), ("Watch", True)):
        service.method.add(
            name=method,
            input_type=f".{HEALTH}.HealthCheckRequest",
            output_type=f".{HEALTH}.HealthCheckResponse",
            server_streaming=streaming,
        )
    return file


def _reflection(package: str) -> FileDescriptorProto:
    file = _file(package, "reflection")
    for name, fields in _REFLECTION.items():
        _add_message(file, name, fields)
    file.service.add(name="ServerReflection").method.add(
        name="ServerReflectionInfo",
        input_type=f".{package}.ServerReflectionRequest",
        output_type=f".{package}.ServerReflectionResponse",
        client_streaming=True,
        server_streaming=True,
    )
    return file


def _add_message(file: FileDescriptorProto, name: str, fields: _Message) -> None:
    message: DescriptorProto = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
        plain = kind.lstrip("|[]")
        added = message.field.add(name=field, number=number, label=3 if kind.startswith("[]") else 1)
        if plain[0].isupper():
            added.type, added.type_name = 11, f".{file.package}.{plain}"
        else:
            added.type = {"string": 9, "bytes": 12, "int32": 5}[plain]
        if kind.startswith("|"):
            if not message.oneof_decl:
                message.oneof_decl.add(name="message_request" if name.endswith("Request") else "message_response")
            added.oneof_index = 0
