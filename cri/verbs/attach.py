"""Attach: a one-time URL for the streams of a running container.

Refuses a terminal where the container has none, and the reverse: bytes would be read as something else. Invariant: the
container notices nothing of who is attached, but for what they type.
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument
from cri.node import Node
from cri.streaming.sessions import Attach
from cri.verbs.exec import check_streams


async def attach(node: Node, request: pb.AttachRequest) -> pb.AttachResponse:
    """The URL."""
    check_streams(request)
    container = node.running(node.container(request.container_id), "attach to")
    config = container.request
    if request.tty != config.tty:
        has = "has a" if config.tty else "has no"
        raise InvalidArgument(f"tty: container {container.name} ({container.id[:13]}) {has} terminal")
    wanted = Attach(
        node.sandbox_of(container),
        container.id,
        # A container that was made without stdin has nothing to write to; what is typed is dropped, as it is elsewhere.
        stdin=request.stdin and config.stdin,
        stdout=request.stdout,
        stderr=request.stderr,
        terminal=config.tty,
    )
    return pb.AttachResponse(url=node.streaming().offer(wanted))
