"""Who a container is and what it may: users and groups, capabilities, filters, namespaces that are shared or not."""

from __future__ import annotations

import os
from pathlib import Path

from conformance.clients.steps import expect, holds, same
from conformance.kubelet.node import Node
from conformance.kubelet.pods import FOREVER, Document, container, pod
from conformance.kubelet.step import Step

NET_BIND_SERVICE = 1 << 10


def identity_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    main = container(
        "main",
        busybox,
        securityContext={"runAsUser": 1000, "runAsGroup": 33, "runAsNonRoot": True, "readOnlyRootFilesystem": True},
        volumeMounts=[{"name": "disk", "mountPath": "/disk"}],
    )
    refused = container("refused", busybox, securityContext={"runAsNonRoot": True})
    groups = {"fsGroup": 4000, "supplementalGroups": [4001]}
    strict = {**groups, "supplementalGroupsPolicy": "Strict", "runAsUser": 1000, "runAsGroup": 33}
    volumes = [{"name": "disk", "emptyDir": {}}]
    return [
        pod("identity", main, volumes=volumes, securityContext=groups),
        pod("strict", container("main", busybox), securityContext=strict),
        pod("refused", refused),
    ]


def identity(node: Node) -> None:
    """User, group and groups as asked for; the image's groups (operator is of staff) merged or not."""
    for name in ("identity", "strict"):
        node.until_ready(name)
    same("user", node.inside("identity", "main", "id -u; id -g").split(), ["1000", "33"])
    same("groups, merged", set(node.inside("identity", "main", "id -G").split()), {"33", "50", "4000", "4001"})
    same("groups, strict", set(node.inside("strict", "main", "id -G").split()), {"33", "4000", "4001"})
    node.inside("identity", "main", "touch /disk/file")
    same("owner by fsGroup", node.inside("identity", "main", "stat -c %g /disk/file").strip(), "4000")
    holds("the root", node.inside("identity", "main", "touch /no 2>&1; true"), "Read-only file system")
    state = node.status("refused", "refused").get("state", {})
    same("root where runAsNonRoot is", state.get("waiting", {}).get("reason"), "CreateContainerConfigError")


def rights_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    none = {"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}, "allowPrivilegeEscalation": False}
    free = {"seccompProfile": {"type": "Unconfined"}, "capabilities": {"add": ["NET_ADMIN"]}}
    return [
        pod(
            "rights",
            container("none", busybox, securityContext=none),
            container("free", busybox, securityContext=free),
            container("all", busybox, securityContext={"privileged": True}),
            securityContext={"sysctls": [{"name": "net.ipv4.ip_local_port_range", "value": "40000 40100"}]},
        )
    ]


def rights(node: Node) -> None:
    """Capabilities, no_new_privs, the filter that a kubelet gives by default, sysctls."""
    node.until_ready("rights")

    def fields(name: str) -> dict[str, str]:
        lines = node.inside("rights", name, "cat /proc/1/status").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    none, free, everything = fields("none"), fields("free"), fields("all")
    for one in ("CapEff", "CapBnd", "CapPrm"):
        same(f"{one} of none", int(none[one], 16), NET_BIND_SERVICE)
    same("no_new_privs and filter of none", (none["NoNewPrivs"], none["Seccomp"]), ("1", "2"))
    same("no filter where unconfined", free["Seccomp"], "0")
    expect(int(free["CapEff"], 16) & 1 << 12, "NET_ADMIN is not there")
    with open("/proc/self/status") as file:
        own = next(line.split()[1] for line in file if line.startswith("CapBnd"))
    same("capabilities of privileged", int(everything["CapEff"], 16), int(own, 16))
    ports = node.inside("rights", "free", "cat /proc/sys/net/ipv4/ip_local_port_range")
    same("the pod's sysctl", ports.split(), ["40000", "40100"])


def sharing_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    return [
        pod("shared", container("one", busybox), container("two", busybox), shareProcessNamespace=True),
        pod("of-host", container("main", busybox), hostPID=True, hostIPC=True),
    ]


def sharing(node: Node) -> None:
    """Namespaces of the pod's own, of its containers together, and of the machine."""
    for name in ("shared", "of-host", "plain"):
        node.until_ready(name)

    def namespaces(name: str, kind: str) -> set[str]:
        return {os.readlink(f"/proc/{node.pid(id_)}/ns/{kind}") for id_ in node.running(name).values()}

    def ours(kind: str) -> str:
        return os.readlink(f"/proc/self/ns/{kind}")

    for name, kind, count in (("plain", "pid", 2), ("plain", "net", 1), ("plain", "ipc", 1), ("shared", "pid", 1)):
        found = namespaces(name, kind)
        expect(len(found) == count and ours(kind) not in found, f"{kind} of {name}: {found}, ours {ours(kind)}")
    for kind in ("pid", "ipc"):
        same(f"{kind} of of-host", namespaces("of-host", kind), {ours(kind)})
    listed = node.inside("shared", "one", "ps -o pid,args")
    expect(" sh -c" not in listed.splitlines()[1], f"pid 1 of a shared namespace is a container's: {listed}")
    expect(listed.count("trap 'exit 0' TERM") >= 2, f"one container does not see the other: {listed}")


def users_pods(node: Node) -> list[Document]:
    mounts = [{"name": "disk", "mountPath": "/disk"}]
    volumes = [{"name": "disk", "emptyDir": {}}]
    script = f"touch /disk/file /out/by-user; {FOREVER}"
    main = container("main", node.images["busybox"], script, volumeMounts=mounts)
    return [pod("users", main, volumes=volumes, hostUsers=False)]


def users(node: Node) -> None:
    """Root inside and nobody outside; files of volumes belong to the same ids on both sides."""
    node.until_ready("users")
    (id_,) = node.running("users").values()
    lines = Path(f"/proc/{node.pid(id_)}/uid_map").read_text().split()
    expect(lines[0] == "0" and int(lines[1]) >= 65536 and int(lines[2]) == 65536, f"ids are mapped as {lines}")
    same("root's id outside", os.stat(f"/proc/{node.pid(id_)}").st_uid, int(lines[1]))
    same("owner inside", node.inside("users", "main", "id -u; stat -c %u /disk/file /out/by-user").split(), ["0"] * 3)
    same("owner outside", (node.base / "out" / "by-user").stat().st_uid, 0)


STEPS = (
    Step(identity, identity_pods),
    Step(rights, rights_pods),
    Step(sharing, sharing_pods),
    Step(users, users_pods),
)
