"""The native network on the real kernel: who reaches whom, and what is left afterwards."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from cri.interfaces import NetworkError, PodNetwork, PortMapping
from cri.network import netlink as nl
from cri.network import routes as rt
from cri.network.bridge import host_name, mac
from cri.network.cni import Cni
from cri.network.netns import Namespaces, inside, open_netns
from runtime.linux.mount import MNT_DETACH, MS_BIND, MS_SHARED, MountPoint, mount, mountinfo, umount2
from tests.costs import SOON_S
from tests.fakes.network import (
    Corner,
    connect,
    in_pod,
    listen,
    make_pod,
    network_corner,
    no_ports_left,
    pod_id,
    reaches,
    refused,
    remove_pod,
    running_pod,
)
from tests.support import eventually, needs


@pytest.fixture
def corner(tmp_path: Path) -> Iterator[Corner]:
    needs("root", "nftables")
    with network_corner(tmp_path) as found:
        yield found


def _ruleset(corner: Corner) -> str:
    table = ["nft", "list", "table", "inet", corner.config.nft_table]
    return subprocess.run(table, capture_output=True, text=True, check=False).stdout


def _mounts(corner: Corner) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(corner.config.state_dir) in line]


def _gateway(corner: Corner) -> str:
    return corner.subnet.replace(".0/24", ".1")


def test_pods_reach_each_other_and_the_bridge_with_their_own_addresses(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner) as (one, first), running_pod(corner) as (two, second):
            assert reaches(one, two, second.ips[0]) == first.ips[0]
            assert reaches(two, one, first.ips[0]) == second.ips[0]
            assert reaches(one, None, _gateway(corner)) == first.ips[0]
            assert reaches(None, one, first.ips[0]) == _gateway(corner)

    asyncio.run(scenario())


def test_the_pod_has_lo_its_address_and_a_default_route(corner: Corner) -> None:
    def look() -> tuple[dict[str, nl.Link], list[rt.Route]]:
        with nl.Netlink() as netlink:
            return {link.name: link for link in nl.list_links(netlink)}, rt.list_routes(netlink)

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            links, routes = in_pod(pod, look)
            assert links["lo"].flags & nl.IFF_UP and links["eth0"].flags & nl.IFF_UP
            assert links["eth0"].mac == mac(pod.id, "eth0", "pod")
            default = [route for route in routes if route.destination is None]
            assert [str(route.gateway) for route in default] == [_gateway(corner)]
            assert Path(result.raw["interfaces"][2]["sandbox"]) == pod.netns
            assert reaches(pod, pod, "127.0.0.1") == "127.0.0.1"

    asyncio.run(scenario())


def test_dual_stack(corner: Corner) -> None:
    six = f"fd00:{random.randrange(1, 65536):x}:{random.randrange(1, 65536):x}::"
    plugin = corner.bridge_plugin(isDefaultGateway=True)
    plugin["ipam"] = {"type": "host-local", "ranges": [[{"subnet": corner.subnet}], [{"subnet": f"{six}/64"}]]}
    corner.conflist("dual", [plugin])

    async def scenario() -> None:
        async with running_pod(corner) as (one, first), running_pod(corner) as (two, second):
            assert len(first.ips) == 2 and ":" in first.ips[1]
            for four_or_six in range(2):  # at once: no address waits for duplicate detection
                assert reaches(one, two, second.ips[four_or_six]) == first.ips[four_or_six]
            assert reaches(one, None, f"{six}1") == first.ips[1]
            rules = _ruleset(corner)
            assert f"ip saddr {corner.subnet} jump" in rules and f"ip6 saddr {six}/64 jump" in rules
        accept_ra = Path(f"/proc/sys/net/ipv6/conf/{corner.bridge}/accept_ra").read_text()
        assert accept_ra == "0\n"

    asyncio.run(scenario())


def test_masquerade_stays_with_the_subnet_and_goes_with_the_network(corner: Corner) -> None:
    half = corner.subnet.replace("/24", "/25")  # not the built-in network's subnet
    ipam = {"type": "host-local", "subnet": half}
    path = corner.conflist("masked", [corner.bridge_plugin(ipam=ipam)])

    async def scenario() -> None:
        async with running_pod(corner):
            rules = _ruleset(corner)
            assert rules.count("masquerade") == 2  # the subnet's, and localhost to host ports
            assert f"ip daddr {half} return" in rules
        async with running_pod(corner) as (pod, _):
            assert _ruleset(corner).count(f"ip saddr {half} jump") == 1
            path.unlink()
            await corner.cni.collect(frozenset({pod.id}))
            assert half in _ruleset(corner)
        await corner.cni.collect(frozenset())
        assert half in _ruleset(corner)  # the bridge is there, with an address in it
        subprocess.run(["ip", "link", "del", corner.bridge], check=True)
        await corner.cni.collect(frozenset())
        assert half not in _ruleset(corner)

    asyncio.run(scenario())


def test_masquerade_hides_the_pods_address_from_the_outside(corner: Corner, tmp_path: Path) -> None:
    """Another bridge of the host plays the outside: a pod's connection there comes from the host's address."""
    with network_corner(tmp_path / "outside") as outside:

        async def scenario() -> None:
            async with running_pod(corner) as (pod, _), running_pod(outside) as (server, there):
                assert reaches(pod, server, there.ips[0]) == _gateway(outside)

        asyncio.run(scenario())


def test_a_flushed_ruleset_is_mended_by_the_next_pod(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner):
            subprocess.run(["nft", "delete", "table", "inet", corner.config.nft_table], check=True)
        async with running_pod(corner):
            assert "masquerade" in _ruleset(corner)

    asyncio.run(scenario())


def test_ip_forwarding_is_on_where_the_bridge_is_a_gateway(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner):
            assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"

    asyncio.run(scenario())


def test_twenty_pods_at_once_get_twenty_addresses(corner: Corner) -> None:
    async def scenario() -> None:
        pods = await asyncio.gather(*(make_pod(corner) for _ in range(20)))
        results = await asyncio.gather(*(corner.cni.add(pod) for pod in pods))
        assert len({result.ips for result in results}) == 20
        assert set(corner.leased().values()) == {pod.id for pod in pods}
        with listen(pods[0], results[0].ips[0]) as listener:
            with connect(pods[19], results[0].ips[0]):
                listener.accept()[0].close()
        await asyncio.gather(*(remove_pod(corner, pod) for pod in pods))
        assert corner.leased() == {}

    asyncio.run(scenario())


def test_o39_fifty_pods_leave_nothing(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner):  # what stays with the bridge is there before the baseline
            pass
        no_ports_left(corner)
        rules, mounts = _ruleset(corner), _mounts(corner)
        for _ in range(50):
            async with running_pod(corner):
                pass
        no_ports_left(corner)
        assert corner.leased() == {} and _ruleset(corner) == rules
        assert list(corner.records.iterdir()) == [] and list(corner.netns.iterdir()) == []
        assert _mounts(corner) == mounts

    asyncio.run(scenario())


def test_addresses_go_round_before_one_is_used_again(corner: Corner) -> None:
    async def scenario() -> None:
        seen = []
        for _ in range(3):
            async with running_pod(corner) as (_, result):
                seen.append(result.ips[0])
        assert len(set(seen)) == 3

    asyncio.run(scenario())


def test_a_full_range_says_so_and_works_again_after_a_release(corner: Corner) -> None:
    plugin = corner.bridge_plugin()
    base = corner.subnet.rsplit(".", 1)[0]
    span = {"subnet": corner.subnet, "rangeStart": f"{base}.10", "rangeEnd": f"{base}.11"}
    plugin["ipam"] = {"type": "host-local", "ranges": [[span]]}
    corner.conflist("small", [plugin])

    async def scenario() -> None:
        async with running_pod(corner), running_pod(corner):
            third = await make_pod(corner)
            with refused(rf"plugin bridge.*no free address in {base}.10-{base}.11", StatusCode.RESOURCE_EXHAUSTED):
                await corner.cni.add(third)
            assert list(corner.records.glob(f"{third.id}*")) == []
        assert (await corner.cni.add(third)).ips[0] in (f"{base}.10", f"{base}.11")
        await remove_pod(corner, third)

    asyncio.run(scenario())


def test_a_taken_interface_name_is_avoided_and_never_deleted(corner: Corner) -> None:
    identity = pod_id()
    name = host_name(identity, "eth0", 0)
    with nl.Netlink() as netlink:
        netlink.run([nl.new_bridge(name, "02:00:00:00:00:07", 0)])  # somebody else's interface, of that very name
    try:

        async def scenario() -> None:
            async with running_pod(corner, id=identity) as (pod, result):
                assert result.raw["interfaces"][1]["name"] == host_name(identity, "eth0", 1)
                assert reaches(pod, None, _gateway(corner)) == result.ips[0]
            no_ports_left(corner)

        asyncio.run(scenario())
        with nl.Netlink() as netlink:
            assert nl.get_link(netlink, name) is not None
    finally:
        with nl.Netlink() as netlink:
            link = nl.get_link(netlink, name)
            assert link is not None
            netlink.run([nl.delete_link(link.index, name)])


def test_an_interface_that_is_no_bridge_is_refused_by_name(corner: Corner) -> None:
    corner.conflist("wrong", [corner.bridge_plugin(bridge="lo")])

    async def scenario() -> None:
        pod = await make_pod(corner)
        with refused("interface lo is there and is no bridge", StatusCode.FAILED_PRECONDITION):
            await corner.cni.add(pod)
        assert corner.leased("wrong") == {}
        await remove_pod(corner, pod)

    asyncio.run(scenario())


def test_another_address_on_the_bridge_needs_force(corner: Corner) -> None:
    other = corner.bridge_plugin()
    base = corner.subnet.rsplit(".", 1)[0]
    other["ipam"] = {"type": "host-local", "ranges": [[{"subnet": f"{base}.0/25", "gateway": f"{base}.100"}]]}
    corner.conflist("first", [corner.bridge_plugin()])
    corner.conflist("second", [other])
    corner.conflist("third", [{**other, "forceAddress": True}])

    async def scenario() -> None:
        async with running_pod(corner, network="first"):
            pass
        pod = await make_pod(corner, network="second")
        with refused("set forceAddress", StatusCode.FAILED_PRECONDITION):
            await corner.cni.add(pod)
        await remove_pod(corner, pod)
        async with running_pod(corner, network="third") as (pod, result):
            assert reaches(pod, None, f"{base}.100") == result.ips[0]

    asyncio.run(scenario())


def test_hairpin_mtu_and_dns(corner: Corner) -> None:
    corner.conflist("tuned", [corner.bridge_plugin(hairpinMode=True, mtu=1300, dns={"nameservers": ["192.0.2.53"]})])

    def mtu() -> int:
        with nl.Netlink() as netlink:
            link = nl.get_link(netlink, "eth0")
            return link.mtu if link else 0

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            host = result.raw["interfaces"][1]["name"]
            shown = subprocess.run(["bridge", "-j", "-d", "link", "show", "dev", host], capture_output=True, check=True)
            assert json.loads(shown.stdout)[0]["hairpin"] is True
            assert in_pod(pod, mtu) == 1300 and result.raw["dns"] == {"nameservers": ["192.0.2.53"]}

    asyncio.run(scenario())


def test_a_name_is_chosen_per_pod_and_the_first_file_is_the_default(corner: Corner) -> None:
    base = corner.subnet.rsplit(".", 1)[0]
    for number, name in ((20, "alpha"), (10, "beta")):
        plugin = corner.bridge_plugin()
        start = {"subnet": corner.subnet, "rangeStart": f"{base}.{number}", "rangeEnd": f"{base}.{number + 5}"}
        plugin["ipam"] = {"type": "host-local", "ranges": [[start]]}
        corner.conflist(name, [plugin], file=f"{number}-x.conflist")

    async def scenario() -> None:
        async with running_pod(corner) as (_, default), running_pod(corner, network="alpha") as (_, named):
            assert default.ips[0] == f"{base}.10" and named.ips[0] == f"{base}.20"

    asyncio.run(scenario())


def test_the_built_in_network_avoids_a_subnet_with_a_route(tmp_path: Path) -> None:
    needs("root")
    with network_corner(tmp_path / "one") as one:
        other = f"10.{os.urandom(1)[0] % 64 + 128}.{os.urandom(1)[0]}.0/24"
        with network_corner(tmp_path / "two", default_subnets=(one.subnet, other)) as two:

            async def scenario() -> None:
                async with running_pod(one), running_pod(two) as (_, result):
                    assert result.ips[0].startswith(other.rsplit(".", 1)[0])
                    two.restart()  # and stays with its choice, as its own bridge's route is in the way of nothing
                    async with running_pod(two) as (_, again):
                        assert again.ips[0].startswith(other.rsplit(".", 1)[0])

            asyncio.run(scenario())


def test_o10_a_process_inside_does_not_keep_the_pin(corner: Corner) -> None:
    async def scenario() -> None:
        pod = await make_pod(corner)
        await corner.cni.add(pod)
        with listen(pod, "127.0.0.1"):  # a socket holds the namespace
            await remove_pod(corner, pod)
            await corner.cni.remove_netns(pod.netns)
            assert not pod.netns.exists() and corner.leased() == {}
            no_ports_left(corner)  # DEL removed the interface itself, the namespace being held

    asyncio.run(scenario())


KILLED = """
import asyncio, sys
from pathlib import Path
from cri.interfaces import PodNetwork
from cri.network.cni import Cni
from cri.network.config import NetworkConfig
config, identity = eval(sys.argv[1], {"NetworkConfig": NetworkConfig, "PosixPath": Path}), sys.argv[2]
async def main():
    cni = Cni(config)
    netns = await cni.new_netns(identity)
    await cni.add(PodNetwork(identity, "web", "default", "u", netns))
    print("added", flush=True)
    if len(sys.argv) > 3:
        await cni.delete(PodNetwork(identity, "web", "default", "u", netns))
