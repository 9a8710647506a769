"""Messages between a shim and its helpers: whole, of any length, with their fds, and an end that is told."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from runtime.shim import channel


@pytest.mark.parametrize("length", [0, 1, 4096, 100_000, 180_000])
def test_a_message_comes_whole_with_its_fds(length: int) -> None:
    here, there = channel.pair()
    with closing(here), closing(there):
        reader, writer = os.pipe()
        channel.send(here, ("word", "x" * length), [writer])
        os.close(writer)
        channel.send(here, "next")
        received = channel.receive(there)
        assert received is not None
        message, fds = received
        assert message == ("word", "x" * length) and len(fds) == 1
        assert not os.get_inheritable(fds[0])
        os.write(fds[0], b"through")
        os.close(fds[0])
        assert os.read(reader, 10) == b"through"
        os.close(reader)
        assert channel.receive(there) == ("next", [])


def test_an_end_is_told_and_silence_is_not_an_end() -> None:
    here, there = channel.pair()
    with closing(here), closing(there):
        there.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            channel.receive(there)
        here.close()
        assert channel.receive(there) is None
