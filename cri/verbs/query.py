"""Version, Status, RuntimeConfig, and every List and Status of pods and containers.

Refuses to wait: all of it is read from memory, and what is verbose about one object from its own files only
(threats R14, O41). Invariant: what is half-made is not shown.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
from collections.abc import Iterator, Mapping

from cri.api import api_pb2 as pb
from cri.errors import InvalidArgument
from cri.node import Node, now_ns
from cri.records import Container, Pod
from cri.threads import to_thread
from cri.verbs import status, verbose
from cri.version import CRI_API, NAME, VERSION
from runtime.linux.files import AT_FDCWD, read_bounded

log = logging.getLogger(__name__)


async def version(node: Node, request: pb.VersionRequest) -> pb.VersionResponse:
    """Who we are. The first field is the kubelet's API version, which it never looks at."""
    return pb.VersionResponse(version="0.1.0", runtime_name=NAME, runtime_version=VERSION, runtime_api_version=CRI_API)


async def node_status(node: Node, request: pb.StatusRequest) -> pb.StatusResponse:
    """RuntimeReady, NetworkReady, the handlers and what they can do."""
    trouble = await node.parts.network.status()
    response = pb.StatusResponse()
    response.status.conditions.add(type="RuntimeReady", status=True)
    if trouble is None:
        response.status.conditions.add(type="NetworkReady", status=True)
    else:
        response.status.conditions.add(
            type="NetworkReady", status=False, reason="NetworkPluginNotReady", message=trouble
        )
    # Nothing that this configuration uses is to go away.
    response.status.conditions.add(type="ContainerRuntimeHasNoDeprecationWarnings", status=True)
    with_users = has_user_namespaces()
    for name in ("", *node.config.runtime.handlers):
        native = not node.handler(name)[1]
        features = pb.RuntimeHandlerFeatures(recursive_read_only_mounts=True, user_namespaces=native and with_users)
        response.runtime_handlers.add(name=name, features=features)
    response.features.supplemental_groups_policy = True
    response.features.user_namespaces_host_network = with_users
    response.features.mount_options = True
    if request.verbose:
        response.info.update(verbose.node_info(node, trouble))
    return response


@functools.cache
def has_user_namespaces() -> bool:
    """True where pods can have user namespaces: the kernel makes them, and overlayfs takes id-mapped layers (5.19)."""
    try:
        allowed = int(read_bounded(AT_FDCWD, "/proc/sys/user/max_user_namespaces", 32)) > 0
    except (OSError, ValueError):
        return False
    major, minor = os.uname().release.split(".")[:2]
    return allowed and (int(major), int("".join(c for c in minor if c.isdigit()) or 0)) >= (5, 19)


async def runtime_config(node: Node, request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
    """The cgroup driver, so that the kubelet uses the same."""
    response = pb.RuntimeConfigResponse()
    response.linux.cgroup_driver = pb.SYSTEMD if node.config.runtime.cgroup_driver == "systemd" else pb.CGROUPFS
    return response


async def update_runtime_config(node: Node, request: pb.UpdateRuntimeConfigRequest) -> pb.UpdateRuntimeConfigResponse:
    """Takes note of the pods' address ranges, one or one of each family; networks are configured by their own files."""
    ranges = request.runtime_config.network_config.pod_cidr
    for one in ranges.split(",") if ranges else ():
        try:
            ipaddress.ip_network(one.strip(), strict=False)
        except ValueError:
            raise InvalidArgument(f"runtime_config.network_config.pod_cidr: {one[:80]!r} is no range") from None
    if ranges:
        log.info("the node's pod range is %s", ranges[:256])
    return pb.UpdateRuntimeConfigResponse()


async def list_pods(node: Node, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
    """The pods that match."""
    return pb.ListPodSandboxResponse(items=pod_items(node, request.filter))


def pod_items(node: Node, wanted: pb.PodSandboxFilter) -> Iterator[pb.PodSandbox]:
    """The pods that match, as a list has them."""
    return (status.pod_item(pod) for pod in matching_pods(node, wanted))


def matching_pods(node: Node, wanted: pb.PodSandboxFilter) -> Iterator[Pod]:
    """The whole pods that every field given in `wanted` matches."""
    for pod in list(node.store.pods.values()):
        if not pod.made_ns or not pod.id.startswith(wanted.id):
            continue
        if wanted.HasField("state") and wanted.state.state != status.pod_state(pod):
            continue
        if labels_match(wanted.label_selector, pod.request.labels):
            yield pod


async def pod_status(node: Node, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
    """One pod and its containers, with more about it when asked. The time is what a kubelet compares with events'."""
    pod = node.pod(request.pod_sandbox_id)
    response = pb.PodSandboxStatusResponse(
        status=status.pod_status(pod),
        containers_statuses=status.whole(node.store.containers_of(pod.id)),
        timestamp=now_ns(),
    )
    if request.verbose:
        response.info.update(verbose.pod_info(node, pod))
    return response


async def list_containers(node: Node, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
    """The containers that match."""
    return pb.ListContainersResponse(containers=container_items(node, request.filter))


def container_items(node: Node, wanted: pb.ContainerFilter) -> Iterator[pb.Container]:
    """The containers that match, as a list has them."""
    return (
        status.container_item(container)
        for container in matching_containers(node, wanted.id, wanted.pod_sandbox_id, wanted.label_selector)
        if not wanted.HasField("state") or wanted.state.state == container.state
    )


def matching_containers(node: Node, id_: str, pod_id: str, labels: Mapping[str, str]) -> Iterator[Container]:
    """The whole containers whose id and pod begin so and whose labels match."""
    for container in list(node.store.containers.values()):
        if not container.made_ns or not container.id.startswith(id_) or not container.pod_id.startswith(pod_id):
            continue
        if labels_match(labels, container.request.labels):
            yield container


def labels_match(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """True when every wanted label is there with its value."""
    return all(labels.get(key) == value for key, value in wanted.items()) if wanted else True


async def container_status(node: Node, request: pb.ContainerStatusRequest) -> pb.ContainerStatusResponse:
    """One container, with more about it when asked."""
    container = node.container(request.container_id)
    response = pb.ContainerStatusResponse(status=status.container_status(container))
    if request.verbose:
        response.info.update(await to_thread(verbose.container_info, node, container))
    return response
