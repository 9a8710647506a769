"""A container's unit and its limits in systemd's words, as data; D-Bus's bytes, without a bus."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cgroups import dbus
from runtime.cgroups.buses import paths
from runtime.cgroups.dbus import Reader, Variant, Writer, types
from runtime.cgroups.hierarchy import below_service
from runtime.cgroups.plan import Now
from runtime.cgroups.scope import USER_SLICE, annotated, bits, expand_slice, properties, scope_for
from runtime.errors import RuntimeFailure
from runtime.fields import Fields
from runtime.resources import parse

MIB = 1 << 20
INFINITY = (1 << 64) - 1


def told(now: Now | None = None, **resources: object) -> dict[str, object]:
    found = properties(parse(Fields(resources, "linux.resources")), now or Now())
    return {name: value.value for name, value in found}


@pytest.mark.parametrize(
    ("path", "unit", "cgroup"),
    [
        ("", "ocirun-id.scope", "system.slice/ocirun-id.scope"),
        ("::x", "x.scope", "system.slice/x.scope"),
        (":p:x", "p-x.scope", "system.slice/p-x.scope"),
        ("machine.slice:libpod:x", "libpod-x.scope", "machine.slice/libpod-x.scope"),
        ("a-b.slice:cri:x", "cri-x.scope", "a.slice/a-b.slice/cri-x.scope"),
        ("-.slice:cri:x", "cri-x.scope", "cri-x.scope"),
    ],
)
def test_a_path_names_a_unit(path: str, unit: str, cgroup: str) -> None:
    scope = scope_for(path, "id")
    assert scope.unit == unit and scope.relative == cgroup


@pytest.mark.parametrize(
    "bad", ["a", "a.service", ".slice", "a--b.slice", "-a.slice", "a-.slice", "a/b.slice", "--.slice"]
)
def test_what_is_no_slice(bad: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"linux\.cgroupsPath"):
        expand_slice(bad)


def test_limits_in_systemds_words() -> None:
    assert told(
        memory={"limit": 64 * MIB, "swap": 80 * MIB, "reservation": 8 * MIB},
        cpu={"shares": 1024, "quota": 33_333, "period": 100_000, "cpus": "0,9", "mems": "0"},
        pids={"limit": 0},
        blockIO={"weight": 1000},
    ) == {
        "MemoryMax": 64 * MIB,
        "MemorySwapMax": 16 * MIB,
        "MemoryLow": 8 * MIB,
        "CPUWeight": 100,
        "CPUQuotaPerSecUSec": 340_000,
        "CPUQuotaPeriodUSec": 100_000,
        "AllowedCPUs": b"\x01\x02",
        "AllowedMemoryNodes": b"\x01",
        "TasksMax": 1,
        "IOWeight": 10_000,
    }
    assert told(memory={"limit": -1}, pids={"limit": -1}, cpu={"quota": -1}) == {
        "MemoryMax": INFINITY,
        "MemorySwapMax": INFINITY,
        "TasksMax": INFINITY,
        "CPUQuotaPerSecUSec": INFINITY,
        "CPUQuotaPeriodUSec": 100_000,
    }
    assert told() == {}


def test_an_update_of_a_part_counts_with_what_is_in_force() -> None:
    now = Now(cpu_quota=45_000, cpu_period=90_000)
    assert told(now, cpu={"quota": 9_000}) == {"CPUQuotaPerSecUSec": 100_000, "CPUQuotaPeriodUSec": 90_000}
    assert told(now, cpu={"period": 45_000}) == {"CPUQuotaPerSecUSec": 1_000_000, "CPUQuotaPeriodUSec": 45_000}


def test_a_limit_by_its_own_name_says_the_last_word() -> None:
    found = told(
        memory={"limit": 64 * MIB},
        unified={"memory.max": "max", "memory.high": "4096", "cpu.max": "max 50000", "cpuset.cpus": "1", "io.max": "x"},
    )
    assert found == {
        "MemoryMax": INFINITY,
        "MemoryHigh": 4096,
        "CPUQuotaPerSecUSec": INFINITY,
        "CPUQuotaPeriodUSec": 50_000,
        "AllowedCPUs": b"\x02",
    }


@pytest.mark.parametrize("bad", ["0-9999999", "0-31:2/4", "x"])
def test_processors_that_systemd_takes_none_of(bad: str) -> None:
    with pytest.raises(RuntimeFailure):
        bits(bad)


def test_s60_no_annotation_says_more_than_the_list() -> None:
    assert annotated([("a", "b"), ("org.systemd.property.TimeoutStopSec", "5")]) == [
        ("TimeoutStopUSec", Variant("t", 5_000_000))
    ]
    for name, text in (("ExecStop", "'x'"), ("MemoryMax", "uint64 1"), ("Description", "'a' + 'b'"), ("Slice", "'a'")):
        with pytest.raises(RuntimeFailure, match=f"annotations.org.systemd.property.{name}"):
            annotated([(f"org.systemd.property.{name}", text)])


# ------------------------------------------------------------------------------------------------------------ D-Bus

VALUES = st.recursive(
    st.one_of(
        st.integers(0, INFINITY).map(lambda value: ("t", value)),
        st.integers(0, 255).map(lambda value: ("y", value)),
        st.booleans().map(lambda value: ("b", value)),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).map(lambda value: ("s", value)),
        st.binary().map(lambda value: ("ay", value)),
        st.lists(st.integers(0, 1 << 31)).map(lambda value: ("au", value)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: (f"({''.join(kind for kind, _ in parts)})", tuple(value for _, value in parts))
        ),
        inner.map(lambda part: ("v", Variant(*part))),
        inner.map(lambda part: (f"a{{s{part[0]}}}", {"key": part[1]})),
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=4))
def test_values_come_back_as_they_were(values: list[tuple[str, object]]) -> None:
    writer = Writer()
    for kind, value in values:
        writer.put(kind, value)
    reader = Reader(bytes(writer.data), "<")
    assert [reader.get(kind) for kind, _ in values] == [value for _, value in values]
    assert types("".join(kind for kind, _ in values)) == [kind for kind, _ in values]


@given(st.binary(max_size=64), st.sampled_from(["as", "a{sv}", "(yv)", "v", "aas", "t", "s"]))
def test_bytes_that_are_no_values_are_refused(data: bytes, kind: str) -> None:
    try:
        Reader(data, "<").get(kind)
    except RuntimeFailure as failure:
        assert "malformed" in str(failure)


@pytest.mark.parametrize("bad", ["a", "(", "(s", "a{", "z", "a" * 40 + "y"])
def test_signatures_that_are_none_are_refused(bad: str) -> None:
    with pytest.raises(RuntimeFailure, match="malformed"):
        types(bad)


def _peer(answer: bytes) -> tuple[dbus.Bus, threading.Thread, socket.socket]:
    """A connection whose other end reads the first message and sends `answer`."""
    mine, its = socket.socketpair()

    def serve() -> None:
        its.recv(4096)
        its.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return dbus.Bus(mine, "the test", 0.2, peer=True), thread, its


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "did not send an answer to Member in time"),
        (b"x" * 16, "malformed"),
        (b"l\2\0\1" + struct.pack("<III", 1 << 30, 1, 0), "a message of"),
        (b"l\2\0\1" + struct.pack("<III", 0, 1, 1 << 31), "a message of"),
        (b"l\2\0\1" + struct.pack("<III", 0, 1, 8) + b"\1\1o\0\xff\xff\xff\x7f", "malformed"),
    ],
)
def test_o36_an_other_side_that_is_wrong_or_silent_is_a_failure_in_time(answer: bytes, words: str) -> None:
    bus, thread, its = _peer(answer)
    with bus, its, pytest.raises(RuntimeFailure, match=words):
        bus.call("to", "/path", "interface", "Member")
    thread.join()


def test_o36_an_other_side_that_is_gone_is_a_failure() -> None:
    bus, thread, its = _peer(b"")
    thread_end = threading.Thread(target=lambda: (thread.join(), its.close()))
    thread_end.start()
    with bus, pytest.raises(RuntimeFailure, match="closed the connection"):
        bus.call("to", "/path", "interface", "Member")
    thread_end.join()


@pytest.mark.parametrize("first", [b"DATA\r\n", b"OK 1234\r\n"])  # the latter: systemd's own socket, before 253
def test_the_other_side_knows_who_we_are_without_a_number(first: bytes) -> None:
    """In a user namespace ours would be another one. What follows comes when all of that has been read."""
    mine, its = socket.socketpair()
    its.sendall(first + b"OK 1234\r\n" + b"more")
    with its, dbus.Bus(mine, "the test", 1.0, peer=True) as bus:
        bus.open()
        assert its.recv(4096) == b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"
        assert mine.recv(4096) == b"more"


def test_an_other_side_that_does_not_let_us_in_says_so() -> None:
    mine, its = socket.socketpair()
    its.sendall(b"REJECTED EXTERNAL\r\n")
    with its, dbus.Bus(mine, "the test", 1.0, peer=True) as bus, pytest.raises(RuntimeFailure, match="refuses uid"):
        bus.open()


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("", []),
        ("unix:path=/run/user/1000/bus", ["/run/user/1000/bus"]),
        ("unix:path=/a%20b%2c,guid=0123", ["/a b,"]),
        ("unix:abstract=/tmp/dbus-x,guid=0", ["\0/tmp/dbus-x"]),
        ("tcp:host=h,port=1;unix:path=/a;unix:path=/b", ["/a", "/b"]),
    ],
)
def test_addresses_of_a_bus(address: str, found: list[str]) -> None:
    assert paths(address) == found


@pytest.mark.parametrize("address", ["autolaunch:", "tcp:host=h", "unix:tmpdir=/tmp", "unix:path=/a%2", "nothing"])
def test_addresses_that_lead_to_no_bus_are_refused(address: str) -> None:
    with pytest.raises(RuntimeFailure, match="DBUS_SESSION_BUS_ADDRESS"):
        paths(address)


def test_a_users_units_are_below_his_systemd() -> None:
    below = "/user.slice/user-1000.slice/user@1000.service"
    scope = scope_for("", "a", USER_SLICE).changed(below=below)
    assert scope.relative == f"{below[1:]}/user.slice/ocirun-a.scope"
    assert scope_for("-.slice:p:a", "a").changed(below=below).relative == f"{below[1:]}/p-a.scope"
    assert below_service(scope.relative)
    for machines in (
        "system.slice/ocirun-a.scope",
        "user.slice/p-a.scope",
        "a.slice/a-b.slice",
        "system.slice/x.service",
    ):
        assert not below_service(machines)
