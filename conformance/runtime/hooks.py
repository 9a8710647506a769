"""Hooks: all six kinds, when and where each runs, what it is told, and what its failure means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group

case = Group("hooks").case

BEFORE_START = ("prestart", "createRuntime", "createContainer")


def hook(script: str, *more: str, **fields: Any) -> dict[str, Any]:
    """A hook that runs a shell script of the host."""
    return {"path": "/bin/sh", "args": ["sh", "-c", script, "hook", *more], **fields}


def add(one: Bundle, kind: str, *entries: dict[str, Any]) -> Bundle:
    one.config.setdefault("hooks", {}).setdefault(kind, []).extend(entries)
    return one


def told(box: Box, kind: str) -> dict[str, Any]:
    """What a hook of ours that wrote its stdin to a file was told."""
    found: dict[str, Any] = json.loads(box.path(kind).read_text())
    return found


def telling(box: Box, one: Bundle, kind: str) -> Bundle:
    return add(one, kind, hook(f"cat > {box.path(kind)}"))


@case()
def every_kind_runs_once_and_in_order(box: Box) -> None:
    one = box.sh("echo command >> /tmp/order")
    order = one.rootfs / "tmp/order"
    for kind in (*BEFORE_START, "poststop"):
        add(one, kind, hook(f"echo {kind} >> {order}"))
    add(one, "startContainer", hook("echo startContainer >> /tmp/order"))
    one.create().ok()
    assert order.read_text().split() == list(BEFORE_START), order.read_text()
    one.start().ok()
    one.becomes("stopped")
    assert order.read_text().split() == [*BEFORE_START, "startContainer", "command"]
    one.delete().ok()
    assert order.read_text().split() == [*BEFORE_START, "startContainer", "command", "poststop"]


@case()
def several_of_a_kind_run_in_their_order(box: Box) -> None:
    one = add(box.bundle("true"), "createRuntime", *(hook(f"echo {number} >> {box.path('out')}") for number in "123"))
    one.run().ok()
    assert box.path("out").read_text().split() == ["1", "2", "3"]


@case()
def prestart_and_create_runtime_are_told_of_the_container(box: Box) -> None:
    one = box.bundle()
    one.config["annotations"] = {"key": "value"}
    for kind in ("prestart", "createRuntime"):
        telling(box, one, kind)
    one.create().ok()
    for kind in ("prestart", "createRuntime"):
        state = told(box, kind)
        assert state["id"] == one.id and state["pid"] == one.pid() and state["bundle"] == str(one.path)
        assert state["status"] == "creating" and state["annotations"]["key"] == "value", state
        assert state["ociVersion"].startswith("1.")


@case()
def create_container_is_told_of_the_container(box: Box) -> None:
    one = telling(box, box.bundle(), "createContainer")
    one.create().ok()
    state = told(box, "createContainer")
    assert state["id"] == one.id and state["status"] in ("creating", "created")


@case()
def poststart_runs_with_start_and_not_with_create(box: Box) -> None:
    one = telling(box, box.bundle(), "poststart")
    one.create().ok()
    assert not box.path("poststart").exists()
    one.start().ok()
    assert box.path("poststart").exists()


@case()
def poststart_is_told_that_it_runs(box: Box) -> None:
    one = telling(box, box.bundle(), "poststart").up()
    state = told(box, "poststart")
    assert (state["id"], state["pid"], state["status"]) == (one.id, one.pid(), "running"), state


@case()
def poststop_is_told_that_it_stopped(box: Box) -> None:
    one = telling(box, box.bundle(), "poststop").up().stopped()
    assert not box.path("poststop").exists()
    one.delete().ok()
    state = told(box, "poststop")
    assert (state["id"], state["status"]) == (one.id, "stopped")


@case()
def start_container_runs_inside(box: Box) -> None:
    one = box.bundle()
    add(one, "startContainer", {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/told; hostname > /tmp/name"]})
    one.config["hostname"] = "inside"
    one.create().ok()
    assert not (one.rootfs / "tmp/told").exists()
    one.start().ok()
    assert one.written("tmp/name") == "inside\n"
    assert json.loads((one.rootfs / "tmp/told").read_text())["id"] == one.id


@case()
def create_runtime_runs_in_the_namespaces_of_the_runtime(box: Box) -> None:
    out = box.path("out")
    kinds = ("mnt", "net", "pid", "uts")
    script = f"for n in {' '.join(kinds)}; do readlink /proc/self/ns/$n; done > {out}"
    add(box.bundle("true"), "createRuntime", hook(script)).run().ok()
    assert out.read_text().split() == [kernel.namespace("self", kind) for kind in kinds]


@case()
def create_container_runs_in_the_container_s_namespaces(box: Box) -> None:
    one = box.bundle()
    out = box.path("out")
    # The rootfs is not yet /: the programs and the paths are the host's.
    script = f"for n in mnt net uts; do readlink /proc/self/ns/$n; done > {out}"
    add(one, "createContainer", hook(script)).create().ok()
    assert out.read_text().split() == [kernel.namespace(one.pid(), kind) for kind in ("mnt", "net", "uts")]


@case()
def a_network_can_be_made_in_prestart(box: Box) -> None:
    one = box.bundle("cat", "/proc/net/dev")
    script = "pid=$(sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p'); nsenter -t $pid -n ip link add made type bridge"
    add(one, "prestart", hook(script))
    assert "made:" in one.run().ok()


@case()
def arguments_and_environment_of_a_hook(box: Box) -> None:
    out = box.path("out")
    script = f'echo "$0 $1 $A ${{SECRET:-none}}" > {out}'
    entry = {"path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["A=a", "PATH=/bin"]}
    add(box.bundle("true"), "createRuntime", entry).run(env={**os.environ, "SECRET": "x"}).ok()
    assert out.read_text() == "zero one a none\n"


@case()
def a_hook_with_a_relative_path_is_refused(box: Box) -> None:
    add(box.bundle(), "createRuntime", {"path": "true"}).create().failed("true")


@case()
def a_hook_that_is_missing_fails_create(box: Box) -> None:
    add(box.bundle(), "createRuntime", {"path": "/nowhere/hook"}).create().failed("no such file or directory")


def fails_create(box: Box, kind: str) -> None:
    """A hook of that kind that fails makes create fail with what it said, and leaves nothing."""
    one = add(box.bundle(), kind, hook("echo the reason >&2; exit 3"))
    said = one.create().failed("hook")
    assert "3" in said
    box.call("state", one.id).failed("container does not exist")


@case()
def a_failing_prestart_fails_create(box: Box) -> None:
    fails_create(box, "prestart")


@case()
def a_failing_create_runtime_fails_create(box: Box) -> None:
    fails_create(box, "createRuntime")


@case()
def a_failing_create_container_fails_create(box: Box) -> None:
    fails_create(box, "createContainer")


@case()
def what_a_failing_hook_said_is_in_the_message(box: Box) -> None:
    add(box.bundle(), "createRuntime", hook("echo the reason >&2; exit 3")).create().failed("the reason")


@case()
def after_a_failing_hook_no_other_runs(box: Box) -> None:
    out = box.path("out")
    add(box.bundle(), "createRuntime", hook("exit 1"), hook(f"echo > {out}")).create().failed("exit status 1")
    assert not out.exists()


@case()
def a_failing_start_container_keeps_the_command_from_running(box: Box) -> None:
    one = box.sh("echo > /tmp/ran")
    add(one, "startContainer", {"path": "/bin/sh", "args": ["sh", "-c", "exit 1"]})
    one.create().ok()
    one.start()
    one.becomes("stopped")
    assert not (one.rootfs / "tmp/ran").exists()


@case()
def a_failing_poststop_does_not_keep_the_container(box: Box) -> None:
    one = add(box.bundle("true"), "poststop", hook("exit 1")).up().becomes("stopped")
    one.delete().ok()
    box.call("state", one.id).failed("container does not exist")


@case()
def a_hook_that_takes_too_long_fails_create(box: Box) -> None:
    one = add(box.bundle(), "createRuntime", hook("exec sleep 1000", timeout=1))
    one.create().failed("timeout of 1")
    assert not (box.root / one.id).exists()


@case()
def a_hook_within_its_time_is_fine(box: Box) -> None:
    one = add(box.bundle("echo", "ran"), "createRuntime", hook("exit 0", timeout=20))
    assert one.run().ok() == "ran\n"


@case()
def the_rootfs_is_mounted_when_create_container_runs(box: Box) -> None:
    source = box.make_directory("source", file="text\n")
    one = box.bundle().mount("/mnt", "bind", source, "bind")
    out = box.path("out")
    add(one, "createContainer", hook(f"cat {one.rootfs}/mnt/file > {out}")).create().ok()
    assert out.read_text() == "text\n"
    assert not Path(one.rootfs / "mnt/file").exists()
