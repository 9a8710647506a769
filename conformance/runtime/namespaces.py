"""Namespaces: each kind made new, joined by its path, and left out; what is refused; hostname and user mappings."""

from __future__ import annotations

import os
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group

case = Group("namespaces").case

KINDS = {"mount": "mnt", "pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup"}


def new_one(box: Box, kind: str) -> int:
    """The pid of a container, whose namespace of that kind was seen to be another than ours."""
    pid = box.bundle().up().pid()
    assert kernel.namespace(pid, KINDS[kind]) != kernel.namespace("self", KINDS[kind])
    return pid


def shared(box: Box, kind: str) -> Bundle:
    """A container without that namespace in its config, seen to be in ours."""
    one = box.bundle().without_namespace(kind).up()
    assert kernel.namespace(one.pid(), KINDS[kind]) == kernel.namespace("self", KINDS[kind])
    return one


def joined(box: Box, kind: str) -> Bundle:
    """A container that joined the namespace of another by its path."""
    first = box.bundle().up()
    path = f"/proc/{first.pid()}/ns/{KINDS[kind]}"
    second = box.bundle().namespace(kind, path).up()
    assert kernel.namespace(second.pid(), KINDS[kind]) == os.readlink(path)
    return second


@case()
def a_new_mount_namespace(box: Box) -> None:
    root = kernel.mount_at("/", new_one(box, "mount"))
    assert root.root.endswith("/rootfs") or root.source


@case()
def a_new_pid_namespace(box: Box) -> None:
    pid = new_one(box, "pid")
    assert kernel.status(pid)["NSpid"].split()[-1] == "1"


@case()
def a_new_network_namespace(box: Box) -> None:
    new_one(box, "network")
    assert box.sh("ls /sys/class/net").mount("/sys", "sysfs", "sysfs", "ro").run().ok().split() == ["lo"]


@case()
def loopback_is_up_in_a_new_network_namespace(box: Box) -> None:
    assert "LOOPBACK,UP" in box.sh("ip link show lo").run().ok()


@case()
def a_new_ipc_namespace(box: Box) -> None:
    new_one(box, "ipc")


@case()
def a_new_uts_namespace(box: Box) -> None:
    new_one(box, "uts")


@case("cgroupns")
def a_new_cgroup_namespace(box: Box) -> None:
    new_one(box, "cgroup")
    for line in box.bundle("cat", "/proc/self/cgroup").run().lines():
        # A hierarchy without controllers of ours may keep the process where the caller was.
        assert line.split(":", 2)[2] in ("/", "/..") or not line.split(":", 2)[1], line


@case("cgroupns")
def the_cgroup_namespace_is_rooted_in_the_container_s_cgroup(box: Box) -> None:
    lines = box.bundle("cat", "/proc/self/cgroup").run().lines()
    memory = [line for line in lines if ":memory:" in line or line.startswith("0::")]
    assert any(line.endswith(":/") for line in memory), lines


@case()
def no_pid_namespace_of_its_own(box: Box) -> None:
    one = shared(box, "pid")
    assert len(kernel.status(one.pid())["NSpid"].split()) == len(kernel.status(os.getpid())["NSpid"].split())


@case()
def no_network_namespace_of_its_own(box: Box) -> None:
    shared(box, "network")


@case()
def no_ipc_namespace_of_its_own(box: Box) -> None:
    shared(box, "ipc")


@case()
def no_uts_namespace_of_its_own(box: Box) -> None:
    shared(box, "uts")


@case("cgroupns")
def no_cgroup_namespace_of_its_own(box: Box) -> None:
    one = shared(box, "cgroup")
    assert one.cgroup in kernel.proc(one.pid(), "cgroup")


@case()
def join_a_pid_namespace(box: Box) -> None:
    second = joined(box, "pid")
    assert kernel.status(second.pid())["NSpid"].split()[-1] != "1"


@case()
def join_a_network_namespace(box: Box) -> None:
    joined(box, "network")


@case()
def join_an_ipc_namespace(box: Box) -> None:
    joined(box, "ipc")


@case()
def join_a_uts_namespace(box: Box) -> None:
    first = box.bundle()
    first.config["hostname"] = "theirs"
    first.up()
    second = box.bundle("hostname").namespace("uts", f"/proc/{first.pid()}/ns/uts")
    assert second.run().ok() == "theirs\n"


@case("cgroupns")
def join_a_cgroup_namespace(box: Box) -> None:
    joined(box, "cgroup")


