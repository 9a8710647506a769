"""Kubelet and ocid restarted, each alone and both at once, in order and by SIGKILL. What runs, runs on: same
containers, same processes; what ended meanwhile is told with its code; what changed meanwhile is done."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from conformance.clients.steps import eventually, expect, same
from conformance.cri_client import Cri
from conformance.kubelet.node import Node
from conformance.kubelet.pods import FOREVER, OFTEN, Document, container, pod
from conformance.kubelet.step import Step


def _steady(node: Node, name: str) -> list[Document]:
    """A pod that counts aloud and is probed, and one whose container ends with 5 when /out/NAME-end is there."""
    probe = {"exec": {"command": ["test", "-e", "/alive"]}, **OFTEN, "failureThreshold": 3}
    count = "touch /alive; i=0; while :; do i=$((i+1)); echo count $i; sleep 0.05; done"
    steady = container("main", node.images["busybox"], count, livenessProbe=probe, readinessProbe=probe)
    look = f"if [ -e /out/{name}-end ]; then rm /out/{name}-end; exit 5; fi"
    end = f"trap 'exit 0' TERM; while :; do sleep 0.1; {look}; done"
    beside = container("beside", node.images["busybox"], FOREVER)
    return [pod(f"{name}-steady", steady, beside), pod(f"{name}-ends", container("main", node.images["busybox"], end))]


def _facts(node: Node, name: str) -> dict[str, tuple[str, int, int]]:
    """Id, pid and restarts of each container of the steady pod."""
    running = node.running(f"{name}-steady")
    restarts = {key: node.status(f"{name}-steady", key)["restartCount"] for key in running}
    return {key: (id_, node.pid(id_), restarts[key]) for key, id_ in running.items()}


def _begin(node: Node, name: str) -> dict[str, tuple[str, int, int]]:
    for one in (f"{name}-steady", f"{name}-ends"):
        node.until_ready(one)
    # A kubelet that ends while it takes a pod apart leaves mounts of subPaths, which the next one never unmounts
    # (removeOrphanedPodVolumeDirs in its kubelet_volumes.go only removes directories).
    pods, manifests = node.base / "kubelet" / "pods", node.base / "manifests"
    eventually(
        lambda: len(list(pods.iterdir())) <= len(list(manifests.iterdir())), "pods of earlier steps are taken apart", 90
    )
    return _facts(node, name)


def _end_one(node: Node, name: str) -> None:
    file = node.base / "out" / f"{name}-end"
    file.touch()
    eventually(lambda: not file.exists(), "the container ends", 20)


def _check(node: Node, name: str, before: dict[str, tuple[str, int, int]]) -> None:
    for _, pid, _ in before.values():
        expect(Path(f"/proc/{pid}").exists(), f"pid {pid} of a steady container is gone")

    def told() -> bool:
        status = node.status(f"{name}-ends", "main")
        return bool(
            status.get("lastState", {}).get("terminated", {}).get("exitCode") == 5 and "running" in status["state"]
        )

    eventually(told, "the exit is told with its code and the container runs again", 60)
    node.until_ready(f"{name}-steady")
    same("the steady containers", _facts(node, name), before)
    log = next((node.base / "logs").glob(f"default_{name}-steady-*")) / "main" / "0.log"
    counts = list(map(int, re.findall(r"F count (\d+)\n", "".join(_texts(log)))))
    same("what is logged", counts, list(range(counts[0], counts[0] + len(counts))))


def _texts(log: Path) -> list[str]:
    """Oldest first, as they are between two rotations: what was read while one went on is read again."""
    while True:
        files = _files(log)
        with contextlib.suppress(FileNotFoundError):
            texts = [path.read_text() for path, _ in files]
            if texts and _files(log) == files:
                return [*texts[1:], texts[0]]


def _files(log: Path) -> list[tuple[Path, int]]:
    """Those that are no archives, with their inodes; `log` itself comes first."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            found = [path for path in log.parent.glob("0.log*") if path.suffix not in (".gz", ".tmp")]
            return sorted((path, path.stat().st_ino) for path in found)


def kubelet_pods(node: Node) -> list[Document]:
    return _steady(node, "kubelet")


def kubelet_restarted(node: Node) -> None:
    """SIGTERM, as by an upgrade."""
    before = _begin(node, "kubelet")
    node.kubelet.stop()
    _end_one(node, "kubelet")
    node.kubelet.start()
    _check(node, "kubelet", before)


def ocid_pods(node: Node) -> list[Document]:
    return _steady(node, "ocid")


def ocid_restarted(node: Node) -> None:
    """SIGKILL; the kubelet goes on asking, and a pod that is new meanwhile starts once there is an answer."""
    before = _begin(node, "ocid")
    with node.ocid_away():
        node.ocid.kill()
        _end_one(node, "ocid")
        node.apply(pod("meanwhile", container("main", node.images["busybox"])))
        for _, pid, _ in before.values():
            expect(Path(f"/proc/{pid}").exists(), f"pid {pid} ends with the daemon")
        node.ocid.start()
    _check(node, "ocid", before)
    node.until_ready("meanwhile")


def both_pods(node: Node) -> list[Document]:
    return [*_steady(node, "both"), pod("leaves", container("main", node.images["busybox"]))]


def both_restarted(node: Node) -> None:
    """SIGKILL for both; a pod comes, another goes while nobody is there."""
    before = _begin(node, "both")
    node.until_ready("leaves")
    with node.ocid_away():
        node.kubelet.kill()
        node.ocid.kill()
        _end_one(node, "both")
        node.withdraw("leaves")
        node.apply(pod("comes", container("main", node.images["busybox"])))
        node.ocid.start()
    node.kubelet.start()
    _check(node, "both", before)
    node.until_ready("comes")
    node.until_gone("leaves")
    for name in ("meanwhile", "comes"):
        node.withdraw(name)


def pressure(node: Node) -> None:
    """With a threshold that the image store's file system is always below, the kubelet frees what ImageFsInfo and
    ListImages show: an image that no container uses goes, those in use stay."""
    with Cri(node.socket) as client:
        unused = client.pull(node.images["nginx"])
        node.kubelet.stop()
        node.configure(evictionHard={"imagefs.available": "99.99%"}, imageMinimumGCAge="1s")
        node.kubelet.start()
        eventually(lambda: all(one.id != unused for one in client.list_images()), "the unused image is removed", 60)
        tags = [tag for one in client.list_images() for tag in one.repo_tags]
        same("images in use", tags, [node.images["busybox"]])
    node.kubelet.stop()
    node.configure(evictionHard={"memory.available": "1Mi"})
    node.kubelet.start()


STEPS = (
    Step(kubelet_restarted, kubelet_pods),
    Step(ocid_restarted, ocid_pods),
    Step(both_restarted, both_pods),
    Step(pressure),
)
