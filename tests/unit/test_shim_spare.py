"""The helper of a spare shim (runtime/shim/spare.py), at a listener of the test's."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.linux.process import set_comm
from runtime.linux.sockets import connect_unix, listen_unix
from runtime.shim import spare as spare_module
from runtime.shim.spare import Spare


class Memory:
    """Of a process that copies pages and gives them back: writes down what was done, one letter each."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.make_ready = lambda: os.write(self.writer, b"c")
        self.rest = SimpleNamespace(act=lambda: os.write(self.writer, b"g"))

    def heard(self, count: int) -> bytes:
        return os.read(self.reader, count)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def _name() -> str:
    return Path("/proc/self/comm").read_text().rstrip("\n")


def test_it_copies_its_pages_gives_them_back_where_nobody_comes_and_takes_who_comes_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_module, "QUIET", 0.01)
    memory, name = Memory(), _name()
    made = Spare(listen_unix(tmp_path / "socket").detach())
    waiting, made._taken = os.pipe()
    shim, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        assert memory.heard(1) + memory.heard(1) == b"cg"
        with connect_unix(tmp_path / "socket", 10.0) as client:
            client.sendall(b"pod")
            os._exit(0 if client.recv(4) == b"made" else 1)
    try:
        with socket.socket(fileno=made.await_request(memory, shim.fileno())) as connection:  # type: ignore[arg-type]
            assert connection.recv(3) == b"pod" and os.read(waiting, 2) == b"t"
            *closed, taken = made.filenos()
            assert not any(Path(f"/proc/self/fd/{fd}").exists() for fd in closed)
            assert Path(f"/proc/self/fd/{taken}").exists(), "the zygote would take it that this process had ended"
            assert _name() == "ocid-zygote"
            connection.sendall(b"made")
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        set_comm(name)
        os.close(waiting)
        os.close(made._taken)
        os.close(made._ours)
        its.close()
        shim.close()
        memory.close()


def test_a_machine_without_memory_for_copies_has_a_spare_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(spare_module, "QUIET", 0.01)
    memory, name = Memory(), _name()
    memory.make_ready, given_back = refuse, memory.rest.act
    made = Spare(listen_unix(tmp_path / "socket").detach())
    waiting, made._taken = os.pipe()
    shim, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def refuse_when_told() -> int:
        given_back()
        return refuse()

    memory.rest.act = refuse_when_told
    pid = os.fork()
    if pid == 0:
        assert memory.heard(1) == b"g"
        connect_unix(tmp_path / "socket", 10.0).close()
        os._exit(0)
    try:
        os.close(made.await_request(memory, shim.fileno()))  # type: ignore[arg-type]
        assert os.waitpid(pid, 0)[1] == 0 and os.read(waiting, 1) == b"t"
        assert capfd.readouterr().err.count("OSError: [Errno 12]") == 2
    finally:
        set_comm(name)
        for fd in (waiting, made._taken, made._ours):
            os.close(fd)
        its.close()
        shim.close()
        memory.close()


def test_who_waits_already_is_taken_at_once(tmp_path: Path) -> None:
    memory, name = Memory(), _name()
    made = Spare(listen_unix(tmp_path / "socket").detach())
    waiting, made._taken = os.pipe()
    shim, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with connect_unix(tmp_path / "socket", 10.0) as client:
            client.sendall(b"pod")
            with socket.socket(fileno=made.await_request(memory, shim.fileno())) as connection:  # type: ignore[arg-type]
                assert connection.recv(3) == b"pod"
        os.write(memory.writer, b".")
        assert memory.heard(2) == b"."
    finally:
        set_comm(name)
        for fd in (waiting, made._taken, made._ours):
            os.close(fd)
        its.close()
        shim.close()
        memory.close()


@pytest.mark.parametrize("who", ["zygote", "shim"])
def test_it_ends_with_the_zygote_and_with_its_shim_and_takes_nobody(tmp_path: Path, who: str) -> None:
    memory = Memory()
    made = Spare(listen_unix(tmp_path / "socket").detach())
    waiting, made._taken = os.pipe()
    shim, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        os.close(made._ours)
        its.close()
        made.await_request(memory, shim.fileno())  # type: ignore[arg-type]
        os._exit(1)
    assert memory.heard(1) == b"c"
    if who == "zygote":
        os.close(made._ours)
    else:
        its.close()
    assert os.waitpid(pid, 0)[1] == 0
    for fd in made.filenos():
        os.close(fd)
    assert os.read(waiting, 1) == b""
    os.close(waiting)
    if who == "shim":
        os.close(made._ours)
    its.close()
    shim.close()
    memory.close()
