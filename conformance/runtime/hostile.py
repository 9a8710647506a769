"""Hostile bundles: what an image or a volume may plant to lead a runtime out of its container.

A subset of the known holes of low-level runtimes ("threats S21" and so on name the rows of threats.md), with markers
outside of the rootfs that are looked at afterwards. None of them needs luck: races are not here, but in tests/.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box, listen, receive_terminal
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.runtime.stdio import read_until

case = Group("hostile").case


def still_works(box: Box) -> None:
    """An ordinary container runs."""
    assert box.bundle("echo", "works").run().ok() == "works\n"


class Outside:
    """A directory of the host with a file in it, which nothing may change."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.directory = box.make_directory("outside", marker="untouched\n", ptmx="untouched\n", null="untouched\n")
        self._before = self._look()

    def _look(self) -> list[tuple[str, int, int, int, int, str]]:
        found = []
        for path in (self.directory, *sorted(self.directory.rglob("*"))):
            state = path.lstat()
            text = path.read_text() if stat.S_ISREG(state.st_mode) else ""
            found.append((str(path), state.st_ino, state.st_mode, state.st_uid, state.st_mtime_ns, text))
        return found

    def is_untouched(self) -> None:
        """Nothing was changed, and an ordinary container still works: refusing everything is no protection."""
        assert self._look() == self._before, self._look()
        still_works(self._box)


def without(one: Bundle, *destinations: str) -> Bundle:
    """Takes mounts out of the config."""
    one.config["mounts"] = [mount for mount in one.config["mounts"] if mount["destination"] not in destinations]
    return one


@case()
def proc_is_a_link_in_the_rootfs(box: Box) -> None:
    """threats S3, S6: labels and sysctls would be written to files of the image's choice."""
    for target in ("/tmp", "tmp", "/nowhere", "../../outside", "proc"):
        one = box.bundle()
        (one.rootfs / "proc").rmdir()
        (one.rootfs / "proc").symlink_to(target)
        one.create().failed("ordinary directory")
    still_works(box)


@case()
def sys_is_a_link_in_the_rootfs(box: Box) -> None:
    """threats S6."""
    one = box.bundle().mount("/sys", "sysfs", "sysfs", "ro")
    (one.rootfs / "sys").rmdir()
    (one.rootfs / "sys").symlink_to("/tmp")
    one.create().failed("ordinary directory")
    still_works(box)


@case()
def a_mount_below_proc_is_refused(box: Box) -> None:
    """threats S2: a volume over /proc/self/attr or /proc/sys would take what the runtime writes there."""
    source = box.make_directory("source")
    for target in ("/proc/sys", "/proc/self/attr", "/proc/1"):
        box.bundle().mount(target, "bind", source, "bind").create().failed("proc")


@case()
def a_tmpfs_on_proc_is_refused(box: Box) -> None:
    """threats S2."""
    box.bundle().mount("/proc", "tmpfs", "tmpfs").create().failed("proc")


@case()
def lxcfs_files_below_proc_are_fine(box: Box) -> None:
    """The fixed list of files that operators bind into /proc stays possible."""
    source = box.make_directory("source", uptime="1.00 2.00\n")
    one = box.bundle("cat", "/proc/uptime").mount("/proc/uptime", "bind", source / "uptime", "bind")
    assert one.run().ok() == "1.00 2.00\n"


@case()
def dev_is_a_link_out_of_the_rootfs(box: Box) -> None:
    """threats S14: nothing at the other end may be removed, made or replaced."""
    outside = Outside(box)
    for target in (str(outside.directory), "../../own-outside"):
        one = without(box.bundle("true"), "/dev/pts", "/dev")
        (one.rootfs / "dev").rmdir()
        (one.rootfs / "dev").symlink_to(target)
        one.run()
        outside.is_untouched()


@case()
def links_in_the_place_of_devices(box: Box) -> None:
    """threats S10, S14: null, ptmx and fd of an image without a tmpfs on /dev."""
    outside = Outside(box)
    one = without(box.bundle("true"), "/dev/pts", "/dev")
    for name in ("null", "ptmx", "fd", "console", "zero"):
        (one.rootfs / "dev" / name).symlink_to(outside.directory / "marker")
    one.run()
    outside.is_untouched()


@case()
def a_masked_path_where_dev_null_is_a_link(box: Box) -> None:
    """threats S10: the mask would be whatever the link leads to."""
    one = without(box.sh("cat /etc/passwd; cat /etc/secret"), "/dev/pts", "/dev")
    (one.rootfs / "etc/secret").write_text("the secret\n")
    (one.rootfs / "dev/null").symlink_to("/etc/group")
    one.linux["maskedPaths"] = ["/etc/secret"]
    assert "the secret" not in one.run().text
    still_works(box)


@case()
def the_target_of_a_file_mount_is_a_link_out(box: Box) -> None:
    """threats S21: what a runtime makes for a mount stays in the rootfs."""
    outside = Outside(box)
    source = box.make_directory("source", file="text\n") / "file"
    one = box.bundle("true").mount("/etc/hosts", "bind", source, "bind")
    (one.rootfs / "etc/hosts").symlink_to(outside.directory / "made")
    one.run()
    outside.is_untouched()


