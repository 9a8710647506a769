"""The `info` of verbose statuses, by the names that crictl's users and their scripts know from the peers.

Refuses secrets: a configuration holds none, and a request's credentials are kept nowhere. Invariant: every value is
JSON, and what is not known is null or left out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from cri.api import api_pb2 as pb
from cri.node import Node
from cri.records import Container, Pod
from cri.spec.limits import build as limits_of
from cri.verbs.run_pod import cgroup_parent, hostname, namespaces
from cri.version import VERSION
from runtime.linux.files import AT_FDCWD, read_bounded

log = logging.getLogger(__name__)

MAX_CONFIG = 16 << 20
SNAPSHOTTER = "overlayfs"
_OCI_VERSION = "1.2.0"


def node_info(node: Node, trouble: str | None) -> dict[str, str]:
    """Of the node: the configuration in force, what there is, and the network."""
    from cri.config_write import as_toml

    network = {"ready": trouble is None, "reason": trouble or ""}
    facts = {
        "config": as_toml(node.config),
        "configuration": _plain(dataclasses.asdict(node.config)),
        "version": VERSION,
        "pods": len(node.store.pods),
        "containers": len(node.store.containers),
        "snapshotter": SNAPSHOTTER,
        "defaultRuntimeName": node.config.runtime.default_handler,
    }
    return {"config": json.dumps(facts), "network": json.dumps(network)}


def pod_info(node: Node, pod: Pod) -> dict[str, str]:
    """Of a pod. `pid` is a process in the pod's namespaces: pause, else a container's, else the shim."""
    running = [container for container in node.store.containers_of(pod.id) if container.running]
    inside = pod.pause_pid or (running[0].pid if running else pod.pid)
    own = namespaces(pod.request)
    info = {
        "pid": inside if pod.ready else 0,
        "shimPid": pod.pid if pod.ready else 0,
        "pausePid": pod.pause_pid,
        "netns": pod.netns,
        "netNamespaceClosed": bool(pod.stopped_ns) or (own.network and not pod.netns),
        "runtimeHandler": pod.handler,
        "runtimeType": _runtime_type(node, pod.handler),
        "snapshotter": SNAPSHOTTER,
        "network": json.loads(pod.network_result or "null"),
        "cniResult": json.loads(pod.network_result or "null"),
        "config": _as_json(pod.request),
        "runtimeSpec": _pod_spec(node, pod),
    }
    return {"info": json.dumps(info)}


def _pod_spec(node: Node, pod: Pod) -> dict[str, object]:
    """A pod has no process of its own; this is what its containers share, in runtime-spec's words."""
    own, pins = namespaces(pod.request), node.paths.pod(pod.id) / "ns"
    shared = [("network", pod.netns)] if pod.netns else []
    pinned = (("ipc", own.ipc), ("uts", own.network), ("pid", own.pid), ("user", own.ids is not None))
    pinned = (("ipc", own.ipc), ("uts", own.network), ("pid", own.pid), ("user", own.ids is not None))
    shared += [(kind, str(pins / kind)) for kind, has in pinned if has]
    return {
        "ociVersion": _OCI_VERSION,
        "hostname": hostname(pod.request),
        "annotations": dict(pod.request.annotations),
        "linux": {
            "namespaces": [{"type": kind, "path": path} for kind, path in shared],
            "cgroupsPath": cgroup_parent(node, pod.request),
            "sysctl": dict(pod.request.linux.sysctls),
        },
    }


def container_info(node: Node, container: Container) -> dict[str, str]:
    """Of a container, with its config.json; reads that, so not for the event loop."""
    handler = node.store.pods[container.pod_id].handler
    info = {
        "sandboxID": container.pod_id,
        "pid": container.pid if container.running else 0,
        "restarts": container.restarts,
        "snapshotKey": container.id,
        "snapshotter": SNAPSHOTTER,
        "runtimeHandler": handler,
        "runtimeType": _runtime_type(node, handler),
        "cgroup": container.cgroup,
        "exitSignal": container.signal,
        "privileged": container.request.linux.security_context.privileged,
        "resources": limits_of(pb.LinuxContainerResources.FromString(container.resources)),
        "config": _as_json(container.request),
        "runtimeSpec": _spec(node, container),
    }
    return {"info": json.dumps(info)}


def _runtime_type(node: Node, handler: str) -> str:
    """ "native", or the path of the binary; "" of a handler that is configured no more."""
    return node.config.runtime.handlers.get(handler, "")


def _spec(node: Node, container: Container) -> object:
    """config.json as the runtime got it; None once a reboot has taken the state directory."""
    try:
        return json.loads(read_bounded(AT_FDCWD, str(node.paths.bundle(container.id) / "config.json"), MAX_CONFIG))
    except (OSError, ValueError) as error:
        log.debug("container %s: config.json: %s", container.id[:13], error)
        return None


def _as_json(message: pb.PodSandboxConfig | pb.ContainerConfig) -> object:
    from google.protobuf.json_format import MessageToDict  # rarely needed, and not small

    return MessageToDict(message, preserving_proto_field_name=True)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else value
