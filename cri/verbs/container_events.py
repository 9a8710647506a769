"""GetContainerEvents: what happens from now on, for as long as the caller reads.

Refuses to tell what was before: who calls it lists once the answer has begun. Invariant: the answer begins (gRPC's
initial metadata) when nothing can be missed any more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cri.api import api_pb2 as pb
from cri.node import Begun, Node


async def container_events(node: Node, request: pb.GetEventsRequest, begun: Begun) -> AsyncGenerator[bytes, None]:
    """Encoded events of all pods and containers."""
    async with aclosing(node.feed.read()) as events:
        async for event in events:
            if event is None:
                await begun()
            else:
                yield event
