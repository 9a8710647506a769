"""One request to a shim or a zygote and its reply, and what went wrong with it as a sentence.

Refuses to connect, and to retry. Invariant: a failure of the other side comes out as the RuntimeFailure that it was,
one of the way as OSError; `sentences` makes ContainerErrors of both.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from runtime.errors import RuntimeFailure
from runtime.linux.record import Record
from runtime.linux.sockets import FrameError, recv_frame, send_frame
from runtime.shim import protocol
from runtime.shim.model import ContainerError, Sandbox, ShimUnresponsive


def ask(
    connection: socket.socket,
    name: str,
    message: Record | None,
    timeout: float | None,
    fds: tuple[int, ...] = (),
    *,
    timed: bool = False,
) -> Any:
    """One request, one reply. Raises RuntimeFailure (the peer's), OSError, FrameError."""
    connection.settimeout(timeout)
    send_frame(connection, protocol.request(name, message, timed=timed), fds)
    return protocol.parse_reply(receive(connection))


def receive(connection: socket.socket) -> bytes:
    """The body of the next frame. Raises OSError, FrameError."""
    received = recv_frame(connection)
    if received is None:
        raise FrameError("the other side closed the connection before it answered")
    return received[0]


@contextlib.contextmanager
def sentences(what: str) -> Iterator[None]:
    """Failures of the wire and of the other side as ContainerErrors that say what was being done."""
    try:
        yield
    except RuntimeFailure as error:
        step = f"step {error.step}: " if error.step else ""
        raise ContainerError(f"{what}: {step}{error}", code=error.code, hint=error.hint) from error
    except TimeoutError as error:
        raise ContainerError(f"{what}: no answer in time", code="deadline") from error
    except OSError as error:
        raise ContainerError(f"{what}: {error}", code="unavailable") from error


def unresponsive(sandbox: Sandbox) -> ShimUnresponsive:
    return ShimUnresponsive(
        f"the shim of pod {sandbox.id}, process {sandbox.pid}, does not answer",
        hint="it is stopped, frozen or stuck in the kernel: see /proc/PID/status",
    )
