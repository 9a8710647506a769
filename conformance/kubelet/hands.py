"""What a person does with kubectl: run, logs, exec, attach, port-forward, cp, debug. Bytes go from kubectl through API
server and kubelet to our streaming server; both transports, where kubectl has two."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

from conformance.clients.steps import Surprise, eventually, expect, holds, same
from conformance.clients.terminal import Terminal
from conformance.kubelet.kubectl import TRANSPORTS, Kubectl
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step

HERE = '{"spec":{"nodeName":"node0"}}'
WAIT_S = 30.0


def hand_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    page = "mkdir /pages; echo by kubectl >/pages/index.html; exec httpd -f -h /pages"
    talk = 'while read line; do echo "said $line"; done; echo over; sleep 1'
    talkers = [container(f"talk-{name}", busybox, talk, stdin=True, stdinOnce=True) for name in TRANSPORTS]
    return [
        pod("hand", container("main", busybox, page), container("beside", busybox), nodeName=NAME),
        pod("talkers", *talkers, nodeName=NAME, restartPolicy="Never"),
    ]


def member(node: Node) -> None:
    """The node is ready, and tells what runs it and what its handlers can."""
    kubectl = node.member()

    def ready() -> bool:
        conditions = kubectl.get("node", NAME).get("status", {}).get("conditions", [])
        return {one["type"]: one["status"] for one in conditions}.get("Ready") == "True"

    eventually(ready, "the node is ready", 60)
    status = kubectl.get("node", NAME)["status"]
    holds("the runtime", status["nodeInfo"]["containerRuntimeVersion"], "ocid://")
    handlers = {one["name"]: one.get("features", {}) for one in status["runtimeHandlers"]}
    expect(handlers[""].get("recursiveReadOnlyMounts"), f"handlers are told as {handlers}")
    expect(status["features"]["supplementalGroupsPolicy"], f"features are told as {status['features']}")
    expect(any(node.images["busybox"] in one["names"] for one in status["images"]), "the image is not told of")


def run_and_logs(node: Node) -> None:
    kubectl = node.member()
    run = ["run", "--restart=Never", f"--image={node.images['busybox']}", f"--overrides={HERE}"]
    done = kubectl.ok(*run, "--rm", "--stdin", "--quiet", "once", "--", "cat", data=b"through and back\n")
    same("run --rm --stdin", done, "through and back\n")
    same("the pod after --rm", kubectl.get("pod", "once"), {})
    script = "echo first; echo second >&2; for i in 1 2 3; do sleep 0.3; echo $i; done; echo last"
    kubectl.ok(*run, "prints", "--", "sh", "-c", script)
    eventually(lambda: node.running("prints"), "the pod runs", WAIT_S)
    same("logs --follow", kubectl.ok("logs", "--follow", "prints"), "first\nsecond\n1\n2\n3\nlast\n")
    same("logs --tail", kubectl.ok("logs", "--tail=2", "prints"), "3\nlast\n")
    stamped = kubectl.ok("logs", "--timestamps", "--tail=1", "prints")
    expect(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z last\n", stamped), f"logs --timestamps prints {stamped!r}")
    kubectl.ok("delete", "pod", "prints")
    same("the pod after delete", kubectl.get("pod", "prints"), {})


def exec_piped(node: Node) -> None:
    kubectl = node.member()
    node.until_ready("hand")
    data = os.urandom(3 << 20)
    for name, changes in TRANSPORTS.items():
        words = ["exec", "hand", "--container=beside"]
        done = kubectl.run(*words, "--", "sh", "-c", "echo out; echo err >&2; exit 7", changes=changes)
        same(f"{name}: code and output", (done.returncode, done.stdout), (7, b"out\n"))
        holds(f"{name}: errors", done.stderr.decode(), "err\n", "exit code 7")
        echoed = kubectl.run(*words, "--stdin", "--", "cat", data=data, changes=changes)
        expect(echoed.stdout == data, f"{name}: of {len(data)} bytes {len(echoed.stdout)} come back, or others")
        missing = kubectl.run(*words, "--", "/no/such/command", changes=changes)
        expect(missing.returncode != 0, f"{name}: a command that is not there succeeds")
        holds(f"{name}: a command that is not there", missing.stderr.decode(), "/no/such/command")


def exec_terminal(node: Node) -> None:
    kubectl = node.member()
    for name, changes in TRANSPORTS.items():
        command = kubectl.command("exec", "-it", "hand", "--container=beside", "--", "sh")
        with Terminal(command, node.base, {**kubectl.environment, **changes}, 31, 97) as terminal:
            terminal.type("stty size; echo $((6*7))\n")
            terminal.until("31 97")
            terminal.until("42")
            terminal.resize(20, 60)
            # The command's own signal for it may come any time: asked until it is so.
            terminal.type("until stty size | grep '20 60'; do :; done; exit 5\n")
            terminal.until("20 60")
            same(f"{name}: the shell's code", terminal.end(), 5)


def attach(node: Node) -> None:
    kubectl = node.member()
    node.until_ready("talkers")
    for name, changes in TRANSPORTS.items():
        words = ["attach", "--stdin", "--quiet", "talkers", f"--container=talk-{name}"]
        said = kubectl.ok(*words, data=b"one\ntwo\n", changes=changes)
        same(f"{name}: what is said", said, "said one\nsaid two\nover\n")
        holds(f"{name}: the log", kubectl.ok("logs", "talkers", f"--container=talk-{name}"), "said two\n", "over\n")


def port_forward(node: Node) -> None:
    kubectl = node.member()
    for name, changes in TRANSPORTS.items():
        with _forwarded(kubectl, changes, "hand", 80) as port:
            for _ in range(3):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=WAIT_S) as reply:
                    same(f"{name}: the page", reply.read(), b"by kubectl\n")
        with _forwarded(kubectl, changes, "hand", 4) as port:
            with socket.create_connection(("127.0.0.1", port), WAIT_S) as closed, contextlib.suppress(OSError):
                closed.settimeout(WAIT_S)
                same(f"{name}: from a port that nobody listens on", closed.recv(1), b"")


@contextlib.contextmanager
def _forwarded(kubectl: Kubectl, changes: dict[str, str], name: str, port: int) -> Iterator[int]:
    """The local port."""
    command = kubectl.command("port-forward", name, f":{port}")
    environment = {**kubectl.environment, **changes}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        said = b""
        try:
            while not (found := re.search(rb"127\.0\.0\.1:(\d+) -> ", said)):
                piece = os.read(process.stdout.fileno(), 4096) if _readable(process.stdout.fileno()) else b""
                if not piece:
                    raise Surprise(f"kubectl port-forward says {said!r}")
                said += piece
            yield int(found[1])
        finally:
            process.kill()


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], WAIT_S)[0])


def copies(node: Node) -> None:
    """A tree to the container and back: same bytes, and a program runs. (kubectl forgets modes on the way back.)"""
    kubectl = node.member()
    here, back = node.base / "to-copy", node.base / "copied"
    (here / "deep" / "er").mkdir(parents=True)
    (here / "big").write_bytes(os.urandom(5 << 20))
    (here / "deep" / "er" / "program").write_text("#!/bin/sh\necho copied and run\n")
    (here / "deep" / "er" / "program").chmod(0o755)
    kubectl.ok("cp", "--container=beside", here, "hand:/tmp/copy")
    digest = hashlib.sha256((here / "big").read_bytes()).hexdigest()
    holds("the file inside", node.inside("hand", "beside", "sha256sum /tmp/copy/big"), digest)
    same("the program inside", node.inside("hand", "beside", "/tmp/copy/deep/er/program"), "copied and run\n")
    kubectl.ok("cp", "--container=beside", "hand:/tmp/copy", back)
    for path in ("big", "deep/er/program"):
        expect((back / path).read_bytes() == (here / path).read_bytes(), f"{path} comes back as something else")


def debug(node: Node) -> None:
    """An ephemeral container in the pid namespace of another of its pod."""
    kubectl = node.member()
    image = f"--image={node.images['busybox']}"
    kubectl.ok("debug", "hand", image, "--target=main", "--container=look", "--", "ps", "-o", "pid,args")
    eventually(
        lambda: "httpd" in kubectl.run("logs", "hand", "--container=look").stdout.decode(), "it sees httpd", WAIT_S
    )


STEPS = (
    Step(member, hand_pods),
    Step(run_and_logs),
    Step(exec_piped),
    Step(exec_terminal),
    Step(attach),
    Step(port_forward),
    Step(copies),
    Step(debug),
)
