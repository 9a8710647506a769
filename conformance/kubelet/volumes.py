"""What a pod sees of files: volumes of its own and of the machine, as a kubelet prepares them and a runtime mounts
them."""

from __future__ import annotations

import subprocess

from conformance.clients.steps import eventually, expect, holds, same
from conformance.kubelet.node import Node
from conformance.kubelet.pods import FOREVER, Document, container, pod
from conformance.kubelet.step import Step


def empty_dirs_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    mounts = [{"name": "disk", "mountPath": "/disk"}, {"name": "memory", "mountPath": "/memory"}]
    writer = f"echo start >>/disk/starts; [ $(wc -l </disk/starts) -gt 1 ] || exit 1; {FOREVER}"
    return [
        pod(
            "empty-dirs",
            container("writer", busybox, writer, volumeMounts=mounts),
            container("reader", busybox, volumeMounts=mounts),
            volumes=[
                {"name": "disk", "emptyDir": {}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
            ],
        )
    ]


def empty_dirs(node: Node) -> None:
    """Shared by the pod's containers, there for as long as the pod is and not the container; memory has its limit."""
    eventually(lambda: node.status("empty-dirs", "writer").get("restartCount") == 1, "the writer is restarted", 60)
    node.until_ready("empty-dirs")
    same("what the other container reads", node.inside("empty-dirs", "reader", "cat /disk/starts"), "start\nstart\n")
    size = node.inside("empty-dirs", "reader", "df -k /memory | tail -1 | awk '{print $1, $2}'")
    same("the tmpfs", size.split(), ["tmpfs", "8192"])
    node.inside("empty-dirs", "writer", "echo here >/memory/file")
    same("through memory", node.inside("empty-dirs", "reader", "cat /memory/file"), "here\n")


def host_paths_pods(node: Node) -> list[Document]:
    machine = node.base / "machine"
    (machine / "deep" / "er").mkdir(parents=True, exist_ok=True)
    (machine / "file").write_text("of the machine\n")
    (machine / "deep" / "er" / "file").write_text("deep\n")
    mounts = [
        {"name": "machine", "mountPath": "/machine"},
        {"name": "machine", "mountPath": "/fixed", "readOnly": True},
        {"name": "machine", "mountPath": "/part", "subPath": "deep/er"},
        {"name": "machine", "mountPath": "/mine", "subPathExpr": "$(WHO)"},
        {"name": "file", "mountPath": "/one-file"},
        {"name": "fresh", "mountPath": "/fresh"},
    ]
    script = f"echo from the pod >/machine/from-pod; {FOREVER}"
    env: list[Document] = [
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "WHO", "value": "sub-$(POD)"},
    ]
    return [
        pod(
            "host-paths",
            container("main", node.images["busybox"], script, volumeMounts=mounts, env=env),
            volumes=[
                {"name": "machine", "hostPath": {"path": str(machine), "type": "Directory"}},
                {"name": "file", "hostPath": {"path": str(machine / "file"), "type": "File"}},
                {"name": "fresh", "hostPath": {"path": str(machine / "not" / "there")}},  # nobody checks that it is
            ],
        )
    ]


def host_paths(node: Node) -> None:
    """Directories and files of the machine, whole and in part, fixed and not, there and not there yet."""
    node.until_ready("host-paths")
    node.inside("host-paths", "main", "touch /fresh/file")
    expect((node.base / "machine" / "not" / "there" / "file").exists(), "a directory that was missing is elsewhere")
    same("what the pod wrote", (node.base / "machine" / "from-pod").read_text(), "from the pod\n")
    same("one file", node.inside("host-paths", "main", "cat /one-file"), "of the machine\n")
    same("a part", node.inside("host-paths", "main", "cat /part/file"), "deep\n")
    node.inside("host-paths", "main", "touch /mine/file")
    expect((node.base / "machine" / "sub-default" / "file").exists(), "subPathExpr leads elsewhere")
    said = node.inside("host-paths", "main", "touch /fixed/no 2>&1; true")
    holds("a write to what is fixed", said, "Read-only file system")


