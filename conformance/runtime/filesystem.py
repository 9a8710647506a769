"""What the runtime itself puts into a rootfs: /dev, /proc, /sys, masked and read-only paths, cgroups, id mappings."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.cases import Group
from conformance.harness.kernel import MountPoint

case = Group("filesystem").case

DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}


@case()
def the_default_devices(box: Box) -> None:
    script = f"cd /dev && stat -c '%n %t:%T %a %u:%g' {' '.join(sorted(DEVICES))}"
    lines = box.sh(script).run().lines()
    assert lines == [f"{name} {DEVICES[name][0]:x}:{DEVICES[name][1]:x} 666 0:0" for name in sorted(DEVICES)]


@case()
def the_default_devices_work(box: Box) -> None:
    said = box.sh("echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 5 /dev/urandom | wc -c; echo > /dev/full")
    result = said.run()
    assert [line.strip() for line in result.text.splitlines()] == ["3", "5"]
    assert result.code != 0 and "No space left" in result.error


@case()
def links_in_dev(box: Box) -> None:
    links = {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
    }
    lines = box.sh(f"cd /dev; for l in {' '.join(links)} ptmx; do readlink $l; done").run().lines()
    assert lines == [*links.values(), "pts/ptmx"]


@case()
def devices_of_the_config(box: Box) -> None:
    one = box.bundle("stat", "-c", "%F %t:%T %a %u:%g", "/dev/mine", "/dev/below/block")
    one.linux["devices"] = [
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/below/block", "type": "b", "major": 7, "minor": 0, "fileMode": 0o600},
    ]
    assert one.run().lines() == ["character special file 1:3 640 5:6", "block special file 7:0 600 0:0"]


@case()
def a_fifo_of_the_config(box: Box) -> None:
    one = box.bundle("stat", "-c", "%F %a", "/dev/pipe")
    one.linux["devices"] = [{"path": "/dev/pipe", "type": "p", "fileMode": 0o622}]
    assert one.run().ok() == "fifo 622\n"


@case()
def a_device_of_a_type_that_is_none(box: Box) -> None:
    one = box.bundle()
    one.linux["devices"] = [{"path": "/dev/mine", "type": "x", "major": 1, "minor": 3}]
    one.create().failed('"x"')


@case()
def a_bind_of_dev_gets_no_devices(box: Box) -> None:
    source = box.make_directory("dev")
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    one = box.sh("ls /dev; echo end")
    one.config["mounts"] = [mount for mount in one.config["mounts"] if not mount["destination"].startswith("/dev")]
    one.mount("/dev", "bind", source, "bind")
    assert one.run().ok() == "null\nend\n"
    assert os.listdir(source) == ["null"]


@case()
def devpts_is_its_own_instance(box: Box) -> None:
    one = box.bundle("ls", "/dev/pts")
    assert one.run().ok().split() == ["ptmx"]


@case()
def proc_is_that_of_the_pid_namespace(box: Box) -> None:
    assert box.sh("ls -d /proc/[0-9]*; cat /proc/1/comm; true").run().lines() == ["/proc/1", "sh"]


@case()
def proc_options(box: Box) -> None:
    found = kernel.mount_at("/proc", box.bundle().up().pid())
    assert {"nosuid", "noexec", "nodev"} <= found.options and found.kind == "proc"


@case()
def sysfs_read_only(box: Box) -> None:
    one = box.sh("test -d /sys/kernel && ! touch /sys/x 2>/dev/null && echo both")
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    assert one.run().ok() == "both\n"


@case()
def mqueue(box: Box) -> None:
    one = box.bundle().mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev").up()
    assert kernel.mount_at("/dev/mqueue", one.pid()).kind == "mqueue"


@case()
def shm_with_its_size(box: Box) -> None:
    one = box.sh("df -k /dev/shm | tail -n 1; stat -c %a /dev/shm")
    one.mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k")
    usage, mode = one.run().lines()
    assert usage.split()[1] == "65536" and mode == "1777"


# --------------------------------------------------------------------------------------- masked and read-only paths


@case()
def a_masked_file_reads_as_empty(box: Box) -> None:
    one = box.sh("cat /etc/passwd; wc -l < /etc/group")
    one.linux["maskedPaths"] = ["/etc/passwd"]
    assert one.run().ok().strip() == "2"


@case()
def a_masked_file_is_dev_null(box: Box) -> None:
    one = box.bundle("stat", "-c", "%t:%T", "/proc/timer_list")
    one.linux["maskedPaths"] = ["/proc/timer_list"]
    if not Path("/proc/timer_list").exists():
        one.process["args"][-1] = "/proc/version"
        one.linux["maskedPaths"] = ["/proc/version"]
    assert one.run().ok() == "1:3\n"


@case()
def a_masked_directory_is_empty_and_read_only(box: Box) -> None:
    one = box.sh("ls -A /etc; touch /etc/x 2>/dev/null && echo written; echo end")
    one.linux["maskedPaths"] = ["/etc"]
    assert one.run().text == "end\n"


@case()
def a_masked_path_that_is_missing_is_no_error(box: Box) -> None:
    one = box.bundle("echo", "ran")
    one.linux["maskedPaths"] = ["/nowhere", "/proc/nowhere/below"]
    assert one.run().ok() == "ran\n"
    assert not (one.rootfs / "nowhere").exists()


@case()
def a_read_only_path(box: Box) -> None:
    one = box.sh("cat /etc/group > /dev/null && touch /tmp/x && ! touch /etc/x 2>/dev/null && echo both")
    one.linux["readonlyPaths"] = ["/etc"]
    assert one.run().ok() == "both\n"


@case()
def a_read_only_path_in_proc(box: Box) -> None:
    one = box.sh("echo x > /proc/sys/kernel/domainname")
    one.capabilities("CAP_SYS_ADMIN")
    one.linux["readonlyPaths"] = ["/proc/sys"]
    said = one.run()
    assert said.code != 0 and "Read-only file system" in said.error


@case()
def a_read_only_path_that_is_missing_is_no_error(box: Box) -> None:
    one = box.bundle("echo", "ran")
    one.linux["readonlyPaths"] = ["/nowhere"]
    assert one.run().ok() == "ran\n"


@case()
def a_read_only_path_keeps_its_other_options(box: Box) -> None:
    one = box.bundle()
    one.linux["readonlyPaths"] = ["/proc/sys"]
    assert {"ro", "nosuid", "nodev", "noexec"} <= kernel.mount_at("/proc/sys", one.up().pid()).options


# ---------------------------------------------------------------------------------------------------------- cgroups


def cgroup_mount(box: Box, *options: str) -> list[MountPoint]:
    one = box.bundle().mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    one.mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", *options).up()
    return [point for point in kernel.mounts(one.pid()) if point.target.startswith("/sys/fs/cgroup")]


@case("cgroup1")
def a_cgroup_mount_shows_every_v1_controller(box: Box) -> None:
    found = cgroup_mount(box, "ro")
    shown = {name for point in found for name in point.superblock}
    assert {"cpu", "memory", "devices", "freezer", "pids"} <= shown
    assert found[0].kind == "tmpfs"


@case("cgroup1")
def a_cgroup_mount_that_is_read_only(box: Box) -> None:
    assert not [point for point in cgroup_mount(box, "ro") if point.kind == "cgroup" and "ro" not in point.options]


@case("cgroup1")
def a_cgroup_mount_that_is_writable(box: Box) -> None:
    [memory] = [point for point in cgroup_mount(box, "rw") if "memory" in point.superblock]
    assert "rw" in memory.options


@case("cgroup2")
def a_cgroup_mount_on_the_unified_hierarchy(box: Box) -> None:
    [found] = cgroup_mount(box, "ro")
    assert found.kind == "cgroup2" and "ro" in found.options


@case("cgroup1")
def the_cgroup_mount_shows_only_the_container_s_own(box: Box) -> None:
    one = box.sh("cat /sys/fs/cgroup/memory/cgroup.procs; ls /sys/fs/cgroup/memory | grep -c conformance")
    one.mount("/sys", "sysfs", "sysfs", "ro").mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro")
    said = one.run().text.split()
    assert "1" in said[:-1] and said[-1] == "0"


@case("cgroup1")
def the_cgroup_mount_without_a_cgroup_namespace(box: Box) -> None:
    one = box.sh("cat /sys/fs/cgroup/pids/cgroup.procs").without_namespace("cgroup")
    one.mount("/sys", "sysfs", "sysfs", "ro").mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro")
    assert "1" in one.run().ok().split()


# ----------------------------------------------------------------------------------------------------- id mappings


@case("idmap", "userns")
def an_idmapped_bind_in_a_user_namespace(box: Box) -> None:
    source = box.make_directory("source", file="x")
    os.chown(source / "file", 1000, 1000)
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    one = box.bundle("stat", "-c", "%u:%g", "/mnt/file").user_namespace()
    one.mount("/mnt", "bind", source, "bind", "idmap", uidMappings=mapping, gidMappings=mapping)
    assert one.run().ok() == "1000:1000\n"


@case("idmap", "userns")
def what_is_written_through_an_idmapped_bind(box: Box) -> None:
    source = box.make_directory("source")
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    one = box.bundle("touch", "/mnt/made").user_namespace()
    one.mount("/mnt", "bind", source, "bind", "idmap", uidMappings=mapping, gidMappings=mapping).run().ok()
    assert (source / "made").stat().st_uid == 0


@case("idmap")
def an_idmapped_bind_with_a_mapping_of_its_own(box: Box) -> None:
    source = box.make_directory("source", file="x")
    os.chown(source / "file", 1000, 1001)
    one = box.bundle("stat", "-c", "%u:%g", "/mnt/file")
    one.mount(
        *("/mnt", "bind", source, "bind", "idmap"),
        uidMappings=[{"containerID": 1000, "hostID": 2000, "size": 1}],
        gidMappings=[{"containerID": 1001, "hostID": 2001, "size": 1}],
    )
    assert one.run().ok() == "2000:2001\n"


@case("idmap")
def mount_mappings_without_idmap_or_bind_are_refused(box: Box) -> None:
    mapping = [{"containerID": 0, "hostID": 100_000, "size": 10}]
    one = box.bundle().mount("/mnt", "tmpfs", "tmpfs", uidMappings=mapping, gidMappings=mapping)
    one.create().failed("bind")


@case()
def the_rootfs_is_left_as_it_was(box: Box) -> None:
    one = box.bundle("echo", "ran")
    before = {str(path): (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_uid) for path in one.rootfs.rglob("*")}
    assert one.run().ok() == "ran\n"
    after = {str(path): (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_uid) for path in one.rootfs.rglob("*")}
    assert after == before
