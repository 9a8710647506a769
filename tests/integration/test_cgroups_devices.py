"""Who may open which device, by v1's list and by a v2 program, and what 1000 updates leave."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cgroups import devices, devices_v2
from runtime.cgroups.hierarchy import places_for
from runtime.cgroups.manager import Manager
from runtime.errors import RuntimeFailure
from runtime.linux import bpf
from runtime.resources import Resources
from tests.integration.cgroup_child import fork, own_path, spawn, wish
from tests.support import needs

KMSG = {"type": "c", "major": 1, "minor": 11}
DENY = {"allow": False, "access": "rwm"}


@pytest.fixture(params=[1, 2])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    """One side of this machine's hybrid alone: v1 with its list, or v2, whose device programs need no controller."""
    if request.param == 1:
        needs("cgroup1")
    with own_path() as path:
        places = tuple(place for place in places_for(f"{path}/ctr", "x") if place.hierarchy.version == request.param)
        yield Manager(places)


@pytest.fixture
def kmsg(tmp_path: Path) -> str:
    path = tmp_path / "kmsg"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 11))
    return str(path)


def opens(manager: Manager, path: str, flags: int) -> int:
    """0 or the errno of open(2) in the container."""

    def attempt() -> int:
        try:
            os.close(os.open(path, flags))
        except OSError as error:
            return error.errno or 99
        return 0

    return fork(attempt, manager).wait()


def makes(manager: Manager, path: str) -> int:
    def attempt() -> int:
        try:
            os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(254, 0))
        except OSError as error:
            return error.errno or 99
        return 0

    return fork(attempt, manager).wait()


def test_only_what_is_allowed_opens(manager: Manager, kmsg: str, tmp_path: Path) -> None:
    manager.create(wish(devices=[DENY]))
    assert opens(manager, kmsg, os.O_RDONLY) == errno.EPERM == opens(manager, "/dev/fuse", os.O_RDONLY)
    for name in ("null", "zero", "full", "random", "urandom"):
        assert opens(manager, f"/dev/{name}", os.O_RDWR) == 0
    assert makes(manager, str(tmp_path / "disk")) == 0  # making a node opens nothing
    assert opens(manager, str(tmp_path / "disk"), os.O_RDONLY) == errno.EPERM


def test_access_by_access(manager: Manager, kmsg: str) -> None:
    manager.create(wish(devices=[DENY, {**KMSG, "allow": True, "access": "r"}]))
    assert opens(manager, kmsg, os.O_RDONLY) == 0
    assert opens(manager, kmsg, os.O_WRONLY) == errno.EPERM == opens(manager, kmsg, os.O_RDWR)
    manager.set(wish(devices=[DENY, {**KMSG, "allow": True, "access": "rw"}]))
    assert opens(manager, kmsg, os.O_RDWR) == 0
    manager.set(wish(devices=[DENY, {**KMSG, "allow": True, "access": "w"}]))
    assert opens(manager, kmsg, os.O_WRONLY) == 0 and opens(manager, kmsg, os.O_RDONLY) == errno.EPERM


def test_allow_all_but(manager: Manager, kmsg: str) -> None:
    manager.create(wish(devices=[{"allow": True}, {**KMSG, "allow": False, "access": "w"}]))
    assert opens(manager, kmsg, os.O_RDONLY) == 0 == opens(manager, "/dev/fuse", os.O_RDONLY)
    assert opens(manager, kmsg, os.O_WRONLY) == errno.EPERM
    manager.set(wish(devices=[DENY]))
    assert opens(manager, "/dev/fuse", os.O_RDONLY) == errno.EPERM
    manager.set(wish(devices=[{"allow": True}]))
    assert opens(manager, kmsg, os.O_WRONLY) == 0


def test_no_rules_are_the_default_devices(manager: Manager, kmsg: str) -> None:
    manager.create(Resources())
    assert opens(manager, kmsg, os.O_RDONLY) == errno.EPERM and opens(manager, "/dev/null", os.O_RDWR) == 0


def test_an_update_of_limits_leaves_devices_alone(manager: Manager, kmsg: str) -> None:
    manager.create(wish(devices=[{**KMSG, "allow": True, "access": "rwm"}]))
    manager.set(Resources())
    assert opens(manager, kmsg, os.O_RDWR) == 0