def propagation_pods(node: Node) -> list[Document]:
    shared = node.base / "kubelet" / "shared"  # below a directory that the kubelet has made a shared mount
    for name in ("from-machine", "from-pod"):
        (shared / name).mkdir(parents=True, exist_ok=True)
    volumes = [{"name": "shared", "hostPath": {"path": str(shared), "type": "Directory"}}]
    into = [{"name": "shared", "mountPath": "/shared", "mountPropagation": "HostToContainer"}]
    both = [{"name": "shared", "mountPath": "/shared", "mountPropagation": "Bidirectional"}]
    none = [{"name": "shared", "mountPath": "/shared"}]
    busybox = node.images["busybox"]
    mount = "mount -t tmpfs mine /shared/from-pod && touch /shared/from-pod/file"
    unmount = f"trap 'umount /shared/from-pod; exit 0' TERM; {mount}; while :; do sleep 0.1; done"
    return [
        pod(
            "propagation",
            container("into", busybox, volumeMounts=into),
            container("none", busybox, volumeMounts=none),
            container("both", busybox, unmount, volumeMounts=both, securityContext={"privileged": True}),
            volumes=volumes,
        )
    ]


def propagation(node: Node) -> None:
    """Mounts that are made later come in where that was asked for, and go out where that was."""
    node.until_ready("propagation")
    shared = node.base / "kubelet" / "shared"
    subprocess.run(["mount", "-t", "tmpfs", "machine", shared / "from-machine"], check=True)
    try:
        (shared / "from-machine" / "file").touch()
        for name, wanted in (("into", "file\n"), ("both", "file\n"), ("none", "")):
            same(f"in {name}", node.inside("propagation", name, "ls /shared/from-machine"), wanted)
        eventually((shared / "from-pod" / "file").exists, "the pod's mount comes out", 20)
        same("into the other", node.inside("propagation", "into", "ls /shared/from-pod"), "file\n")
    finally:
        subprocess.run(["umount", shared / "from-machine"], check=True)
    node.withdraw("propagation")
    node.until_gone("propagation")
    expect(not (shared / "from-pod" / "file").exists(), "the pod's mount outlives it")


def downward_pods(node: Node) -> list[Document]:
    volume = {
        "name": "info",
        "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]},
    }
    env = [
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    main = container(
        "main",
        node.images["busybox"],
        volumeMounts=[{"name": "info", "mountPath": "/info"}],
        env=env,
        resources={"limits": {"memory": "40Mi"}},
    )
    return [pod("downward", main, volumes=[volume], metadata={"labels": {"colour": "blue"}})]


def downward(node: Node) -> None:
    """What a pod is told of itself, by files and by its environment."""
    status = node.until_ready("downward")
    same("labels", node.inside("downward", "main", "cat /info/labels").strip(), 'colour="blue"')
    same(
        "environment", node.inside("downward", "main", "echo $MEMORY $POD_IP").split(), [str(40 << 20), status["podIP"]]
    )


def images_pods(node: Node) -> list[Document]:
    mounts = [
        {"name": "image", "mountPath": "/image", "readOnly": True},
        {"name": "image", "mountPath": "/part", "readOnly": True, "subPath": "etc/nginx"},
    ]
    volumes = [{"name": "image", "image": {"reference": node.images["nginx"], "pullPolicy": "IfNotPresent"}}]
    return [pod("images", container("main", node.images["busybox"], volumeMounts=mounts), volumes=volumes)]


def images(node: Node) -> None:
    """An image as a volume, whole and in part; nobody writes to it."""
    node.until_ready("images")
    holds("a page", node.inside("images", "main", "cat /image/usr/share/nginx/html/index.html"), "Hello from a pod")
    holds("a part", node.inside("images", "main", "cat /part/nginx.conf"), "worker_processes")
    holds("a write", node.inside("images", "main", "touch /image/no 2>&1; true"), "Read-only file system")


STEPS = (
    Step(empty_dirs, empty_dirs_pods),
    Step(host_paths, host_paths_pods),
    Step(propagation, propagation_pods),
    Step(downward, downward_pods),
    Step(images, images_pods),
)
