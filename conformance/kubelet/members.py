"""What a kubelet does for the pods of an API server alone: resize in place, evict, recursive read-only mounts, runtime
classes, and the words for how a pod ended."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from conformance.clients.steps import eventually, expect, holds, same
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step

WAIT_S = 60.0


def _amounts(cpu: str, memory: str) -> Document:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}}


def events(node: Node) -> None:
    """The kubelet hears of containers by GetContainerEvents, and has done so since it began."""
    connections, failures = (f"kubelet_evented_pleg_connection_{kind}_count" for kind in ("success", "error"))
    eventually(lambda: node.metric("kubelet_evented_pleg_connection_latency_seconds_count") >= 10, "ten events", WAIT_S)
    same("streams begun and failed", (node.metric(connections), node.metric(failures)), (1.0, 0.0))


def resize_pods(node: Node) -> list[Document]:
    policy = [
        {"resourceName": "cpu", "restartPolicy": "NotRequired"},
        {"resourceName": "memory", "restartPolicy": "NotRequired"},
    ]
    restart = [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]
    busybox = node.images["busybox"]
    return [
        pod(
            "resized",
            container("main", busybox, resources=_amounts("100m", "32Mi"), resizePolicy=policy),
            container("beside", busybox, resources=_amounts("100m", "32Mi"), resizePolicy=restart),
            nodeName=NAME,
        )
    ]


def resize(node: Node) -> None:
    """More and less, in the kernel's files of container and pod, while the same process runs on; or with a restart
    where the pod asks for one."""
    node.until_ready("resized")
    before = node.running("resized")
    pid = node.pid(before["main"])
    for cpu, memory in (("250m", "64Mi"), ("150m", "48Mi")):
        _resize(node, "main", cpu, memory)
        _until_in_force(node, before["main"], cpu, memory)
    same("the container", node.running("resized"), before)
    same("its process", node.pid(before["main"]), pid)
    same("restarts", node.status("resized", "main")["restartCount"], 0)
    _resize(node, "beside", "100m", "40Mi")
    eventually(lambda: node.status("resized", "beside").get("restartCount") == 1, "the other is restarted", WAIT_S)
    same("the first container", node.running("resized")["main"], before["main"])
    told = node.status("resized", "main")["resources"]["limits"]
    same("what is told", told, {"cpu": "150m", "memory": "48Mi"})


def _resize(node: Node, name: str, cpu: str, memory: str) -> None:
    patch: Any = {"spec": {"containers": [{"name": name, "resources": _amounts(cpu, memory)}]}}
    node.member().ok("patch", "pod", "resized", "--subresource=resize", f"--patch={json.dumps(patch)}")


def _until_in_force(node: Node, container_id: str, cpu: str, memory: str) -> None:
    document = node.pod("resized")
    other = 100  # thousandths of a cpu, and 32 MiB, of the second container
    wanted = [int(cpu.removesuffix("m")), int(memory.removesuffix("Mi"))]

    def now() -> list[list[int]]:
        found = []
        for below in ("", container_id):
            quota = (node.cgroup_of(document, "cpu") / below / "cpu.cfs_quota_us").read_text()
            limit = (node.cgroup_of(document, "memory") / below / "memory.limit_in_bytes").read_text()
            found.append([int(quota) // 100, int(limit) >> 20])
        return found

    both = [[wanted[0] + other, wanted[1] + 32], wanted]
    eventually(lambda: now() == both, f"pod and container have {both}", WAIT_S)

    def done() -> bool:
        limits = node.status("resized", "main").get("resources", {}).get("limits", {})
        return bool(limits == {"cpu": cpu, "memory": memory})

    eventually(done, f"the kubelet tells {cpu}, {memory}", WAIT_S)


def evicted_pods(node: Node) -> list[Document]:
    write = "dd if=/dev/zero of=/big bs=1M count=12 2>/dev/null; echo x >/out/written; while :; do sleep 1; done"
    limit = {"limits": {"ephemeral-storage": "6Mi"}}
    wasteful = container("main", node.images["busybox"], write, resources=limit)
    return [
        pod("wasteful", wasteful, nodeName=NAME),
        pod("thrifty", container("main", node.images["busybox"]), nodeName=NAME),
    ]


def evicted(node: Node) -> None:
    """Who fills its writable layer beyond its limit is evicted, by what our statistics say of it; nobody else is."""
    eventually(lambda: node.out("written"), "twelve megabytes are written", WAIT_S)

    def status() -> Document:
        return dict(node.member().get("pod", "wasteful")["status"])

    eventually(lambda: status().get("reason") == "Evicted", "the pod is evicted", WAIT_S)
    holds("the reason", status()["message"], "ephemeral local storage usage exceeds the total limit of containers 6Mi")
    eventually(lambda: not node.running("wasteful"), "nothing of it runs", WAIT_S)
    expect(node.running("thrifty"), "another pod went with it")


def recursive_pods(node: Node) -> list[Document]:
    outer = node.base / "recursive"
    (outer / "inner").mkdir(parents=True, exist_ok=True)
    mounts = [
        {"name": "outer", "mountPath": "/all", "readOnly": True, "recursiveReadOnly": "Enabled"},
        {"name": "outer", "mountPath": "/top", "readOnly": True},
    ]
    volumes = [{"name": "outer", "hostPath": {"path": str(outer), "type": "Directory"}}]
    # A mount of the machine's below the volume, which is there before the pod is.
    subprocess.run(["mount", "-t", "tmpfs", "inner", outer / "inner"], check=True)
    return [
        pod("recursive", container("main", node.images["busybox"], volumeMounts=mounts), volumes=volumes, nodeName=NAME)
    ]


def recursive(node: Node) -> None:
    """Read-only with all that is mounted below, where that is asked for."""
    try:
        node.until_ready("recursive")
        said = node.inside(
            "recursive", "main", "for i in all top; do touch /$i/inner/$i 2>&1 || true; done; ls /all/inner"
        )
        holds("what is refused", said, "touch: /all/inner/all: Read-only file system")
        same("what is there", said.splitlines()[-1], "top")
    finally:
        subprocess.run(["umount", node.base / "recursive" / "inner"], check=True)


def classes_pods(node: Node) -> list[Document]:
    node.member().apply(
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": "by-runc"},
            "handler": "runc",
            "overhead": {"podFixed": {"memory": "8Mi", "cpu": "50m"}},
        }
    )
    limits = {"limits": {"memory": "32Mi"}}
    main = container("main", node.images["busybox"], resources=limits)
    return [pod("by-runc", main, runtimeClassName="by-runc", nodeName=NAME)]


def classes(node: Node) -> None:
    """A handler by its class: runc's state knows the container; the class's overhead is the pod's."""
    node.until_ready("by-runc")
    (id_,) = node.running("by-runc").values()
    same("output", node.inside("by-runc", "main", "echo here"), "here\n")
    said = "".join(path.read_text() for path in node.socket.parent.rglob("state.json") if id_ in str(path))
    holds("the state of runc", said, '"init_process_pid"', id_)
    limit = (node.cgroup_of(node.pod("by-runc"), "memory") / "memory.limit_in_bytes").read_text()
    same("the pod's limit with its overhead", int(limit) >> 20, 40)


STEPS = (
    Step(resize, resize_pods),
    Step(evicted, evicted_pods),
    Step(recursive, recursive_pods),
    Step(classes, classes_pods),
    Step(events),
)