@case()
def the_target_of_a_tmpfs_is_a_link_out(box: Box) -> None:
    outside = Outside(box)
    before = kernel.mounts()
    one = box.bundle("sh", "-c", "echo x > /data/x").mount("/data", "tmpfs", "tmpfs")
    (one.rootfs / "data").symlink_to("../" * 20 + str(outside.directory).lstrip("/"))
    one.run()
    outside.is_untouched()
    assert kernel.mounts() == before


@case()
def cwd_through_a_descriptor_of_the_runtime(box: Box) -> None:
    """threats S8: /proc/self/fd/N of an early cwd would be a directory of the host."""
    for number in (*range(3, 20), 64):
        one = box.bundle("cat", "marker", "../marker", "../../marker")
        one.process["cwd"] = f"/proc/self/fd/{number}"
        (box.directory / "marker").write_text("of the host\n")
        assert "of the host" not in one.run().text, number
    still_works(box)


@case()
def exec_cwd_through_a_descriptor_of_the_runtime(box: Box) -> None:
    """threats S8."""
    one = box.bundle().up()
    Path(box.directory / "marker").write_text("of the host\n")
    for number in range(3, 16):
        said = one.exec("cat", "marker", "../marker", flags=("--cwd", f"/proc/self/fd/{number}"))
        assert "of the host" not in said.text, number
    assert one.exec("echo", "works").ok() == "works\n"


@case()
def the_command_through_a_descriptor_of_the_runtime(box: Box) -> None:
    """threats S8: a program of the host would run inside."""
    for number in range(3, 12):
        one = box.bundle(f"/proc/self/fd/{number}/bin/busybox", "echo", "ran")
        assert "ran" not in one.run().text, number
    still_works(box)


@case()
def the_runtime_cannot_be_written_from_inside(box: Box) -> None:
    """threats S1: a container that runs the runtime's own binary again by /proc/self/exe."""
    before = Path(box.runtime).read_bytes()
    one = box.bundle("/proc/self/exe", "--version")
    said = one.run()
    assert "version" not in said.text or said.code != 0 or "spec" not in said.text, said
    two = box.bundle().up()
    two.exec("/proc/self/exe", "--version")
    assert two.exec("echo", "works").ok() == "works\n"
    assert Path(box.runtime).read_bytes() == before


@case()
def the_inheritable_set_is_empty_in_exec(box: Box) -> None:
    """threats S5."""
    one = box.bundle().up()
    for flags in ((), ("--cap", "CAP_NET_BIND_SERVICE"), ("--user", "1000")):
        said = one.exec("grep", "CapInh", "/proc/self/status", flags=flags).ok()
        assert int(said.split()[1], 16) == 0, flags


@case()
def exec_user_one_is_not_root(box: Box) -> None:
    """threats S15, S16: a numeric user is that number, also where the image has a name of those digits."""
    one = box.bundle()
    (one.rootfs / "etc/passwd").write_text("1:x:0:0::/:/bin/sh\n1000:x:0:0::/:/bin/sh\n")
    one.up()
    for user, wanted in (("1", "1"), ("1:2", "1"), ("1000", "1000")):
        assert one.exec("id", "-u", flags=("--user", user)).ok().strip() == wanted


@case()
def dev_console_where_pts_is_hostile(box: Box) -> None:
    """threats S11: the console is a terminal of the container's own devpts, whatever lies at /dev/pts in the image."""
    one = box.sh("stat -c 'console %t' /dev/console; sleep 1000")
    (one.rootfs / "dev/pts").mkdir()
    (one.rootfs / "dev/pts/0").symlink_to("/proc/sys/kernel/core_pattern")
    one.process["terminal"] = True
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    with listen(box.path("console")) as listener:
        one.create("--console-socket", str(box.path("console"))).ok()
        master = receive_terminal(listener)
    one.start().ok()
    # Major 88: terminals of devpts.
    assert "console 88" in read_until(master, "\n").replace("\r", "")
    os.close(master)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


@case()
def ids_that_lead_out_of_the_root(box: Box) -> None:
    """threats S19."""
    one = box.bundle("true")
    one.write()
    outside = Outside(box)
    for name in ("../own-outside", "..", ".", "a/../../x", "x" * 5000, "-x"):
        assert box.call("create", "--bundle", str(one.path), name).code != 0, name[:20]
        assert box.call("delete", "--force", name).code in (0, 1)
    outside.is_untouched()


@case()
def a_container_cannot_see_the_processes_of_the_host(box: Box) -> None:
    said = box.sh("ls -d /proc/[0-9]*; true").run().lines()
    assert said == ["/proc/1"], said


@case()
def core_pattern_is_not_for_containers(box: Box) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    one = box.sh("echo '|/x' > /proc/sys/kernel/core_pattern")
    one.linux["readonlyPaths"] = ["/proc/sys"]
    assert "Read-only file system" in one.run().failed()
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before
