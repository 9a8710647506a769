"""ListMetricDescriptors and ListPodSandboxMetrics.

Refuses to hold up others: thousands of samples are made a few pods at a time, in a thread. Invariant: what is listed is
described; a pod or container that is gone meanwhile is left out; figures of a cgroup are of one that there is.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

from cri import metrics
from cri.api import api_pb2 as pb
from cri.node import Node, PodLook
from cri.records import Pod
from cri.threads import to_thread
from cri.verbs.run_pod import cgroup_parent

# How many pods are looked at in one go: their samples are made in some 10 ms.
LOOK_ITEMS = 16


async def list_metric_descriptors(
    node: Node, request: pb.ListMetricDescriptorsRequest
) -> pb.ListMetricDescriptorsResponse:
    """What ListPodSandboxMetrics may hold."""
    return pb.ListMetricDescriptorsResponse(descriptors=metrics.descriptors())


async def list_pod_metrics(node: Node, request: pb.ListPodSandboxMetricsRequest) -> pb.ListPodSandboxMetricsResponse:
    """All samples of the ready pods."""
    response = pb.ListPodSandboxMetricsResponse()
    async for some in pod_metrics(node):
        response.pod_metrics.extend(some)
    return response


async def pod_metrics(node: Node) -> AsyncGenerator[list[pb.PodSandboxMetrics], None]:
    """The samples of the ready pods, some pods at a time."""
    pods = [pod for pod in node.store.pods.values() if pod.ready]
    for start in range(0, len(pods), LOOK_ITEMS):
        yield await _of(node, pods[start : start + LOOK_ITEMS])


async def _of(node: Node, pods: list[Pod]) -> list[pb.PodSandboxMetrics]:
    looks = await node.statistics.look(pods, full=True)
    layers = {one.id: node.statistics.layer(one.id) for look in looks for one, _ in look.containers}
    return await to_thread(_messages, node, looks, layers)


def _messages(node: Node, looks: list[PodLook], layers: dict[str, pb.FilesystemUsage]) -> list[pb.PodSandboxMetrics]:
    disk = os.statvfs(node.config.root)
    return [_message(node, look, layers, disk) for look in looks if look.stats is not None]


def _message(
    node: Node, look: PodLook, layers: dict[str, pb.FilesystemUsage], disk: os.statvfs_result
) -> pb.PodSandboxMetrics:
    pod = look.pod
    message = pb.PodSandboxMetrics(pod_sandbox_id=pod.id)
    if look.stats is not None:
        facts = metrics.Facts(look.stats, pod.created_ns, interfaces=tuple(look.interfaces or ()))
        cgroup = cgroup_parent(node, pod.request) if look.own_cgroup else ""
        families = metrics.FAMILIES if look.own_cgroup else metrics.OF_NETWORKS
        message.metrics.extend(metrics.samples(facts, metrics.pod_labels(pod, cgroup), families))
    for container, stats in look.containers:
        facts = metrics.Facts(
            stats,
            container.started_ns,
            pb.LinuxContainerResources.FromString(container.resources),
            layers[container.id],
            node.statistics.processes(container.id, container.pid),
            disk=disk,
            tasks=node.statistics.tasks(container.id),
        )
        part = message.container_metrics.add(container_id=container.id)
        part.metrics.extend(metrics.samples(facts, metrics.container_labels(container, pod)))
    return message
