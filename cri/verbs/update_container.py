"""UpdateContainerResources: new limits for a container, also while it runs.

Refuses to touch what the request does not give. Invariant: the record says what is in force in the cgroup.
"""

from __future__ import annotations

from cri import oom_score
from cri.api import api_pb2 as pb
from cri.errors import FailedPrecondition, InvalidArgument, NotFound
from cri.node import Node
from cri.spec import limits
from cri.threads import to_thread
from cri.verbs.create_container import while_ready


async def update_container(
    node: Node, request: pb.UpdateContainerResourcesRequest
) -> pb.UpdateContainerResourcesResponse:
    """All of the limits given, or none of them."""
    container = node.container(request.container_id)
    if request.HasField("windows"):
        raise InvalidArgument("windows: this node runs Linux")
    built = limits.build(request.linux)
    limits.oom_score_adj(request.linux)
    await node.tasks.finish(_update(node, container.id, request.linux, built), f"update {container.name}")
    return pb.UpdateContainerResourcesResponse()


async def _update(node: Node, container_id: str, given: pb.LinuxContainerResources, built: dict[str, object]) -> None:
    async with node.locks.held(container_id):
        container = node.store.containers.get(container_id)
        if container is None:
            raise NotFound(f"container {container_id!r} not found")
        if container.finished_ns:
            raise FailedPrecondition(f"update {container.name} ({container.id[:13]}): the container has ended")
        with while_ready(node, container.pod_id, f"update {container.name} ({container.id[:13]})"):
            await to_thread(node.parts.containers.update, node.sandbox_of(container), container.id, built)
        if given.oom_score_adj and container.pid:
            await to_thread(oom_score.apply, container.cgroup, container.id, given.oom_score_adj)
        merged = pb.LinuxContainerResources.FromString(container.resources)
        limits.merge(merged, given)
        await node.store.change_container(container_id, resources=merged.SerializeToString())
