"""StopPodSandbox: everything in the pod is killed, its network given back, its shim ended.

Refuses to forget: what could not be given back keeps the pod listed, not ready, and the same call tries again
(threats O2, O4). Invariant: once stopping has begun nothing new starts in the pod.
"""

from __future__ import annotations

import asyncio
import logging

from cri.api import api_pb2 as pb
from cri.errors import NotFound
from cri.node import Node, now_ns
from cri.records import LOST_EXIT, Container, Pod
from cri.threads import to_thread
from cri.undo import both
from cri.verbs.run_pod import LOOPBACK_ONLY
from cri.verbs.stop_container import kill
from runtime.linux.failpoint import failpoint

log = logging.getLogger(__name__)


async def stop_pod(node: Node, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
    """Stops the pod; repeating it succeeds."""
    pod = node.pod(request.pod_sandbox_id)
    await node.tasks.finish(_stop_locked(node, pod.id), f"stop pod {pod.label}")
    return pb.StopPodSandboxResponse()


async def _stop_locked(node: Node, pod_id: str) -> None:
    async with node.locks.held(pod_id):
        pod = node.store.pods.get(pod_id)
        if pod is None:
            raise NotFound(f"pod sandbox {pod_id!r} not found")
        await stop(node, pod)


async def stop(node: Node, pod: Pod) -> None:
    """Stops `pod`, whose lock the caller holds. Each step is fine with having been done before."""
    if pod.stopped_ns:
        return
    if not pod.stopping_ns:
        pod = await node.store.change_pod(pod.id, stopping_ns=now_ns())
    failpoint("stop_pod.recorded")
    await _kill_all(node, pod)
    failpoint("stop_pod.killed")
    await both(_end_shim(node, pod), _disconnect(node, pod))
    failpoint("stop_pod.disconnected")
    await node.store.change_pod(pod.id, stopped_ns=now_ns())
    log.info("pod %s (%s) is stopped", pod.label, pod.id[:13])


async def _kill_all(node: Node, pod: Pod) -> None:
    running = [container for container in node.store.containers_of(pod.id) if container.running]
    if pod.lost_ns:
        # The shim is gone and with it the one who knew how they end; deleting kills them and is all there is to do.
        work = [_kill_orphan(node, pod, container) for container in running]
    else:
        work = [kill(node, container) for container in running]
    failures = [result for result in await asyncio.gather(*work, return_exceptions=True) if result is not None]
    for failure in failures:
        if isinstance(failure, BaseException):
            raise failure


async def _kill_orphan(node: Node, pod: Pod, container: Container) -> None:
    await to_thread(node.parts.containers.delete, node.sandbox(pod), container.id)
    end_unseen(node, container, "killed after its shim was lost")


def end_unseen(node: Node, container: Container, message: str) -> None:
    """Records an end that nobody saw, and says so: the code is LOST_EXIT, never 0 (threats O17)."""
    current = node.store.containers.get(container.id)
    if current is not None and not current.finished_ns:
        node.store.note_container(
            container.id, finished_ns=now_ns(), exit_code=LOST_EXIT, reason="ContainerStatusUnknown", message=message
        )
    node.exits.happened(container.id)


async def _end_shim(node: Node, pod: Pod) -> None:
    node.events.unwatch(pod.id)
    await to_thread(node.parts.sandboxes.stop, node.sandbox(pod))


async def _disconnect(node: Node, pod: Pod) -> None:
    if not pod.netns:
        return
    network = pod.pod_network()
    if pod.network != LOOPBACK_ONLY:
        await node.parts.network.delete(network)
    await node.parts.network.remove_netns(network.netns)
