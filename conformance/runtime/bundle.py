"""Bundles, roots and ids: where a container's files are looked for, what it may be called, what is refused."""

from __future__ import annotations

from conformance.harness.box import Box
from conformance.harness.cases import Group

case = Group("bundle").case


@case()
def the_bundle_defaults_to_the_working_directory(box: Box) -> None:
    one = box.bundle("echo", "ran")
    one.write()
    assert box.call("run", one.id, cwd=one.path).ok() == "ran\n"


@case()
def a_relative_bundle(box: Box) -> None:
    one = box.bundle()
    one.write()
    box.call("create", "--bundle", one.path.name, one.id, cwd=one.path.parent).ok()
    assert one.state()["bundle"] == str(one.path)


@case()
def a_bundle_without_a_config(box: Box) -> None:
    empty = box.make_directory("empty")
    box.call("create", "--bundle", str(empty), "x").failed("config.json", code=1)


@case()
def a_config_that_is_not_json(box: Box) -> None:
    bad = box.make_directory("bad", **{"config.json": '{"ociVersion": '})
    box.call("create", "--bundle", str(bad), "x").failed(code=1)


@case()
def a_config_without_a_rootfs(box: Box) -> None:
    one = box.bundle()
    one.config["root"]["path"] = "nowhere"
    one.create().failed("no such file or directory")


@case()
def a_config_without_a_process_cannot_start(box: Box) -> None:
    one = box.bundle()
    del one.config["process"]
    one.create().failed("process")


@case()
def an_absolute_root_path(box: Box) -> None:
    one = box.sh("test -x /bin/busybox && echo there")
    one.config["root"]["path"] = str(one.rootfs)
    assert one.run().ok() == "there\n"


@case()
def ids_of_every_legal_character(box: Box) -> None:
    one = box.bundle("echo", "ran")
    one.write()
    for name in ("a", "A-b_c.d+e", "0", "_x", "x" * 100):
        assert box.call("run", "--bundle", str(one.path), name).ok() == "ran\n"


@case()
def ids_that_are_refused(box: Box) -> None:
    one = box.bundle("true")
    one.write()
    for name in ("a/b", "..", "", "a b", "ü", "a\nb", "a:b"):
        box.call("create", "--bundle", str(one.path), name).failed(
            "invalid container id format" if name else "id", code=1
        )


@case()
def an_id_is_needed_and_only_one(box: Box) -> None:
    one = box.bundle("true")
    one.write()
    box.call("create", "--bundle", str(one.path)).failed("requires exactly 1 argument", code=1)
    box.call("create", "--bundle", str(one.path), "a", "b").failed("requires exactly 1 argument", code=1)
