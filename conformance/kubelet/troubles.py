"""What happens to a whole node: its memory runs out. With a kubelet that is configured for it and started anew, alone
on the node, since everybody on it would be concerned."""

from __future__ import annotations

from pathlib import Path

from conformance.clients.steps import eventually, holds, same
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step, applied, configured

WAIT_S = 90.0
# What pods have together, what must be left of it, and what one of them takes.
NODE_MIB, LEFT_MIB, EATEN_MIB = 256, 96, 200


def _condition(node: Node, kind: str) -> str:
    conditions = node.member().get("node", NAME)["status"]["conditions"]
    return next((str(one["status"]) for one in conditions if one["type"] == kind), "")


def memory_pressure(node: Node) -> None:
    """The pods of the node have little memory together: all but that is kept for the system. When less than a threshold
    of it is left, the node says so, and of its pods that one is evicted which, by our statistics, uses most beyond what
    it asked for; not the one that uses as much as it asked for."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    changes = {
        "systemReserved": {"memory": str(total - (NODE_MIB << 20))},
        "evictionHard": {"memory.available": f"{LEFT_MIB}Mi"},
        "evictionPressureTransitionPeriod": "20s",
        "nodeStatusUpdateFrequency": "2s",
    }
    modest = container("main", node.images["busybox"], resources={"requests": {"memory": "32Mi"}})
    eat = f"dd if=/dev/zero of=/memory/big bs=1M count={EATEN_MIB}; while :; do sleep 1; done"
    greedy = container(
        "main",
        node.images["busybox"],
        eat,
        resources={"requests": {"memory": "16Mi"}},
        volumeMounts=[{"name": "memory", "mountPath": "/memory"}],
    )
    volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    waster = pod("glutton", greedy, nodeName=NAME, volumes=volumes)
    with configured(node, **changes), applied(node, pod("modest", modest, nodeName=NAME)):
        node.until_ready("modest")
        before = node.running("modest")
        with applied(node, waster):
            _evicted(node, before)


def _evicted(node: Node, others: dict[str, str]) -> None:
    eventually(lambda: _condition(node, "MemoryPressure") == "True", "the node is short of memory", WAIT_S)

    def status() -> Document:
        return dict(node.member().get("pod", "glutton")["status"])

    eventually(lambda: status().get("reason") == "Evicted", "the pod is evicted", WAIT_S)
    holds("the reason", status()["message"], "low on resource: memory", f"Threshold quantity: {LEFT_MIB}Mi")
    holds("the reason", status()["message"], "Container main was using", "request is 16Mi")
    eventually(lambda: not node.running("glutton"), "nothing of it runs", WAIT_S)
    same("the other pod", node.running("modest"), others)
    eventually(lambda: _condition(node, "MemoryPressure") == "False", "there is memory again", WAIT_S)


STEPS = (Step(memory_pressure),)
