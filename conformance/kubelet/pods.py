"""Manifests of pods, as the values that JSON is made of. A script is what a container of busybox runs; what it has to
show it writes below /out, which is a directory of this machine."""

from __future__ import annotations

import copy
from typing import Any

Document = dict[str, Any]
# As often as a kubelet can, and with patience: what is shown is not how fast this machine is.
OFTEN: Document = {"periodSeconds": 1, "timeoutSeconds": 20}
FOREVER = "trap 'exit 0' TERM; while :; do sleep 0.1; done"


def container(name: str, image: str, script: str = FOREVER, **more: Any) -> Document:
    return {
        "name": name,
        "image": image,
        "command": ["sh", "-c", script],
        "imagePullPolicy": "IfNotPresent",
        **more,
    }


def pod(name: str, *containers: Document, **spec: Any) -> Document:
    """`metadata` in `spec` is added to the pod's own."""
    metadata = {"name": name, "namespace": "default", **spec.pop("metadata", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "containers": list(containers),
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **spec,
        },
    }


def with_out(document: Document, directory: str) -> Document:
    """The same pod with `directory` of this machine as /out of every container."""
    document = copy.deepcopy(document)
    spec = document["spec"]
    spec.setdefault("volumes", []).append({"name": "out", "hostPath": {"path": directory, "type": "Directory"}})
    for one in [*spec["containers"], *spec.get("initContainers", [])]:
        one["volumeMounts"] = [*one.get("volumeMounts", []), {"name": "out", "mountPath": "/out"}]
    return document
