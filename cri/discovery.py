"""gRPC's health and reflection services on the CRI's socket: grpc.health.v1, and grpc.reflection.v1 and v1alpha.

A few lines of our own instead of two packages (docs/decisions/0009). Refuses to know better than the calls: a service
is serving exactly while its calls are not refused. Invariant: nothing here outlives the daemon's wish to end, whatever
a client keeps open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from cri.api import api_pb2 as pb
from cri.discovery_protos import HEALTH, REFLECTIONS, protos
from cri.intercept import Intercept

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
_NOT_FOUND, _UNIMPLEMENTED = 5, 12
_HEALTH_NAME = f"{HEALTH}.Health"
_REFLECTION_NAMES = tuple(f"{package}.ServerReflection" for package in REFLECTIONS)
_CRI_NAMES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_NAMES = (*_CRI_NAMES, _HEALTH_NAME, *_REFLECTION_NAMES)


class Discovery:
    """The handlers of these services, for the server whose calls `intercept` lets through."""

    def __init__(self, intercept: Intercept) -> None:
        self._intercept = intercept
        self._ended = asyncio.Event()
        self._changed = asyncio.Event()
        intercept.told.append(self._change)

    def _change(self) -> None:
        """Wakes every watcher: each waits for the event of its time, which is never cleared."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Ends what clients keep open."""
        self._ended.set()
        self._change()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For a grpc.aio server. Requests come as bytes, parsed with classes that are made on first use."""
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        found = [grpc.method_handlers_generic_handler(_HEALTH_NAME, health)]
        for package, name in zip(REFLECTIONS, _REFLECTION_NAMES, strict=True):
            info = grpc.stream_stream_rpc_method_handler(self._info(package))
            found.append(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": info}))
        return tuple(found)

    # -------------------------------------------------------------------------------------------------------- health

    def _status(self, service: str) -> int:
        if service and service not in _NAMES:
            return _SERVICE_UNKNOWN
        return _NOT_SERVING if self._intercept.why_not else _SERVING

    async def _check(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        service = await _parsed(f"{HEALTH}.HealthCheckRequest", request, context)
        status = self._status(service.service)
        if status == _SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {service.service[:200]!r} is served here")
        return _status_message(status)

    async def _watch(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        service = await _parsed(f"{HEALTH}.HealthCheckRequest", request, context)
        told = -1
        while True:
            # All of it from before the answer is sent: what changes meanwhile is told by the next.
            changed, ended = self._changed, self._ended.is_set()
            status = self._status(service.service)
            if status != told:
                told = status
                yield _status_message(status)
            if ended:
                return
            await changed.wait()

    # ---------------------------------------------------------------------------------------------------- reflection

    def _info(self, package: str) -> Any:
        async def info(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            async for request in _until(requests, self._ended):
                asked = await _parsed(f"{package}.ServerReflectionRequest", request, context)
                answer = protos().message(f"{package}.ServerReflectionResponse")(valid_host=asked.host)
                answer.original_request.CopyFrom(asked)
                _answer(asked, answer)
                yield answer.SerializeToString()

        return info


async def _until(requests: AsyncIterator[bytes], ended: asyncio.Event) -> AsyncIterator[bytes]:
    """The requests of a stream, until it or the daemon ends."""
    ending = asyncio.ensure_future(ended.wait())
    iterator = aiter(requests)
    try:
        while True:
            coming = asyncio.ensure_future(anext(iterator))
            try:
                await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
            if not coming.done() or coming.cancelled():
                return
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
    finally:
        ending.cancel()


async def _parsed(name: str, data: bytes, context: grpc.aio.ServicerContext) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return protos().message(name).FromString(data)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {name}")


def _status_message(status: int) -> bytes:
    found: bytes = protos().message(f"{HEALTH}.HealthCheckResponse")(status=status).SerializeToString()
    return found


def _answer(asked: Any, answer: Any) -> None:
    kind = asked.WhichOneof("message_request")
    if kind == "list_services":
        for name in sorted(_NAMES):
            answer.list_services_response.service.add(name=name)
        return
    if kind == "file_by_filename":
        file = (
            pb.DESCRIPTOR
            if asked.file_by_filename == pb.DESCRIPTOR.name
            else protos().find_file(asked.file_by_filename)
        )
        _give(file, f"no file {asked.file_by_filename[:200]!r}", answer)
    elif kind == "file_containing_symbol":
        symbol = asked.file_containing_symbol
        _give(_cri_file(symbol) or protos().find_symbol(symbol), f"no symbol {symbol[:200]!r}", answer)
    elif kind == "all_extension_numbers_of_type":
        wanted = asked.all_extension_numbers_of_type
        if (_cri_file(wanted) or protos().find_symbol(wanted)) is None:
            _give(None, f"no type {wanted[:200]!r}", answer)
        else:
            answer.all_extension_numbers_response.base_type_name = wanted  # proto3 has no extensions
    elif kind == "file_containing_extension":
        _give(None, "no extensions", answer)
    else:
        answer.error_response.error_code = _UNIMPLEMENTED
        answer.error_response.error_message = "none of the questions that this protocol has"


def _cri_file(symbol: str) -> FileDescriptor | None:
    """The CRI's file where it defines `symbol`."""
    try:
        file = pb.DESCRIPTOR.pool.FindFileContainingSymbol(symbol)
    except KeyError:
        return None
    return file if file.name == pb.DESCRIPTOR.name else None


def _give(file: FileDescriptor | None, otherwise: str, answer: Any) -> None:
    if file is None:
        answer.error_response.error_code = _NOT_FOUND
        answer.error_response.error_message = otherwise
        return
    answer.file_descriptor_response.file_descriptor_proto.extend(one.serialized_pb for one in _with_dependencies(file))


def _with_dependencies(file: FileDescriptor) -> Iterator[FileDescriptor]:
    found = {file.name: file}
    waiting = [file]
    while waiting:
        for other in waiting.pop().dependencies:
            if other.name not in found:
                found[other.name] = other
                waiting.append(other)
    yield from found.values()
