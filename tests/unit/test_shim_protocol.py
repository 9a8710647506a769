"""The wire: what is said arrives, and what should not be said is refused by name."""

from __future__ import annotations

import os
import socket

import pytest

from runtime.errors import RuntimeFailure
from runtime.linux.sockets import recv_frame
from runtime.shim import protocol
from runtime.shim.protocol import ExecMessage, Facts, IdMessage


def test_a_request_arrives_as_it_was_sent_bytes_included() -> None:
    arguments = ["\udcff\udc80", 'quo"te', "ünï", ""]  # what argv may hold: not valid UTF-8 (threats P8)
    message = ExecMessage("c1", {"args": arguments}, 1.5, 16)
    name, body = protocol.parse_request(protocol.request("exec", message))
    assert name == "exec"
    assert protocol.parse(ExecMessage, body) == message


@pytest.mark.parametrize("body", [{}, {"id": "x", "more": 1}, [], "x", None])
def test_missing_and_unknown_fields_are_named(body: object) -> None:
    with pytest.raises(RuntimeFailure, match="IdMessage: expected fields .'id'.") as caught:
        protocol.parse(IdMessage, body)
    assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'["x"]', b"[1,{}]", b"\xff", b"[" * 100_000, b'{"a":1}'])
def test_garbage_is_an_error_not_a_crash(payload: bytes) -> None:
    with pytest.raises(RuntimeFailure):
        protocol.parse_request(payload)


def test_an_error_crosses_with_code_step_and_hint() -> None:
    error = RuntimeFailure("mount proc: EPERM", step="mounts", errno=1, hint="try", code="failed_precondition")
    with pytest.raises(RuntimeFailure) as caught:
        protocol.parse_reply(protocol.failure(error))
    assert (str(caught.value), caught.value.step, caught.value.hint, caught.value.code) == (
        "mount proc: EPERM",
        "mounts",
        "try",
        "failed_precondition",
    )
    with pytest.raises(RuntimeFailure, match="ENOENT"):
        protocol.parse_reply(protocol.failure(FileNotFoundError(2, "No such file", "/x")))
    with pytest.raises(RuntimeFailure, match="KeyError"):
        protocol.parse_reply(protocol.failure(KeyError("x")))


def test_facts_survive_and_ignore_what_is_of_another_type() -> None:
    facts = Facts("c")
    facts.pid, facts.exit_code, facts.message, facts.oom_killed = 7, 3, "why", True
    assert Facts.from_json(facts.to_json()).to_json() == facts.to_json()
    odd = Facts.from_json({"pid": "7", "exit_code": True, "message": 3, "nonsense": 1})
    assert odd.to_json() == Facts("").to_json()
    assert Facts.from_json("x").exit_code == -1


@pytest.mark.parametrize(
    "payload",
    [
        b'{"resize":[1]}',
        b'{"resize":["1",2]}',
        b'{"resize":[true,2]}',
        b'{"resize":[-1,2]}',
        b'{"resize":[1,65536]}',
        b"[]",
        b"x",
    ],
)
def test_a_resize_is_two_numbers(payload: bytes) -> None:
    master, slave = os.openpty()
    protocol.resize(master, b'{"resize":[24,81]}')
    assert os.get_terminal_size(slave) == (81, 24)
    with pytest.raises(RuntimeFailure):
        protocol.resize(master, payload)
    os.close(master)
    os.close(slave)


def test_frames_are_those_of_runtime_linux_sockets() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(protocol.frame(b"x" * 1000))
        assert recv_frame(theirs) == (b"x" * 1000, [])
