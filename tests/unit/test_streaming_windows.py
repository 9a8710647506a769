"""SPDY's windows: with a client that counts them nothing is sent that it has no room for and nothing stands still; one
that does not count, as client-go, notices nothing of them."""

from __future__ import annotations

import asyncio
import struct

import pytest

from cri.streaming import spdy_frames as frames
from cri.streaming.windows import CONNECTION, INITIAL, LARGEST, Credits, Windows
from cri.streaming.wire import ProtocolError
from tests.streaming import Site, Spdy, code, on_site

ALL = 300_000
PRINT = ("sh", "-c", f"exec head -c {ALL} /dev/zero")


def settings(initial: int, *, flags: int = 0) -> bytes:
    """A SETTINGS frame with an initial window."""
    return struct.pack(">HHIIII", 0x8000 | frames.VERSION, frames.SETTINGS, 12, 1, flags << 24 | 7, initial)


async def quiet(client: Spdy) -> None:
    """All that the server sends before it answers a ping has come; what it sends is sent in order."""
    client.write(frames.ping(1))
    before = len(client.other)
    await client.until(lambda: any(kind == frames.PING for kind, _ in client.other[before:]))


async def stands_still(client: Spdy, size: int) -> None:
    """So much of stdout has come, and no more comes."""
    await client.until(lambda: len(client.said("stdout")) >= size)
    for _ in range(5):  # turns of the server's loop, each longer than what a command's output takes through it
        await quiet(client)
    assert len(client.said("stdout")) == size


def test_no_more_is_sent_than_the_client_has_room_for() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec(*PRINT)) as client:
            client.write(settings(10_000, flags=1))
            client.streams("error", "stdout", "stderr")
            await stands_still(client, 10_000)
            client.write(frames.window_update(client.names["stdout"], 5_000))
            await stands_still(client, 15_000)
            client.write(settings(12_000))  # two thousand more for every stream there is
            await stands_still(client, 17_000)
            client.write(frames.window_update(client.names["stdout"], LARGEST - 1_000_000))
            await stands_still(client, INITIAL)  # that of the connection is as wide as the draft has it
            client.write(frames.window_update(CONNECTION, 1 << 20))
            assert code(await client.status()) == 0
            assert client.said("stdout") == bytes(ALL)

    on_site(body)


def test_what_was_sent_before_the_client_counted_is_counted() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(
            site.exec("sh", "-c", f"head -c {ALL} /dev/zero; read x; printf more", stdin=True)
        ) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            await client.until(lambda: len(client.said("stdout")) == ALL)
            out = client.names["stdout"]
            client.write(frames.window_update(out, ALL - INITIAL + 3))  # as for all of it, and three bytes
            client.write(frames.window_update(CONNECTION, ALL - INITIAL))
            client.send("stdin", b"x\n", fin=True)
            await stands_still(client, ALL)
            client.write(frames.window_update(CONNECTION, INITIAL))
            await stands_still(client, ALL + 3)
            client.write(frames.window_update(out, 1))
            assert code(await client.status()) == 0
            assert client.said("stdout")[ALL:] == b"more"

    on_site(body)


def test_a_client_that_waits_for_room_gets_it_and_all_of_its_input_arrives() -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("wc", "-c", stdin=True)) as client:
            client.write(settings(INITIAL))
            client.streams("error", "stdin", "stdout", "stderr")
            stdin, sent = client.names["stdin"], 0
            room = {CONNECTION: INITIAL, stdin: INITIAL}
            while sent < 1 << 20:
                size = min(*room.values(), 10_000, (1 << 20) - sent)
                if not size:
                    assert await client.turn()
                    updates = [
                        struct.unpack(">II", body) for kind, body in client.other if kind == frames.WINDOW_UPDATE
                    ]
                    room = {key: INITIAL - sent + sum(n for number, n in updates if number == key) for key in room}
                    continue
                client.send("stdin", bytes(size))
                sent += size
                room = {key: left - size for key, left in room.items()}
                assert min(room.values()) >= 0
            client.send("stdin", b"", fin=True)
            assert code(await client.status()) == 0
            assert client.said("stdout").strip() == b"1048576"

    on_site(body)


def test_a_client_that_does_not_say_whether_it_counts_hears_of_windows_once() -> None:
    """As client-go, which does not, and reads each of our frames."""

    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("wc", "-c", stdin=True)) as client:
            client.streams("error", "stdin", "stdout", "stderr")
            for _ in range(160):
                client.send("stdin", bytes(32 << 10))
            client.send("stdin", b"", fin=True)
            assert code(await client.status()) == 0
            assert client.said("stdout").strip() == b"%d" % (160 * (32 << 10))
            updates = [struct.unpack(">II", body) for kind, body in client.other if kind == frames.WINDOW_UPDATE]
            assert sorted(updates) == [(CONNECTION, 1 << 30), (client.names["stdin"], 1 << 30)]

    on_site(body)


@pytest.mark.parametrize("how", ["reset", "gone"])
def test_who_waits_for_room_in_a_stream_that_ends_waits_no_more(how: str) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", "exec cat /dev/zero")) as client:
            client.write(settings(1_000))
            client.streams("error", "stdout", "stderr")
            await stands_still(client, 1_000)
            if how == "reset":
                client.write(frames.rst_stream(client.names["stdout"], frames.CANCEL))
                await client.to_end()
        (child,) = site.streams.processes
        await asyncio.wait_for(asyncio.to_thread(child.wait), 20)

    on_site(body)


@pytest.mark.parametrize(
    "lie",
    [
        frames.window_update(1, 0),
        frames.window_update(3, LARGEST) * 2,
        frames.window_update(CONNECTION, LARGEST) * 2,
        settings(1 << 31),
        frames.window_update(1, LARGEST - INITIAL) + settings(INITIAL + 1),
        frames.window_update(1, 1)[:4] + b"\0\0\0\4" + bytes(4),
    ],
)
def test_s54_a_window_that_lies_ends_the_connection(lie: bytes) -> None:
    async def body(site: Site) -> None:
        async with Spdy.open(site.exec("sh", "-c", "echo; exec sleep 1000")) as client:
            client.streams("error", "stdout", "stderr")
            await client.until(lambda: bool(client.said("stdout")))
            client.write(lie)
            await client.to_end()
            assert client.other[-1][0] == frames.GOAWAY and client.other[-1][1][4:] == b"\0\0\0\1"

    on_site(body)


def test_updates_for_streams_that_have_ended_say_nothing() -> None:
    windows = Windows()
    windows.open(1)
    windows.close(1)
    windows.close(1)
    windows.widened(1, 5)
    windows.widened(7, LARGEST)
    assert asyncio.run(windows.take(1, 5)) == 0
    with pytest.raises(ProtocolError, match="expected 1 to"):
        windows.widened(7, 0)


def test_a_credit_that_cannot_be_told_now_is_told_with_the_next() -> None:
    told: list[tuple[int, int]] = []
    answers = [False, False, True]

    def tell(number: int, size: int) -> bool:
        told.append((number, size))
        return answers.pop(0)

    windows = Windows()
    windows.sized(INITIAL)
    credits = Credits(windows, tell)
    for size in (30_000, 20_000, 10_000, 5_000, 500):
        credits.came(1, size)
        credits.taken(1, size)
    assert told == [(1, 50_000), (1, 60_000), (1, 65_000)]
    credits.close(1)
    credits.taken(1, 1 << 20)
    assert len(told) == 3
