"""Open files on their way from a command to the daemon: each is used once, or by nobody, and then closed."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import stat
from pathlib import Path

import pytest

from cri import handover
from cri.errors import InvalidArgument
from cri.handover import FILES_SOCKET, Handover, handed_over
from runtime.linux.sockets import connect_unix
from tests.costs import SOON_S
from tests.fakes.imagestore import run


def held() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until_held(count: int) -> None:
    while held() != count:
        await asyncio.sleep(0.001)


def test_a_file_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    async def scenario() -> None:
        files = Handover(tmp_path / FILES_SOCKET)
        files.start()
        assert stat.S_IMODE((tmp_path / FILES_SOCKET).stat().st_mode) == 0o600
        before = held()

        def command(fd: int) -> int:
            with handed_over(tmp_path, fd) as ticket:
                done = asyncio.run_coroutine_threadsafe(use(ticket), loop)
                return done.result()

        async def use(ticket: str) -> int:
            taken = files.take(ticket)
            with pytest.raises(InvalidArgument, match="file: expected a ticket"):
                files.take(ticket)
            assert not os.get_inheritable(taken)
            return taken

        loop = asyncio.get_running_loop()
        with open(tmp_path / "file", "rb") as file:
            taken = await asyncio.to_thread(command, file.fileno())
        assert os.pread(taken, 100, 0) == b"content"  # the command has closed both the file and the connection
        os.close(taken)
        await until_held(before)
        files.close()
        assert not (tmp_path / FILES_SOCKET).exists()

    run(scenario())


def test_what_nobody_takes_is_closed_with_its_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        files = Handover(tmp_path / FILES_SOCKET)
        files.start()
        before = held()

        def command() -> str:
            with handed_over(tmp_path, 0) as ticket:
                return ticket

        ticket = await asyncio.to_thread(command)
        await until_held(before)
        with pytest.raises(InvalidArgument):
            files.take(ticket)
        files.close()

    run(scenario())


@pytest.mark.parametrize("fds", [0, 2])
def test_anything_but_one_file_is_refused(tmp_path: Path, fds: int) -> None:
    async def scenario() -> None:
        files = Handover(tmp_path / FILES_SOCKET)
        files.start()
        before = held()

        def command() -> bytes:
            with connect_unix(tmp_path / FILES_SOCKET, 10.0) as peer:
                if not fds:
                    peer.send(b"0")
                    return peer.recv(100)
                socket.send_fds(peer, [b"0"], [0] * fds)
                return peer.recv(100)

        answer = await asyncio.to_thread(command)
        assert answer == b""
        await until_held(before)
        files.close()

    run(scenario())


@pytest.mark.parametrize("late", [False, True])
def test_no_more_than_the_limit_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Also where the daemon has closed the connection before the command has sent anything."""
    monkeypatch.setattr(handover, "_MOST", 2)

    def connect(path: Path, seconds: float) -> socket.socket:
        peer = connect_unix(path, seconds)
        closed = select.poll()
        closed.register(peer, select.POLLRDHUP)
        closed.poll(SOON_S * 1000)
        return peer

    async def scenario() -> None:
        files = Handover(tmp_path / FILES_SOCKET)
        files.start()

        def command() -> None:
            with handed_over(tmp_path, 0), handed_over(tmp_path, 0):
                if late:
                    monkeypatch.setattr(handover, "connect_unix", connect)
                with pytest.raises(ConnectionResetError, match=r"^the daemon takes no more files now$"):
                    with handed_over(tmp_path, 0):
                        raise AssertionError("a third one")

        await asyncio.to_thread(command)
        files.close()

    run(scenario())
