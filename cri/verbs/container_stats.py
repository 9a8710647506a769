"""ContainerStats and ListContainerStats.

Refuses to wait for anything but cgroup files. Invariant: the list holds what runs, and is never an error because of
one container.
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.node import Node
from cri.records import Container
from cri.verbs.query import matching_containers


async def container_stats(node: Node, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
    """The use of one container, running or not."""
    container = node.container(request.container_id)
    (stats,) = await node.statistics.of([container])
    return pb.ContainerStatsResponse(stats=stats)


async def list_container_stats(node: Node, request: pb.ListContainerStatsRequest) -> pb.ListContainerStatsResponse:
    """The use of the running containers that match."""
    return pb.ListContainerStatsResponse(stats=await node.statistics.of(matching(node, request.filter)))


def matching(node: Node, wanted: pb.ContainerStatsFilter) -> list[Container]:
    """The running containers that every field given in `wanted` matches."""
    return [
        container
        for container in matching_containers(node, wanted.id, wanted.pod_sandbox_id, wanted.label_selector)
        if container.running
    ]