asyncio.run(main())
"""


def _killed_at(corner: Corner, identity: str, point: str, *more: str) -> None:
    """A daemon that dies of SIGKILL at a failpoint."""
    environment = {**os.environ, "OCID_FAILPOINTS": f"{point}=kill", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", KILLED, repr(corner.config), identity, *more]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


POINTS = ["network.recorded", "network.bridge.leased", "network.bridge.connected", "network.plugin.added"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("way", ["delete", "collect", "add again"])
def test_o3_killed_in_the_middle_of_add(corner: Corner, point: str, way: str) -> None:
    identity = pod_id()
    _killed_at(corner, identity, point)
    assert (corner.records / f"{identity}.json").exists()
    pod = PodNetwork(identity, "web", "default", "u", corner.netns / identity)

    async def scenario() -> None:
        if way == "collect":
            await corner.cni.collect(frozenset())
        elif way == "add again":
            assert len((await corner.cni.add(pod)).ips) == 1 and len(corner.leased()) == 1
            await remove_pod(corner, pod)
        else:
            await remove_pod(corner, pod)
        assert corner.leased() == {} and list(corner.records.iterdir()) == [] and list(corner.netns.iterdir()) == []
        no_ports_left(corner)

    asyncio.run(scenario())


FAILING = KILLED.replace("await cni.add", "try: await cni.add").replace(
    'print("added", flush=True)', "except Exception as error: print(error)"
)


@pytest.mark.parametrize("point", POINTS)
def test_o8_a_failure_at_any_step_of_add_is_undone(corner: Corner, point: str) -> None:
    identity = pod_id()
    environment = {**os.environ, "OCID_FAILPOINTS": f"{point}=error", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", FAILING, repr(corner.config), identity]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert f"FailpointError: failpoint {point}" in ended.stdout and "add pod default/web" in ended.stdout
    assert corner.leased() == {} and list(corner.records.iterdir()) == []
    no_ports_left(corner)
    asyncio.run(corner.cni.remove_netns(corner.netns / identity))


def test_o3_killed_in_the_middle_of_delete(corner: Corner) -> None:
    identity = pod_id()
    _killed_at(corner, identity, "network.plugin.delete", "delete")
    assert len(corner.leased()) == 1
    asyncio.run(remove_pod(corner, PodNetwork(identity, "", "", "", corner.netns / identity)))
    assert corner.leased() == {} and list(corner.records.iterdir()) == []


def test_o4_after_a_reboot_delete_still_releases_the_lease(corner: Corner) -> None:
    async def scenario() -> None:
        pod = await make_pod(corner)
        await corner.cni.add(pod)
        await corner.cni.remove_netns(pod.netns)
        for path in corner.records.iterdir():
            path.unlink()
        corner.restart()
        assert len(corner.leased()) == 1
        await corner.cni.delete(pod)
        assert corner.leased() == {}

    asyncio.run(scenario())


def test_o4_after_a_reboot_collect_releases_the_lease(corner: Corner) -> None:
    async def scenario() -> None:
        pod = await make_pod(corner)
        kept = await make_pod(corner)
        for each in (pod, kept):
            await corner.cni.add(each)
            await corner.cni.remove_netns(each.netns)
        for path in corner.records.iterdir():
            path.unlink()
        corner.restart()
        await corner.cni.collect(frozenset({kept.id}))
        assert list(corner.leased().values()) == [kept.id]
        await corner.cni.delete(kept)

    asyncio.run(scenario())


def test_collect_leaves_leases_of_another_runtime_alone(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner) as (_, result):
            foreign = f"{corner.subnet.rsplit('.', 1)[0]}.200"
            (corner.leases / foreign).write_text("f00\r\neth0")
            corner.results.mkdir(parents=True)
            cached = corner.results / f"{corner.config.default_name}-f00-eth0"
            cached.write_text("{}")
            await corner.cni.collect(frozenset())
            assert corner.leased() == {foreign: "f00"} and result.ips[0] != foreign
            cached.unlink()
            await corner.cni.collect(frozenset())
            assert corner.leased() == {}

    asyncio.run(scenario())


def test_another_ocid_on_the_machine_collects_nothing_of_ours(corner: Corner, tmp_path: Path) -> None:
    """`ocid run` with a root of its own next to a node's daemon: one bridge, one lease directory, one table."""
    portmap: dict[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}
    corner.conflist("net", [corner.bridge_plugin(), portmap])
    other = Cni(replace(corner.config, state_dir=tmp_path / "other"))

    async def scenario() -> None:
        async with running_pod(corner, ports=(PortMapping(47123, 80),)) as (pod, result):
            await other.collect(frozenset())
            assert corner.leased("net") == {result.ips[0]: pod.id} and "47123" in _ruleset(corner)
            assert reaches(None, pod, result.ips[0])
            # A wiped state directory, as after a reboot: now they are leftovers, to whoever comes first.
            (corner.records / f"{pod.id}.json").unlink()
            await other.collect(frozenset())
            assert corner.leased("net") == {} and "47123" not in _ruleset(corner)
            no_ports_left(corner)

    try:
        asyncio.run(scenario())
    finally:
        other.close()


