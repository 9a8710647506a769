"""CHECK of CNI, host ports that outlive a restart and a flushed ruleset, and what plugins are told by capability."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cri.interfaces import NetworkError, PodNetwork, PortMapping
from cri.network import netlink as nl
from cri.network import routes as rt
from cri.network.bridge import host_name
from tests.fakes.network import Corner, connect, in_pod, listen, make_pod, network_corner, remove_pod, running_pod
from tests.support import needs

PORTMAP: dict[str, object] = {"type": "portmap", "capabilities": {"portMappings": True}}
ANSWER = """echo '{"cniVersion":"1.1.0","ips":[{"address":"192.0.2.77/24"}]}'"""


@pytest.fixture
def corner(tmp_path: Path) -> Iterator[Corner]:
    needs("root", "nftables")
    with network_corner(tmp_path) as found:
        yield found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        return int(sock.getsockname()[1])


def _reaches(pod: PodNetwork, port: int) -> bool:
    with listen(pod, "0.0.0.0", 80) as listener:
        try:
            connect(None, "127.0.0.1", port, 2).close()
        except OSError:
            return False
        listener.accept()[0].close()
        return True


def _table(corner: Corner) -> str:
    command = ["nft", "list", "table", "inet", corner.config.nft_table]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_o59_host_ports_survive_a_restart_and_come_back_after_a_flushed_ruleset(corner: Corner) -> None:
    corner.conflist("net", [corner.bridge_plugin(), PORTMAP])
    port = _free_port()

    async def scenario() -> None:
        async with running_pod(corner, ports=(PortMapping(port, 80),)) as (pod, _):
            assert await corner.cni.check(pod) is None
            corner.restart()
            await corner.cni.collect(frozenset({pod.id}))
            assert _reaches(pod, port), "a restart cut the pod off"
            subprocess.run(["nft", "delete", "table", "inet", corner.config.nft_table], check=True)
            assert not _reaches(pod, port)
            assert await corner.cni.check(pod) is None
            assert _reaches(pod, port), "the check did not put the rules back"
            assert f"ip saddr {corner.subnet} jump masq" in _table(corner)
        assert str(port) not in _table(corner), "the rules that were put back went not with the pod"

    asyncio.run(scenario())


def _unset_address(corner: Corner, pod: PodNetwork) -> None:
    def flush() -> None:
        with nl.Netlink() as netlink:
            link = nl.get_link(netlink, "eth0")
            assert link is not None
            addresses = [address for address in rt.list_addresses(netlink, link.index) if address.version == 4]
            netlink.run([rt.delete_address(link.index, "eth0", address) for address in addresses])

    in_pod(pod, flush)


def _down(corner: Corner, pod: PodNetwork) -> None:
    def down() -> None:
        with nl.Netlink() as netlink:
            link = nl.get_link(netlink, "eth0")
            assert link is not None
            netlink.run([nl.set_link_down(link.index, "eth0")])

    in_pod(pod, down)


def _unplug(corner: Corner, pod: PodNetwork) -> None:
    subprocess.run(["ip", "link", "set", host_name(pod.id, "eth0", 0), "nomaster"], check=True)


def _remove(corner: Corner, pod: PodNetwork) -> None:
    subprocess.run(["ip", "link", "del", host_name(pod.id, "eth0", 0)], check=True)


def _bridge_down(corner: Corner, pod: PodNetwork) -> None:
    subprocess.run(["ip", "link", "set", corner.bridge, "down"], check=True)


def _take_lease(corner: Corner, pod: PodNetwork) -> None:
    for address in corner.leased("net"):
        (corner.config.lease_dir / "net" / address).write_bytes(b"another\r\neth0")


def _forget(corner: Corner, pod: PodNetwork) -> None:
    for path in corner.records.glob("*.json"):
        path.unlink()


@pytest.mark.parametrize(
    "harm, words",
    [
        (_unset_address, "eth0 of the pod has lost 10."),
        (_down, "eth0 of the pod is down"),
        (_unplug, "is no port of"),
        (_remove, "the pod has no interface eth0"),
        (_bridge_down, "is down"),
        (_take_lease, "is leased to another: it may be given to another pod"),
        (_forget, "nothing is recorded of its network"),
    ],
)
def test_check_names_what_is_not_as_add_left_it(
    corner: Corner, harm: Callable[[Corner, PodNetwork], None], words: str
) -> None:
    corner.conflist("net", [corner.bridge_plugin()])

    async def scenario() -> None:
        async with running_pod(corner) as (pod, _):
            assert await corner.cni.check(pod) is None
            harm(corner, pod)
            said = await corner.cni.check(pod)
            assert said is not None and words in said
            if harm is not _forget:
                assert said.startswith("network net: plugin bridge (native): check pod default/web (")

    asyncio.run(scenario())


def test_programs_are_checked_with_the_result_unless_the_list_says_not_to(corner: Corner) -> None:
    fails = (
        """if [ "$CNI_COMMAND" = CHECK ]; then cat > "$0.stdin"; echo '{"code":11,"msg":"flow lost"}'; exit 1; fi\n"""
    )
    spy = corner.program("spy", fails + ANSWER)
    path = corner.conflist("net", [{"type": "spy"}], version="1.1.0")

    async def scenario() -> None:
        async with running_pod(corner) as (pod, result):
            said = await corner.cni.check(pod)
            assert said is not None and said.startswith("network net: plugin spy: check pod default/web (")
            assert said.endswith("flow lost (code 11)")
            assert json.loads(Path(f"{spy}.stdin").read_text())["prevResult"] == result.raw
        path.write_text(json.dumps(json.loads(path.read_text()) | {"disableCheck": True}))
        async with running_pod(corner) as (pod, _):
            assert await corner.cni.check(pod) is None

    asyncio.run(scenario())


def test_a_check_that_hangs_is_killed_and_named(tmp_path: Path) -> None:
    needs("root", "nftables")
    with network_corner(tmp_path, plugin_timeout_s=0.5) as corner:
        corner.program("slow", f'if [ "$CNI_COMMAND" = CHECK ]; then exec sleep 1000; fi\n{ANSWER}')
        corner.conflist("net", [{"type": "slow"}], version="1.1.0")

        async def scenario() -> None:
            async with running_pod(corner) as (pod, _):
                said = await corner.cni.check(pod)
                assert said is not None and "plugin slow: " in said and "no end after" in said

        asyncio.run(scenario())


def test_plugins_are_told_what_their_capabilities_ask_for_and_nothing_else(corner: Corner) -> None:
    spy = corner.program("spy", f'cat > "$0.$CNI_COMMAND.stdin"\n{ANSWER}')
    asked = {"dns": True, "bandwidth": True, "portMappings": True, "ips": True}
    corner.conflist("net", [{"type": "spy", "capabilities": asked}], version="1.1.0")
    told: dict[str, object] = {"dns": {"servers": ["192.0.2.53"]}, "bandwidth": {"ingressRate": 1000}}

    async def scenario() -> None:
        async with running_pod(corner, capabilities=told | {"cgroupPath": "/x"}):
            assert json.loads(Path(f"{spy}.ADD.stdin").read_text())["runtimeConfig"] == told
            corner.restart()  # DEL comes from the record
        assert json.loads(Path(f"{spy}.DEL.stdin").read_text())["runtimeConfig"] == told

    asyncio.run(scenario())


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_each_protocol_and_family_has_its_entry_and_it_goes_with_the_pod(corner: Corner, protocol: str) -> None:
    plugin = corner.bridge_plugin()
    six = f"fd00:{os.urandom(2).hex()}:2::"
    plugin["ipam"] = {"type": "host-local", "ranges": [[{"subnet": corner.subnet}], [{"subnet": f"{six}/64"}]]}
    corner.conflist("net", [plugin, PORTMAP])
    port = _free_port()
    ports = (PortMapping(port, 80, protocol), PortMapping(port + 1, 81, protocol, "127.0.0.1"))

    async def scenario() -> None:
        async with running_pod(corner, ports=ports) as (_, result):
            table = _table(corner)
            four, over_six = result.ips
            for entry in (
                f"{protocol} . {port} comment",
                f"127.0.0.1 . {protocol} . {port + 1} comment",
                f": {four} . 80",
                f": {over_six} . 80",
                f": {four} . 81",
            ):
                assert entry in table, entry
            assert f": {over_six} . 81" not in table, "a host address of IPv4 leads to no IPv6 address"
        assert f". {port} " not in _table(corner)

    asyncio.run(scenario())


def test_a_pod_with_thousands_of_host_ports(corner: Corner) -> None:
    """More than a netlink socket takes at once, and than one attribute can name."""
    corner.conflist("net", [corner.bridge_plugin(), PORTMAP])
    first = 30000
    ports = tuple(PortMapping(first + number, 80, "udp") for number in range(2200))

    async def scenario() -> None:
        async with running_pod(corner, ports=ports):
            assert _table(corner).count("udp . 3") == len(ports)
        assert "udp . 3" not in _table(corner)

    asyncio.run(scenario())


def test_sysctls_of_the_pods_interfaces_are_set_once_they_are_there(corner: Corner) -> None:
    corner.conflist("net", [corner.bridge_plugin()])

    async def scenario() -> None:
        sysctls = {"net.ipv4.conf.eth0.arp_filter": "1", "net.ipv4.neigh.eth0.app_solicit": "5"}
        pod = replace(await make_pod(corner), sysctls=sysctls)
        await corner.cni.add(pod)
        files = [f"/proc/sys/net/ipv4/{name}" for name in ("conf/eth0/arp_filter", "neigh/eth0/app_solicit")]
        assert in_pod(pod, lambda: [Path(file).read_text() for file in files]) == ["1\n", "5\n"]
        await remove_pod(corner, pod)
        bad = replace(await make_pod(corner), sysctls={"net.ipv4.conf.eth7.arp_filter": "1"})
        with pytest.raises(NetworkError, match="sysctls: add pod .*net/ipv4/conf/eth7/arp_filter") as refused:
            await corner.cni.add(bad)
        assert refused.value.code == "invalid_argument" and not list(corner.records.iterdir()) and not corner.leased()
        await remove_pod(corner, bad)

    asyncio.run(scenario())
