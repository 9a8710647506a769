"""What strangers may send to the streaming server: wrong tokens, slow heads, frames that lie (threats S54, S56)."""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from collections.abc import Callable

import pytest

from cri.errors import LimitExceeded
from cri.streaming import server, websocket
from cri.streaming import spdy_frames as frames
from cri.streaming.tokens import MAX_WAITING, TTL_S, Tokens
from cri.streaming.wire import ProtocolError
from tests.streaming import Site, Spdy, Ws, ask, code, dial, head, on_site

UPGRADE = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": "v4.channel.k8s.io"}


def test_the_dictionary_is_that_of_the_specification() -> None:
    # Its Adler-32 is what every zlib stream of SPDY/3 names it by.
    assert len(frames.DICTIONARY) == 1423 and zlib.adler32(frames.DICTIONARY) == 0xE3C6A7C2


def test_header_blocks_share_a_context_in_both_directions() -> None:
    deflater, inflater = frames.Deflater(), frames.Inflater()
    assert (
        deflater.block({})[0] >> 4 == 10 - 8
    )  # the window, which is most of what a connection costs (RFC 1950, CINFO)
    deflater = frames.Deflater()
    for headers in ({"streamtype": "error"}, {}, {"StreamType": "data", "port": "80"}):
        wanted = {name.lower(): value for name, value in headers.items()}
        assert inflater.headers(deflater.block(headers)) == wanted


@pytest.mark.parametrize(
    "plain",
    [
        struct.pack(">I", 2**24),
        struct.pack(">II", 1, 2**31) + b"x",
        struct.pack(">I", 1) + b"\0\0",
        bytes(64 << 20),
    ],
    ids=["2^24 headers", "a long name", "an early end", "a bomb"],
)
def test_s54_header_blocks_that_lie(plain: bytes) -> None:
    packer = zlib.compressobj(zdict=frames.DICTIONARY)
    block = packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(ProtocolError, match="header"):
        frames.Inflater().headers(block)


def _control(kind: int, payload: bytes, length: int | None = None, version: int = 3) -> bytes:
    return struct.pack(">HHI", 0x8000 | version, kind, len(payload) if length is None else length) + payload


HOSTILE: dict[str, Callable[[Spdy], bytes]] = {
    "settings without end": lambda _: _control(frames.SETTINGS, struct.pack(">I", 2**24)),
    "a control frame of 16 MiB": lambda _: _control(frames.SETTINGS, b"", 2**24 - 1),
    "another version": lambda _: _control(frames.PING, bytes(4), version=2),
    "headers that are no zlib": lambda _: _control(frames.HEADERS, bytes(4) + b"garbage"),
    "an even id": lambda client: frames.syn_stream(2, client.deflater.block({})),
    "the same id again": lambda client: (
        frames.syn_stream(1, client.deflater.block({})) * 1 + frames.syn_stream(1, client.deflater.block({}))
    ),
    "a short ping": lambda _: _control(frames.PING, b"\0"),
    "a stream of no type": lambda client: frames.syn_stream(1, client.deflater.block({"streamtype": "nonsense"})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_s54_a_frame_that_lies_ends_the_connection(name: str) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("cat", stdin=True)) as client:
            client.write(HOSTILE[name](client))
            await client.to_end()
        assert not site.streams.processes

    on_site(body)


def test_s54_streams_beyond_the_limit_are_refused_and_floods_of_pings_answered() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.forward(), "portforward.k8s.io") as client:
            for number in range(300):
                client.stream(streamtype="error", port="80", requestid=str(number))
            client.write(frames.ping(1) * 1000)
            await client.until(lambda: sum(kind == frames.PING for kind, _ in client.other) == 1000)
            refused = sum(kind == frames.RST_STREAM for kind, _ in client.other)
            assert refused == 300 - 256

    on_site(body)


def test_data_for_streams_that_nobody_opened_is_dropped() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("cat", stdin=True)) as client:
            client.write(frames.data(77, bytes(1 << 20)))
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"fine", fin=True)
            assert code(await client.status()) == 0 and client.said("stdout") == b"fine"

    on_site(body)


@pytest.mark.parametrize(
    "raw",
    [
        websocket.frame(websocket.BINARY, b"\0no mask"),
        struct.pack(">BBQ", 0x82, 0xFF, 1 << 62) + b"mask",
        bytes((0xC2, 0x80)) + b"mask",
        bytes((0x80, 0x80)) + b"mask",
        bytes((0x89, 0xFE)) + b"\1\0mask",
    ],
    ids=["no mask", "2^62 bytes", "an extension", "a continuation of nothing", "a long ping"],
)
def test_s54_websocket_frames_that_lie(raw: bytes) -> None:
    async def body(site: Site) -> None:
        async with Ws.open(site.exec("cat", stdin=True)) as ws:
            ws.writer.write(raw)
            await ws.channels()
            assert ws.closed_with == websocket.PROTOCOL_ERROR
        for child in site.streams.processes:
            await asyncio.to_thread(child.wait)

    on_site(body)


