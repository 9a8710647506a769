"""What a command does with a daemon that has begun to serve just now."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from cri.cli import connect
from cri.marks import RECOVERING


def failure(details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class Daemon:
    """Answers a call after so many refusals."""

    def __init__(self, refusals: int, details: str = f"ListContainers: {RECOVERING}") -> None:
        self.refusals, self.details, self.calls = refusals, details, 0

    async def call(self) -> str:
        self.calls += 1
        if self.calls <= self.refusals:
            raise failure(self.details)
        return "answer"


def test_a_daemon_that_recovers_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_AGAIN_S", 0)
    daemon = Daemon(3)
    assert asyncio.run(connect._once_ready(daemon.call)) == "answer" and daemon.calls == 4


@pytest.mark.parametrize(("details", "patience"), [("the disk is full", 30.0), (RECOVERING, -1.0)])
def test_others_and_those_that_do_not_end_are_not(
    monkeypatch: pytest.MonkeyPatch, details: str, patience: float
) -> None:
    monkeypatch.setattr(connect, "_READY_S", patience)
    daemon = Daemon(1, details)
    with pytest.raises(grpc.aio.AioRpcError, match=details[:10]):
        asyncio.run(connect._once_ready(daemon.call))
    assert daemon.calls == 1
