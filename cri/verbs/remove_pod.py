"""RemovePodSandbox: stops the pod if need be, removes its containers, its directory, its cgroup, its record.

Refuses to drop the record before what it tells of is gone (threats O7). Invariant: repeating it goes on where it
ended; an unknown pod counts as removed.
"""

from __future__ import annotations

import logging

from cri.api import api_pb2 as pb
from cri.errors import NotFound
from cri.node import Node
from cri.threads import to_thread
from cri.verbs import remove_container, stop_pod
from cri.verbs.run_pod import leave_cgroup
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree

log = logging.getLogger(__name__)


async def remove_pod(node: Node, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
    """Removes the pod with all that is in it."""
    try:
        pod = node.pod(request.pod_sandbox_id)
    except NotFound:
        return pb.RemovePodSandboxResponse()
    await node.tasks.finish(remove(node, pod.id), f"remove pod {pod.label}")
    return pb.RemovePodSandboxResponse()


async def remove(node: Node, pod_id: str) -> None:
    """Removes a pod by its full id; fine with its being gone."""
    async with node.locks.held(pod_id):
        pod = node.store.pods.get(pod_id)
        if pod is None:
            return
        await stop_pod.stop(node, pod)
        failpoint("remove_pod.stopped")
        # One after the other: a pod has few, and the first failure stops before the record.
        for container in node.store.containers_of(pod_id):
            await remove_container.remove(node, container.id)
        failpoint("remove_pod.containers")
        await to_thread(remove_tree, node.paths.pod(pod_id))
        failpoint("remove_pod.directory")
        leave_cgroup(node, pod)
        await node.store.remove(pod)
        node.statistics.forget(pod_id)
    log.info("pod %s (%s) is removed", pod.label, pod.id[:13])
