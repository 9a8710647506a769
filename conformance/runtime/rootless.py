"""An ordinary user runs containers: its own ids alone, its own directories, no cgroups of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from conformance.harness import kernel
from conformance.harness.box import Box, Result
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group, Skip
from conformance.harness.rootfs import make_rootfs

case = Group("rootless", "userns").case

USER = 4242


def bundle(box: Box, *args: str) -> Bundle:
    """A bundle that belongs to an ordinary user, and maps it to root inside."""
    one = box.bundle(*args)
    shutil.rmtree(one.rootfs)
    # A hard link of root's busybox cannot be given away.
    make_rootfs(one.rootfs, box.directory, own_binary=True)
    one.namespace("user").without_namespace("network").without_namespace("cgroup")
    del one.linux["cgroupsPath"]
    for key in ("uidMappings", "gidMappings"):
        one.linux[key] = [{"containerID": 0, "hostID": USER, "size": 1}]
    return one


def give_away(box: Box) -> None:
    """The case's directory becomes the user's."""
    for directory, names, files in os.walk(box.directory):
        for name in (".", *names, *files):
            os.lchown(os.path.join(directory, name), USER, USER)


def as_user(box: Box, one: Bundle, *words: str, **changes: Any) -> Result:
    """The runtime as that user."""
    one.write()
    give_away(box)
    home = box.directory / "home"
    home.mkdir(exist_ok=True)
    os.chown(home, USER, USER)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    drop: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": [], "env": environment, "cwd": home}
    return box.call(*words, **{**drop, **changes})


def readable_runtime(box: Box) -> None:
    """Some trees are root's alone; then an ordinary user has no runtime, and there is nothing to be seen."""
    said = subprocess.run(
        [box.runtime, "--version"], user=USER, group=USER, extra_groups=[], capture_output=True, check=False
    )
    if said.returncode:
        raise Skip(f"an ordinary user cannot run {box.runtime}")


@case()
def run_as_an_ordinary_user(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box, "sh", "-c", "id -u; id -g; cat /proc/self/uid_map")
    lines = as_user(box, one, "run", "--bundle", str(one.path), one.id).lines()
    assert lines[:2] == ["0", "0"] and lines[2].split() == ["0", str(USER), "1"]


@case()
def what_it_makes_belongs_to_the_user(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box, "touch", "/tmp/made")
    as_user(box, one, "run", "--bundle", str(one.path), one.id).ok()
    assert (one.rootfs / "tmp/made").stat().st_uid == USER


@case()
def create_start_exec_kill_delete_as_an_ordinary_user(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box)
    as_user(box, one, "create", "--bundle", str(one.path), one.id).ok()
    as_user(box, one, "start", one.id).ok()
    assert as_user(box, one, "exec", one.id, "id", "-u").ok() == "0\n"
    pid = as_user(box, one, "state", one.id).json()["pid"]
    assert set(kernel.status(pid)["Uid"].split()) == {str(USER)}
    as_user(box, one, "kill", one.id, "KILL").ok()
    kernel.eventually(lambda: not kernel.alive(pid), "it to end")
    as_user(box, one, "delete", one.id).ok()


@case()
def a_config_of_spec_rootless_runs(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box)
    as_user(box, one, "state", "none").failed()
    (one.path / "config.json").unlink()
    home = box.directory / "home"
    drop: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": [], "cwd": one.path}
    drop["env"] = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(home)}
    box.call("spec", "--rootless", **drop).ok()
    config = json.loads((one.path / "config.json").read_text())
    config["process"].update(terminal=False, args=["id", "-u"])
    (one.path / "config.json").write_text(json.dumps(config))
    assert box.call("run", one.id, **drop).ok() == "0\n"


@case()
def mappings_of_others_are_refused(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box)
    one.linux["uidMappings"] = [{"containerID": 0, "hostID": 0, "size": 1}]
    as_user(box, one, "create", "--bundle", str(one.path), one.id).failed()


@case()
def without_a_user_namespace_it_is_refused(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box).without_namespace("user")
    del one.linux["uidMappings"], one.linux["gidMappings"]
    as_user(box, one, "create", "--bundle", str(one.path), one.id).failed("requires user namespaces")


@case("newuidmap")
def several_ids_through_newuidmap(box: Box) -> None:
    readable_runtime(box)
    one = bundle(box, "cat", "/proc/self/uid_map")
    for key in ("uidMappings", "gidMappings"):
        one.linux[key].append({"containerID": 1, "hostID": 500_000, "size": 1000})
    passwd = Path("/etc/passwd").read_text()
    entries = {"/etc/passwd": f"{passwd}conformance:x:{USER}:{USER}::/:/bin/sh\n"}
    entries |= dict.fromkeys(("/etc/subuid", "/etc/subgid"), "conformance:500000:1000\n")
    # Seen in this worker's mount namespace alone.
    for name, text in entries.items():
        box.path(Path(name).name).write_text(text)
    prepared = []
    try:
        for name in entries:
            box.path(Path(name).name).chmod(0o644)
            box.execute(["mount", "--bind", str(box.path(Path(name).name)), name]).ok()
            prepared.append(name)
        lines = as_user(box, one, "run", "--bundle", str(one.path), one.id).lines()
        assert [line.split() for line in lines] == [["0", str(USER), "1"], ["1", "500000", "1000"]]
    finally:
        for name in prepared:
            box.execute(["umount", name]).ok()
