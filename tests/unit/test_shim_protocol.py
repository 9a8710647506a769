"""The wire: what is said arrives, and what should not be said is refused by name."""

from __future__ import annotations

import os
import socket

import pytest

from runtime.errors import RuntimeFailure
from runtime.linux.sockets import recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.protocol import ExecMessage, Facts, FrameReader, IdMessage


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


@pytest.mark.parametrize("payload", [b'{"resize":[1]}', b'{"resize":["1",2]}', b'{"resize":[true,2]}', b"[]", b"x"])
def test_a_resize_is_two_numbers(payload: bytes) -> None:
    assert protocol.parse_resize(b'{"resize":[24,80]}') == (24, 80)
    with pytest.raises(RuntimeFailure):
        protocol.parse_resize(payload)


def test_frames_are_put_together_from_single_bytes_and_bring_their_fds() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader = FrameReader(theirs)
    inode = os.stat("/dev/null").st_ino
    with ours, theirs, open("/dev/null", "rb") as null:
        data = protocol.frame(b"hello") + protocol.frame(b"")
        for byte in data:
            assert reader.take() is None
            ours.send(bytes([byte]))
            assert reader.read()
            if reader._buffer == b"\x05\0\0\0hello":
                assert reader.take() == b"hello"
        assert reader.take() == b""
        send_frame(ours, b"with fds", (null.fileno(), null.fileno()))
        assert reader.read()
        assert reader.take() == b"with fds"
        fds = reader.take_fds()
        assert [os.fstat(fd).st_ino for fd in fds] == [inode, inode]
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)
        ours.close()
        assert not reader.read()


def test_a_frame_that_announces_too_much_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs:
        ours.send((protocol.MAX_REQUEST + 1).to_bytes(4, "little"))
        with pytest.raises(RuntimeFailure, match="at most"):
            FrameReader(theirs).read()


def test_frames_are_those_of_runtime_linux_sockets() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(protocol.frame(b"x" * 1000))
        assert recv_frame(theirs) == (b"x" * 1000, [])
