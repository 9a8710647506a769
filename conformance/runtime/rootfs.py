"""Propagation of mounts, and the root filesystem as a mount: shared, read-only, an overlay, pivoted or not."""

from __future__ import annotations

from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.runtime.mounts import bound, seen

case = Group("rootfs").case


# ------------------------------------------------------------------------------------------------------- propagation


def propagation(box: Box, *options: str) -> frozenset[str]:
    return bound(box, "rbind", *options).propagation


@case()
def a_bind_is_private_by_default(box: Box) -> None:
    assert propagation(box) == frozenset()


@case()
def shared_propagation(box: Box) -> None:
    assert "shared" in propagation(box, "shared")


@case()
def unbindable_propagation(box: Box) -> None:
    assert "unbindable" in propagation(box, "unbindable")


def with_shared_source(box: Box, *options: str, root: str = "") -> tuple[Bundle, Path]:
    """A container on a source that is a shared mount here; the source."""
    source = box.make_directory("source")
    box.execute(["mount", "-t", "tmpfs", "source", str(source)]).ok()
    box.execute(["mount", "--make-shared", str(source)]).ok()
    (source / "below").mkdir()
    one = box.bundle().mount("/mnt", "bind", source, "rbind", *options)
    if root:
        one.linux["rootfsPropagation"] = root
    return one, source


@case()
def rslave_receives_later_mounts(box: Box) -> None:
    one, source = with_shared_source(box, "rslave", root="rslave")
    try:
        one.up()
        assert "master" in kernel.mount_at("/mnt", one.pid()).propagation
        box.execute(["mount", "-t", "tmpfs", "later", str(source / "below")]).ok()
        assert kernel.mount_at("/mnt/below", one.pid()).source == "later"
    finally:
        box.execute(["umount", "-R", str(source)]).ok()


@case()
def rprivate_does_not_receive_later_mounts(box: Box) -> None:
    one, source = with_shared_source(box, "rprivate")
    try:
        one.up()
        box.execute(["mount", "-t", "tmpfs", "later", str(source / "below")]).ok()
        assert "/mnt/below" not in [point.target for point in kernel.mounts(one.pid())]
    finally:
        box.execute(["umount", "-R", str(source)]).ok()


@case()
def rshared_sends_mounts_out(box: Box) -> None:
    one, source = with_shared_source(box, "rshared", root="rshared")
    one.process["args"] = ["sh", "-c", "mount -t tmpfs inside /mnt/below && echo > /tmp/up && sleep 1000"]
    one.capabilities("CAP_SYS_ADMIN")
    try:
        one.up().written("tmp/up")
        assert kernel.mount_at(str(source / "below")).source == "inside"
    finally:
        box.execute(["umount", "-R", str(source)]).ok()


@case()
def the_root_is_private_with_rootfs_propagation_private(box: Box) -> None:
    one = box.bundle()
    one.linux["rootfsPropagation"] = "private"
    assert not seen(one, "/").propagation


@case()
def the_root_is_shared_with_rootfs_propagation_shared(box: Box) -> None:
    one = box.bundle()
    one.linux["rootfsPropagation"] = "shared"
    assert "shared" in seen(one, "/").propagation


@case()
def the_root_is_unbindable_with_rootfs_propagation_unbindable(box: Box) -> None:
    one = box.bundle()
    one.linux["rootfsPropagation"] = "unbindable"
    assert "unbindable" in seen(one, "/").propagation


# -------------------------------------------------------------------------------------------------------- the rootfs


@case()
def a_read_only_root(box: Box) -> None:
    one = box.sh("touch /x 2>&1")
    one.config["root"]["readonly"] = True
    said = one.run()
    assert said.code != 0 and "Read-only file system" in said.text
    assert not (one.rootfs / "x").exists()


@case()
def mounts_on_a_read_only_root_are_writable(box: Box) -> None:
    one = box.sh("echo x > /mnt/x && cat /mnt/x").mount("/mnt", "tmpfs", "tmpfs")
    one.config["root"]["readonly"] = True
    assert one.run().ok() == "x\n"


@case()
def the_old_root_is_gone(box: Box) -> None:
    one = box.bundle().up()
    targets = [point.target for point in kernel.mounts(one.pid())]
    assert targets[0] == "/" and not [target for target in targets if str(box.directory) in target], targets


@case()
def mounts_do_not_show_on_the_host(box: Box) -> None:
    before = kernel.mounts()
    one = box.bundle().mount("/mnt", "tmpfs", "tmpfs").up()
    assert kernel.mount_at("/mnt", one.pid()).kind == "tmpfs"
    assert kernel.mounts() == before


@case()
def no_pivot(box: Box) -> None:
    one = box.sh("ls /; cat /proc/1/comm; true")
    said = one.run("--no-pivot").lines()
    assert said[-1] == "sh" and "bin" in said


@case("overlay")
def a_rootfs_that_is_an_overlay(box: Box) -> None:
    one = box.sh("cat /etc/passwd > /etc/copy; wc -l < /etc/copy")
    lower, upper, work = one.rootfs, box.make_directory("upper"), box.make_directory("work")
    merged = box.make_directory("merged")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    box.execute(["mount", "-t", "overlay", "-o", options, "overlay", str(merged)]).ok()
    try:
        one.config["root"]["path"] = str(merged)
        assert one.run().ok().strip() == "3"
        assert (upper / "etc/copy").exists() and not (lower / "etc/copy").exists()
    finally:
        box.execute(["umount", str(merged)]).ok()


@case("overlay")
def an_overlay_as_a_mount(box: Box) -> None:
    lower, upper, work = (box.make_directory(name) for name in ("lower", "upper", "work"))
    (lower / "file").write_text("lower\n")
    one = box.sh("cat /mnt/file; echo new > /mnt/file")
    one.mount("/mnt", "overlay", "overlay", f"lowerdir={lower},upperdir={upper},workdir={work}")
    assert one.run().ok() == "lower\n"
    assert (upper / "file").read_text() == "new\n"
