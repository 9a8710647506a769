"""linux.netDevices: what moves into a container, what it keeps, and what is refused before anything has moved."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import OCIRUN, Bundles, bundles
from tests.support import eventually, needs

pytestmark = pytest.mark.skipif(Path(OCIRUN).name == "runc", reason="the reference on this machine is older than these")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def links(pid: int | None = None) -> dict[str, dict[str, Any]]:
    enter = ["nsenter", "-t", str(pid), "-n"] if pid else []
    said = subprocess.run([*enter, "ip", "-j", "addr"], check=True, capture_output=True, text=True).stdout
    return {link["ifname"]: link for link in json.loads(said)}


@pytest.fixture
def device(home: Bundles) -> Iterator[str]:
    """One end of a veth pair, with addresses of several kinds, of which two are to be kept."""
    name = f"oci{home.cgroup[-6:]}"
    ip("link", "add", name, "address", "02:00:00:00:00:77", "mtu", "1400", "type", "veth", "peer", "name", f"{name}p")
    ip("link", "set", name, "up")
    ip("addr", "add", "198.51.100.7/24", "brd", "198.51.100.255", "dev", name)
    ip("addr", "add", "169.254.9.9/16", "scope", "link", "dev", name)
    ip("addr", "add", "198.51.100.8/24", "valid_lft", "600", "preferred_lft", "600", "dev", name)
    ip("-6", "addr", "add", "2001:db8::7/64", "nodad", "dev", name)
    try:
        yield name
    finally:
        subprocess.run(["ip", "link", "del", f"{name}p"], check=False, capture_output=True)


@pytest.mark.parametrize("inside", ["", "net7", "net%d"])
def test_a_device_moves_with_its_permanent_addresses(home: Bundles, device: str, inside: str) -> None:
    one = home.make()
    one.linux["netDevices"] = {device: {"name": inside} if inside else {}}
    one.create().ok()
    assert device not in links()
    there = links(one.pid())
    found = there[{"": device, "net7": "net7", "net%d": "net0"}[inside]]
    assert set(there) == {"lo", found["ifname"]}
    assert found["address"] == "02:00:00:00:00:77" and found["mtu"] == 1400 and "UP" in found["flags"]
    addresses = {entry["local"]: entry for entry in found["addr_info"] if entry["scope"] == "global"}
    assert set(addresses) == {"198.51.100.7", "2001:db8::7"}
    assert addresses["198.51.100.7"]["prefixlen"] == 24 and addresses["198.51.100.7"]["broadcast"] == "198.51.100.255"
    assert not any(entry["local"] == "169.254.9.9" for entry in found["addr_info"])
    one.start().ok()
    one.delete().ok()
    # A virtual device ends with its namespace, which the runtime leaves to the kernel.
    assert device not in links() and found["ifname"] not in links()
    one.gone()


def test_devices_move_into_a_namespace_that_is_joined(home: Bundles, device: str) -> None:
    first = home.make().up()
    one = home.make()
    one.linux["namespaces"][2]["path"] = f"/proc/{first.pid()}/ns/net"
    one.linux["netDevices"] = {device: {"name": "eth0"}}
    one.create().ok()
    assert "eth0" in links(first.pid())
    one.delete().ok()
    assert "eth0" in links(first.pid()), "the runtime has taken it out again"


def test_a_device_moves_into_a_user_namespace(home: Bundles, device: str) -> None:
    one = home.make().user_namespace()
    one.linux["netDevices"] = {device: {"name": "eth0"}}
    one.create().ok()
    assert {entry["local"] for entry in links(one.pid())["eth0"]["addr_info"]} >= {"198.51.100.7", "2001:db8::7"}


def test_hooks_find_the_devices_there(home: Bundles, device: str) -> None:
    one = home.make("true")
    one.linux["netDevices"] = {device: {"name": "eth0"}}
    out = home.directory / "out"
    find = r"""pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/')"""
    script = f"{find}; nsenter -t $pid -n ip -o link show dev eth0 > {out}"
    one.config["hooks"] = {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}
    one.run().ok()
    assert "eth0" in out.read_text()


def test_what_cannot_move_is_said_before_anything_has(home: Bundles, device: str) -> None:
    one = home.make("true")
    one.linux["netDevices"] = {device: {}, "not-there": {}}
    one.run().failed("linux.netDevices.not-there: link not found for interface not-there")
    assert device in links()
    one.linux["netDevices"] = {device: {"name": "lo"}}
    one.run().failed(f"linux.netDevices.{device}: the container has a device lo already")
    assert "UP" in links()[device]["flags"]
    for name in ("a/b", "a b", "..", "x" * 16, "a:b"):
        one.linux["netDevices"] = {device: {"name": name}}
        one.run().failed(f"linux.netDevices.{device}: ")
    one.linux["netDevices"] = {device: {}}
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "network"]
    one.run().failed("linux.netDevices: unable to move network devices without a network namespace")
    one.linux["namespaces"].append({"type": "network", "path": "/proc/self/ns/net"})
    one.run().failed("already")
    assert device in links()
    one.gone()


def test_the_kernels_refusal_is_said(home: Bundles) -> None:
    """A device that belongs to its namespace, as lo does, cannot leave it."""
    one = home.make("true")
    one.linux["netDevices"] = {"lo": {"name": "lo7"}}
    one.run().failed("linux.netDevices.lo: move to the container as lo7")
    ip("link", "set", "lo", "up")
    one.gone()
    eventually(lambda: "UP" in links()["lo"]["flags"])
