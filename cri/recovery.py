"""The daemon's start, which is always a recovery: records, then shims, then what nobody owns.

Assumes that the shims and the kernel know better than the records; that a record exists before anything it tells of;
and that nothing else works on this root (the lock of `cri.daemon`). Refuses to invent: an end that nobody saw is
reported as unseen. Invariant: a pod that cannot be recovered costs that pod, not the node; sweeping comes last.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Sequence

from cri import interrupted
from cri.ends import end_orphan
from cri.events import Events, keep_facts
from cri.interfaces import ContainerError, ContainerFacts, NetworkError, Sandbox, ShimUnresponsive
from cri.node import Node, now_ns
from cri.paused import thaw_left
from cri.records import Container, Pod
from cri.threads import to_thread
from cri.verbs import checkpoint, remove_container
from cri.verbs.run_pod import LOOPBACK_ONLY, leave_cgroup
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree

log = logging.getLogger(__name__)

AT_ONCE = 32
CHECKS_AT_ONCE = 4
RETRY_S = 5.0


async def recover(node: Node, events: Events) -> None:
    """Brings records, shims and leftovers to agree. Never raises for one pod's sake."""
    await _all(node, [_undo_pod(node, pod) for pod in node.store.pods.values() if not pod.made_ns])
    await _all(node, [_undo_container(node, one) for one in node.store.containers.values() if not one.made_ns])
    failpoint("recovery.undone")
    snapshots = {item.key for item in await to_thread(node.parts.snapshots.list)}
    await _all(node, [_end_rootless(node, one) for one in _unended(node) if one.id not in snapshots])
    open_pods = [pod for pod in node.store.pods.values() if not pod.stopped_ns]
    await _all(node, [_reconnect(node, events, pod) for pod in open_pods])
    failpoint("recovery.reconnected")
    await _all(node, [interrupted.take_away(node, pod) for pod in interrupted.without_container(node)])
    await _sweep(node)
    await node.store.settle()
    log.info("recovered %d pods and %d containers", len(node.store.pods), len(node.store.containers))


async def _all(node: Node, works: list[Awaitable[None]]) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(work: Awaitable[None]) -> None:
        async with gate:
            try:
                await work
            except Exception as error:
                log.error(
                    "recovery: %s", error, exc_info=not isinstance(error, OSError | ContainerError | NetworkError)
                )

    await asyncio.gather(*(one(work) for work in works))


async def _undo_pod(node: Node, pod: Pod) -> None:
    """A RunPodSandbox that a kill interrupted. What cannot be undone now stays, as a pod to be stopped and removed."""
    log.warning("pod %s (%s) was half-made: undoing it", pod.label, pod.id[:13])
    try:
        await to_thread(node.parts.sandboxes.stop, node.sandbox(pod))
        if pod.netns:
            if pod.network != LOOPBACK_ONLY:
                await _disconnect(node, pod)
            await node.parts.network.remove_netns(pod.pod_network().netns)
        await to_thread(remove_tree, node.paths.pod(pod.id))
        for container in node.store.containers_of(pod.id):  # those of a RestorePod
            await _undo_container(node, container)
    except Exception:
        await node.store.change_pod(pod.id, made_ns=now_ns(), lost_ns=now_ns())
        raise
    leave_cgroup(node, pod)
    await node.store.remove(pod)


async def _disconnect(node: Node, pod: Pod) -> None:
    """A plugin that hangs, or waits for an agent that is a pod itself, does not keep the node from starting."""
    limit = node.config.limits.recovery_s
    try:
        async with asyncio.timeout(limit):
            await node.parts.network.delete(pod.pod_network())
    except TimeoutError:
        words = f"pod {pod.label} ({pod.id[:13]}): its network has not gone within {limit:g} s (limits.recovery_s)"
        raise NetworkError(f"{words}; it is tried again when the pod is removed", code="deadline") from None


async def _undo_container(node: Node, container: Container) -> None:
    log.warning("container %s (%s) was half-made: undoing it", container.name, container.id[:13])
    try:
        await to_thread(remove_container.take_away, node, container)
    except Exception:
        await node.store.change_container(
            container.id,
            made_ns=now_ns(),
            finished_ns=now_ns(),
            exit_code=128,
            reason="CreateError",
            message="its creation was interrupted",
        )
        raise
    await node.store.remove(container)


def _unended(node: Node) -> list[Container]:
    return [one for one in node.store.containers.values() if not one.finished_ns]


async def _end_rootless(node: Node, container: Container) -> None:
    """The database had lost the snapshot, and with it the files: what still runs on them must not (threats O44)."""
    log.error("container %s (%s): its root filesystem is not known any more", container.name, container.id[:13])
    await end_orphan(node, container, "it was killed because its root filesystem was lost")


async def _reconnect(node: Node, events: Events, pod: Pod) -> None:
    """Takes in what the pod's shim knows, and listens to it from now on; a shim that does not answer in time is
    asked again beside the rest (threats O20)."""
    asking = node.tasks.spawn(to_thread(_ask, node, pod), f"ask {pod.id[:13]}")
    done, _ = await asyncio.wait({asking}, timeout=node.config.limits.recovery_s)
    error = asking.exception() if done else None
    if done and not isinstance(error, ShimUnresponsive):
        await _answered(node, events, pod, asking.result())
        return
    log.error("pod %s (%s): its shim does not answer, asking again later", pod.label, pod.id[:13])
    node.tasks.background(_ask_again(node, events, pod.id, asking), f"reconnect {pod.id[:13]}")


