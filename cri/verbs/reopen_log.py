"""ReopenContainerLog: after rotation renamed the file, the log goes on in a new one.

Refuses a container that does not run, as CRI asks. Invariant: no line is lost or split (the shim's promise).
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.node import Node
from cri.threads import to_thread


async def reopen_log(node: Node, request: pb.ReopenContainerLogRequest) -> pb.ReopenContainerLogResponse:
    """Opens the log anew."""
    container = node.running(node.container(request.container_id), "reopen the log of")
    await to_thread(node.parts.containers.reopen_log, node.sandbox_of(container), container.id)
    return pb.ReopenContainerLogResponse()
