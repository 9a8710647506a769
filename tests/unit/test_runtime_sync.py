"""The talk between create, init and start: whole messages, expected kinds, fds that are nobody's but the receiver's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from runtime import sync
from runtime.errors import RuntimeFailure
from runtime.fields import encode


@pytest.fixture
def ends() -> object:
    one, two = sync.Channel.pair()
    yield one, two
    one.close()
    two.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_and_fds_arrive_whole(ends: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = ends
    reader, writer = os.pipe()
    one.send("Child", pid=7, text=("a", "b\udcff"), fds=(reader,))
    message, fds = two.receive("Child")
    assert message == sync.Message("Child", 7, ("a", "b\udcff")) and len(fds) == 1
    assert not os.get_inheritable(fds[0])
    os.write(writer, b"x")
    assert os.read(fds[0], 1) == b"x"
    for fd in (reader, writer, *fds):
        os.close(fd)


def test_another_message_than_expected_is_named_and_its_fds_are_closed(ends: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = ends
    before = open_fds()
    one.send("Console", fds=(0,))
    with pytest.raises(RuntimeFailure, match="expected Ready or Hooks from the other process, got Console"):
        two.receive("Ready", "Hooks")
    assert open_fds() == before


def test_a_failure_reads_as_it_read_where_it_happened(ends: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = ends
    one.fail(RuntimeFailure("mount x on /y: EPERM", step="mounts", errno=1, hint="do this", code="invalid_argument"))
    with pytest.raises(RuntimeFailure) as caught:
        two.receive("Ready")
    found = caught.value
    assert (str(found), found.step, found.errno, found.hint, found.code) == (
        "mount x on /y: EPERM", "mounts", 1, "do this", "invalid_argument",
    )  # fmt: skip


def test_a_failure_that_is_too_long_keeps_its_end(ends: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = ends
    one.fail(RuntimeFailure("bind " + "\x01" * 100_000 + ": ENAMETOOLONG", step="mounts"))
    with pytest.raises(RuntimeFailure, match=": ENAMETOOLONG$") as caught:
        two.receive("Ready")
    assert caught.value.step == "mounts" and len(str(caught.value)) < 5000


def test_the_end_of_the_peer_is_its_own_error(ends: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = ends
    one.close()
    with pytest.raises(sync.Closed):
        two.receive("Go")
    two.fail(RuntimeFailure("nobody hears this"))


@pytest.mark.parametrize(
    "raw", [b"{", b"[]", b'{"kind": 5}', b'{"kind":"Ready","pid":"1"}', b'{"kind":"Ready","text":[1]}', b"\xff"]
)
def test_nonsense_is_refused(raw: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        channel = sync.Channel(ours)
        before = open_fds()
        socket.send_fds(theirs, [raw], [0])
        with pytest.raises(RuntimeFailure):
            channel.receive("Ready")
        assert open_fds() == before


def test_more_than_a_message_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(encode({"kind": "Ready", "text": ["x" * (sync.MAX_MESSAGE + 8192)]}))
        with pytest.raises(RuntimeFailure, match="too long"):
            sync.Channel(ours).receive("Ready")


@pytest.mark.parametrize("depth", [0, 12])
def test_start_reaches_who_listens_and_only_a_start_is_accepted(tmp_path: Path, depth: int) -> None:
    directory = tmp_path / Path(*["a-rather-long-name"] * depth)  # beyond sun_path
    directory.mkdir(parents=True, exist_ok=True)
    assert sync.connect(str(directory), "start.sock") is None
    listener = sync.listen(str(directory), "start.sock")
    assert (directory / "start.sock").stat().st_mode & 0o777 == 0o600
    curious = sync.connect(str(directory), "start.sock")
    wrong = sync.connect(str(directory), "start.sock")
    right = sync.connect(str(directory), "start.sock")
    assert curious is not None and wrong is not None and right is not None
    curious.close()
    wrong.send("Stop")
    right.send("Start")
    accepted = sync.accept(listener)
    assert right.receive("Accepted")[0].kind == "Accepted"
    with pytest.raises(RuntimeFailure):
        wrong.receive("Accepted")
    for end in (accepted, right, wrong):
        end.close()
    listener.close()
    assert sync.connect(str(directory), "start.sock") is None