_Answer = tuple[int, Sequence[ContainerFacts]] | None


def _ask(node: Node, pod: Pod) -> _Answer:
    """The pod's event stream and what its shim knows; None when the shim is gone. Raises ContainerError."""
    return node.parts.sandboxes.rejoin(node.sandbox(pod))


async def _answered(node: Node, events: Events, pod: Pod, answer: _Answer) -> None:
    if answer is None:
        await lost(node, pod.id)
        return
    stream, facts = answer
    events.watch(pod.id, stream)
    await _merge(node, pod, facts)
    await thaw_left(node, pod)


async def _ask_again(node: Node, events: Events, pod_id: str, asking: asyncio.Task[_Answer]) -> None:
    """Until the shim answers, is gone, or its pod is stopped by somebody."""
    while True:
        try:
            answer = await asking
        except ContainerError as error:
            log.debug("pod %s: %s", pod_id[:13], error)
        else:
            pod = node.store.pods.get(pod_id)
            if pod is not None and not pod.stopping_ns:
                log.info("pod %s (%s): its shim has answered", pod.label, pod_id[:13])
                await _answered(node, events, pod, answer)
            elif answer is not None:
                os.close(answer[0])
            return
        await asyncio.sleep(RETRY_S)
        pod = node.store.pods.get(pod_id)
        if pod is None or pod.stopping_ns:
            return
        asking = node.tasks.spawn(to_thread(_ask, node, pod), f"ask {pod_id[:13]}")


async def _merge(node: Node, pod: Pod, facts: Sequence[ContainerFacts]) -> None:
    known = {item.id for item in facts}
    for item in facts:
        if keep_facts(node, item) is None:
            log.warning("pod %s: container %s has no record: removing it", pod.label, item.id[:13])
            await to_thread(node.parts.containers.delete, node.sandbox(pod), item.id)
    for container in node.store.containers_of(pod.id):
        if container.id not in known and not container.finished_ns:
            await end_orphan(node, container, "its shim knows nothing of it")


async def lost(node: Node, pod_id: str) -> None:
    """The pod's shim has died: what ran in it is killed, since nobody could log, reap or stop it any more
    (threats O13), and the pod is not ready. What the shim wrote down before it died counts (threats O15)."""
    async with node.locks.held(pod_id):
        pod = node.store.pods.get(pod_id)
        if pod is None or pod.stopping_ns or pod.stopped_ns or not pod.made_ns:
            return
        log.error("pod %s (%s): its shim (pid %d) has died", pod.label, pod.id[:13], pod.pid)
        pod = await node.store.change_pod(pod_id, lost_ns=pod.lost_ns or now_ns())
        for container in node.store.containers_of(pod_id):
            if not container.finished_ns:
                await end_orphan(node, container, f"its shim (pid {pod.pid}) died")


async def _sweep(node: Node) -> None:
    """Takes away what no record tells of. Each on its own: one that resists does not keep the others."""
    await _all(node, [to_thread(remove_tree, checkpoint.directory(node))])
    pods = await to_thread(_names, node.paths.pods)
    bundles = await to_thread(_names, node.paths.bundles)
    await _all(node, [_sweep_pod(node, name) for name in pods if name not in node.store.pods])
    await _all(
        node, [to_thread(remove_tree, node.paths.bundle(name)) for name in bundles if name not in node.store.containers]
    )
    snapshots = [item.key for item in await to_thread(node.parts.snapshots.list)]
    # The key of a snapshot begins with the id of its container (volume_key).
    left = [key for key in snapshots if key.partition(".")[0] not in node.store.containers]
    await _all(node, [to_thread(node.parts.snapshots.remove, key) for key in left])
    valid = frozenset(pod.id for pod in node.store.pods.values() if not pod.stopped_ns)
    await _all(node, [node.parts.network.collect(valid), interrupted.sweep_logs(node)])


async def check_networks(node: Node) -> None:
    """Looks whether the pods are still connected, and puts back host ports and other rules of ocid's own that were
    flushed meanwhile. What else is wrong is said: a kubelet must not lose a pod over it."""
    gate = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def one(pod: Pod) -> None:
        async with gate:
            try:
                trouble = await node.parts.network.check(pod.pod_network())
            except NetworkError as error:
                trouble = str(error)
        current = node.store.pods.get(pod.id)
        if trouble is not None and current is not None and current.ready:
            log.warning("pod %s (%s): %s", pod.label, pod.id[:13], trouble)

    pods = [pod for pod in node.store.pods.values() if pod.ready and pod.netns and pod.network != LOOPBACK_ONLY]
    await asyncio.gather(*(one(pod) for pod in pods))


async def _sweep_pod(node: Node, name: str) -> None:
    log.warning("pod %s has no record: removing what is left of it", name[:13])
    directory = node.paths.pod(name)
    # The shim wrote who it is into its directory; that is all there is to go by.
    await to_thread(node.parts.sandboxes.stop, Sandbox(name, directory, 0, 0))
    await to_thread(remove_tree, directory)


def _names(directory: os.PathLike[str]) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
