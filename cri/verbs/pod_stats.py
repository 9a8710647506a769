"""PodSandboxStats and ListPodSandboxStats.

Refuses to wait for anything but cgroup files and netlink. Invariant: the list holds what is ready, and is never an
error because of one pod.
"""

from __future__ import annotations

from cri.api import api_pb2 as pb
from cri.node import Node
from cri.records import Pod
from cri.verbs.query import labels_match


async def pod_stats(node: Node, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
    """The use of one pod; only its name when it is not ready."""
    pod = node.pod(request.pod_sandbox_id)
    (stats,) = await node.statistics.of_pods([pod])
    return pb.PodSandboxStatsResponse(stats=stats)


async def list_pod_stats(node: Node, request: pb.ListPodSandboxStatsRequest) -> pb.ListPodSandboxStatsResponse:
    """The use of the ready pods that match."""
    return pb.ListPodSandboxStatsResponse(stats=await node.statistics.of_pods(matching(node, request.filter)))


def matching(node: Node, wanted: pb.PodSandboxStatsFilter) -> list[Pod]:
    """The ready pods that every field given in `wanted` matches."""
    return [
        pod
        for pod in node.store.pods.values()
        if pod.ready and pod.id.startswith(wanted.id) and labels_match(wanted.label_selector, pod.request.labels)
    ]
