"""Devices that plugins of the kubelet hand out: by the device plugin API, and by dynamic resource allocation. What a
container has of them is looked at from inside it: the node's number, what the kernel lets it do with the node,
variables, files.

No scheduler is here: the step allots the claim and binds the pod to its node, as one would."""

from __future__ import annotations

import json
import os
from typing import Any

from conformance.clients.steps import eventually, holds, same
from conformance.cri_client import Cri
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.plugins import DRIVER, NODE_NUMBER, RESOURCE, TOKENS, Driver, device_plugin, dra_driver
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step, applied

WAIT_S = 60.0
NUMBER = f"{os.major(NODE_NUMBER):x}:{os.minor(NODE_NUMBER):x}"
# Opened for reading, for writing; what the node is; what is beside it.
LOOK = "stat -c %t:%T {0}; (: <{0}) 2>&1 && echo reads; (: >{0}) 2>&1 && echo writes; true"


def plugged(node: Node) -> None:
    """Two containers ask for one device each and get different ones: node, what may be done with it, variable, mount,
    CDI device, annotation. A third pod has nothing of it, and is not even let open a node of that number."""
    directory = node.base / "tokens"
    directory.mkdir()
    busybox = node.images["busybox"]
    one = {"limits": {RESOURCE: 1}}
    two = [container(name, busybox, resources=one) for name in ("first", "second")]
    with device_plugin(directory):
        eventually(lambda: _allocatable(node) == str(len(TOKENS)), "the node has two tokens", WAIT_S)
        with applied(
            node, pod("plugged", *two, nodeName=NAME), pod("plain", container("main", busybox), nodeName=NAME)
        ):
            node.until_ready("plugged")
            node.until_ready("plain")
            seen = {name: _given(node, name) for name in ("first", "second")}
            same("the tokens", sorted(seen.values()), sorted(TOKENS))
            made = node.inside(
                "plain", "main", f"ls /dev/token 2>&1; mknod /t c {' '.join(_numbers())}; (: </t) 2>&1; true"
            )
            holds("without a plugin", made, "No such file", "can't open /t: Operation not permitted")


def _numbers() -> tuple[str, str]:
    return str(os.major(NODE_NUMBER)), str(os.minor(NODE_NUMBER))


def _allocatable(node: Node) -> Any:
    return node.member().get("node", NAME).get("status", {}).get("allocatable", {}).get(RESOURCE)


def _given(node: Node, name: str) -> str:
    """The token that the container has, if it has it in every way."""
    token = node.inside("plugged", name, "echo $TOKEN").strip()
    said = node.inside("plugged", name, LOOK.format("/dev/token"))
    same("the node, to read only", said.splitlines()[:2], [NUMBER, "reads"])
    holds("the node, to read only", said, "can't create /dev/token: Operation not permitted")
    said = node.inside("plugged", name, "cat /token; echo $TOKEN_BY_CDI; touch /token 2>&1 || true")
    same("mount and CDI device", said.splitlines()[:2], [f"the {token} one", token])
    holds("the mount", said, "Read-only file system")
    with Cri(node.socket) as client:
        annotations = client.status(node.running("plugged")[name]).annotations
    same("the annotation", annotations.get("tokens.ocid.invalid/given"), token)
    return token


def claimed(node: Node) -> None:
    """A claim is allotted, the pod bound; the driver is asked to prepare it, and its CDI device, of which nobody knew
    before, is in the container that names the claim and in no other. When the pod is gone it is given back."""
    directory = node.base / "claims"
    directory.mkdir()
    busybox = node.images["busybox"]
    with dra_driver(directory, node.base / "kubelet" / "plugins_registry") as driver:
        eventually(lambda: driver.registered, "the kubelet has found the driver", WAIT_S)
        same("what it says of it", driver.registered, [(True, "")])
        node.member().apply(_claim())
        has = container("main", busybox, resources={"claims": [{"name": "it"}]})
        claims = [{"name": "it", "resourceClaimName": "mine"}]
        with applied(node, pod("claimed", has, container("beside", busybox), resourceClaims=claims)):
            _schedule(node)
            node.until_ready("claimed")
            _look(node, driver)
        eventually(lambda: not driver.prepared, "the claim is given back", WAIT_S)
        node.member().ok("delete", "resourceclaim", "mine", "--wait=false")


def _look(node: Node, driver: Driver) -> None:
    (uid,) = driver.prepared
    said = node.inside("claimed", "main", LOOK.format("/dev/claimed") + "; cat /claim; echo; echo $CLAIM")
    same("the device", said.splitlines(), [NUMBER, "reads", "writes", uid, "mine"])
    said = node.inside("claimed", "beside", "ls /dev/claimed /claim 2>&1; echo :$CLAIM:")
    holds("the container beside it", said, "/dev/claimed: No such file", "/claim: No such file", "::")


def _claim() -> Document:
    asked = {
        "name": "one",
        "exactly": {"deviceClassName": "tokens.ocid.invalid", "allocationMode": "ExactCount", "count": 1},
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": "mine", "namespace": "default"},
        "spec": {"devices": {"requests": [asked]}},
    }


def _schedule(node: Node) -> None:
    """As a scheduler does it: the claim gets its device and is kept for the pod, then the pod gets its node."""
    kubectl = node.member()
    uid = kubectl.get("pod", "claimed")["metadata"]["uid"]
    given = [{"request": "one", "driver": DRIVER, "pool": "here", "device": "claimed"}]
    status: Document = {
        "allocation": {"devices": {"results": given}},
        "reservedFor": [{"resource": "pods", "name": "claimed", "uid": uid}],
    }
    kubectl.ok(
        "patch",
        "resourceclaim",
        "mine",
        "--subresource=status",
        "--type=merge",
        f"--patch={json.dumps({'status': status})}",
    )
    binding = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": "claimed"},
        "target": {"apiVersion": "v1", "kind": "Node", "name": NAME},
    }
    where = "--raw=/api/v1/namespaces/default/pods/claimed/binding"
    kubectl.ok("create", where, "--filename=-", data=json.dumps(binding).encode())


STEPS = (Step(plugged), Step(claimed))
