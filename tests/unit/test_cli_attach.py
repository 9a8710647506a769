"""Signals while a container's streams are copied: each acts in the loop, and is afterwards what it was before."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from cri.cli import attach


def test_a_signal_acts_in_the_loop_and_is_afterwards_what_it_was_before() -> None:
    seen: list[tuple[int, bool]] = []

    async def body() -> None:
        loop = asyncio.get_running_loop()
        both = asyncio.Event()

        def act(number: int) -> None:
            seen.append((number, asyncio.get_running_loop() is loop))
            if len(seen) == 2:
                both.set()

        with attach._acting(loop, {signal.SIGUSR1: act, signal.SIGHUP: act}):
            os.kill(os.getpid(), signal.SIGUSR1)
            while not seen:
                await asyncio.sleep(0)
            # Another thread takes it, while the loop waits in the kernel: nothing but the signal may wake that.
            thread = threading.Timer(0.05, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGHUP))
            began = loop.time()
            thread.start()
            await both.wait()
            assert loop.time() - began < 15, "something else has woken it"

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asyncio.run(asyncio.wait_for(body(), 30))
        assert seen == [(signal.SIGUSR1, True), (signal.SIGHUP, True)]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_fails_while_signals_are_caught_leaves_none_caught() -> None:
    async def body() -> None:
        with attach._acting(asyncio.get_running_loop(), {signal.SIGUSR2: print}):
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(body())
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