@case()
def join_a_namespace_that_is_pinned_by_a_bind_mount(box: Box) -> None:
    first = box.bundle().up()
    pin = box.path("netns")
    pin.touch()
    box.execute(["mount", "--bind", f"/proc/{first.pid()}/ns/net", str(pin)]).ok()
    try:
        inode = kernel.namespace(first.pid(), "net")
        second = box.bundle("readlink", "/proc/self/ns/net").namespace("network", str(pin))
        assert second.run().ok().strip() == inode
    finally:
        box.execute(["umount", str(pin)]).ok()


@case()
def join_several_at_once(box: Box) -> None:
    first = box.bundle().up()
    second = box.bundle()
    for kind in ("network", "ipc", "uts", "pid"):
        second.namespace(kind, f"/proc/{first.pid()}/ns/{KINDS[kind]}")
    pid = second.up().pid()
    for kind in ("net", "ipc", "uts", "pid"):
        assert kernel.namespace(pid, kind) == kernel.namespace(first.pid(), kind), kind


@case()
def a_namespace_path_that_is_not_there(box: Box) -> None:
    box.bundle().namespace("network", str(box.path("missing"))).create().failed("no such file or directory")


@case()
def a_namespace_path_of_another_kind(box: Box) -> None:
    box.bundle().namespace("network", "/proc/self/ns/uts").create().failed("net")


@case()
def a_namespace_path_that_is_an_ordinary_file(box: Box) -> None:
    path = box.path("file")
    path.touch()
    box.bundle().namespace("ipc", str(path)).create().failed("ipc namespace")


@case()
def a_namespace_twice(box: Box) -> None:
    one = box.bundle()
    one.linux["namespaces"].append({"type": "uts"})
    one.create().failed("uts", code=1)


@case()
def a_namespace_of_a_kind_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.linux["namespaces"].append({"type": "magic"})
    one.create().failed("magic")


@case()
def the_order_of_namespaces_does_not_matter(box: Box) -> None:
    one = box.bundle("id", "-u").user_namespace()
    one.linux["namespaces"].reverse()
    assert one.run().ok() == "0\n"


@case()
def hostname(box: Box) -> None:
    one = box.bundle("hostname")
    one.config["hostname"] = "a-name.example"
    assert one.run().ok() == "a-name.example\n"


@case()
def the_hostname_of_the_caller_stays(box: Box) -> None:
    before = os.uname().nodename
    one = box.bundle("hostname")
    one.config["hostname"] = "other"
    assert one.run().ok() == "other\n"
    assert os.uname().nodename == before


@case()
def a_hostname_without_a_uts_namespace_is_refused(box: Box) -> None:
    one = box.bundle().without_namespace("uts")
    one.config["hostname"] = "other"
    one.create().failed("hostname")


@case()
def domainname(box: Box) -> None:
    one = box.bundle("cat", "/proc/sys/kernel/domainname")
    one.config["domainname"] = "a.domain"
    assert one.run().ok() == "a.domain\n"


@case()
def an_ipc_namespace_has_its_own_message_queues(box: Box) -> None:
    one = box.sh("ls /dev/mqueue | wc -l").mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev")
    assert one.run().ok().strip() == "0"


# ------------------------------------------------------------------------------------------------------------ user


@case("userns")
def a_user_namespace_maps_ids(box: Box) -> None:
    one = box.bundle().user_namespace().up()
    pid = one.pid()
    assert kernel.namespace(pid, "user") != kernel.namespace("self", "user")
    assert kernel.proc(pid, "uid_map").split() == ["0", "100000", "65536"]
    assert kernel.proc(pid, "gid_map").split() == ["0", "100000", "65536"]
    assert kernel.status(pid)["Uid"].split()[0] == "100000"


@case("userns")
def inside_a_user_namespace_root_is_root(box: Box) -> None:
    assert box.sh("id -u; stat -c %u /bin; touch /tmp/x; stat -c %u:%g /tmp/x").user_namespace().run().lines() == [
        "0",
        "0",
        "0:0",
    ]


@case("userns")
def a_user_namespace_with_several_ranges(box: Box) -> None:
    one = box.bundle().user_namespace()
    ranges = [(0, 100_000, 10), (10, 200_000, 5), (1000, 300_000, 1)]
    for key in ("uidMappings", "gidMappings"):
        one.linux[key] = [{"containerID": inside, "hostID": host, "size": size} for inside, host, size in ranges]
    one.process["user"] = {"uid": 1000, "gid": 12}
    one.up()
    assert kernel.status(one.pid())["Uid"].split()[0] == "300000"
    assert kernel.status(one.pid())["Gid"].split()[0] == "200002"
    lines = [tuple(map(int, line.split())) for line in kernel.proc(one.pid(), "uid_map").splitlines()]
    assert lines == ranges


