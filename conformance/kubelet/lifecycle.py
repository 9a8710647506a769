"""How pods begin, go wrong, and end: order of init and sidecar containers, exit codes and messages, restarts with
backoff, hooks and signals in the time that a pod has for its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from conformance.clients.steps import eventually, expect, holds, same
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import FOREVER, OFTEN, Document, container, pod
from conformance.kubelet.step import Step

BACKOFF_S = 2.0  # as the kubelet is configured; it waits that long before the second start, too
UP = "cut -d' ' -f1 /proc/uptime"


def _say(file: str, word: str) -> str:
    return f"echo {word} >>/out/{file}"


def plain_pods(node: Node) -> list[Document]:
    nginx = {"name": "nginx", "image": node.images["nginx"], "imagePullPolicy": "Always"}
    return [pod("plain", nginx, container("beside", node.images["busybox"]))]


def plain(node: Node) -> None:
    """Its status is told, its containers are where a kubelet wants them, its address answers, its logs are there."""
    status = node.until_ready("plain")
    told = {one["name"]: one["containerID"] for one in status["containerStatuses"]}
    running = node.running("plain")
    same("containers of the pod", {name: f"ocid://{id_}" for name, id_ in running.items()}, told)
    document = node.pod("plain")
    for id_ in running.values():
        for controller in ("memory", "cpu", "pids"):
            cgroup = node.cgroup_of(document, controller) / id_
            pids = (cgroup / "cgroup.procs").read_text().split()
            expect(str(node.pid(id_)) in pids, f"{cgroup} holds {pids}, not {node.pid(id_)}")
    page = node.inside("plain", "beside", f"wget -q -O- http://{status['podIP']}/")
    holds("the page", page, "Hello from a pod")
    (link,) = Path("/var/log/containers").glob(f"plain-{NAME}_default_beside-*.log")
    expect(link.exists(), f"{link} leads nowhere")
    holds(
        "hosts file of the kubelet's", node.inside("plain", "beside", "cat /etc/hosts"), status["podIP"], "plain-node0"
    )
    said = node.call(f"/run/default/plain-{NAME}/beside?cmd=hostname", "POST")
    same("the kubelet's /run of hostname", said.strip(), f"plain-{NAME}")


def order_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    steady = f"trap '{_say('order', 'sidecar-ends')}; exit 0' TERM; sleep 1; {_say('order', 'sidecar')}; touch /ready; "
    sidecar = container(
        "sidecar",
        busybox,
        f"{steady} while :; do sleep 0.1; done",
        restartPolicy="Always",
        startupProbe={"exec": {"command": ["test", "-e", "/ready"]}, **OFTEN, "failureThreshold": 30},
    )
    first = container("first", busybox, f"sleep 0.5; {_say('order', 'first')}")
    second = container("second", busybox, _say("order", "second"))
    main = container("main", busybox, f"{_say('order', 'main')}; sleep 0.5; {_say('order', 'main-ends')}")
    return [pod("order", main, initContainers=[first, sidecar, second], restartPolicy="Never")]


def order(node: Node) -> None:
    """Init containers one after the other, a sidecar from its place among them until the main container has ended."""
    eventually(lambda: node.status("order").get("phase") == "Succeeded", "the pod succeeds", 60)
    wanted = ["first", "sidecar", "second", "main", "main-ends", "sidecar-ends"]
    same("the order of what containers did", node.out("order").split(), wanted)
    for name in ("first", "second", "main", "sidecar"):
        ended = node.status("order", name)["state"]["terminated"]
        same(f"exit of {name}", (ended["exitCode"], ended["reason"]), (0, "Completed"))


def init_fails_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    script = f"{_say('init-fails', 'try')}; [ $(wc -l </out/init-fails) -ge 2 ]"
    return [pod("init-fails", container("main", busybox), initContainers=[container("init", busybox, script)])]


def init_fails(node: Node) -> None:
    """One that fails is run again, and nothing before it has succeeded."""
    node.until_ready("init-fails")
    same("tries of the init container", node.out("init-fails").split(), ["try", "try"])
    same("restarts told", node.status("init-fails", "init")["restartCount"], 1)


def exits_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    own = container("own", busybox, "echo 'because of this' >/dev/termination-log; exit 3")
    logs = container("logs", busybox, "echo 'last words'; exit 4", terminationMessagePolicy="FallbackToLogsOnError")
    return [
        pod("exits", own, logs, container("signal", busybox), restartPolicy="Never"),
        pod("absent", container("main", busybox) | {"command": ["/no/such/command"]}),
    ]


def exits(node: Node) -> None:
    """Codes, messages out of the termination log or the end of the logs, and a command that is not there."""
    eventually(lambda: "signal" in node.running("exits"), "a container runs", 60)
    os.kill(node.pid(node.running("exits")["signal"]), signal.SIGKILL)
    eventually(lambda: node.status("exits").get("phase") == "Failed", "the pod fails", 60)
    for name, code, message in (("own", 3, "because of this\n"), ("logs", 4, "last words\n"), ("signal", 137, "")):
        ended = node.status("exits", name)["state"]["terminated"]
        same(f"{name}: code, reason", (ended["exitCode"], ended["reason"]), (code, "Error"))
        same(f"{name}: message", ended.get("message", ""), message)

    def told() -> str:
        status = node.status("absent", "main")
        states = (status.get("state", {}), status.get("lastState", {}))
        return " ".join(
            str(state.get(kind, {}).get("message")) for state in states for kind in ("waiting", "terminated")
        )

    eventually(lambda: "/no/such/command" in told(), "the kubelet tells of the missing command", 30)


def backoff_pods(node: Node) -> list[Document]:
    return [pod("backoff", container("main", node.images["busybox"], f"{UP} >>/out/backoff; exit 1"))]


def backoff(node: Node) -> None:
    """What fails again and again is started again, and each time waits."""
    waits: set[str] = set()

    def seen() -> bool:
        status = node.status("backoff", "main")
        waits.add(status.get("state", {}).get("waiting", {}).get("reason", ""))
        return int(status.get("restartCount", 0)) >= 3 and "CrashLoopBackOff" in waits

    eventually(seen, "three restarts, and a wait for another", 60)
    eventually(lambda: len(node.out("backoff").split()) >= 4, "the fourth start writes", 20)
    starts = [float(line) for line in node.out("backoff").split()]
    gaps = [later - earlier for earlier, later in zip(starts, starts[1:], strict=False)]
    expect(all(gap >= BACKOFF_S for gap in gaps[1:]), f"starts are {gaps} s apart")


def hooks_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    lifecycle = {
        "postStart": {"exec": {"command": ["sh", "-c", _say("hooks", "post-start")]}},
        "preStop": {"exec": {"command": ["sh", "-c", f"{_say('hooks', 'pre-stop')}; sleep 0.5"]}},
    }
    end = f"trap '{_say('hooks', 'term')}; sleep 1; {_say('hooks', 'done')}; exit 0' TERM; while :; do sleep 0.1; done"
    deaf = f"trap '{_say('deaf', 'term')}' TERM; while :; do sleep 0.1; done"
    usr1 = f"trap '{_say('usr1', 'usr1')}; exit 0' USR1; while :; do sleep 0.1; done"
    return [
        pod("hooks", container("main", busybox, end, lifecycle=lifecycle), terminationGracePeriodSeconds=30),
        pod("deaf", container("main", busybox, deaf), terminationGracePeriodSeconds=2),
        pod("usr1", container("main", busybox, usr1, lifecycle={"stopSignal": "SIGUSR1"}), os={"name": "linux"}),
    ]


def hooks(node: Node) -> None:
    """A pod that is withdrawn: its hook, its signal, the time it takes for itself; one that does not listen is killed
    when its time is over and not before."""
    for name in ("hooks", "deaf", "usr1"):
        node.until_ready(name)
    began = time.monotonic()
    for name in ("hooks", "deaf", "usr1"):
        node.withdraw(name)
    eventually(lambda: not node.running("deaf"), "the deaf pod is killed", 30)
    took = time.monotonic() - began
    expect(took >= 2, f"the deaf pod of 2 s was gone after {took:.1f} s")
    for name in ("hooks", "deaf", "usr1"):
        node.until_gone(name)
    same("the end in order", node.out("hooks").split(), ["post-start", "pre-stop", "term", "done"])
    same("what the deaf one heard", node.out("deaf").split(), ["term"])
    same("stopSignal of the pod", node.out("usr1").split(), ["usr1"])


def changed_pods(node: Node) -> list[Document]:
    return [pod("changed", container("main", node.images["busybox"], f"echo one >>/out/changed; {FOREVER}"))]


def changed(node: Node) -> None:
    """A manifest that changes ends the pod and begins another."""
    node.until_ready("changed")
    before = node.running("changed")
    node.apply(pod("changed", container("main", node.images["busybox"], f"echo two >>/out/changed; {FOREVER}")))
    eventually(lambda: node.running("changed") not in ({}, before), "another container runs", 60)
    eventually(lambda: node.out("changed").split() == ["one", "two"], "each ran once", 20)


STEPS = (
    Step(plain, plain_pods),
    Step(order, order_pods),
    Step(init_fails, init_fails_pods),
    Step(exits, exits_pods),
    Step(backoff, backoff_pods),
    Step(hooks, hooks_pods),
    Step(changed, changed_pods),
)
