"""PortForward through the streaming server, over SPDY, WebSocket channels and the tunnel; and TLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import struct
import subprocess
from pathlib import Path

import pytest

from cri.streaming import exchange, server
from cri.streaming import spdy_frames as frames
from tests.costs import SOON_S
from tests.streaming import Site, Spdy, Ws, ask, code, dial, on_site


class Upper:
    """A server on loopback that answers in capitals, and ends once its client has."""

    def __init__(self) -> None:
        self.port = 0

    async def __aenter__(self) -> Upper:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @staticmethod
    async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
            await writer.drain()
        writer.write(b"BYE")
        writer.close()


def _pair(client: Spdy, port: int, request: str, *, first: str = "error") -> tuple[int, int]:
    """The numbers of data and error."""
    numbers = {}
    for kind in (first, "data" if first == "error" else "error"):
        headers = {"requestid": request} if request else {}
        numbers[kind] = client.stream(streamtype=kind, port=str(port), **headers)
    return numbers["data"], numbers["error"]


@pytest.mark.parametrize("tunnel", [False, True])
def test_many_connections_over_one(tunnel: bool) -> None:
    async def play(client: Spdy, port: int) -> None:
        pairs = [_pair(client, port, str(n), first="data" if n % 2 else "error") for n in range(20)]
        for number, (data, _) in enumerate(pairs):
            client.write(frames.data(data, b"hello %d" % number))
        await client.until(lambda: all(len(client.got[data]) >= 7 for data, _ in pairs))
        for data, _ in pairs:
            client.write(frames.data(data, b"", fin=True))
        await client.until(lambda: all({data, error} <= client.ended for data, error in pairs))
        for number, (data, error) in enumerate(pairs):
            assert client.got[data] == b"HELLO %dBYE" % number and client.got[error] == b""

    async def body(site: Site) -> None:
        async with Upper() as upper:
            if tunnel:
                async with Ws.open(site.forward(), exchange.TUNNEL) as ws:
                    await play(Spdy(ws.read_exactly, ws.send), upper.port)
            else:
                async with Spdy.open(site.forward(), exchange.FORWARD) as client:
                    await play(client, upper.port)

    on_site(body)


def test_a_port_that_nobody_listens_on_is_an_error_in_words_and_others_go_on() -> None:
    async def body(site: Site) -> None:
        async with Upper() as upper, Spdy.open(site.forward(), exchange.FORWARD) as client:
            data, error = _pair(client, upper.port, "")  # a client of before there were request ids
            refused, why = _pair(client, 1, "2")
            await client.until(lambda: {refused, why} <= client.ended)
            assert client.got[why].startswith(b"error forwarding port 1 to pod pod, uid u: ")
            client.write(frames.data(data, b"still here", fin=True))
            await client.until(lambda: {data, error} <= client.ended)
            assert client.got[data] == b"STILL HEREBYE"

    on_site(body)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "", "٣"])
def test_what_is_no_port_is_refused(port: str) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.forward(), exchange.FORWARD) as client:
            number = client.stream(streamtype="data", port=port)
            await client.until(lambda: any(kind == frames.RST_STREAM for kind, _ in client.other))
            (reset,) = (payload for kind, payload in client.other if kind == frames.RST_STREAM)
            assert struct.unpack(">I", reset[:4]) == (number,)

    on_site(body)


def test_half_a_pair_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "OPEN_S", 0.1)

    async def body(site: Site) -> None:
        async with Spdy.open(site.forward(), exchange.FORWARD) as client:
            client.stream(streamtype="data", port="80", requestid="0")
            await client.until(lambda: any(kind == frames.RST_STREAM for kind, _ in client.other))
        async with Spdy.open(site.exec("true")) as client:
            client.streams("error")
            await client.to_end()

    on_site(body)


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""])
def test_channels_are_numbered_by_the_ports_of_the_request(protocol: str) -> None:
    async def body(site: Site) -> None:
        async with Upper() as upper, Ws.open(site.forward(upper.port, 1), protocol) as ws:
            if "base64" in protocol:
                ws.send(b"0aGk=", 1)
            else:
                ws.send(b"\0hi")
            got: dict[int, bytes] = {}
            while got.get(0, b"")[2:] != b"HI" or len(got.get(3, b"")) < 3:
                message = await ws.receive()
                assert message is not None
                number = message[1][0] - (48 if "base64" in protocol else 0)
                payload = message[1][1:]
                if "base64" in protocol:
                    payload = base64.b64decode(payload)
                got[number] = got.get(number, b"") + payload
            assert got[0][:2] == got[1] == struct.pack("<H", upper.port)
            assert got[3].startswith(struct.pack("<H", 1) + b"error forwarding port 1")

    on_site(body)


def test_channels_need_ports_in_the_request() -> None:
    async def body(site: Site) -> None:
        fields = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        fields |= {"Sec-WebSocket-Key": "x" * 24, "Sec-WebSocket-Protocol": "v4.channel.k8s.io"}
        status, _, words = await ask(site.forward(), fields, "GET")
        assert status == 400 and words.startswith("port: ")

    on_site(body)


def _certified(directory: Path) -> dict[str, str]:
    """[stream] with a certificate of its own."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    files = {"tls_key": str(directory / "key.pem"), "tls_cert": str(directory / "cert.pem")}
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files["tls_key"], "-out", files["tls_cert"]]
    subprocess.run(["openssl", *words.split(), *options], check=True, capture_output=True)
    return files


def test_tls(tmp_path: Path) -> None:
    files = _certified(tmp_path)

    async def body(site: Site) -> None:
        url = site.exec("sh", "-c", "head -c 3000000 /dev/zero; exit 9")
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=files["tls_cert"])
        async with Spdy.open(url, ssl=context) as client:
            client.streams("error", "stdout", "stderr")
            assert code(await client.status()) == 9
            assert len(client.said("stdout")) == 3_000_000
            await client.to_end()

    on_site(body, **files)


@pytest.mark.parametrize("tls", [False, True])
def test_s54_silent_connections_are_bounded_and_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setattr(server, "HEAD_S", 10 * SOON_S)
    monkeypatch.setattr(server, "_SPARE", 3)
    files = _certified(tmp_path) if tls else {}

    async def body(site: Site) -> None:
        silent = [await dial(site.exec("true")) for _ in range(5)]
        options = {"ssl": ssl.create_default_context(cafile=files["tls_cert"])} if tls else {}
        async with asyncio.timeout(SOON_S), Spdy.open(site.exec("echo", "hi"), **options) as client:
            client.streams("error", "stdout", "stderr")
            assert code(await client.status()) == 0 and client.said("stdout") == b"hi\n"
            for reader, _, _ in silent[:3]:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        assert not any(reader.at_eof() for reader, _, _ in silent[3:])
        for _, writer, _ in silent:
            writer.close()

    on_site(body, **files)
