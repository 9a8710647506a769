"""UpdatePodSandboxResources: new limits for a pod as a whole.

Refuses limits where the cgroup is not the pod's alone: they would be other pods' limits as well. A kubelet has set its
pods' cgroups itself before it calls, so for those the same values are written once more. Invariant: all of it is in
force and in the record, or nothing is; `overhead` is told to us, and limits nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from cri.api import api_pb2 as pb
from cri.errors import FailedPrecondition, NotFound
from cri.interfaces import ContainerError
from cri.node import Node
from cri.records import Pod
from cri.spec import limits
from cri.threads import to_thread
from cri.verbs.create_container import require_ready
from cri.verbs.run_pod import own_cgroups
from runtime import resources
from runtime.cgroups.manager import UNIT, manager_for, manager_from_paths
from runtime.errors import RuntimeFailure
from runtime.fields import Fields

log = logging.getLogger(__name__)


async def update_pod(node: Node, request: pb.UpdatePodSandboxResourcesRequest) -> pb.UpdatePodSandboxResourcesResponse:
    """All of the limits given, or none of them."""
    pod = node.pod(request.pod_sandbox_id)
    limits.build_pod(request.overhead)
    built = limits.build_pod(request.resources)
    await node.tasks.finish(_update(node, pod.id, request, built), f"update pod {pod.label}")
    return pb.UpdatePodSandboxResourcesResponse()


async def _update(node: Node, pod_id: str, request: pb.UpdatePodSandboxResourcesRequest, built: dict[str, Any]) -> None:
    async with node.locks.held(pod_id):
        pod = node.store.pods.get(pod_id)
        if pod is None:
            raise NotFound(f"pod sandbox {pod_id!r} not found")
        what = f"update pod {pod.label} ({pod.id[:13]})"
        require_ready(pod, what)
        if built:
            systemd = node.config.runtime.cgroup_driver == "systemd"
            await to_thread(_apply, what, _cgroup(node, pod, what), pod.id, built, systemd)
        config = pb.PodSandboxConfig()
        config.CopyFrom(pod.request)
        for given, kept in ((request.overhead, config.linux.overhead), (request.resources, config.linux.resources)):
            limits.merge(kept, given)
        await node.store.change_pod(pod.id, config=config.SerializeToString())
    log.info("pod %s (%s) has new limits: %s", pod.label, pod.id[:13], built or "none")


def _cgroup(node: Node, pod: Pod, what: str) -> str:
    cgroup = own_cgroups(node, [pod]).get(pod.id)
    if cgroup is None:
        raise FailedPrecondition(
            f"{what}: resources: the pod has no cgroup for itself; run it with a linux.cgroup_parent of its own"
        )
    return cgroup


def _apply(what: str, cgroup: str, pod_id: str, built: dict[str, Any], systemd: bool) -> None:
    """Raises ContainerError. A limit below what is in use is refused: v2 would take it and kill (threats O56)."""
    wanted = dict(built)
    if "memory" in wanted:
        wanted["memory"] = {**wanted["memory"], "checkBeforeUpdate": True}
    try:
        manager = manager_for(cgroup, pod_id)
        if not manager.exists():
            if systemd:
                raise FailedPrecondition(f"{what}: its slice {cgroup} is not there; whoever manages it makes it")
            manager.make()  # no container has come yet; it goes with the pod (Pod.cgroup_made)
        if systemd:  # which would put its own view into force at its next reload
            manager = manager_from_paths({**manager.paths(), UNIT: cgroup.rpartition("/")[2]})
        manager.set(resources.parse(Fields(wanted, "resources")))
    except RuntimeFailure as error:
        raise ContainerError(f"{what}: {error}", code=error.code, hint=error.hint) from error
