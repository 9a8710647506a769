"""create, start, kill, delete, state: the states of a container, each order that is wrong, and what is left after."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.cases import Group
from conformance.harness.kernel import eventually

case = Group("lifecycle").case


@case()
def create_does_not_run_the_command(box: Box) -> None:
    one = box.sh("echo up > /tmp/up")
    one.create().ok()
    assert one.status() == "created"
    assert not (one.rootfs / "tmp/up").exists()
    one.start().ok()
    assert one.written("tmp/up") == "up\n"


@case()
def state_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.config["annotations"] = {"org.example.key": "a value"}
    one.create().ok()
    state = one.state()
    assert state["id"] == one.id and state["status"] == "created" and state["bundle"] == str(one.path)
    assert state["ociVersion"].startswith("1.") and state["annotations"] == {"org.example.key": "a value"}
    assert kernel.alive(state["pid"])


@case()
def state_has_rootfs_created_and_owner(box: Box) -> None:
    state = box.bundle().up().state()
    assert state["rootfs"] == f"{state['bundle']}/rootfs"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", state["created"]), state["created"]
    assert state["owner"] == ""


@case()
def state_of_a_running_container(box: Box) -> None:
    one = box.bundle().up()
    assert one.status() == "running"
    assert kernel.proc(one.pid(), "cmdline") == "sleep\x001000\x00"


@case()
def state_of_a_stopped_container_has_no_pid(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    assert one.state()["pid"] == 0


@case()
def state_of_a_paused_container(box: Box) -> None:
    one = box.bundle().up()
    box.call("pause", one.id).ok()
    assert one.status() == "paused"
    box.call("resume", one.id).ok()
    assert one.status() == "running"


@case()
def the_pid_stays_the_same_through_start(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    before = one.pid()
    one.start().ok()
    assert one.pid() == before


@case()
def start_twice_is_refused(box: Box) -> None:
    one = box.bundle().up()
    one.start().failed("cannot start an already running container")
    assert one.status() == "running"


@case()
def start_of_a_stopped_container_is_refused(box: Box) -> None:
    one = box.bundle("true").up().becomes("stopped")
    one.start().failed("cannot start a container that has stopped")


@case()
def start_of_an_unknown_container(box: Box) -> None:
    box.call("start", "unknown").failed("container does not exist", code=1)


@case()
def state_of_an_unknown_container(box: Box) -> None:
    box.call("state", "unknown").failed("container does not exist", code=1)


@case()
def kill_of_an_unknown_container(box: Box) -> None:
    box.call("kill", "unknown", "TERM").failed("container does not exist", code=1)


@case()
def delete_of_an_unknown_container(box: Box) -> None:
    box.call("delete", "unknown").failed("container does not exist", code=1)


@case()
def delete_force_of_an_unknown_container_succeeds(box: Box) -> None:
    one = box.bundle().up()
    box.call("delete", "--force", "unknown").ok()
    assert one.status() == "running"


@case()
def create_with_an_id_that_exists(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    pid = one.pid()
    one.create().failed("container with given ID already exists")
    assert one.pid() == pid and one.status() == "created"


@case()
def run_with_an_id_that_exists(box: Box) -> None:
    one = box.bundle().up()
    one.run().failed("container with given ID already exists")
    assert one.status() == "running"


@case()
def an_id_can_be_used_again_after_delete(box: Box) -> None:
    one = box.bundle().up().stopped()
    one.delete().ok()
    one.up()
    assert one.status() == "running"


@case()
def two_containers_from_one_bundle(box: Box) -> None:
    one = box.bundle()
    one.write()
    for name in ("first", "second"):
        one.config["linux"]["cgroupsPath"] = f"{box.cgroup}/{name}"
        one.write()
        box.call("create", "--bundle", str(one.path), name).ok()
    states = [box.call("state", name).json() for name in ("first", "second")]
    assert states[0]["pid"] != states[1]["pid"] and states[0]["bundle"] == states[1]["bundle"]


@case()
def delete_of_a_running_container_is_refused(box: Box) -> None:
    one = box.bundle().up()
    one.delete().failed("cannot delete container", "that is not stopped")
    assert one.status() == "running"


@case()
def delete_force_of_a_running_container(box: Box) -> None:
    one = box.bundle().up()
    pid = one.pid()
    one.delete("--force").ok()
    assert not kernel.alive(pid)
    box.call("state", one.id).failed("container does not exist")


@case()
def delete_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    pid = one.pid()
    one.delete().ok()
    eventually(lambda: not kernel.alive(pid), "the process of a deleted container to end")
    box.call("state", one.id).failed("container does not exist")


@case()
def delete_force_of_a_created_container(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    one.delete("--force").ok()
    box.call("state", one.id).failed("container does not exist")


@case("freezer")
def delete_force_of_a_paused_container(box: Box) -> None:
    one = box.bundle().up()
    pid = one.pid()
    box.call("pause", one.id).ok()
    one.delete("--force").ok()
    eventually(lambda: not kernel.alive(pid), "the process of a paused container to end")


@case()
def delete_removes_state_and_cgroups(box: Box) -> None:
    one = box.bundle().up().stopped()
    assert (box.root / one.id).is_dir()
    one.delete().ok()
    assert not (box.root / one.id).exists()
    for top in kernel.hierarchies():
        assert not (top / one.cgroup.lstrip("/")).exists(), top


@case()
def delete_twice(box: Box) -> None:
    one = box.bundle().up().stopped()
    one.delete().ok()
    one.delete().failed("container does not exist")


@case()
def create_writes_the_pid_file(box: Box) -> None:
    one = box.bundle()
    file = box.path("pid")
    one.create("--pid-file", str(file)).ok()
    assert file.read_text() == str(one.pid())


@case()
def run_detach_writes_the_pid_file(box: Box) -> None:
    one = box.bundle()
    file = box.path("pid")
    one.run("--detach", "--pid-file", str(file)).ok()
    assert file.read_text() == str(one.pid())


@case()
def a_pid_file_that_cannot_be_written_fails_create(box: Box) -> None:
    one = box.bundle()
    one.create("--pid-file", str(box.path("no") / "pid")).failed("no such file or directory")
    box.call("state", one.id).failed("container does not exist")


@case()
def a_failed_create_leaves_nothing(box: Box) -> None:
    one = box.bundle("no-such-command")
    one.create().failed("executable file not found in $PATH")
    box.call("state", one.id).failed("container does not exist")
    assert not (box.root / one.id).exists()
    for top in kernel.hierarchies():
        assert not (top / one.cgroup.lstrip("/")).exists(), top


@case()
def a_failed_mount_leaves_nothing(box: Box) -> None:
    one = box.bundle().mount("/mnt", "bind", box.path("missing"), "bind")
    one.create().failed("no such file or directory")
    assert not (box.root / one.id).exists()


@case()
def state_files_are_not_for_others(box: Box) -> None:
    one = box.bundle().up()
    assert (box.root / one.id).stat().st_mode & 0o066 == 0
    saved = json.loads((box.root / one.id / "state.json").read_text())
    assert saved["id"] == one.id and saved["init_process_pid"] == one.pid()


@case()
def the_saved_state_has_what_tools_read(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    saved = json.loads((box.root / one.id / "state.json").read_text())
    pid = one.pid()
    assert {"created", "init_process_start", "cgroup_paths", "namespace_paths", "config"} <= saved.keys()
    assert saved["namespace_paths"]["NEWNS"] == f"/proc/{pid}/ns/mnt"
    assert saved["init_process_start"] == int(kernel.proc(pid, "stat").rpartition(")")[2].split()[19])
    for path in saved["cgroup_paths"].values():
        assert str(pid) in (Path(path) / "cgroup.procs").read_text().split()


@case()
def a_start_that_fails_in_execve_leaves_a_stopped_container(box: Box) -> None:
    one = box.bundle("/broken")
    (one.rootfs / "broken").write_bytes(b"\x7fELF and nothing more")
    (one.rootfs / "broken").chmod(0o755)
    one.create().ok()
    one.start()
    one.becomes("stopped")
    one.delete().ok()


@case()
def the_init_that_dies_before_start(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    os.kill(one.pid(), signal.SIGKILL)
    one.becomes("stopped")
    one.start().failed("cannot start a container that has stopped")
    one.delete().ok()


@case()
def a_second_root_knows_nothing_of_the_first(box: Box) -> None:
    one = box.bundle().up()
    elsewhere = [box.runtime, "--root", str(box.path("root")), "state", one.id]
    box.execute(elsewhere).failed("container does not exist")


@case()
def a_root_is_made_when_it_is_missing(box: Box) -> None:
    assert not box.root.exists()
    box.bundle().create().ok()
    assert box.root.stat().st_mode & 0o077 in (0, 0o011)


@case()
def a_container_outlives_the_directory_of_its_caller(box: Box) -> None:
    one = box.bundle()
    one.write()
    away = box.make_directory("away")
    box.call("create", "--bundle", str(one.path), one.id, cwd=away).ok()
    away.rmdir()
    one.start().ok()
    assert one.status() == "running"