def test_s56_a_token_works_once_and_every_other_gets_the_same_404() -> None:
    async def body(site: Site) -> None:
        url = site.exec("true")
        base, token = url.rsplit("/", 1)
        assert len(token) == 32 and site.exec("true").rsplit("/", 1)[1] != token
        answers = [
            await ask(f"{base}/{'x' * 32}", UPGRADE),
            await ask(f"{base}/{token}x", UPGRADE),
            await ask(f"{base.replace('exec', 'attach')}/{site.exec('true').rsplit('/', 1)[1]}", UPGRADE),
            await ask(base.rsplit("/", 1)[0] + "/", UPGRADE),
        ]
        async with Spdy.open(url) as client:
            client.streams("error", "stdout", "stderr")
            assert code(await client.status()) == 0
        answers.append(await ask(url, UPGRADE))
        assert answers[0][0] == 404 and all(answer == answers[0] for answer in answers)

    on_site(body)


def test_s56_a_token_is_too_old_after_its_time_and_there_are_not_too_many() -> None:
    now = 0.0
    tokens: Tokens[str] = Tokens(lambda: now)
    old = tokens.offer("old")
    now = TTL_S - 1
    young = tokens.offer("young")
    now = TTL_S + 0.5
    assert tokens.take(old) is None and tokens.take(young) == "young" and tokens.take(young) is None
    for _ in range(MAX_WAITING):
        tokens.offer("x")
    with pytest.raises(LimitExceeded, match="wait to be used"):
        tokens.offer("x")
    now += TTL_S
    tokens.offer("x")
    assert TTL_S <= 60


def test_what_is_no_upgrade_is_answered_and_uses_the_token_up() -> None:
    async def body(site: Site) -> None:
        for fields, method, wanted in (
            ({}, "GET", 400),
            ({**UPGRADE, "Upgrade": "h2c"}, "POST", 400),
            ({**UPGRADE, "X-Stream-Protocol-Version": "v9.channel.k8s.io"}, "POST", 403),
            ({"Connection": "Upgrade", "Upgrade": "websocket"}, "GET", 400),
        ):
            url = site.exec("true")
            status, answer, body = await ask(url, fields, method)
            assert status == wanted and "location" not in answer and body
            assert (await ask(url, UPGRADE))[0] == 404
        assert (await ask(site.exec("true"), UPGRADE, "DELETE"))[0] == 405
        assert (await ask(site.exec("true"), {**UPGRADE, "Content-Length": "5"}))[0] == 400

    on_site(body)


def test_s54_a_head_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)

    async def body(site: Site) -> None:
        reader, writer, path = await dial(site.exec("true"))
        writer.write(f"POST {path} HTTP/1.1\r\nX: ".encode())
        assert await reader.read() == b""
        writer.close()
        reader, writer, path = await dial(site.exec("true"))
        writer.write(b"POST / HTTP/1.1\r\nX: " + b"x" * (1 << 20))
        with pytest.raises((EOFError, ConnectionResetError)):
            await reader.readexactly(1)
        writer.close()

    on_site(body)


def test_sessions_are_limited_and_an_idle_one_is_ended() -> None:
    async def body(site: Site) -> None:
        urls = [site.exec("cat", stdin=True) for _ in range(2)]
        async with Spdy.open(urls[0]) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"x")
            await client.until(lambda: client.said("stdout") == b"x")
            assert (await ask(urls[1], UPGRADE))[0] == 503
            with pytest.raises(LimitExceeded, match=r"stream\.sessions"):
                site.exec("true")
            await client.to_end()  # stream.idle_s
        for child in site.streams.processes:
            await asyncio.to_thread(child.wait)

    on_site(body, sessions=1, idle_s=1.0)


def test_a_taken_port_is_an_error_that_names_it() -> None:
    async def body(site: Site) -> None:
        port = int(site.exec("true").split(":")[2].split("/")[0])
        with pytest.raises(OSError, match=f"listen for streams on 127.0.0.1 port {port}"):
            on = server.Server(type(site.server._config)(port=port), site.server._sessions)
            await on.start()

    on_site(body)


def test_the_server_ends_with_sessions_open() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("cat", stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            client.send("stdin", os.urandom(10))
            await client.until(lambda: len(client.said("stdout")) == 10)
            await site.server.close()
            await client.to_end()
        for child in site.streams.processes:
            await asyncio.to_thread(child.wait)

    on_site(body)


def test_an_answer_is_never_a_redirect() -> None:
    async def body(site: Site) -> None:
        reader, writer, _ = await dial(site.exec("true"))
        writer.write(b"GET //elsewhere/exec/x HTTP/1.1\r\n\r\n")
        status, fields = await head(reader)
        assert status == 404 and "location" not in fields
        writer.close()

    on_site(body)
