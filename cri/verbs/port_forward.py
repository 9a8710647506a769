"""PortForward: a one-time URL for connections to ports inside a pod.

Refuses pods that are not ready, and numbers that are no ports. Invariant: nothing is connected before a client asks for
a port, and every connection is made inside the pod's network namespace.
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.errors import FailedPrecondition, InvalidArgument
from cri.node import Node
from cri.streaming.sessions import PortForward


async def port_forward(node: Node, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
    """The URL."""
    pod = node.pod(request.pod_sandbox_id)
    if not pod.ready:
        raise FailedPrecondition(f"port-forward to {pod.label} ({pod.id[:13]}): the pod is not ready")
    for port in request.port:
        if not 0 < port < 65536:
            raise InvalidArgument(f"port: {port} is no port")
    wanted = PortForward(node.sandbox(pod), f"uid {pod.uid}", tuple(request.port))
    return pb.PortForwardResponse(url=node.streaming().offer(wanted))
