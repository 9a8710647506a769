"""What a killed `ocid run` or `ocid rm` leaves: a pod of theirs without a container, a directory for the log of no pod.

Such a pod would hold its address, its ports and a shim, and no command shows it, since all of them know containers.
Looked for at a start, when nobody can be between the two calls that make pod and container: whoever was has lost its
connection, or the root's lock with its life; and when a daemon's client is gone in the middle (Launch in cri.own).
Refuses to touch pods that are not of our own commands.
"""

from __future__ import annotations

import asyncio
import logging
import os

from cri.marks import LOGS, NAME_LABEL, NAMESPACE, POD_LABEL, VOLUMES
from cri.node import Node
from cri.records import Pod
from cri.threads import to_thread
from cri.verbs import remove_pod
from runtime.linux.files import remove_tree

log = logging.getLogger(__name__)
_LOOK_S = 0.05


def without_container(node: Node) -> list[Pod]:
    """Pods that are of no use to anybody."""
    return [pod for pod in node.store.pods.values() if _is_ours(pod) and not node.store.containers_of(pod.id)]


async def take_away(node: Node, pod: Pod) -> None:
    """Removes such a pod."""
    log.warning("pod %s (%s) was left without its container: removing it", pod.label, pod.id[:13])
    await remove_pod.remove(node, pod.id)


async def forsaken(node: Node, uid: str) -> None:
    """Removes what a client had made for a pod of that uid when it was gone, once its last call has come to an end."""
    pods = _of(node, uid)
    while any(not pod.made_ns for pod in pods):
        await asyncio.sleep(_LOOK_S)
        pods = _of(node, uid)
    for pod in pods:
        log.warning("pod %s (%s) was left by who made it: removing it", pod.label, pod.id[:13])
        await remove_pod.remove(node, pod.id)
    for kind in (LOGS, VOLUMES):
        await to_thread(remove_tree, node.config.root / kind / uid)


def _of(node: Node, uid: str) -> list[Pod]:
    return [pod for pod in node.store.pods.values() if pod.uid == uid and _is_ours(pod)]


async def sweep_logs(node: Node) -> None:
    """Removes directories of logs and volumes whose pod is gone."""
    known = {pod.uid for pod in node.store.pods.values()}
    for top in (node.config.root / LOGS, node.config.root / VOLUMES):
        names = await to_thread(os.listdir, top) if top.is_dir() else []
        for uid in names:
            if uid not in known:
                await to_thread(remove_tree, top / uid)


def _is_ours(pod: Pod) -> bool:
    return pod.namespace == NAMESPACE and not pod.request.labels.keys().isdisjoint((NAME_LABEL, POD_LABEL))
