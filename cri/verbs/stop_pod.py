"""StopPodSandbox: everything in the pod is killed, its network given back, its shim ended.

Refuses to forget: what could not be given back keeps the pod listed, not ready, and the same call tries again
(threats O2, O4). Invariant: once stopping has begun nothing new starts in the pod.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from cri.api import api_pb2 as pb
from cri.ends import end_dead
from cri.errors import NotFound
from cri.events import keep_facts
from cri.interfaces import ShimUnresponsive
from cri.node import Node, now_ns
from cri.records import Pod
from cri.threads import to_thread
from cri.undo import both
from cri.verbs.run_pod import LOOPBACK_ONLY
from cri.verbs.stop_container import kill
from runtime.linux.failpoint import failpoint
from runtime.linux.libc import KernelError
from runtime.linux.process import is_running, pidfd_open, pidfd_send_signal

log = logging.getLogger(__name__)


async def stop_pod(node: Node, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
    """Stops the pod; repeating it succeeds, and so does stopping one that is not there (as with containerd)."""
    try:
        pod = node.pod(request.pod_sandbox_id)
    except NotFound:
        return pb.StopPodSandboxResponse()
    await node.tasks.finish(_stop_locked(node, pod.id), f"stop pod {pod.label}")
    return pb.StopPodSandboxResponse()


async def _stop_locked(node: Node, pod_id: str) -> None:
    async with node.locks.held(pod_id):
        pod = node.store.pods.get(pod_id)
        if pod is not None:  # removed meanwhile: that is more than was asked for
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
    """Kills the containers while there is a shim to tell how each ended; without one, ending the pod kills them."""
    running = [container for container in node.store.containers_of(pod.id) if container.running]
    if not running or not await _shim_answers(node, pod):
        return
    results = await asyncio.gather(*(kill(node, container) for container in running), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _shim_answers(node: Node, pod: Pod) -> bool:
    """Takes in what the shim knows. One that does not answer is killed, so that ending the pod need not wait for it;
    what it had written down stays, and its containers are killed by whoever cleans up after it."""
    try:
        facts = await to_thread(node.parts.sandboxes.reconnect, node.sandbox(pod))
    except ShimUnresponsive as error:
        log.error("pod %s (%s): %s; killing it", pod.label, pod.id[:13], error)
        await to_thread(_kill_process, pod.pid, pod.started_ticks)
        return False
    for item in facts or ():
        keep_facts(node, item)
    return facts is not None


def _kill_process(pid: int, started_ticks: int) -> None:
    try:
        pidfd = pidfd_open(pid)
    except KernelError:
        return
    try:
        # Looked at after it was opened: the pidfd is of this process or of nobody we know.
        if is_running(pid, started_ticks):
            pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


async def _end_shim(node: Node, pod: Pod) -> None:
    node.events.unwatch(pod.id)
    await to_thread(node.parts.sandboxes.stop, node.sandbox(pod))
    for container in node.store.containers_of(pod.id):
        if container.made_ns and not container.finished_ns:
            await end_dead(node, container, "it was killed with its pod")


async def _disconnect(node: Node, pod: Pod) -> None:
    if not pod.netns:
        return
    network = pod.pod_network()
    if pod.network != LOOPBACK_ONLY:
        await node.parts.network.delete(network)
    await node.parts.network.remove_netns(network.netns)