def test_o5_a_namespace_by_pid_is_never_used(corner: Corner) -> None:
    async def scenario() -> None:
        pod = await make_pod(corner)
        by_pid = replace(pod, netns=Path(f"/proc/{os.getpid()}/ns/net"))
        with pytest.raises(NetworkError, match="no pinned network namespace"):
            await corner.cni.add(by_pid)
        await corner.cni.add(pod)
        corner.program("spy", "exit 0")
        await corner.cni.delete(by_pid)
        assert corner.leased() == {}
        await corner.cni.remove_netns(pod.netns)

    asyncio.run(scenario())


def test_o60_the_result_survives_the_daemon(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            corner.restart()
            corner.conflist("broken", [{"type": "nosuch"}])
            again = await corner.cni.add(pod)
            assert again.ips == result.ips and dict(again.raw) == dict(result.raw)

    asyncio.run(scenario())


def test_delete_uses_the_configuration_that_add_used(corner: Corner) -> None:
    path = corner.conflist("old", [corner.bridge_plugin()])

    async def scenario() -> None:
        pod = await make_pod(corner)
        await corner.cni.add(pod)
        path.unlink()
        corner.conflist("new", [{"type": "nosuch"}])
        corner.restart()
        await remove_pod(corner, pod)
        assert corner.leased("old") == {}
        no_ports_left(corner)

    asyncio.run(scenario())


def test_a_damaged_record_does_not_keep_the_pod(corner: Corner) -> None:
    async def scenario() -> None:
        pod = await make_pod(corner)
        await corner.cni.add(pod)
        (corner.records / f"{pod.id}.json").write_bytes(b'{"version": 1, "pod"')
        corner.restart()
        await remove_pod(corner, pod)
        assert corner.leased() == {} and list(corner.records.iterdir()) == []

    asyncio.run(scenario())


def test_collect_spares_bridges_ports_of_pods_that_live(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            gone = await make_pod(corner)
            await corner.cni.add(gone)
            await corner.cni.collect(frozenset({pod.id}))
            assert reaches(None, pod, result.ips[0])
            eventually(lambda: len(corner.ports()) == 1)

    asyncio.run(scenario())


def test_another_reader_of_netlink_sees_what_our_messages_have_made(corner: Corner) -> None:
    """Our own messages are written and read by one hand: pyroute2 is a second opinion."""
    from pyroute2 import IPRoute  # dear to import

    def look() -> tuple[dict[str, Any], set[tuple[str, int]], str]:
        with IPRoute() as routes:
            link = routes.get_links(ifname="eth0")[0]
            addresses = {(one.get("address"), one["prefixlen"]) for one in routes.get_addr(index=link["index"])}
            gateway = next(one.get("gateway") for one in routes.get_routes(dst_len=0, family=socket.AF_INET))
        return {"up": link["state"] == "up", "mac": link.get("address"), "mtu": link.get("mtu")}, addresses, gateway

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            fd = open_netns(pod.netns)
            assert fd is not None
            try:
                link, addresses, gateway = await asyncio.to_thread(inside, fd, look)
            finally:
                os.close(fd)
            told = next(one for one in result.raw["interfaces"] if one["name"] == "eth0")  # type: ignore[attr-defined]
            assert link == {"up": True, "mac": told["mac"], "mtu": 1500}
            assert (result.ips[0], 24) in addresses
            assert gateway == str(ipaddress.ip_network(corner.subnet)[1])

    asyncio.run(scenario())


def test_the_pool_leaves_no_namespace_of_a_killed_daemon(corner: Corner) -> None:
    """Spare namespaces are fds of the process alone: nothing on disk, nothing mounted."""

    async def scenario() -> None:
        await corner.cni.warm()
        async with running_pod(corner):
            assert len(list(corner.netns.iterdir())) == 1

    asyncio.run(scenario())
    assert list(corner.netns.iterdir()) == []


def test_the_pool_fills_itself_again_once_its_pod_is_up(corner: Corner) -> None:
    def spares() -> int:
        """Namespaces that this process holds by fds."""
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and os.readlink(link).startswith("net:") for link in links)

    async def spares_are(count: int) -> None:
        async with asyncio.timeout(SOON_S):
            # One that is being made is there before the pool has it.
            while spares() != count or any(thread.name == "netns-pool" for thread in threading.enumerate()):
                await asyncio.sleep(0.005)

    async def scenario() -> None:
        before = spares()
        await corner.cni.warm()
        await spares_are(before + corner.config.pool_size)
        pin = await corner.cni.new_netns(pod_id())
        assert spares() == before + corner.config.pool_size - 1
        await spares_are(before + corner.config.pool_size)
        await corner.cni.remove_netns(pin)

    asyncio.run(scenario())


def test_namespaces_pinned_on_a_shared_mount_are_private_to_this_mount_namespace(tmp_path: Path) -> None:
    needs("root")
    shared, directory = str(tmp_path), tmp_path / "netns"

    def inside() -> list[MountPoint]:
        return [point for point in mountinfo() if point.target.startswith(f"{shared}/")]

    mount(shared, shared, None, MS_BIND)
    mount(None, shared, None, MS_SHARED)
    try:
        namespaces = Namespaces(directory, 0)
        pin = namespaces.create("pod")
        assert [(point.target, point.fstype == "nsfs") for point in inside()] == [
            (str(directory), False),
            (str(pin), True),
        ]
        assert not any("shared:" in point.propagation for point in inside())
        namespaces.close()
        assert len(inside()) == 2  # a pod outlives the daemon
        namespaces.remove(pin)
        namespaces.close()
        assert inside() == []  # and with the last pin goes the mount
    finally:
        umount2(shared, MNT_DETACH)


def test_udp_and_tcp_use_their_own_namespaces_port_space(corner: Corner) -> None:
    async def scenario() -> None:
        async with running_pod(corner) as (one, first), running_pod(corner) as (two, _):

            def bound() -> socket.socket:
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sock.bind(("0.0.0.0", 5353))
                sock.settimeout(5)
                return sock

            with in_pod(one, bound) as here, in_pod(two, bound) as there:
                there.sendto(b"ping", (first.ips[0], 5353))
                assert here.recv(16) == b"ping"

    asyncio.run(scenario())


def test_o1_a_cancelled_new_namespace_leaves_no_pin(corner: Corner) -> None:
    async def scenario() -> None:
        for step in range(20):
            task = asyncio.create_task(corner.cni.new_netns(pod_id()))
            await asyncio.sleep(step * 0.0001)
            task.cancel()
            try:
                path = await task
            except asyncio.CancelledError:
                assert not corner.netns.exists() or list(corner.netns.iterdir()) == []
            else:
                await corner.cni.remove_netns(path)

    asyncio.run(scenario())
