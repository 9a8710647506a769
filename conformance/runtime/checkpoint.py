"""checkpoint and restore through CRIU, where it is."""

from __future__ import annotations

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually

group = Group("checkpoint", "criu")
case = group.case
anywhere = Group("checkpoint").case


def counting(box: Box) -> Bundle:
    """A container that counts in a file, up."""
    one = box.sh("i=0; while :; do i=$((i+1)); echo $i > /tmp/n; sleep 0.05; done").up()
    one.written("tmp/n")
    return one


def count(one: Bundle) -> int:
    return int((one.rootfs / "tmp/n").read_text() or 0)


@case()
def a_checkpoint_ends_the_container_and_restore_goes_on(box: Box) -> None:
    one = counting(box)
    pid = one.pid()
    image = box.path("image")
    box.call("checkpoint", "--image-path", str(image), "--work-path", str(box.make_directory("work")), one.id).ok()
    assert not kernel.alive(pid)
    before = count(one)
    assert (image / "inventory.img").exists()
    box.call("delete", "--force", one.id)
    box.call("restore", "-d", "--image-path", str(image), "--bundle", str(one.path), one.id).ok()
    assert one.status() == "running"
    eventually(lambda: count(one) > before, "it to go on counting")


@case()
def leave_running(box: Box) -> None:
    one = counting(box)
    box.call("checkpoint", "--leave-running", "--image-path", str(box.path("image")), one.id).ok()
    before = count(one)
    assert one.status() == "running"
    eventually(lambda: count(one) > before, "it to go on counting")


@case()
def a_pre_dump_leaves_it_running(box: Box) -> None:
    one = counting(box)
    box.call("checkpoint", "--pre-dump", "--image-path", str(box.path("parent")), one.id).ok()
    assert one.status() == "running"


@case()
def checkpoint_of_a_stopped_container(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    box.call("checkpoint", "--image-path", str(box.path("image")), one.id).failed()


@anywhere()
def checkpoint_of_an_unknown_container(box: Box) -> None:
    box.call("checkpoint", "unknown").failed("container does not exist")


@anywhere()
def checkpoint_without_criu_says_so(box: Box) -> None:
    one = box.bundle().up()
    box.flags = ("--criu", "/nowhere/criu")
    box.call("checkpoint", "--image-path", str(box.path("image")), one.id).failed("criu")
    box.flags = ()
    assert one.status() == "running"
