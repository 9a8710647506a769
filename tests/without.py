"""A pytest plugin: plays a test as it is, and once more for each field that it is said to show, with that field taken
out of every request, or of every answer, or filled with something else there, while the test runs.
conformance/fields.py asks for it and judges.

    pytest -p tests.without --without FILE …        FILE: {"plays": {test: ["request Message.field", …]}}

A play begins with `request`, `answer` (both: without the field) or `altered` (in answers).

writes FILE.told beside it: a list of {test, field, outcome, said, met, seconds}, of which `met` counts the messages
that had the field.

A field is taken out where a message leaves or enters this process: gRPC's channels, and the service that tests on fakes
call without gRPC. Fixtures have it, so that one daemon serves all plays of a module; what a play that fails has left in
that daemon is taken away. Refuses to judge: a test that fails is told with what it said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from conformance import cri_client
from cri.api import api_pb2 as pb
from cri.service import STREAMS, Service
from tests import costs

# What a play without its field waits for does not come: it need not wait as long as a test that has it.
PATIENCE_S = 15.0
# Times are nanoseconds, and tests hold them between two others: an hour is out of every reach.
_LATER = 3_600_000_000_000
_METHODS = {method.name: method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods}


class Taken:
    """What is done just now: `how` is request, answer or altered, "" for nothing."""

    how = message = field = ""
    met = 0

    def out_of(self, side: str, whole: Any) -> Any:
        """`whole`, or a copy without the field, or with another value in it."""
        if side != {"altered": "answer"}.get(self.how, self.how):
            return whole
        copy = type(whole)()
        copy.CopyFrom(whole)
        self._change(copy)
        return copy

    def _change(self, message: Message) -> None:
        found = message.ListFields()
        for field, value in found:
            if field.message_type is None or _is_map(field):
                continue  # maps are of strings, all of them
            for one in (value,) if isinstance(value, Message) else value:
                self._change(one)
        if message.DESCRIPTOR.name == self.message:
            for field in (field for field, _ in found if field.name == self.field):
                self.met += 1
                alter(message, field) if self.how == "altered" else message.ClearField(field.name)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def alter(message: Message, field: FieldDescriptor) -> None:
    """Puts something else into a field that is set. Of a single message nothing: its own fields have their plays."""
    value = getattr(message, field.name)
    if _is_map(field):
        value["altered"] = "altered"
    elif field.is_repeated:
        value.add() if field.message_type is not None else value.append(value[-1])
    elif field.message_type is None:
        setattr(message, field.name, _another(field, value))


def _another(field: FieldDescriptor, value: Any) -> Any:
    if field.enum_type is not None:
        return next(number for number in field.enum_type.values_by_number if number != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str | bytes):
        return value + ("-altered" if isinstance(value, str) else b"-altered")
    if field.type in (field.TYPE_INT64, field.TYPE_UINT64):
        return value + _LATER if value < 1 << 62 else value - _LATER
    return value + 1


taken = Taken()


# ------------------------------------------------------------------------------------------- where messages go by


def _tapped(channel: Any) -> Any:
    """A channel whose stubs send and hand out what is left of a message."""

    def tap(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(method: str, request_serializer: Any, response_deserializer: Any, *rest: Any, **named: Any) -> Any:
            def send(message: Any) -> bytes:
                return bytes(request_serializer(taken.out_of("request", message)))

            def hand_out(data: bytes) -> Any:
                return taken.out_of("answer", response_deserializer(data))

            return make(method, send, hand_out, *rest, **named)

        return made

    for name in ("unary_unary", "unary_stream"):
        setattr(channel, name, tap(getattr(channel, name)))
    return channel


def _tap(module: Any) -> None:
    make = module.insecure_channel
    module.insecure_channel = lambda *words, **named: _tapped(make(*words, **named))


_call, _stream = Service.call, Service.stream


async def _tapped_call(self: Service, name: str, request: Any, *rest: Any) -> Any:
    return taken.out_of("answer", await _call(self, name, taken.out_of("request", request), *rest))


async def _left_of(name: str, answers: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    parse = getattr(pb, _METHODS[name].output_type.name).FromString
    async for answer in answers:
        yield taken.out_of("answer", parse(answer)).SerializeToString()


def _tapped_stream(self: Service, name: str, request: Any, *rest: Any) -> AsyncGenerator[bytes, None]:
    assert name in STREAMS
    return _left_of(name, _stream(self, name, taken.out_of("request", request), *rest))


# --------------------------------------------------------------------------------------------------------- the plays


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without", type=Path)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    assert "tests.support" not in sys.modules, "who took the limit before this was read has the long one"
    costs.SOON_S = cri_client.CALL_S = PATIENCE_S


def pytest_configure(config: pytest.Config) -> None:
    _tap(grpc)
    _tap(grpc.aio)
    Service.call, Service.stream = _tapped_call, _tapped_stream  # type: ignore[method-assign]
    plays = json.loads(config.getoption("--without").read_text())["plays"]
    config.pluginmanager.register(Plays(plays))


def _said(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """In a line."""
    error = caught.value
    words = str(error.details()) if isinstance(error, grpc.Call) else caught.exconly(tryshort=True)
    return words.partition("\n")[0][:200]


class Plays:
    def __init__(self, plays: dict[str, list[str]]) -> None:
        self._plays = plays
        self._told: list[dict[str, Any]] = []

    @pytest.fixture
    def taken_out(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        fields = self._plays.get(metafunc.definition.nodeid)
        if fields is None:
            return  # another one of the same file, which will not be played
        metafunc.fixturenames.append("taken_out")
        # Whole again at the end: no play has failed by what those before it have left.
        metafunc.parametrize("taken_out", ["", *fields, ""], ids=["whole", *fields, "whole again"], indirect=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        taken.how, _, field = item.callspec.params["taken_out"].partition(" ")
        taken.message, _, taken.field = field.partition(".")
        taken.met = 0
        try:
            return (yield)
        finally:
            taken.how = ""
            for fixture in item.funcargs.values():
                if hasattr(client := getattr(fixture, "client", None), "clear"):
                    client.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Function, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._told.append(
                {
                    "test": item.nodeid.partition("[")[0],
                    "field": item.callspec.params["taken_out"],
                    "outcome": report.outcome if report.when == "call" else f"{report.outcome} before it began",
                    "said": "" if call.excinfo is None else _said(call.excinfo),
                    "met": taken.met,
                    "seconds": call.duration,
                }
            )
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        file = session.config.getoption("--without")
        file.with_suffix(".told").write_text(json.dumps(self._told))
