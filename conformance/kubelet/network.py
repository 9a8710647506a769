"""What a pod is reached by and what it reaches: ports of the node, the node's own network, names."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import urllib.request

from conformance.clients.steps import eventually, expect, holds, same
from conformance.kubelet.node import ADDRESS, NAME, Node
from conformance.kubelet.pods import FOREVER, Document, container, pod
from conformance.kubelet.step import Step

TCP, UDP = 18080, 18053
ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 53))
while True:
    server.sendto(*server.recvfrom(100))
"""


def host_ports_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    page = "mkdir /pages; echo by port >/pages/index.html; exec httpd -f -h /pages"
    web = container("web", busybox, page, ports=[{"containerPort": 80, "hostPort": TCP}])
    more = {"containerPort": 53, "hostPort": UDP, "protocol": "UDP", "hostIP": ADDRESS}
    return [pod("host-ports", web, container("echo", busybox, ports=[more]))]


def host_ports(node: Node) -> None:
    """Reached on the node's address, by TCP and by UDP, until the pod is gone."""
    node.until_ready("host-ports")
    eventually(lambda: _page(ADDRESS) == "by port\n", f"http://{ADDRESS}:{TCP} answers", 20)
    # No program of the images answers by UDP: ours does, inside the pod's network.
    inside = [
        "nsenter",
        "--net",
        f"--target={node.pid(node.running('host-ports')['echo'])}",
        sys.executable,
        "-c",
        ECHO,
    ]
    with subprocess.Popen(inside) as server:
        try:
            eventually(lambda: _echo(b"hello") == b"hello", f"udp {ADDRESS}:{UDP} answers", 20)
        finally:
            server.kill()
    node.withdraw("host-ports")
    node.until_gone("host-ports")
    eventually(lambda: not _page(ADDRESS), "the port closes with the pod", 20)


def _page(address: str) -> str:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}:{TCP}/index.html", timeout=2) as reply:
        return str(reply.read().decode())
    return ""


def _echo(data: bytes) -> bytes:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.sendto(data, (ADDRESS, UDP))
        return client.recv(100)
    return b""


def host_network_pods(node: Node) -> list[Document]:
    return [pod("host-network", container("main", node.images["busybox"]), hostNetwork=True)]


def host_network(node: Node) -> None:
    """The node's addresses and the node's name."""
    node.until_ready("host-network")
    holds("addresses inside", node.inside("host-network", "main", "ip -o address"), ADDRESS)
    with open("/etc/hostname") as file:
        expect(
            node.inside("host-network", "main", "hostname").strip() in (file.read().strip(), NAME), "another hostname"
        )


def names_pods(node: Node) -> list[Document]:
    return [
        pod(
            "names",
            container("main", node.images["busybox"]),
            hostname="chosen",
            subdomain="below",
            dnsPolicy="None",
            dnsConfig={
                "nameservers": ["192.0.2.7"],
                "searches": ["one.example", "two.example"],
                "options": [{"name": "ndots", "value": "3"}],
            },
            hostAliases=[{"ip": "192.0.2.9", "hostnames": ["other.example"]}],
        ),
        pod("node-names", container("main", node.images["busybox"]), dnsPolicy="Default"),
    ]


def names(node: Node) -> None:
    """hostname, resolv.conf as the pod or the node has it, and the hosts file."""
    for name in ("names", "node-names"):
        node.until_ready(name)
    same("hostname", node.inside("names", "main", "hostname").strip(), "chosen")
    text = node.inside("names", "main", "cat /etc/resolv.conf")
    holds("resolv.conf", text, "nameserver 192.0.2.7", "search one.example two.example", "options ndots:3")
    holds("hosts", node.inside("names", "main", "cat /etc/hosts"), "192.0.2.9\tother.example")
    holds("the node's resolv.conf", node.inside("node-names", "main", "cat /etc/resolv.conf"), "192.0.2.1")


def between_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    serve = "mkdir /pages; echo from a pod >/pages/index.html; exec httpd -f -h /pages"
    return [pod("server", container("main", busybox, serve)), pod("asks", container("main", busybox, FOREVER))]


def between(node: Node) -> None:
    """One pod asks another by its address; both on the node's network, both with addresses of their own."""
    addresses = [node.until_ready(name)["podIP"] for name in ("server", "asks")]
    expect(len(set(addresses)) == 2, f"both have {addresses}")
    same("page", node.inside("asks", "main", f"wget -q -O- http://{addresses[0]}/index.html"), "from a pod\n")


STEPS = (
    Step(host_ports, host_ports_pods),
    Step(host_network, host_network_pods),
    Step(names, names_pods),
    Step(between, between_pods),
)