@case("userns")
def a_user_that_is_not_mapped_is_refused(box: Box) -> None:
    one = box.bundle().user_namespace(size=100)
    one.process["user"] = {"uid": 5000, "gid": 0}
    one.create().failed("unmapped user")


@case("userns")
def join_a_user_namespace(box: Box) -> None:
    first = box.bundle().user_namespace().up()
    second = box.bundle().user_namespace()
    second.namespace("user", f"/proc/{first.pid()}/ns/user")
    for key in ("uidMappings", "gidMappings"):
        del second.linux[key]
    second.up()
    assert kernel.namespace(second.pid(), "user") == kernel.namespace(first.pid(), "user")


@case("userns")
def other_namespaces_belong_to_the_user_namespace(box: Box) -> None:
    # Root of a user namespace may change the hostname only of a uts namespace that it owns.
    one = box.sh("hostname changed; hostname").user_namespace()
    one.capabilities("CAP_SYS_ADMIN")
    assert one.run().ok() == "changed\n"


@case("userns")
def mappings_without_a_user_namespace_are_refused(box: Box) -> None:
    one = box.bundle()
    one.linux["uidMappings"] = [{"containerID": 0, "hostID": 100_000, "size": 10}]
    one.linux["gidMappings"] = [{"containerID": 0, "hostID": 100_000, "size": 10}]
    one.create().failed("user")


@case("userns")
def a_user_namespace_without_mappings_is_refused(box: Box) -> None:
    one = box.bundle().user_namespace()
    del one.linux["uidMappings"], one.linux["gidMappings"]
    one.create().failed("mapping")


@case("userns")
def proc_and_sys_in_a_user_namespace(box: Box) -> None:
    one = box.sh("cat /proc/1/comm; test -d /sys/kernel && echo sys").user_namespace()
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    assert one.run().lines() == ["sh", "sys"]


@case("userns")
def default_devices_in_a_user_namespace(box: Box) -> None:
    one = box.sh("echo x > /dev/null && head -c 4 /dev/zero | wc -c").user_namespace()
    assert one.run().ok().strip() == "4"


@case("userns")
def exec_in_a_user_namespace(box: Box) -> None:
    one = box.bundle().user_namespace().up()
    assert one.exec("sh", "-c", "id -u; readlink /proc/self/ns/user").lines() == [
        "0",
        kernel.namespace(one.pid(), "user"),
    ]


# ------------------------------------------------------------------------------------------------------------ time


@case("timens")
def a_time_namespace_with_offsets(box: Box) -> None:
    one = box.bundle("cat", "/proc/uptime").namespace("time")
    one.linux["timeOffsets"] = {"boottime": {"secs": 1_000_000, "nanosecs": 0}}
    uptime = float(one.run().ok().split()[0])
    here = float(Path("/proc/uptime").read_text().split()[0])
    assert 999_000 < uptime - here < 1_001_000, (uptime, here)


@case("timens")
def a_time_namespace_with_a_monotonic_offset(box: Box) -> None:
    one = box.bundle("cat", "/proc/self/timens_offsets").namespace("time")
    one.linux["timeOffsets"] = {"monotonic": {"secs": 100, "nanosecs": 5}}
    lines = {line.split()[0]: line.split()[1:] for line in one.run().lines()}
    assert lines["monotonic"] == ["100", "5"]


@case("timens")
def join_a_time_namespace(box: Box) -> None:
    first = box.bundle().namespace("time").up()
    second = box.bundle().namespace("time", f"/proc/{first.pid()}/ns/time").up()
    assert kernel.namespace(second.pid(), "time") == kernel.namespace(first.pid(), "time")


@case("timens")
def exec_joins_the_time_namespace(box: Box) -> None:
    one = box.bundle().namespace("time").up()
    assert one.exec("readlink", "/proc/self/ns/time").ok().strip() == kernel.namespace(one.pid(), "time")


@case("timens")
def time_offsets_without_a_time_namespace_are_refused(box: Box) -> None:
    one = box.bundle()
    one.linux["timeOffsets"] = {"boottime": {"secs": 5}}
    one.create().failed("time namespace")
