"""host-local: ranges, the order of addresses, and the reference plugin's files."""

from __future__ import annotations

import fcntl
import ipaddress
import threading
import time
from pathlib import Path

import pytest

from cri.interfaces import PodNetwork
from cri.network import collect
from cri.network.conflist import ConfigError
from cri.network.host_local import HostLocal, parse_settings
from cri.network.values import Call, PluginError, make_result


def _call(pod: str, seconds: float = 5.0) -> Call:
    network = PodNetwork(pod, "n", "ns", "u", Path("/nosuch"))
    return Call(network, "net", "1.0.0", "eth0", None, time.monotonic() + seconds, Path("/nosuch"))


def _plugin(tmp_path: Path, **ipam: object) -> HostLocal:
    return HostLocal("net", parse_settings({"type": "host-local", **ipam}), tmp_path)


def _give(plugin: HostLocal, pod: str) -> list[str]:
    return [str(address.interface) for address in plugin.allocate(_call(pod)).addresses]


def test_addresses_in_order_without_gateway_network_and_broadcast(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/29")
    assert [_give(plugin, f"c{n}")[0] for n in range(5)] == [f"10.1.2.{n}/29" for n in range(2, 7)]
    with pytest.raises(PluginError, match="no free address in 10.1.2.1-10.1.2.6"):
        _give(plugin, "c9")


def test_files_are_the_reference_plugins(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24")
    _give(plugin, "c1")
    assert (tmp_path / "net" / "10.1.2.2").read_bytes() == b"c1\r\neth0"
    assert (tmp_path / "net" / "last_reserved_ip.0").read_bytes() == b"10.1.2.2"
    assert (tmp_path / "net" / "lock").exists()
    (tmp_path / "net" / "10.1.2.3").write_bytes(b"another\r\neth0")
    (tmp_path / "net" / "10.1.2.4").write_bytes(b"")  # somebody else's, half made
    assert _give(plugin, "c2") == ["10.1.2.5/24"]


def test_o3_a_lease_without_an_owner_is_of_somebody_who_was_killed(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24")
    _give(plugin, "c1")
    (tmp_path / "net" / "10.1.2.3").write_bytes(b"")
    (tmp_path / "net" / "notes").write_bytes(b"")
    (tmp_path / "net" / "10.1.2.4").symlink_to(tmp_path / "net" / "notes")
    collect.release(plugin, frozenset({"c1"}))
    left = {path.name for path in (tmp_path / "net").iterdir()}
    assert left == {"10.1.2.2", "10.1.2.4", "last_reserved_ip.0", "lock", "notes"}


def test_the_search_goes_on_behind_the_last_and_comes_round(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, ranges=[[{"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.10", "rangeEnd": "10.1.2.12"}]])
    seen = []
    for number in range(5):
        seen += _give(plugin, f"c{number}")
        plugin.release(_call(f"c{number}"), None)
    assert [text.split(".")[3] for text in seen] == ["10/24", "11/24", "12/24", "10/24", "11/24"]


def test_a_shorter_last_address_leaves_no_old_digits(tmp_path: Path) -> None:
    plugin = _plugin(
        tmp_path,
        ranges=[
            [
                {"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.254", "rangeEnd": "10.1.2.254"},
                {"subnet": "10.1.3.0/24", "rangeStart": "10.1.3.9", "rangeEnd": "10.1.3.9"},
            ]
        ],
    )
    assert _give(plugin, "a") + _give(plugin, "b") == ["10.1.2.254/24", "10.1.3.9/24"]
    assert (tmp_path / "net" / "last_reserved_ip.0").read_bytes() == b"10.1.3.9"


def test_dual_stack_takes_one_of_each_or_none(tmp_path: Path) -> None:
    six = {"subnet": "fd00::/64", "rangeStart": "fd00::10", "rangeEnd": "fd00::10"}
    plugin = _plugin(tmp_path, ranges=[[{"subnet": "10.1.2.0/24"}], [six]], routes=[{"dst": "::/0"}])
    assert _give(plugin, "c1") == ["10.1.2.2/24", "fd00::10/64"]
    with pytest.raises(PluginError, match="no free address in fd00::10-fd00::10"):
        _give(plugin, "c2")
    assert {lease.container for lease in plugin.store.leases()} == {"c1"}


def test_release_takes_only_what_is_the_containers(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24")
    granted = plugin.allocate(_call("c1"))
    _give(plugin, "c11")
    (tmp_path / "net" / "10.1.2.77").write_bytes(b"c1")  # an old version's file: the container alone
    (tmp_path / "net" / "10.1.2.78").write_bytes(b"c1\r\neth1")
    (tmp_path / "net" / "garbage").write_bytes(b"c1\r\neth0")
    plugin.release(_call("c1"), None)
    left = {(str(lease.address), lease.container, lease.interface) for lease in plugin.store.leases()}
    assert left == {("10.1.2.3", "c11", "eth0"), ("10.1.2.78", "c1", "eth1")}
    plugin.release(_call("c1"), make_result("1.0.0", [], granted, None))


def test_release_by_a_stale_result_takes_nobody_elses_address(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, ranges=[[{"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.9"}]])
    result = make_result("1.0.0", [], plugin.allocate(_call("c1")), None)
    plugin.release(_call("c1"), result)
    _give(plugin, "c2")
    plugin.release(_call("c1"), result)
    assert [lease.container for lease in plugin.store.leases()] == ["c2"]


def test_twenty_threads_get_twenty_addresses(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24")
    found: list[str] = []
    threads = [threading.Thread(target=lambda n=n: found.extend(_give(plugin, f"c{n}"))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 20


def test_r14_a_lock_that_another_keeps_is_named(tmp_path: Path) -> None:
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24")
    _give(plugin, "c1")
    with open(tmp_path / "net" / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PluginError, match="lock is locked by another process"):
            plugin.allocate(_call("c2", seconds=0.05))
    assert _give(plugin, "c2")


@pytest.mark.parametrize(
    ("ipam", "words"),
    [
        ({"ranges": {}}, "ipam.ranges: expected a list"),
        ({"ranges": [[]]}, "ipam.ranges[0]: expected a list of objects"),
        ({"ranges": [[{}]]}, "ipam.ranges[0][0]: "),
        ({"ranges": [[{"subnet": "10.0.0.0/31"}]]}, "10.0.0.0/31 is too small"),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.5"}]]}, "rangeStart: 10.0.1.5 is not in"),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeEnd": "::1"}]]}, "rangeEnd: ::1 is not in"),
        (
            {"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}]]},
            "10.0.0.9 is behind",
        ),
        ({"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]]}, "IPv4 and IPv6 in one set"),
        ({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.0.0/25"}]]}, "overlap"),
        ({"subnet": "10.0.0.0/24", "routes": [{"dst": "nowhere"}]}, "ipam.routes[0]: "),
        ({"subnet": "10.0.0.0/24", "dataDir": 5}, "ipam.dataDir: expected a string"),
        ({"ranges": [[{"subnet": "10.0.0.0/24"}]] * 17}, "17 of them"),
    ],
)
def test_a_wrong_range_is_named(ipam: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(ipam)
    assert words in str(caught.value)


def test_data_directory_gateway_and_resolv_conf(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# x\nnameserver 192.0.2.1\nsearch a b\noptions ndots:2\ndomain d\nnameserver\n")
    data = tmp_path / "elsewhere"
    plugin = _plugin(tmp_path, subnet="10.1.2.0/24", gateway="10.1.2.254", dataDir=str(data), resolvConf=str(resolv))
    granted = plugin.allocate(_call("c1"))
    assert granted.addresses[0].gateway == ipaddress.ip_address("10.1.2.254")
    assert granted.dns == {"nameservers": ["192.0.2.1"], "search": ["a", "b"], "options": ["ndots:2"], "domain": "d"}
    assert (data / "net" / "10.1.2.1").exists()
