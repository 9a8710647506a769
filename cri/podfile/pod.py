"""A file of Kubernetes objects as pods to be played: Pod documents, and the ConfigMaps that they name.

Pure. Refuses other kinds, and every field that it does not know, by its path (`pod web: spec.containers[0].…`), since a
pod that lacks what its author wrote is another pod. Invariant: nothing is made before all of the file was understood.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cri.api import api_pb2 as pb
from cri.marks import GRACE, NAMESPACE, POD_LABEL
from cri.podfile.containers import Planned, PodWide, planned
from cri.podfile.documents import documents
from cri.podfile.values import name, only, unique
from cri.podfile.volumes import ConfigMap, Volume, config_map, volumes
from runtime.fields import FieldError, Fields
from runtime.linux.dataclass import dataclass

_POLICIES = {"": "always", "Always": "always", "OnFailure": "on-failure", "Never": ""}
_SPEC = (
    *("containers", "initContainers", "volumes", "restartPolicy", "hostname", "hostNetwork", "hostPID", "hostIPC"),
    *("shareProcessNamespace", "securityContext", "dnsConfig", "dnsPolicy", "terminationGracePeriodSeconds"),
    *("automountServiceAccountToken", "enableServiceLinks", "hostUsers"),
)
_SECURITY = ("runAsUser", "runAsGroup", "runAsNonRoot", "supplementalGroups", "seccompProfile", "sysctls")
MAX_CONTAINERS = 100
GRACE_S = 30


@dataclass(frozen=True, slots=True)
class PlannedPod:
    """A pod that is to be. Its volumes are in `directory`."""

    name: str
    config: pb.PodSandboxConfig
    init: tuple[Planned, ...]
    containers: tuple[Planned, ...]
    volumes: tuple[Volume, ...]
    directory: Path


def names(raw: bytes, what: str) -> list[str]:
    """The names of the pods in a file, whatever else it says of them. Raises FieldError."""
    found = [Fields(document, what) for document in documents(raw, what)]
    return [name(one.required_object("metadata")) for one in found if one.str("kind") == "Pod"]


def pods(raw: bytes, what: str, places: Callable[[str], tuple[Path, Path]]) -> list[PlannedPod]:
    """The pods in a file. `places(uid)` are the directories of a pod's logs and volumes. Raises FieldError."""
    found: list[tuple[str, Fields]] = []
    maps: dict[str, ConfigMap] = {}
    for index, document in enumerate(documents(raw, what)):
        fields = Fields(document)
        kind = fields.str("kind")
        if (fields.str("apiVersion"), kind) not in (("v1", "Pod"), ("v1", "ConfigMap")):
            wrong = f"{fields.str('apiVersion') or 'no apiVersion'} {kind or 'without kind'}"
            raise FieldError(f"{what}: document {index + 1}", f"expected v1 Pod or ConfigMap, got {wrong[:80]}")
        if kind == "ConfigMap":
            one = config_map(Fields(document, f"document {index + 1}"))
            maps[one.name] = one
        else:
            found.append((name(Fields(document, "pod").required_object("metadata")), fields))
    if not found:
        raise FieldError(what, "there is no Pod in it")
    unique("pods", [called for called, _ in found])
    return [_pod(called, document, maps, places) for called, document in found]


def _pod(
    called: str, document: Fields, maps: Mapping[str, ConfigMap], places: Callable[[str], tuple[Path, Path]]
) -> PlannedPod:
    try:
        return _planned(called, document, maps, places)
    except FieldError as error:
        raise FieldError(f"pod {called}", str(error)) from None


def _planned(
    called: str, document: Fields, maps: Mapping[str, ConfigMap], places: Callable[[str], tuple[Path, Path]]
) -> PlannedPod:
    only(document, "apiVersion", "kind", "metadata", "spec")
    metadata = only(document.required_object("metadata"), "name", "namespace", "labels", "annotations", "uid")
    if metadata.str("namespace") not in ("", "default", NAMESPACE):
        raise metadata.error("namespace", f"there are no namespaces here: leave it out, or say default or {NAMESPACE}")
    spec = only(document.required_object("spec"), *_SPEC)
    security = only(spec.object("securityContext") or Fields({}, "spec.securityContext"), *_SECURITY)
    if security.has("fsGroup"):
        raise security.error("fsGroup", "is not supported by ocid pod play")
    if spec.optional_bool("hostUsers") is False:
        raise spec.error("hostUsers", "false is not supported by ocid pod play")
    uid = os.urandom(16).hex()
    logs, directory = places(uid)
    config = _sandbox(called, uid, logs, spec, security, metadata)
    known = volumes(spec, maps)
    options = config.linux.security_context.namespace_options
    pod = PodWide(
        called,
        known,
        maps,
        directory,
        security,
        options.pid,
        options.network,
        options.ipc,
        _POLICIES[spec.str("restartPolicy", choices=_POLICIES)],
    )
    both = [(key, spec.objects(key)) for key in ("initContainers", "containers")]
    if not both[1][1]:
        raise spec.error("containers", "is required")
    if sum(len(items) for _, items in both) > MAX_CONTAINERS:
        raise spec.error("containers", f"more than {MAX_CONTAINERS}")
    init, containers = (tuple(planned(item, pod, init=key != "containers") for item in items) for key, items in both)
    unique(spec.at("containers"), [one.name for one in (*init, *containers)])
    config.linux.security_context.privileged = any(
        one.config.linux.security_context.privileged for one in (*init, *containers)
    )
    config.port_mappings.extend(port for one in containers for port in one.ports)
    if config.port_mappings and options.network == pb.NODE:
        raise spec.error("hostNetwork", "with it there are no ports of its own to publish: leave out hostPort")
    return PlannedPod(called, config, init, containers, tuple(known.values()), directory)


def _sandbox(
    called: str, uid: str, logs: Path, spec: Fields, security: Fields, metadata: Fields
) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig(hostname=spec.str("hostname") or called, log_directory=str(logs))
    config.metadata.name, config.metadata.namespace, config.metadata.uid = called, NAMESPACE, uid
    config.labels.update(metadata.mapping("labels"))
    config.annotations.update(metadata.mapping("annotations"))
    config.labels[POD_LABEL] = called
    options = config.linux.security_context.namespace_options
    shared = spec.bool("shareProcessNamespace")
    if shared and spec.bool("hostPID"):
        raise spec.error("shareProcessNamespace", "not with hostPID")
    options.pid = pb.NODE if spec.bool("hostPID") else pb.POD if shared else pb.CONTAINER
    options.ipc = pb.NODE if spec.bool("hostIPC") else pb.POD
    if spec.bool("hostNetwork"):
        options.network = pb.NODE
        config.hostname = ""
    for fields in security.objects("sysctls"):
        only(fields, "name", "value")
        config.linux.sysctls[fields.str("name", required=True)] = fields.str("value")
    # ClusterFirst is what every manifest says that says nothing: without a cluster it is the node's.
    spec.str("dnsPolicy", choices=("", "Default", "ClusterFirst", "None"))
    config.annotations[GRACE] = str(spec.int("terminationGracePeriodSeconds", 0, 1 << 31, GRACE_S))
    dns: Any = spec.object("dnsConfig")
    if dns is not None:
        only(dns, "nameservers", "searches")
        config.dns_config.servers.extend(dns.strs("nameservers"))
        config.dns_config.searches.extend(dns.strs("searches"))
    return config
