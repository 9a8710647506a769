"""Mounts: every kind, option and propagation, seen in the container's own mount table; what a target may be."""

from __future__ import annotations

import os
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.harness.kernel import MountPoint

case = Group("mounts").case


def seen(one: Bundle, target: str) -> MountPoint:
    """The mount at a target, as the container sees it once it is up."""
    return kernel.mount_at(target, one.up().pid())


def bound(box: Box, *options: str) -> MountPoint:
    """A directory of ours bound to /mnt with options; how it shows in the container."""
    source = box.make_directory("source", file="text")
    return seen(box.bundle().mount("/mnt", "bind", source, *options), "/mnt")


# ------------------------------------------------------------------------------------------------------------ binds


@case()
def bind_of_a_directory(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.sh("cat /mnt/file; echo back > /mnt/written").mount("/mnt", "bind", source, "bind")
    assert one.run().ok() == "text\n"
    assert (source / "written").read_text() == "back\n"


@case()
def bind_of_a_file(box: Box) -> None:
    source = box.make_directory("source", file="text\n") / "file"
    one = box.sh("cat /etc/bound").mount("/etc/bound", "bind", source, "bind")
    assert one.run().ok() == "text\n"
    assert (one.rootfs / "etc/bound").read_text() == ""


@case()
def bind_over_a_file_that_is_there(box: Box) -> None:
    source = box.make_directory("source", file="theirs\n") / "file"
    one = box.bundle("cat", "/etc/hosts").mount("/etc/hosts", "bind", source, "bind")
    (one.rootfs / "etc/hosts").write_text("mine\n")
    assert one.run().ok() == "theirs\n"
    assert (one.rootfs / "etc/hosts").read_text() == "mine\n"


@case()
def the_type_of_a_bind_may_be_none_or_missing(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle("cat", "/a/file", "/b/file").mount("/a", "none", source, "bind")
    one.config["mounts"].append({"destination": "/b", "source": str(source), "options": ["bind"]})
    assert one.run().ok() == "text\ntext\n"


@case()
def a_target_is_made_with_its_parents(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle("cat", "/a/b/c/file").mount("/a/b/c", "bind", source, "bind")
    assert one.run().ok() == "text\n"
    assert (one.rootfs / "a/b/c").is_dir() and (one.rootfs / "a/b").stat().st_mode & 0o777 == 0o755


@case()
def bind_is_not_recursive_and_rbind_is(box: Box) -> None:
    source = box.make_directory("source")
    (source / "below").mkdir()
    box.execute(["mount", "-t", "tmpfs", "below", str(source / "below")]).ok()
    try:
        (source / "below/file").write_text("text\n")
        one = box.sh("ls /one/below; ls /two/below")
        one.mount("/one", "bind", source, "bind").mount("/two", "bind", source, "rbind")
        assert one.run().ok() == "file\n"
    finally:
        box.execute(["umount", str(source / "below")]).ok()


@case()
def read_only(box: Box) -> None:
    source = box.make_directory("source")
    one = box.sh("touch /mnt/x 2>&1").mount("/mnt", "bind", source, "bind", "ro")
    said = one.run()
    assert said.code == 1 and "Read-only file system" in said.text
    assert not (source / "x").exists()


@case()
def the_last_of_ro_and_rw_counts(box: Box) -> None:
    assert "rw" in bound(box, "bind", "ro", "rw").options


@case()
def nosuid_nodev_noexec(box: Box) -> None:
    assert {"nosuid", "nodev", "noexec"} <= bound(box, "bind", "nosuid", "nodev", "noexec").options


@case()
def noexec_keeps_programs_from_running(box: Box) -> None:
    source = box.make_directory("source", program="#!/bin/sh\necho ran\n")
    (source / "program").chmod(0o755)
    one = box.bundle("/mnt/program").mount("/mnt", "bind", source, "bind", "noexec")
    one.run().failed("permission denied")
    one.config["mounts"][-1]["options"] = ["bind"]
    assert one.run().ok() == "ran\n"


@case()
def noatime_and_relatime(box: Box) -> None:
    assert "noatime" in bound(box, "bind", "noatime").options


@case()
def strictatime(box: Box) -> None:
    assert not {"noatime", "relatime"} & bound(box, "bind", "strictatime").options


@case()
def nodiratime(box: Box) -> None:
    assert "nodiratime" in bound(box, "bind", "nodiratime").options


@case()
def a_bind_of_a_read_only_source_stays_so(box: Box) -> None:
    source = box.make_directory("source")
    box.execute(["mount", "--bind", str(source), str(source)]).ok()
    try:
        box.execute(["mount", "-o", "remount,bind,ro,nosuid,nodev", str(source)]).ok()
        assert {"ro", "nosuid", "nodev"} <= seen(box.bundle().mount("/mnt", "bind", source, "bind"), "/mnt").options
    finally:
        box.execute(["umount", str(source)]).ok()


@case()
def remount_of_a_bind(box: Box) -> None:
    source = box.make_directory("source")
    one = box.bundle().mount("/mnt", "bind", source, "bind")
    one.mount("/mnt", "", "", "remount", "bind", "ro")
    assert "ro" in seen(one, "/mnt").options


@case("rro")
def recursive_read_only(box: Box) -> None:
    source = box.make_directory("source")
    (source / "below").mkdir()
    box.execute(["mount", "-t", "tmpfs", "below", str(source / "below")]).ok()
    try:
        one = box.bundle().mount("/mnt", "bind", source, "rbind", "rro").up()
        assert "ro" in kernel.mount_at("/mnt/below", one.pid()).options
    finally:
        box.execute(["umount", str(source / "below")]).ok()


@case("rro")
def recursive_nosuid_nodev_noexec(box: Box) -> None:
    source = box.make_directory("source")
    (source / "below").mkdir()
    box.execute(["mount", "-t", "tmpfs", "below", str(source / "below")]).ok()
    try:
        one = box.bundle().mount("/mnt", "bind", source, "rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime").up()
        assert {"nosuid", "nodev", "noexec", "noatime"} <= kernel.mount_at("/mnt/below", one.pid()).options
    finally:
        box.execute(["umount", str(source / "below")]).ok()


@case()
def ro_alone_leaves_submounts_writable(box: Box) -> None:
    source = box.make_directory("source")
    (source / "below").mkdir()
    box.execute(["mount", "-t", "tmpfs", "below", str(source / "below")]).ok()
    try:
        one = box.bundle().mount("/mnt", "bind", source, "rbind", "ro").up()
        assert "ro" in kernel.mount_at("/mnt", one.pid()).options
        assert "rw" in kernel.mount_at("/mnt/below", one.pid()).options
    finally:
        box.execute(["umount", str(source / "below")]).ok()


@case()
def a_source_that_is_missing(box: Box) -> None:
    box.bundle().mount("/mnt", "bind", box.path("missing"), "bind").create().failed("no such file or directory")


@case()
def an_option_that_nobody_knows_reaches_the_filesystem(box: Box) -> None:
    box.bundle().mount("/mnt", "tmpfs", "tmpfs", "nonsense").create().failed("invalid argument")


@case()
def a_filesystem_that_nobody_knows(box: Box) -> None:
    box.bundle().mount("/mnt", "nonsensefs", "x").create().failed("no such device")


@case()
def a_later_mount_hides_an_earlier_one(box: Box) -> None:
    first, second = box.make_directory("first", file="first\n"), box.make_directory("second", file="second\n")
    one = box.bundle("cat", "/mnt/file").mount("/mnt", "bind", first, "bind").mount("/mnt", "bind", second, "bind")
    assert one.run().ok() == "second\n"


@case()
def a_mount_inside_a_mount(box: Box) -> None:
    outer, inner = box.make_directory("outer"), box.make_directory("inner", file="inner\n")
    one = box.bundle("cat", "/mnt/a/file").mount("/mnt", "bind", outer, "bind").mount("/mnt/a", "bind", inner, "bind")
    assert one.run().ok() == "inner\n"
    assert (outer / "a").is_dir()


@case()
def the_source_of_a_bind_may_be_relative_to_the_bundle(box: Box) -> None:
    one = box.bundle("cat", "/mnt/name").mount("/mnt", "bind", "beside", "bind")
    (one.path / "beside").mkdir()
    (one.path / "beside/name").write_text("beside\n")
    assert one.run().ok() == "beside\n"


@case()
def names_with_spaces_and_unicode(box: Box) -> None:
    source = box.make_directory("a source – ü", file="text\n")
    assert box.bundle("cat", "/m n t ü/file").mount("/m n t ü", "bind", source, "bind").run().ok() == "text\n"


# ---------------------------------------------------------------------------------------------- symlinks at the target


@case()
def an_absolute_link_at_the_target_stays_in_the_rootfs(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle("cat", "/real/file").mount("/link", "bind", source, "bind")
    (one.rootfs / "real").mkdir()
    (one.rootfs / "link").symlink_to("/real")
    assert one.run().ok() == "text\n"


@case()
def a_dangling_link_at_the_target_is_followed_inside(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle("cat", "/made/below/file").mount("/link", "bind", source, "bind")
    (one.rootfs / "link").symlink_to("/made/below")
    assert one.run().ok() == "text\n"
    assert (one.rootfs / "made/below").is_dir() and not Path("/made").exists()


@case()
def a_link_on_the_way_to_the_target_stays_in_the_rootfs(box: Box) -> None:
    outside = box.make_directory("outside")
    source = box.make_directory("source", file="text\n")
    one = box.bundle("true").mount("/link/below", "bind", source, "bind")
    (one.rootfs / "link").symlink_to(outside)
    one.run()
    assert os.listdir(outside) == []
    assert box.bundle("echo", "works").run().ok() == "works\n"


@case()
def dots_in_a_target_stay_in_the_rootfs(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle("cat", "/up/file").mount("/../../up", "bind", source, "bind")
    assert one.run().ok() == "text\n"
    assert not (one.path / "up").exists() and not (one.path.parent / "up").exists()


# ------------------------------------------------------------------------------------------------------------- tmpfs


@case()
def tmpfs_with_size_and_mode(box: Box) -> None:
    one = box.sh("stat -c %a /mnt; df -k /mnt | tail -n 1")
    one.mount("/mnt", "tmpfs", "tmpfs", "size=64k", "mode=1700", "nosuid")
    mode, usage = one.run().lines()
    assert mode == "1700" and usage.split()[1] == "64"


@case()
def tmpfs_with_uid_and_gid(box: Box) -> None:
    one = box.bundle("stat", "-c", "%u:%g", "/mnt").mount("/mnt", "tmpfs", "tmpfs", "uid=5", "gid=6")
    assert one.run().ok() == "5:6\n"


@case()
def tmpfs_is_empty_and_gone_afterwards(box: Box) -> None:
    one = box.sh("ls -A /mnt; echo x > /mnt/file; cat /mnt/file").mount("/mnt", "tmpfs", "tmpfs")
    (one.rootfs / "mnt").mkdir()
    (one.rootfs / "mnt/hidden").touch()
    assert one.run().ok() == "x\n"
    assert os.listdir(one.rootfs / "mnt") == ["hidden"]


@case()
def tmpcopyup_brings_what_was_there(box: Box) -> None:
    one = box.sh("cat /etc/group; stat -c %a /etc/below; echo x > /etc/new")
    one.mount("/etc", "tmpfs", "tmpfs", "tmpcopyup")
    (one.rootfs / "etc/group").write_text("a group\n")
    (one.rootfs / "etc/below").mkdir()
    (one.rootfs / "etc/below").chmod(0o701)
    assert one.run().ok() == "a group\n701\n"
    assert not (one.rootfs / "etc/new").exists()


@case()
def tmpfs_read_only(box: Box) -> None:
    assert "ro" in seen(box.bundle().mount("/mnt", "tmpfs", "tmpfs", "ro"), "/mnt").options
