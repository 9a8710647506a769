"""Probes of every kind and what a kubelet does upon them. An exec probe is our ExecSync, many times a minute."""

from __future__ import annotations

from conformance.clients.steps import eventually, expect, same
from conformance.kubelet.node import Node
from conformance.kubelet.pods import FOREVER, OFTEN, Document, container, pod
from conformance.kubelet.step import Step


def liveness_pods(node: Node) -> list[Document]:
    script = "echo start >>/out/liveness; touch /alive; [ $(wc -l </out/liveness) -gt 1 ] || (sleep 2; rm /alive) &"
    probe = {
        "exec": {"command": ["cat", "/alive"]},
        **OFTEN,
        "failureThreshold": 2,
        "initialDelaySeconds": 1,
    }
    return [pod("liveness", container("main", node.images["busybox"], f"{script} {FOREVER}", livenessProbe=probe))]


def liveness(node: Node) -> None:
    """A container whose probe fails is ended and started again, once, for then it succeeds."""
    eventually(lambda: node.status("liveness", "main").get("restartCount", 0) >= 1, "a restart", 60)
    node.until_ready("liveness")
    same("starts", node.out("liveness").split(), ["start", "start"])


def readiness_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    http = {"httpGet": {"path": "/index.html", "port": 80}, **OFTEN, "failureThreshold": 1}
    tcp = {"tcpSocket": {"port": 7}, **OFTEN, "failureThreshold": 1}
    serve = "mkdir /pages; echo page >/pages/index.html; exec httpd -f -h /pages"
    listen = "until [ -e /out/tcp-open ]; do sleep 0.1; done; exec nc -ll -p 7 -e cat"
    return [
        pod("http", container("main", busybox, serve, readinessProbe=http)),
        pod("tcp", container("main", busybox, listen, readinessProbe=tcp)),
    ]


def readiness(node: Node) -> None:
    """Follows what http and tcp say; nothing is restarted for it."""
    node.until_ready("http")
    node.inside("http", "main", "mv /pages/index.html /pages/away")
    eventually(lambda: not node.ready("http"), "404 makes it unready", 20)
    node.inside("http", "main", "mv /pages/away /pages/index.html")
    node.until_ready("http")
    eventually(lambda: node.running("tcp"), "the pod without an open port runs", 30)
    expect(not node.ready("tcp"), "a closed port is ready")
    (node.base / "out" / "tcp-open").touch()
    node.until_ready("tcp")
    same("restarts", [node.status(name, "main")["restartCount"] for name in ("http", "tcp")], [0, 0])


def startup_pods(node: Node) -> list[Document]:
    startup = {"exec": {"command": ["test", "-e", "/up"]}, **OFTEN, "failureThreshold": 60}
    liveness = {"exec": {"command": ["test", "-e", "/up"]}, **OFTEN, "failureThreshold": 1}
    script = f"(sleep 4; touch /up) & {FOREVER}"
    main = container("main", node.images["busybox"], script, startupProbe=startup, livenessProbe=liveness)
    return [pod("startup", main)]


def startup(node: Node) -> None:
    """Holds back a liveness probe that would have ended the container."""
    node.until_ready("startup")
    same("restarts", node.status("startup", "main")["restartCount"], 0)


def hanging_pods(node: Node) -> list[Document]:
    probe = {"exec": {"command": ["sleep", "54321"]}, "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 1}
    return [pod("hanging", container("main", node.images["busybox"], readinessProbe=probe))]


def hanging(node: Node) -> None:
    """A probe that hangs is a probe that failed, and nothing of it stays."""
    eventually(lambda: node.running("hanging"), "the pod runs", 30)

    def processes() -> str:
        return node.inside("hanging", "main", "ps -o args")

    eventually(lambda: "54321" in processes(), "a probe runs", 60)
    eventually(lambda: "54321" not in processes(), "a probe was ended", 60)
    expect(processes().count("54321") <= 1, f"probes pile up: {processes()}")
    expect(not node.ready("hanging"), "a probe that hangs makes it ready")


STEPS = (
    Step(liveness, liveness_pods),
    Step(readiness, readiness_pods),
    Step(startup, startup_pods),
    Step(hanging, hanging_pods),
)
