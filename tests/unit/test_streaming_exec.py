"""Exec and attach through the streaming server, over SPDY and WebSocket, with real processes at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cri.streaming import server, websocket
from cri.streaming.spdy import SpdyConnection, SpdyStream
from cri.streaming.spdy_frames import Deflater, Inflater
from tests.costs import SOON_S, soon
from tests.streaming import Site, Spdy, Ws, code, on_site


@pytest.mark.parametrize("number", [0, 3, 255])
def test_the_exit_code_comes_as_a_status_after_all_output(number: int) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", f"echo out; echo err >&2; exit {number}")) as client:
            client.streams("error", "stdout", "stderr")
            assert code(await client.status()) == number
            assert (client.said("stdout"), client.said("stderr")) == (b"out\n", b"err\n")
            assert {client.names["stdout"], client.names["stderr"]} <= client.ended
            await client.to_end()

    on_site(body)


@pytest.mark.parametrize("protocol", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""])
def test_before_v4_the_error_stream_has_words(protocol: str) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", "exit 3"), protocol) as client:
            client.streams("error", "stdout", "stderr")
            await client.until(lambda: client.names["error"] in client.ended)
            assert b"exit status 3" in client.said("error")
        async with Spdy.open(site.exec("true"), protocol) as client:
            client.streams("error", "stdout", "stderr")
            await client.until(lambda: client.names["error"] in client.ended)
            assert client.said("error") == b""

    on_site(body)


def test_a_command_that_cannot_start_is_an_internal_error() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("/no/such/command")) as client:
            client.streams("error", "stdout", "stderr")
            status = await client.status()
            assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
            assert "/no/such/command" in status["message"]

    on_site(body)


def test_o29_the_end_of_stdin_reaches_the_command() -> None:
    data = os.urandom(3 << 20)

    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("cat", stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            for at in range(0, len(data), 32768):
                client.send("stdin", data[at : at + 32768])
            client.send("stdin", b"", fin=True)
            assert code(await client.status()) == 0
            assert client.said("stdout") == data
        async with Ws.open(site.exec("cat", stdin=True)) as ws:
            ws.send(b"\0" + data)
            ws.send(bytes((websocket.CLOSE_SIGNAL, 0)))
            got = await ws.channels()
            assert got[1] == data and code(json.loads(got[3])) == 0 and ws.closed_with == websocket.NORMAL

    on_site(body)


def test_o28_a_slow_reader_gets_every_byte_and_the_code_last() -> None:
    wanted = b"".join(b"%d\n" % number for number in range(1, 300_001))

    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("seq", "1", "300000")) as client:
            client.streams("error", "stdout", "stderr")
            turns = 0
            while client.names["error"] not in client.ended:
                assert await client.turn()
                turns += 1
                if turns < 40:
                    await asyncio.sleep(0.005)  # the reader's slowness itself, waited for by nobody
            assert client.said("stdout") == wanted
            assert code(await client.status()) == 0

    on_site(body)


def test_a_reader_that_stops_stops_the_command_and_nothing_grows() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", "exec cat /dev/zero")) as client:
            client.streams("error", "stdout", "stderr")
            await client.until(lambda: bool(client.said("stdout")))
            (child,) = site.streams.processes
            await _blocked(child.pid)
            written = _written(child.pid)
            # What is in flight: socket buffers of both ends, the daemon's two, and the pipe.
            assert written < 32 << 20
        await _ended(child)

    on_site(body)


async def _blocked(pid: int) -> None:
    """Until it writes no more."""
    deadline = time.monotonic() + 20
    last, same = -1, 0
    while same < 5:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
        now = _written(pid)
        last, same = now, same + 1 if now == last else 0


def _written(pid: int) -> int:
    return int(next(line for line in Path(f"/proc/{pid}/io").read_text().splitlines() if "wchar" in line).split()[1])


async def _ended(child: subprocess.Popen[bytes]) -> int:
    return await asyncio.wait_for(asyncio.to_thread(child.wait), 20)


def test_s52_a_child_that_keeps_stdout_open_delays_the_end_shortly_only() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", "sleep 1000 & echo $!")) as client:
            client.streams("error", "stdout", "stderr")
            with soon():
                assert code(await client.status()) == 0
            os.kill(int(client.said("stdout")), 9)

    on_site(body)


def test_a_terminal_has_the_size_that_the_client_says_and_ends_with_it() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", stdin=True, terminal=True)) as client:
            client.streams("error", "stdin", "stdout", "resize")
            client.send("resize", b'{"Width": 97, "Hei')
            client.send("resize", b'ght": 31}{"Width":-1,"Height":2}\n')
            client.send("stdin", b"until stty size | grep '31 97'; do :; done\n")
            await client.until(lambda: b"31 97\r\n" in client.said("stdout"))
            client.send("stdin", b"exit 4\n")
            assert code(await client.status()) == 4
        async with Ws.open(site.exec("sh", stdin=True, terminal=True), "v4.channel.k8s.io") as ws:
            ws.send(b'\4{"Width": 55, "Height": 44}')
            ws.send(b"\0until stty size | grep '44 55'; do :; done; exit 6\n")
            got = await ws.channels()
            assert b"44 55" in got[1] and code(json.loads(got[3])) == 6

    on_site(body)


def test_a_client_that_hangs_up_ends_input_and_hangs_up_the_terminal() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("cat", stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"x")
            await client.until(lambda: client.said("stdout") == b"x")
        async with Spdy.open(site.exec("sh", stdin=True, terminal=True)) as client:
            client.streams("error", "stdin", "stdout", "resize")
            client.send("stdin", b"echo $((40+2))\n")
            await client.until(lambda: b"42" in client.said("stdout"))
        for child in site.streams.processes:
            await _ended(child)

    on_site(body)


def test_s53_o64_clients_that_drop_at_any_time_leave_nothing() -> None:
    async def body(site: Site) -> None:
        async def one(turn: int) -> None:
            words = ("/no/such",) if turn % 3 == 0 else ("cat",)
            url = site.attach(stdin=True, terminal=True) if turn % 4 == 0 else ""
            url = url or site.exec(*words, stdin=True, terminal=True)
            async with Spdy.open(url) as client:
                names = ("error", "stdin", "stdout", "resize")[: turn % 5 or 4]
                client.streams(*names)
                for _ in range(min(turn % 4, len(names))):  # a reply each, and no more is sure to come
                    await client.turn()

        for start in range(0, 120, 8):
            await asyncio.gather(*(one(turn) for turn in range(start, start + 8)))

    on_site(body)  # which compares fds and tasks


@pytest.mark.parametrize("reset", [False, True])
def test_s53_a_client_that_goes_while_its_input_is_not_taken_is_missed(
    monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(server, "LOOK_S", 0.05)
    monkeypatch.setattr(server, "GONE_S", 0.1)

    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sleep", "1000", stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"x" * (1 << 20))
            writer = client.writer  # type: ignore[attr-defined]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):  # it does not go: nobody takes it
                    await writer.drain()
                    await asyncio.Event().wait()
            assert site.server._running == 1
            if reset:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            async with asyncio.timeout(SOON_S):
                while site.server._running:
                    await asyncio.sleep(0.01)

    on_site(body)


def test_o32_a_session_leaves_nothing_for_the_collector_to_find() -> None:
    async def body(site: Site) -> None:
        kinds = (SpdyConnection, SpdyStream, Deflater, Inflater)

        def there() -> list[object]:
            return [found for found in gc.get_objects() if isinstance(found, kinds)]

        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                async with Spdy.open(site.exec("true")) as client:
                    client.streams("error", "stdout", "stderr")
                    assert code(await client.status()) == 0
                    await client.to_end()
            del client
            async with asyncio.timeout(SOON_S):
                while site.server._running or site.server._connections:
                    await asyncio.sleep(0.01)
            assert not there()
        finally:
            gc.enable()

    on_site(body)


@pytest.mark.parametrize("verb", ["exec", "attach"])
def test_s53_what_a_call_under_way_was_lent_stays_open_for_it(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(site: Site) -> None:
        called, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        seen: list[tuple[list[str], list[str]]] = []
        name = "exec_stream" if verb == "exec" else "attach"
        start = getattr(site.streams, name)

        def late(*args: Any, **kwargs: Any) -> Any:
            fds = args[3] if verb == "exec" else args[2]
            before = list(map(_target, fds))
            loop.call_soon_threadsafe(called.set)
            go.wait(SOON_S)
            seen.append((before, list(map(_target, fds))))
            return start(*args, **kwargs)

        monkeypatch.setattr(site.streams, name, late)
        async with Ws.open(site.exec("true", stdin=True) if verb == "exec" else site.attach(stdin=True)) as ws:
            await called.wait()
            ws.writer.transport.abort()
        while site.server._running:  # until the session has ended: what comes next gets the numbers that it had
            await asyncio.sleep(0.001)
        strangers = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(6)]
        go.set()
        while not seen:
            await asyncio.sleep(0.001)
        for fd in strangers:
            os.close(fd)
        before, after = seen[0]
        assert after == before and all(target.startswith("pipe:") for target in before)

    on_site(body)


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return "closed"


@pytest.mark.parametrize("protocol", ["v4.base64.channel.k8s.io", "base64.channel.k8s.io", "channel.k8s.io", ""])
def test_websocket_channels_in_every_spelling(protocol: str) -> None:
    async def body(site: Site) -> None:
        async with Ws.open(site.exec("sh", "-c", "read x; echo got $x; exit 2", stdin=True), protocol) as ws:
            if "base64" in protocol:
                ws.send(b"0aGVsbG8K", websocket.TEXT)
            else:
                ws.send(b"\0hello\n")
            got = await ws.channels()
            assert got[1] == b"got hello\n"
            if protocol.startswith("v4"):
                assert code(json.loads(got[3])) == 2
            else:
                assert b"exit status 2" in got[3]

    on_site(body)


def test_attach_copies_both_ways_and_resizes_until_the_output_ends() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.attach(stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"hello", fin=True)
            assert (await client.status())["status"] == "Success"
            assert client.said("stdout") == b"hello"
        async with Spdy.open(site.attach(stdin=True, terminal=True)) as client:
            client.streams("error", "stdin", "stdout", "resize")
            client.send("resize", b'{"Width": 80, "Height": 24}')
            client.send("stdin", b"x")
            await client.until(lambda: client.said("stdout") == b"x")
            for _ in range(1000):
                if site.streams.sizes:
                    break
                await asyncio.sleep(0.01)
            assert site.streams.sizes == [[24, 80]]

    on_site(body)


def test_many_streams_at_once() -> None:
    async def body(site: Site) -> None:
        async def one(number: int) -> None:
            async with Spdy.open(site.exec("sh", "-c", f"head -c 1000000 /dev/zero; exit {number}")) as client:
                client.streams("error", "stdout", "stderr")
                assert code(await client.status()) == number
                assert len(client.said("stdout")) == 1_000_000

        await asyncio.gather(*(one(number) for number in range(24)))

    on_site(body)


def test_a_ping_is_answered_while_a_command_runs() -> None:
    async def body(site: Site) -> None:
        async with Ws.open(site.exec("cat", stdin=True)) as ws:
            ws.send(b"are you there", websocket.PING)
            while (message := await ws.receive()) is not None and message[0] != websocket.PONG:
                pass
            assert message == (websocket.PONG, b"are you there")
            ws.send(struct.pack(">H", 1000), websocket.CLOSE)
            assert await ws.channels() == {} and ws.closed_with == websocket.NORMAL

    on_site(body)