def programs(manager: Manager) -> tuple[int, ...]:
    fd = os.open(manager.paths()[""], os.O_RDONLY | os.O_CLOEXEC)
    try:
        return bpf.bpf_prog_query(fd)
    finally:
        os.close(fd)


def test_o61_a_hundred_updates_leave_one_program(manager: Manager, kmsg: str) -> None:
    rules = [DENY, {**KMSG, "allow": True, "access": "r"}]
    manager.create(wish(devices=rules))
    again = wish(devices=rules)
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(100):  # 64 programs are all that a cgroup takes
        manager.set(again)
    assert len(os.listdir("/proc/self/fd")) <= fds  # fewer, when the collector took what an earlier test left
    if "" in manager.paths():
        assert len(programs(manager)) == 1
    else:
        listing = Path(manager.paths()["devices"], "devices.list").read_text().splitlines()
        assert len(listing) == len(devices.DEFAULT_DEVICES) + 1
    assert opens(manager, kmsg, os.O_RDONLY) == 0 and opens(manager, kmsg, os.O_WRONLY) == errno.EPERM


def test_o61_a_running_process_never_loses_a_device_in_an_update(manager: Manager) -> None:
    manager.create(wish(devices=[DENY]))
    script = "import os\nos.write(1, b'x')\nwhile True: os.close(os.open('/dev/null', os.O_RDWR))"
    child = spawn(["python3", "-S", "-c", script], manager)
    child.read()
    for index in range(100):
        extra = {"type": "b", "major": 7, "minor": index % 5, "allow": True, "access": "rwm"}
        manager.set(wish(devices=[DENY, extra]))
    assert manager.pids() == [child.pid]
    manager.kill()
    assert child.wait() == -9  # by us, and not by an exception


def test_o61_programs_that_piled_up_are_taken_off(kmsg: str) -> None:
    with own_path() as path:
        manager = Manager(tuple(one for one in places_for(f"{path}/ctr", "x") if one.hierarchy.version == 2))
        manager.create(Resources())
        fd = os.open(manager.paths()[""], os.O_RDONLY | os.O_CLOEXEC)
        for _ in range(3):
            stray = bpf.bpf_prog_load_device(devices_v2.program(devices.policy(())))
            bpf.bpf_prog_attach(fd, stray)
            os.close(stray)
        os.close(fd)
        assert len(programs(manager)) == 4
        manager.set(wish(devices=[{**KMSG, "allow": True, "access": "rwm"}]))
        assert len(programs(manager)) == 1 and opens(manager, kmsg, os.O_RDWR) == 0


def test_a_failed_update_keeps_the_old_program() -> None:
    with own_path() as path:
        manager = Manager(tuple(one for one in places_for(f"{path}/ctr", "x") if one.hierarchy.version == 2))
        manager.create(Resources())
        before = programs(manager)
        with pytest.raises(RuntimeFailure, match="pids.limit: this kernel's cgroups have no pids.max"):
            manager.set(wish(devices=[{"allow": True}], pids={"limit": 5}))
        assert programs(manager) == before


def test_the_verifier_s_words_are_in_the_error() -> None:
    with pytest.raises(OSError, match="(?s)bpf load device program .*R0 !read_ok"):
        bpf.bpf_prog_load_device(bpf.insn(0x95))


def test_the_verifier_takes_every_shape_of_program() -> None:
    rule = {"type": "b", "allow": True, "access": "rm"}
    for major, minor in ((-1, -1), (5, -1), (-1, 7), (0xFFFFFFFF, 0xFFFFFFFF)):
        for base in (DENY, {"allow": True}):
            chosen = {**rule, "major": major, "minor": minor, "allow": not base["allow"]}
            wanted = wish(devices=[base, chosen]).devices
            assert wanted is not None
            os.close(bpf.bpf_prog_load_device(devices_v2.program(devices.policy(wanted))))
    many = [{**rule, "major": 8, "minor": minor} for minor in range(550)]
    wanted = wish(devices=[DENY, *many]).devices
    assert wanted is not None
    long = devices_v2.program(devices.policy(wanted))
    assert len(long) // 8 > 4096  # all that a program had before Linux 5.2
    os.close(bpf.bpf_prog_load_device(long))
