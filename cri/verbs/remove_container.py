"""RemoveContainer: kills it if it runs, and takes away cgroup, bundle, writable layer and record, in this order.

Refuses to drop the record before what it tells of is gone (threats O7). Invariant: repeating it at any point, also
after a kill -9, goes on where it ended; an unknown container counts as removed.
"""

from __future__ import annotations

import logging

from cri.api import api_pb2 as pb
from cri.errors import NotFound
from cri.node import Node, volume_key
from cri.records import Container
from cri.threads import to_thread
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree

log = logging.getLogger(__name__)


async def remove_container(node: Node, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
    """Removes the container, by force if need be."""
    try:
        container = node.container(request.container_id)
    except NotFound:
        return pb.RemoveContainerResponse()
    await node.tasks.finish(remove(node, container.id), f"remove container {container.name}")
    return pb.RemoveContainerResponse()


async def remove(node: Node, container_id: str) -> None:
    """Removes a container by its full id; fine with its being gone."""
    async with node.locks.held(container_id):
        container = node.store.containers.get(container_id)
        if container is None:
            return
        await to_thread(take_away, node, container)
        failpoint("remove_container.gone")
        await node.store.remove(container)
        node.processes.pop(container_id, None)
        node.statistics.forget(container_id)
        node.exits.happened(container_id)
    log.info("container %s (%s) is removed", container.name, container.id[:13])


def take_away(node: Node, container: Container) -> None:
    """Everything of a container but its record; blocks, and may be repeated."""
    pod = node.store.pods.get(container.pod_id)
    if pod is not None and not pod.stopped_ns:  # a pod's end has taken all that its shim had, with the shim
        node.parts.containers.delete(node.sandbox(pod), container.id)
    failpoint("remove_container.deleted")
    for index, mount in enumerate(container.request.mounts):
        if mount.HasField("image"):
            node.parts.snapshots.remove(volume_key(container.id, index))
    node.parts.snapshots.remove(container.id)
    failpoint("remove_container.snapshot")
    remove_tree(node.paths.bundle(container.id))
