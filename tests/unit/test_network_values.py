"""Results, records, names, netlink framing and nftables keys: what needs no kernel."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import struct
import threading
from pathlib import Path

import pytest

from cri.interfaces import PodNetwork, PortMapping
from cri.network import netlink as nl
from cri.network import portmap
from cri.network.bridge import host_name, is_host_name, is_interface_name, mac
from cri.network.conflist import ConfigError, parse_list
from cri.network.external import Binaries, run
from cri.network.records import Record, Records
from cri.network.values import Address, Allocation, PluginError, PodRoute, make_result, parse_result
from cri.threads import Threads, to_thread
from tests.support import SOON_S


def test_results_are_brought_to_the_lists_version() -> None:
    old = {"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.0.0.2/8", "gateway": "10.0.0.1"}]}
    new = parse_result(old, "1.0.0")
    assert new.raw["ips"] == [{"address": "10.0.0.2/8", "gateway": "10.0.0.1"}] and new.raw["cniVersion"] == "1.0.0"
    assert parse_result(dict(new.raw), "0.3.1").raw["ips"][0]["version"] == "4"


def test_a_native_result_is_one_that_we_would_accept() -> None:
    granted = Allocation(
        (Address(ipaddress.ip_interface("fd00::2/64"), ipaddress.ip_address("fd00::1")),),
        (PodRoute(ipaddress.ip_network("::/0"), None),),
        {"nameservers": ["::1"]},
    )
    for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0"):
        made = make_result(version, [{"name": "eth0"}], granted, 0)
        assert parse_result(dict(made.raw), version) == made and made.allocation().dns == {"nameservers": ["::1"]}
        assert ("version" in made.raw["ips"][0]) is (version < "1.0.0")


@pytest.mark.parametrize("many", [{"ips": [{}] * 65}, {"routes": [{}] * 1025}, {"interfaces": [{}] * 1025}])
def test_r05_a_result_has_bounds(many: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="at most"):
        parse_result({"cniVersion": "1.0.0", **many}, "1.0.0")


# -------------------------------------------------------------------------------------------------------- records


def _record(**changes: object) -> Record:
    ports = (PortMapping(80, 8080), PortMapping(53, 53, "udp", "::1"))
    pod = PodNetwork("p1", "web", "default", "u", Path("/run/x/p1"), ports, "net")
    conflist = parse_list({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "a"}]}, "old place")
    result = parse_result({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/8"}]}, "1.0.0")
    values = {"pod": pod, "conflist": conflist, "interface": "eth0", "namespace": (4, 17), "result": result}
    return Record(**(values | changes))  # type: ignore[arg-type]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = Records(tmp_path / "cni")
    assert records.read("p1") is None and records.pods() == []
    for record in (_record(result=None), _record()):
        records.write(record)
        found = records.read("p1")
        assert found is not None
        assert (found.pod, found.namespace, found.result) == (record.pod, record.namespace, record.result)
        assert found.conflist.plugins == record.conflist.plugins and found.conflist.name == "net"
    assert records.pods() == ["p1"] and (tmp_path / "cni").stat().st_mode & 0o777 == 0o700
    records.remove("p1")
    records.remove("p1")
    assert records.pods() == []


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version":2}', b"\xff", b'{"version":1,"pod":[],"conflist":{}}'])
def test_o44_a_damaged_record_is_none_and_still_listed(tmp_path: Path, damage: bytes) -> None:
    records = Records(tmp_path)
    (tmp_path / "p1.json").write_bytes(damage)
    assert records.read("p1") is None and records.pods() == ["p1"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(_record())
    (tmp_path / ".p1.json.1.abcd").write_bytes(b"half")
    records.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["p1.json"]


# ---------------------------------------------------------------------------------------------------------- names


def test_names_and_macs_follow_from_the_pod() -> None:
    assert host_name("a", "eth0", 0) == host_name("a", "eth0", 0) != host_name("a", "eth0", 1)
    assert len(host_name("a", "eth0", 0)) < 16 and is_host_name(host_name("b", "eth0", 3))
    for name in ("oc0123", "veth01234567", "oc012345678g", "ocid0", "oc01234567890"):
        assert not is_host_name(name)
    first = int(mac("a", "eth0", "pod").split(":")[0], 16)
    assert first & 3 == 2 and mac("a", "eth0", "pod") != mac("a", "eth0", "host")


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "a b", "a:1", "x%d", "x" * 16, "ä", "a\n"])
def test_interface_names(bad: str) -> None:
    assert not is_interface_name(bad) and is_interface_name("ocid0")


# -------------------------------------------------------------------------------------------------------- netlink


def test_attributes_round_trip_and_malformed_ones_end_the_list() -> None:
    data = nl.text(3, "eth0") + nl.nested(18, nl.u32(1, 7)) + nl.attribute(4, b"")
    found = nl.attributes(data)
    assert found[3] == b"eth0\0" and nl.attributes(found[18])[1] == struct.pack("=I", 7) and found[4] == b""
    for cut in range(len(data)):
        nl.attributes(data[:cut])
    assert nl.attributes(struct.pack("=HH", 2, 1) + data) == {}
    assert nl.attributes(struct.pack("=HH", 60000, 1)) == {}


def test_an_error_names_the_message_the_errno_and_what_the_kernel_said() -> None:
    said = nl.attribute(nl.NLMSGERR_ATTR_MSG, b"Invalid thing\0")
    body = struct.pack("=i", -17) + bytes(16) + said
    error = nl.parse_error(nl.NLM_F_ACK_TLVS, body, "create veth x")
    assert str(error) == "create veth x: EEXIST file exists (kernel: Invalid thing)"
    assert nl.parse_error(0, struct.pack("=i", 0) + bytes(16), "x") is None


# ----------------------------------------------------------------------------------------------------------- ports


def test_forwards_of_each_family() -> None:
    four, six = ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("fd00::2")
    ports = [
        PortMapping(0, 99),
        PortMapping(80, 8080),
        PortMapping(81, 1, host_ip="127.0.0.1"),
        PortMapping(82, 2, "UDP", "::"),
    ]
    found = portmap.forwards(ports, [four, six, ipaddress.ip_address("10.0.0.3")])
    assert [(f.protocol, f.host_port, f.host_ip and str(f.host_ip), f.pod_ip) for f in found] == [
        ("tcp", 80, None, four),
        ("tcp", 80, None, six),
        ("tcp", 81, "127.0.0.1", four),
        ("udp", 82, None, six),
    ]


def test_a_port_that_is_asked_for_twice_is_one_or_a_mistake() -> None:
    four = [ipaddress.ip_address("10.0.0.2")]
    twice = [PortMapping(80, 8080), PortMapping(80, 8080), PortMapping(80, 8080, "udp"), PortMapping(80, 1, "sctp")]
    assert len(portmap.forwards(twice, four)) == 3
    assert len(portmap.forwards([PortMapping(80, 1), PortMapping(80, 2, host_ip="10.9.9.9")], four)) == 2
    with pytest.raises(PluginError, match="host port 80/tcp is asked for twice, for ports 8080 and 81 of the pod") as e:
        portmap.forwards([PortMapping(80, 8080), PortMapping(80, 81, host_ip="0.0.0.0")], four)
    assert e.value.code == "invalid_argument"


@pytest.mark.parametrize(
    "bad",
    [
        PortMapping(-1, 80),
        PortMapping(65536, 80),
        PortMapping(80, -1),
        PortMapping(80, 80, "icmp"),
        PortMapping(80, 80, host_ip="host"),
    ],
)
def test_s59_wrong_ports_are_named(bad: PortMapping) -> None:
    with pytest.raises(PluginError, match="port 80|port -1|port 65536|host address"):
        portmap.forwards([bad], [ipaddress.ip_address("10.0.0.2")])


# ------------------------------------------------------------------------------------------------------- programs


def test_programs_are_found_by_plain_name_only(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    program = tmp_path / "two" / "x"
    program.write_text("#!/bin/sh\n")
    binaries = Binaries((tmp_path / "one", tmp_path / "two"))
    with pytest.raises(PluginError, match="no program x in .*one, .*two"):
        binaries.find("x")
    program.chmod(0o755)
    assert binaries.find("x") == program
    (tmp_path / "one" / "x").mkdir()
    assert binaries.find("x") == program
    for bad in ("../two/x", "/bin/sh", "", "a\0b", ".."):
        with pytest.raises(PluginError, match="is not a plugin's name"):
            binaries.find(bad)


def test_p11_a_program_inherits_three_fds_and_no_signal_setting(tmp_path: Path) -> None:
    program = tmp_path / "x"
    program.write_text("#!/bin/sh\nls -l /proc/self/fd >&2\ngrep -E 'Sig(Ign|Blk)' /proc/self/status\ncat\n")
    program.chmod(0o755)
    outcome = run(program, {"PATH": "/bin:/usr/bin"}, b"input", timeout=10)
    fds = [line.split(" -> ")[1] for line in outcome.stderr.decode().splitlines() if " -> " in line]
    # The shell's own script, and the directory that ls reads, are theirs.
    inherited = [target for target in fds if target != str(program) and not target.startswith("/proc/")]
    assert len(inherited) == 3 and all(target.startswith("pipe:") for target in inherited)
    words = outcome.stdout.decode().split()
    assert words[1] == "0" * 16 and int(words[3], 16) & 1 << 12 == 0 and words[4] == "input"  # 12: SIGPIPE


def test_a_program_that_reads_nothing_gets_no_deadlock(tmp_path: Path) -> None:
    program = tmp_path / "x"
    program.write_text("#!/bin/sh\nexec <&-\necho ok\n")
    program.chmod(0o755)
    assert run(program, {"PATH": "/bin"}, b"x" * 1_000_000, timeout=10).stdout == b"ok\n"


def test_a_grandchild_that_keeps_stdout_is_not_waited_for(tmp_path: Path) -> None:
    program = tmp_path / "x"
    program.write_text('#!/bin/sh\nsleep 60 & echo $! > "$0.pid"\necho ok\n')
    program.chmod(0o755)
    try:
        assert run(program, {"PATH": "/bin"}, b"", timeout=10).stdout == b"ok\n"
    finally:
        os.kill(int((tmp_path / "x.pid").read_text()), signal.SIGKILL)


# -------------------------------------------------------------------------------------------------------- threads


def test_to_thread_passes_arguments_results_and_errors() -> None:
    def work(first: int, *, second: int) -> tuple[int, bool]:
        if second == 0:
            raise ZeroDivisionError
        return first // second, threading.current_thread() is threading.main_thread()

    assert asyncio.run(to_thread(work, 6, second=2)) == (3, False)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(to_thread(work, 6, second=0))


def test_a_pool_has_its_limit() -> None:
    threads, running, most, lock = Threads("t", 2), 0, 0, threading.Lock()
    gate = threading.Barrier(2)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(SOON_S)
        with lock:
            running -= 1

    async def scenario() -> None:
        await asyncio.gather(*(threads.run(work) for _ in range(6)))

    asyncio.run(scenario())
    threads.close()
    assert most == 2
