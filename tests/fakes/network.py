"""The pod network for tests: one in memory, and the real one in a corner of the machine of its own.

`FakeNetwork` keeps every promise of cri.interfaces.Network without a kernel, and fails on demand. `network_corner`
gives a real Cni whose bridge, table, leases and state nobody else uses, and takes all of it away again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from grpc import StatusCode

from cri.errors import code_of
from cri.interfaces import InterfaceCounters, NetworkError, NetworkResult, PodNetwork
from cri.network import netlink as nl
from cri.network.cni import Cni
from cri.network.config import NetworkConfig
from cri.network.conflist import is_name
from cri.network.firewall import Firewall
from cri.network.netns import in_own_thread, inside, make, open_netns
from runtime.linux.libc import KernelError
from runtime.linux.mount import MNT_DETACH, umount2
from runtime.linux.process import CLONE_NEWNET, setns
from tests.support import eventually

T = TypeVar("T")


@dataclass
class FakeNetwork:
    """Addresses from a counter, namespaces as empty files. `failures` maps "add", "delete", "new_netns" to how many
    calls fail first, with the code `blame`; `not_ready` is what `status` says; `before` is awaited before each add."""

    directory: Path
    networks: frozenset[str] = frozenset({"", "fake"})
    failures: dict[str, int] = field(default_factory=dict)
    blame: str = "internal"
    not_ready: str | None = None
    before: Callable[[PodNetwork], Awaitable[None]] | None = None
    pods: dict[str, NetworkResult] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    _numbers: int = 1

    def _fail(self, verb: str) -> None:
        self.calls.append(verb)
        if self.failures.get(verb, 0) > 0:
            self.failures[verb] -= 1
            raise NetworkError(f"network fake: plugin fake: {verb}: told to fail", code=self.blame)

    def netns_path(self, pod_id: str) -> Path:
        return self.directory / pod_id

    async def new_netns(self, pod_id: str, source: Path | None = None) -> Path:
        self._fail("new_netns")
        if not is_name(pod_id):
            raise NetworkError(f"network namespace for pod {pod_id[:64]}: no name")
        if source is not None and not source.exists():
            raise NetworkError(f"network namespace for pod {pod_id[:64]}: {source} is no pinned network namespace")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.netns_path(pod_id)
        path.write_bytes(b"")
        return path

    async def remove_netns(self, path: Path) -> None:
        self._fail("remove_netns")
        if path.parent != self.directory:
            raise NetworkError(f"remove network namespace: {path} is none of ours")
        path.unlink(missing_ok=True)

    async def add(self, pod: PodNetwork) -> NetworkResult:
        if not is_name(pod.id):
            raise NetworkError(f"{pod.id!r} is not a pod's id")
        if pod.network not in self.networks:
            raise NetworkError(f"no network {pod.network}")
        if not pod.netns.exists():
            raise NetworkError(f"{pod.netns} is no pinned network namespace")
        if pod.id in self.pods:
            return self.pods[pod.id]
        if self.before is not None:
            await self.before(pod)
        self._fail("add")
        self._numbers += 1
        address = str(ipaddress.ip_address("10.99.0.0") + self._numbers)
        raw = {"cniVersion": "1.0.0", "ips": [{"address": f"{address}/16"}]}
        self.pods[pod.id] = NetworkResult((address,), raw)
        return self.pods[pod.id]

    async def delete(self, pod: PodNetwork) -> None:
        self._fail("delete")
        if not is_name(pod.id):
            raise NetworkError(f"{pod.id!r} is not a pod's id")
        self.pods.pop(pod.id, None)

    async def check(self, pod: PodNetwork) -> str | None:
        self.calls.append("check")
        if pod.id not in self.pods:
            return f"pod {pod.id}: nothing is recorded of its network"
        return None if pod.netns.exists() else f"{pod.netns} is no pinned network namespace"

    async def counters(self, paths: Sequence[Path]) -> dict[Path, list[InterfaceCounters]]:
        return {path: [InterfaceCounters("eth0", 1, 2, 3, 4, 5, 6, 7, 8)] for path in paths if path.exists()}

    async def status(self) -> str | None:
        return self.not_ready

    async def collect(self, valid: frozenset[str]) -> None:
        self.calls.append("collect")
        self.pods = {pod: result for pod, result in self.pods.items() if pod in valid}
        if self.directory.exists():
            for path in self.directory.iterdir():
                if path.name not in valid:
                    path.unlink()


# ---------------------------------------------------------------------------------------------------- the real one


@dataclass
class Corner:
    """A real network of a test's own. `subnet` is its /24; `restart` is a daemon that was killed and came back."""

    config: NetworkConfig
    subnet: str
    bridge: str
    cni: Cni

    @property
    def leases(self) -> Path:
        return self.config.lease_dir / self.config.default_name

    @property
    def records(self) -> Path:
        return self.config.state_dir / "cni"

    @property
    def netns(self) -> Path:
        return self.config.state_dir / "netns"

    @property
    def results(self) -> Path:
        return self.config.lease_dir.parent / "results"

    def leased(self, network: str = "") -> dict[str, str]:
        """Address to container id."""
        directory = self.config.lease_dir / (network or self.config.default_name)
        found = {}
        for path in directory.iterdir() if directory.exists() else ():
            with contextlib.suppress(ValueError):
                found[str(ipaddress.ip_address(path.name))] = path.read_bytes().split(b"\r\n")[0].decode()
        return found

    def ports(self) -> list[str]:
        """The names of the interfaces attached to the bridge."""
        with nl.Netlink() as netlink:
            bridge = nl.get_link(netlink, self.bridge)
            return [link.name for link in nl.list_links(netlink) if bridge is not None and link.master == bridge.index]

    def restart(self) -> None:
        self.cni.close()
        self.cni = Cni(self.config)

    def conflist(self, name: str, plugins: list[dict[str, object]], version: str = "1.0.0", file: str = "") -> Path:
        """Writes a conflist into the configuration directory."""
        self.config.conf_dir.mkdir(parents=True, exist_ok=True)
        path = self.config.conf_dir / (file or f"10-{name}.conflist")
        path.write_text(json.dumps({"cniVersion": version, "name": name, "plugins": plugins}))
        return path

    def bridge_plugin(self, **more: object) -> dict[str, object]:
        """A native bridge with host-local on the corner's subnet."""
        ipam = {"type": "host-local", "ranges": [[{"subnet": self.subnet}]], "routes": [{"dst": "0.0.0.0/0"}]}
        return {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": True, "ipam": ipam, **more}

    def program(self, name: str, script: str) -> Path:
        """A plugin program as a shell script in the corner's first program directory."""
        self.config.bin_dirs[0].mkdir(parents=True, exist_ok=True)
        path = self.config.bin_dirs[0] / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path


def _remove_links(names: Iterator[str] | list[str]) -> None:
    with nl.Netlink() as netlink:
        for name in names:
            link = nl.get_link(netlink, name)
            if link is not None:
                netlink.run([nl.delete_link(link.index, name)])


def _free_subnet() -> str:
    """A /24 of 10.64.0.0/10 that no route leads into: other tests' networks are somewhere else."""
    routes = Path("/proc/net/fib_trie").read_text()
    while True:
        base = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
        if f"{base}." not in routes:
            return f"{base}.0/24"


@contextlib.contextmanager
def network_corner(tmp_path: Path, **changes: object) -> Iterator[Corner]:
    """A real Cni with names of its own; everything of it is gone afterwards, whatever the test did."""
    token = secrets.token_hex(4)
    subnet = _free_subnet()
    values: dict[str, object] = {
        "conf_dir": tmp_path / "net.d",
        "bin_dirs": (tmp_path / "bin", Path("/usr/lib/cni")),
        "state_dir": tmp_path / "run",
        "lease_dir": tmp_path / "cni" / "networks",
        "pool_size": 1,
        "plugin_timeout_s": 20.0,
        "default_name": f"net{token}",
        "default_bridge": f"otb{token}",
        "default_subnets": (subnet,),
        "nft_table": f"ocid_{token}",
    }
    config = NetworkConfig(**(values | changes))  # type: ignore[arg-type]
    corner = Corner(config, subnet, f"otb{token}", Cni(config))
    try:
        yield corner
    finally:
        try:
            asyncio.run(corner.cni.collect(frozenset()))
        finally:
            corner.cni.close()
            for name in os.listdir(corner.netns) if corner.netns.exists() else ():
                with contextlib.suppress(KernelError):
                    umount2(str(corner.netns / name), MNT_DETACH)
            _remove_links([*corner.ports(), corner.bridge])
            Firewall(config.nft_table, config.state_dir.joinpath).remove()
            with contextlib.suppress(KernelError):
                umount2(str(corner.netns), MNT_DETACH)


def isolated(function: Callable[[], T]) -> T:
    """Calls `function` with a network namespace of its own as "the host": for programs that leave tables behind.
    Threads and processes started in it are in there, too."""
    fd = make(1)[0]

    def body() -> T:
        setns(fd, CLONE_NEWNET)
        return function()

    try:
        return in_own_thread(body)
    finally:
        os.close(fd)


def pod_id() -> str:
    return secrets.token_hex(32)


async def make_pod(corner: Corner, **changes: object) -> PodNetwork:
    """A pod with a namespace of its own, no network yet."""
    identity = str(changes.pop("id", "") or pod_id())
    netns = await corner.cni.new_netns(identity)
    return PodNetwork(id=identity, name="web", namespace="default", uid="u-1", netns=netns, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running_pod(corner: Corner, **changes: object) -> AsyncIterator[tuple[PodNetwork, NetworkResult]]:
    """A pod with its network, taken down at the end."""
    pod = await make_pod(corner, **changes)
    result = await corner.cni.add(pod)
    yield pod, result
    await remove_pod(corner, pod)


async def remove_pod(corner: Corner, pod: PodNetwork) -> None:
    await corner.cni.delete(pod)
    await corner.cni.remove_netns(pod.netns)


@contextlib.contextmanager
def refused(words: str, code: StatusCode) -> Iterator[None]:
    """Fails unless a call in here fails with these words (a pattern), and is told with this code."""
    with pytest.raises(NetworkError, match=words) as caught:
        yield
    assert code_of(caught.value) is code, caught.value


def in_pod(pod: PodNetwork, function: Callable[[], T]) -> T:
    """Calls `function` inside the pod's namespace; sockets made there stay there."""
    fd = open_netns(pod.netns)
    assert fd is not None, f"{pod.netns} is no namespace"
    try:
        return inside(fd, function)
    finally:
        os.close(fd)


def listen(pod: PodNetwork | None, address: str, port: int = 8080) -> socket.socket:
    """A listening TCP socket in the pod (None: on the host)."""

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(8)
        sock.settimeout(5)
        return sock

    return make() if pod is None else in_pod(pod, make)


def connect(pod: PodNetwork | None, address: str, port: int = 8080, timeout: float = 5.0) -> socket.socket:
    """A TCP connection from inside the pod (None: from the host)."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    return make() if pod is None else in_pod(pod, make)


def reaches(client: PodNetwork | None, server: PodNetwork | None, address: str, port: int = 8080) -> str:
    """Connects and says hello; the address that the server saw the client come from."""
    with listen(server, address, port) as listener, connect(client, address, port) as sock:
        accepted, peer = listener.accept()
        with accepted:
            accepted.settimeout(5)
            sock.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
        return str(peer[0])


def no_ports_left(corner: Corner) -> None:
    """The kernel removes interfaces a little after DEL."""
    eventually(lambda: not corner.ports(), what="interfaces of removed pods are still there")
