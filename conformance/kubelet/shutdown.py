"""A node is shut down: logind delays it for the kubelet, which ends the pods by us, those that the node needs after all
others; then the node comes up again, with what STATE held gone, as a reboot takes it.

Invariant: every wait is for something that a pod, logind or the kubelet does; the one time that has to pass is that of
the pod that does not end by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conformance.clients.steps import eventually, expect, holds, same
from conformance.cri_client import Cri
from conformance.daemons import retire
from conformance.kubelet.logind import Systemd, inhibitors, logind, power_off
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step, applied, configured
from cri.api import api_pb2
from runtime.linux.files import remove_tree

WAIT_S = 90.0
# More than the 5 s that logind gives by itself, so that the kubelet must have had it changed. Those that the node needs
# have the last CRITICAL_S of it, whatever grace their pods ask for.
GRACE_S, CRITICAL_S = 30, 4
CRITICAL: Document = {"priorityClassName": "system-node-critical"}
# As nobody but an API server looks classes up, a static pod says the number too.
STATIC_CRITICAL = CRITICAL | {"priority": 2000001000}
# The code each ends with, and the reason that is told with it.
FIRST = {"ordinary": (3, "Error"), "static": (0, "Completed")}
LAST = {"needed": (0, "Completed"), "static-needed": (0, "Completed"), "deaf": (137, "Error")}
# The phase of each that the API server has made, and why it is in that.
TOLD = {"ordinary": ("Failed", "Terminated"), "needed": ("Succeeded", ""), "deaf": ("Failed", "Terminated")}
STATIC = ("static", "static-needed")


def shutdown(node: Node) -> None:
    """By TERM, in its order, with the time that each may have; codes and states are told as they were, also by an ocid
    that starts anew; after a reboot what is static runs again, and nothing else."""
    with logind(node.base / "logind") as systemd, applied(node, *_pods(node)):
        _until_ready(node)  # a kubelet that ends while it makes a pod finds the name taken when it is back
        with configured(node, shutdownGracePeriod=f"{GRACE_S}s", shutdownGracePeriodCriticalPods=f"{CRITICAL_S}s"):
            eventually(lambda: 'string "kubelet"' in inhibitors(), "the kubelet has asked for time", WAIT_S)
            holds("what it delays", inhibitors(), 'string "shutdown"', 'string "delay"')
            _until_ready(node)  # it would refuse those that it has yet to hear of
            before = {name: node.running(name)["main"] for name in FIRST | LAST}
            _end_in_order(node, systemd, before)
            _told(node, before)
            _rebooted(node, before)
        for name in STATIC:
            node.until_ready(name)
            expect(node.running(name)["main"] != before[name], f"{name} is told to run in its old container")
        for name in sorted(FIRST | LAST):
            same(f"whether {name} runs again", bool(node.running(name)), name in STATIC)


def _until_ready(node: Node) -> None:
    for name in FIRST | LAST:
        node.until_ready(name)


def _pods(node: Node) -> list[Document]:
    def one(name: str, more: str, **spec: Any) -> Document:
        script = f"say() {{ echo {name} $1 >>/out/end; }}; trap 'say term; {more}' TERM; while :; do sleep 0.1; done"
        return pod(name, container("main", node.images["busybox"], script), terminationGracePeriodSeconds=60, **spec)

    held = "until [ -e /out/let-go ]; do sleep 0.1; done; say done; exit 3"
    return [
        one("ordinary", held, nodeName=NAME),
        one("static", "say done; exit 0"),
        one("needed", "say done; exit 0", nodeName=NAME, **CRITICAL),
        one("static-needed", "say done; exit 0", **STATIC_CRITICAL),
        one("deaf", ":", nodeName=NAME, **CRITICAL),
    ]


def _end_in_order(node: Node, systemd: Systemd, before: dict[str, str]) -> None:
    """One of the ordinary ones takes its time, which all others have to wait for."""

    def said() -> list[str]:
        return node.out("end").splitlines()

    power_off()
    eventually(lambda: {"ordinary term", "static done"} <= set(said()), "the ordinary pods have been told", WAIT_S)
    eventually(lambda: not node.running("static"), "the pod that ends at once has ended", WAIT_S)
    same("who has been told", sorted(said()), ["ordinary term", "static done", "static term"])
    same("what runs of the others", {name: node.running(name)["main"] for name in LAST}, _of(before, LAST))
    same("what systemd is to start", systemd.started, [])
    (node.base / "out" / "let-go").touch()
    eventually(lambda: systemd.started or systemd.failure, "the power is off", WAIT_S)
    same("what failed of systemd", systemd.failure, "")
    same("what systemd starts", systemd.started, ["poweroff.target"])
    same("who ended first", sorted(said()[:4]), ["ordinary done", "ordinary term", "static done", "static term"])
    wanted = ["deaf term", "needed done", "needed term", "static-needed done", "static-needed term"]
    same("who ended then", sorted(said()[4:]), wanted)


def _of(before: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: before[name] for name in names}


def _told(node: Node, before: dict[str, str]) -> None:
    """What is known of the end, by ocid and by the API server, which the kubelet tells when it comes to it."""
    # The kubelet waits no longer than it lets a pod live: the power may be off an instant before the last is killed.
    eventually(lambda: not any(node.running(name) for name in FIRST | LAST), "all have ended", WAIT_S)
    with Cri(node.socket) as client:
        statuses = {name: client.status(id_) for name, id_ in before.items()}
    for name, (code, reason) in (FIRST | LAST).items():
        same(f"the end of {name}", (statuses[name].exit_code, statuses[name].reason), (code, reason))
    ended = {name: status.finished_at for name, status in statuses.items()}
    expect(max(_of(ended, FIRST).values()) < min(_of(ended, LAST).values()), f"they ended at {ended}")
    took = (ended["deaf"] - max(_of(ended, FIRST).values())) / 1e9
    expect(took >= CRITICAL_S, f"who does not listen had {took:.1f} of {CRITICAL_S} s")

    def told() -> dict[str, tuple[str, str]]:
        statuses = {name: node.member().get("pod", name)["status"] for name in TOLD}
        return {name: (status["phase"], status.get("reason", "")) for name, status in statuses.items()}

    eventually(lambda: told() == TOLD, f"the API server has heard of the ends: {TOLD}", WAIT_S)
    holds("why a pod has failed", node.member().get("pod", "deaf")["status"]["message"], "imminent node shutdown")
    eventually(lambda: not node.cgroups(), "no cgroups of pods are left", WAIT_S)


def _rebooted(node: Node, before: dict[str, str]) -> None:
    """Kubelet and ocid end, as systemd ends them then; STATE is gone, and so is every process."""
    with Cri(node.socket) as client:
        statuses = {name: client.status(id_) for name, id_ in before.items()}
        pods = {one.id for one in client.list_pods()}
    node.kubelet.stop()
    same("the code that ocid ends with", node.ocid.stop(), 0)
    retire(node.socket.parent)
    same("mounts of STATE", _mounts(node), [])
    remove_tree(node.socket.parent)
    node.ocid.start()
    with Cri(node.socket) as client:
        same(
            "the pods", {one.id: one.state for one in client.list_pods()}, dict.fromkeys(pods, api_pb2.SANDBOX_NOTREADY)
        )
        for name, id_ in before.items():
            same(f"what is told of {name} after a reboot", client.status(id_), statuses[name])


def _mounts(node: Node) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{node.socket.parent}/")]


STEPS = (Step(shutdown),)
