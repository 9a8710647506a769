"""Namespaces shared, joined and mapped; networks; pods; what kube play makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from conformance.clients.podman.tool import Podman
from conformance.clients.steps import eventually, expect, holds, same


def user_namespace(it: Podman) -> None:
    text = it.shell(
        "cat /proc/self/uid_map /proc/self/gid_map", "--uidmap", "0:100000:1000", "--gidmap", "0:200000:1000"
    )
    same("--uidmap, --gidmap", text.split(), ["0", "100000", "1000", "0", "200000", "1000"])
    same(
        "who owns what is inside",
        it.shell("stat -c %u:%g /bin/busybox /tmp", "--uidmap", "0:100000:1000").split(),
        ["0:0", "0:0"],
    )
    it.start("mapped", "--uidmap", "0:100000:1000", "--user", "5")
    same("its uid outside", Path(f"/proc/{it.pid('mapped')}").stat().st_uid, 100005)
    same(
        "exec as root inside",
        it("exec", "-u", "0", "mapped", "sh", "-c", "id -u; touch /made; stat -c %u /made").split(),
        ["0", "0"],
    )


def userns_auto(it: Podman) -> None:
    text = it.shell("cat /proc/self/uid_map", "--userns", "auto:size=4096")
    inside, outside, size = map(int, text.split())
    same("the size", (inside, size), (0, 4096))
    expect(outside >= SUBIDS[0], f"--userns=auto maps from {outside}")
    same(
        "--userns=host",
        it.shell("cat /proc/self/uid_map", "--userns", "host"),
        Path("/proc/self/uid_map").read_text().strip(),
    )


# What /etc/subuid gives the user "containers" while this runs: first id, how many.
SUBIDS = (1_000_000, 1_000_000)


def userns_of_another(it: Podman) -> None:
    it.start("first", "--uidmap", "0:100000:1000")
    it.start("second", "--userns", "container:first")
    one, two = (os.readlink(f"/proc/{it.pid(name)}/ns/user") for name in ("first", "second"))
    same("the user namespace", two, one)
    it("exec", "second", "touch", "/made")


def shared_namespaces(it: Podman) -> None:
    it.start("first", "--ipc", "shareable", "--hostname", "first")
    same("--pid container:", it.shell("ps -o args | grep -c '[s]leep 3600'", "--pid", "container:first"), "1")
    for kind, flag in (("net", "--net"), ("ipc", "--ipc"), ("uts", "--uts"), ("pid", "--pid")):
        it("run", "-d", "--name", f"by-{kind}", flag, "container:first", it.image, "sleep", "3600")
        ours, theirs = (os.readlink(f"/proc/{it.pid(name)}/ns/{kind}") for name in ("first", f"by-{kind}"))
        same(f"the {kind} namespace", theirs, ours)


def host_namespaces(it: Podman) -> None:
    it(
        "run",
        "-d",
        "--name",
        "host",
        "--net",
        "host",
        "--pid",
        "host",
        "--ipc",
        "host",
        "--uts",
        "host",
        it.image,
        "sleep",
        "3600",
    )
    for kind in ("net", "pid", "ipc", "uts"):
        same(
            f"the {kind} namespace",
            os.readlink(f"/proc/{it.pid('host')}/ns/{kind}"),
            os.readlink(f"/proc/self/ns/{kind}"),
        )
    it("kill", "host")
    same("wait", it("wait", "host"), "137")


def cgroup_namespace(it: Podman) -> None:
    private = it.shell("cut -d: -f3 /proc/self/cgroup | sort -u", "--cgroupns", "private")
    same("--cgroupns private", private, "/")
    holds("--cgroupns host", it.shell("cat /proc/self/cgroup", "--cgroupns", "host"), "libpod")
    same(
        "--cgroup-parent",
        it.shell("cat /proc/self/cgroup", "--cgroupns", "host", "--cgroup-parent", f"/{PARENT}").count(PARENT) > 0,
        True,
    )


PARENT = f"libpod_parent/of-clients-{os.getpid()}"


def network(it: Podman) -> None:
    it("run", "-d", "--name", "web", "-p", "8080:80", it.image, "httpd", "-f", "-h", "/www")
    address = it.inspect("web")["NetworkSettings"]["IPAddress"]
    eventually(lambda: b"Hello" in fetch(f"http://{address}/"), f"http://{address}/ answers")
    text = it("run", "--rm", it.image, "wget", "-q", "-O-", f"http://{address}/")
    holds("from another container", text, "Hello")
    same("only lo without a network", it.shell("ls /sys/class/net"), "lo")
    same(
        "--dns",
        it("run", "--rm", "--dns", "192.0.2.1", it.image, "cat", "/etc/resolv.conf").split()[-2:],
        ["nameserver", "192.0.2.1"],
    )
    holds(
        "--add-host", it("run", "--rm", "--add-host", "far:192.0.2.2", it.image, "cat", "/etc/hosts"), "192.0.2.2\tfar"
    )


def fetch(url: str) -> bytes:
    # Not urllib: this process may live with proxies of its environment.
    return subprocess.run(
        ["busybox", "wget", "-q", "-O-", "-Y", "off", url], capture_output=True, timeout=10, check=False
    ).stdout


def pod(it: Podman) -> None:
    it("pod", "create", "--name", "team", "--hostname", "team", "--share", "net,ipc,uts,pid")
    it("run", "-d", "--pod", "team", "--name", "server", it.image, "httpd", "-f", "-h", "/www")
    text = it(
        "run", "--rm", "--pod", "team", it.image, "sh", "-c", "wget -q -O- http://127.0.0.1/; hostname; ps -o comm"
    )
    holds("from beside it", text, "Hello", "team", "httpd", "catatonit")
    same("pod ps", it("pod", "ps", "--format", "{{.Name}} {{.Status}} {{.NumberOfContainers}}"), "team Running 2")
    holds("pod top", it("pod", "top", "team", "args"), "httpd", "catatonit")
    holds("pod stats", it("pod", "stats", "--no-stream", "team"), "server")
    it("pod", "pause", "team")
    same("paused", it.state("server"), "paused")
    it("pod", "unpause", "team")
    before = it.pid("server")
    it("pod", "restart", "team")
    expect(it.pid("server") != before, "pod restart leaves the process")
    it("pod", "stop", "--time", "1", "team")
    same("after stop", it("pod", "ps", "--format", "{{.Status}}"), "Exited")
    it("pod", "start", "team")
    same("after start", it.state("server"), "running")
    it("pod", "kill", "team")
    it("pod", "rm", "team")


def pod_with_user_namespace(it: Podman) -> None:
    it("pod", "create", "--name", "mapped", "--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000")
    it("run", "-d", "--pod", "mapped", "--name", "inside", it.image, "sleep", "3600")
    same("its uid outside", Path(f"/proc/{it.pid('inside')}").stat().st_uid, 100000)
    holds("its network is the pod's own", it("exec", "inside", "ip", "-o", "addr"), "eth0")


def init_containers(it: Podman) -> None:
    """Init containers run to their end before the others start."""
    it("pod", "create", "--name", "staged")
    it(
        "create",
        "--pod",
        "staged",
        "--init-ctr",
        "always",
        "--name",
        "prepare",
        "-v",
        "stage:/stage",
        it.image,
        "sh",
        "-c",
        "echo ready > /stage/mark",
    )
    it(
        "create",
        "--pod",
        "staged",
        "--name",
        "main",
        "-v",
        "stage:/stage",
        it.image,
        "sh",
        "-c",
        "cat /stage/mark; exec sleep 3600",
    )
    try:
        it("pod", "start", "staged")
        eventually(lambda: it("logs", "main") == "ready", "what the init container left is seen")
    finally:
        it("pod", "rm", "-f", "-t", "0", "staged")
        it("volume", "rm", "--all", "--force")


def kube(it: Podman) -> None:
    it("pod", "create", "--name", "spec")
    it(
        "run",
        "-d",
        "--pod",
        "spec",
        "--name",
        "spec-web",
        "--memory",
        "30m",
        "-e",
        "COLOR=red",
        it.image,
        "sleep",
        "3600",
    )
    file = it.file("pod.yaml", it("generate", "kube", "spec"))
    holds("generate kube", file.read_text(), "kind: Pod", "spec-web", "COLOR")
    it("pod", "rm", "-f", "-t", "0", "spec")
    it("play", "kube", file)
    same("after play", it("exec", "spec-spec-web", "sh", "-c", "echo $COLOR"), "red")
    it("play", "kube", "--down", file)
    same("after --down", it("ps", "-aq"), "")


STEPS = (
    user_namespace,
    userns_auto,
    userns_of_another,
    shared_namespaces,
    host_namespaces,
    cgroup_namespace,
    network,
    pod,
    pod_with_user_namespace,
    init_containers,
    kube,
)
