"""The Stream calls: the items of a List, in messages of bounded size.

Refuses filters that the List would refuse, by asking the same functions. Invariant: the items are those that were
there when the call began, and no message is longer than CHUNK_BYTES unless a single item is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Any

from cri.api import api_pb2 as pb
from cri.node import Begun, Node
from cri.verbs import container_stats, images, pod_metrics, pod_stats, query

CHUNK_ITEMS = 256
CHUNK_BYTES = 256 << 10


def chunks(kind: type[Any], field: str, items: Iterable[Any]) -> Iterable[bytes]:
    """`items` as encoded messages of type `kind` with the repeated field `field`."""
    message, count, size = kind(), 0, 0
    for item in items:
        length = item.ByteSize()
        if count and (count >= CHUNK_ITEMS or size + length > CHUNK_BYTES):
            yield message.SerializeToString()
            message, count, size = kind(), 0, 0
        getattr(message, field).append(item)
        count, size = count + 1, size + length
    if count:
        yield message.SerializeToString()


async def stream_pods(node: Node, request: pb.StreamPodSandboxesRequest, begun: Begun) -> AsyncGenerator[bytes, None]:
    """ListPodSandbox in pieces."""
    for chunk in chunks(pb.StreamPodSandboxesResponse, "pod_sandboxes", query.pod_items(node, request.filter)):
        yield chunk


async def stream_containers(
    node: Node, request: pb.StreamContainersRequest, begun: Begun
) -> AsyncGenerator[bytes, None]:
    """ListContainers in pieces."""
    for chunk in chunks(pb.StreamContainersResponse, "containers", query.container_items(node, request.filter)):
        yield chunk


async def stream_images(node: Node, request: pb.StreamImagesRequest, begun: Begun) -> AsyncGenerator[bytes, None]:
    """ListImages in pieces."""
    for chunk in chunks(
        pb.StreamImagesResponse, "images", map(images.message, await images.find(node, request.filter))
    ):
        yield chunk


async def stream_container_stats(
    node: Node, request: pb.StreamContainerStatsRequest, begun: Begun
) -> AsyncGenerator[bytes, None]:
    """ListContainerStats in pieces."""
    async for some in node.statistics.some_of(container_stats.matching(node, request.filter)):
        for chunk in chunks(pb.StreamContainerStatsResponse, "container_stats", some):
            yield chunk


async def stream_pod_stats(
    node: Node, request: pb.StreamPodSandboxStatsRequest, begun: Begun
) -> AsyncGenerator[bytes, None]:
    """ListPodSandboxStats in pieces."""
    async for some in node.statistics.some_of_pods(pod_stats.matching(node, request.filter)):
        for chunk in chunks(pb.StreamPodSandboxStatsResponse, "pod_sandbox_stats", some):
            yield chunk


async def stream_pod_metrics(
    node: Node, request: pb.StreamPodSandboxMetricsRequest, begun: Begun
) -> AsyncGenerator[bytes, None]:
    """ListPodSandboxMetrics in pieces."""
    async for some in pod_metrics.pod_metrics(node):
        for chunk in chunks(pb.StreamPodSandboxMetricsResponse, "pod_sandbox_metrics", some):
            yield chunk
