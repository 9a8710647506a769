"""checkpoint and restore through Debian's criu on Debian's kernel: the same processes, with what they had in memory.

Here and not under tests/integration: criu must know the kernel's vdso, and Debian's is older than many kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.tree import children
from tests.bundles import Bundle, Bundles, Result
from tests.shims import lab
from tests.support import eventually

# Counts in a variable of the shell: only memory that came through can go on with it.
COUNT = "i=0; while read x; do i=$((i+1)); echo $i; done"


@dataclass
class Talk:
    """A container's stdin and stdout as this test's ends of pipes."""

    stdin: int
    stdout: int
    ends: tuple[int, int]
    heard: str = ""

    def say(self, line: str) -> None:
        os.write(self.stdin, f"{line}\n".encode())

    def hear(self, line: str) -> None:
        """Waits for that line to be the next one."""
        while "\n" not in self.heard:
            piece = os.read(self.stdout, 4096)
            assert piece, f"the container closed its stdout; before that it said {self.heard!r}"
            self.heard += piece.decode()
        first, _, self.heard = self.heard.partition("\n")
        assert first == line

    def close(self) -> None:
        for fd in (self.stdin, self.stdout, *self.ends):
            os.close(fd)


@pytest.fixture
def talks() -> Iterator[list[Talk]]:
    made: list[Talk] = []
    yield made
    for talk in made:
        talk.close()


def _talk(talks: list[Talk]) -> Talk:
    theirs_in, mine_in = os.pipe()
    mine_out, theirs_out = os.pipe()
    talks.append(Talk(mine_in, mine_out, (theirs_in, theirs_out)))
    return talks[-1]


def _up(bundle: Bundle, talk: Talk) -> Bundle:
    log = bundle.path / "create.errors"  # stderr is the container's
    bundle.write()
    words = ("--log", str(log), "create", "--bundle", str(bundle.path), bundle.id)
    made = bundle.home.ocirun(*words, stdin=talk.ends[0], stdout=talk.ends[1], stderr=talk.ends[1])
    assert made.code == 0, log.read_text()
    bundle.start().ok()
    return bundle


def _checkpoint(bundle: Bundle, *flags: str, images: str = "images") -> Result:
    result = bundle.home.ocirun("checkpoint", *flags, "--image-path", str(bundle.path / images), bundle.id, timeout=120)
    if result.code:
        _show_log(bundle.path / images / "dump.log")
    return result


def _restore(bundle: Bundle, talk: Talk | None = None, *flags: str, images: str = "images") -> Result:
    bundle.write()
    stdio = {} if talk is None else {"stdin": talk.ends[0], "stdout": talk.ends[1], "stderr": talk.ends[1]}
    where = ("--bundle", str(bundle.path), "--image-path", str(bundle.path / images))
    log = bundle.path / "restore.errors"  # stderr may be the container's
    words = ("--log", str(log), "restore", "--detach", *flags, *where, bundle.id)
    result = bundle.home.ocirun(*words, timeout=120, **stdio)
    if result.code:
        _show_log(bundle.path / images / "restore.log")
        result.error = log.read_text()
    return result


def _show_log(log: Path) -> None:
    if log.exists():
        print(*log.read_text(errors="replace").splitlines()[-60:], sep="\n")


@pytest.fixture
def counting(home: Bundles, talks: list[Talk]) -> tuple[Bundle, Talk]:
    """A container that has counted to two."""
    talk = _talk(talks)
    bundle = _up(home.sh(COUNT), talk)
    for number in ("1", "2"):
        talk.say("next")
        talk.hear(number)
    return bundle, talk


def test_memory_comes_back(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, _ = counting
    first = bundle.pid()
    _checkpoint(bundle).ok()
    bundle.gone()
    bundle.home.ocirun("state", bundle.id).failed("container does not exist")
    talk, pid_file = _talk(talks), bundle.path / "pid"
    _restore(bundle, talk, "--pid-file", str(pid_file)).ok()
    assert bundle.status() == "running"
    assert bundle.pid() == int(pid_file.read_text()) != first
    talk.say("next")
    talk.hear("3")
    assert f"{bundle.home.cgroup}/{bundle.id}" in Path(f"/proc/{bundle.pid()}/cgroup").read_text()
    assert bundle.exec("echo", "inside").ok() == "inside\n"
    bundle.delete().ok()
    bundle.gone()


def test_descriptors_are_named_as_runc_names_them(counting: tuple[Bundle, Talk]) -> None:
    bundle, talk = counting
    pipes = [os.readlink(f"/proc/self/fd/{fd}") for fd in (talk.ends[0], talk.ends[1], talk.ends[1])]
    _checkpoint(bundle, "--leave-running").ok()
    assert json.loads((bundle.path / "images/descriptors.json").read_text()) == pipes


def test_left_running_it_goes_on(counting: tuple[Bundle, Talk]) -> None:
    bundle, talk = counting
    pid = bundle.pid()
    _checkpoint(bundle, "--leave-running").ok()
    assert (bundle.status(), bundle.pid()) == ("running", pid)
    talk.say("next")
    talk.hear("3")


def test_a_pre_dump_is_the_parent_of_a_dump(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, talk = counting
    _checkpoint(bundle, "--pre-dump", images="before").ok()
    assert not (bundle.path / "before/descriptors.json").exists()
    talk.say("next")
    talk.hear("3")
    _checkpoint(bundle, "--parent-path", "../before").ok()
    assert os.readlink(bundle.path / "images/parent") == "../before"
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    talk.say("next")
    talk.hear("4")


def test_limits_are_those_of_the_bundle(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, _ = counting
    _checkpoint(bundle).ok()
    bundle.linux["resources"] = {"pids": {"limit": 77}, "memory": {"limit": 100 << 20}}
    _restore(bundle, _talk(talks)).ok()
    where = Path("/sys/fs/cgroup", bundle.home.cgroup, bundle.id)
    assert (where / "pids.max").read_text() == "77\n"
    assert (where / "memory.max").read_text() == f"{100 << 20}\n"
    assert str(bundle.pid()) in (where / "cgroup.procs").read_text().split()


def test_s71_images_with_more_rights_than_the_bundle_gives_are_refused(home: Bundles, talks: list[Talk]) -> None:
    # With children, for whose ends criu, which traces them, and the init would wait for ever.
    talk = _talk(talks)
    bundle = _up(home.sh("sleep 1111 & sleep 2222 & echo up; read x"), talk)
    talk.hear("up")
    _checkpoint(bundle).ok()
    bundle.process["capabilities"] = {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
    _restore(bundle, _talk(talks)).failed("capabilities in CapBnd that it may not have: CAP_CHOWN")
    bundle.gone()
    assert not list((bundle.path / "images").glob(".criu*"))


def test_s71_a_filter_that_the_bundle_asks_for_must_be_there(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, _ = counting
    _checkpoint(bundle).ok()
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    _restore(bundle, _talk(talks)).failed("has no seccomp filter")
    bundle.gone()


def test_a_filter_comes_back(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = home.sh("read x; mkdir /tmp/x; echo $?; read x")
    bundle.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    }
    _up(bundle, talk)
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    talk.say("go")
    talk.hear("mkdir: can't create directory '/tmp/x': Operation not permitted")
    talk.hear("1")


def test_mounts_come_from_the_bundle(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = home.sh("echo kept > /scratch/file; echo up; read x; cat /scratch/file /data/file; read x")
    for name in ("one", "two"):
        (bundle.path / name).mkdir()
        (bundle.path / name / "file").write_text(f"{name}\n")
    bundle.mount("/scratch", "tmpfs", "tmpfs")
    bundle.mount("/data", "bind", bundle.path / "one", "bind", "ro")
    bundle.linux["maskedPaths"] = ["/proc/kcore", "/proc/timer_list", "/sys/firmware"]
    bundle.linux["readonlyPaths"] = ["/proc/sys", "/proc/bus"]
    _up(bundle, talk)
    talk.hear("up")
    _checkpoint(bundle).ok()
    bundle.config["mounts"][-1]["source"] = str(bundle.path / "two")
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    talk.say("go")
    talk.hear("kept")
    talk.hear("two")
    assert bundle.exec("cat", "/proc/timer_list").ok() == ""
    bundle.exec("sh", "-c", "echo 1 > /proc/sys/kernel/msgmax").failed("Read-only file system", 1)


def test_another_root_gets_the_mount_points(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = home.sh("echo up; read x; cat /made/here/file; read x")
    (bundle.path / "volume").mkdir()
    (bundle.path / "volume/file").write_text("volume\n")
    bundle.mount("/made/here", "bind", bundle.path / "volume", "bind")
    _up(bundle, talk)
    talk.hear("up")
    _checkpoint(bundle).ok()
    shutil.rmtree(bundle.rootfs / "made")
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    talk.say("go")
    talk.hear("volume")


def test_a_network_namespace_that_is_joined_stays_outside(home: Bundles, talks: list[Talk]) -> None:
    holder = home.make().up()
    network = f"/proc/{holder.pid()}/ns/net"
    talk = _talk(talks)
    bundle = home.sh(COUNT)
    for entry in bundle.linux["namespaces"]:
        if entry["type"] == "network":
            entry["path"] = network
    _up(bundle, talk)
    talk.say("next")
    talk.hear("1")
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    assert os.readlink(f"/proc/{bundle.pid()}/ns/net") == os.readlink(network)
    talk.say("next")
    talk.hear("2")


def test_a_pid_namespace_that_is_joined_stays_outside(home: Bundles, talks: list[Talk]) -> None:
    holder = home.make().up()
    bundle = home.sh(COUNT)
    for entry in bundle.linux["namespaces"]:
        if entry["type"] == "pid":
            entry["path"] = f"/proc/{holder.pid()}/ns/pid"
    _comes_back(bundle, talks)
    assert os.readlink(f"/proc/{bundle.pid()}/ns/pid") == os.readlink(f"/proc/{holder.pid()}/ns/pid")


def _comes_back(bundle: Bundle, talks: list[Talk]) -> None:
    talk = _talk(talks)
    _up(bundle, talk)
    talk.say("next")
    talk.hear("1")
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    talk.say("next")
    talk.hear("2")


def test_a_container_with_all_that_is_usual_comes_back(home: Bundles, talks: list[Talk]) -> None:
    bundle = home.sh(COUNT)
    bundle.config["root"]["readonly"] = True
    bundle.mount("/sys", "sysfs", "sysfs", "ro", "nosuid").mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro")
    bundle.mount("/dev/shm", "tmpfs", "shm", "size=1m").mount("/dev/mqueue", "mqueue", "mqueue")
    (bundle.path / "volume").mkdir()
    bundle.mount("/tmp", "bind", bundle.path / "volume", "rbind", "rslave")
    bundle.linux["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
    _comes_back(bundle, talks)
    bundle.exec("touch", "/x").failed("Read-only file system", 1)
    bundle.exec("touch", "/tmp/x").ok()
    assert (bundle.path / "volume/x").exists()
    assert bundle.home.mounts() == []


def test_hooks_run_for_a_restore_as_for_a_create(home: Bundles, talks: list[Talk]) -> None:
    bundle = home.sh(COUNT)
    seen, hook = bundle.path / "seen", bundle.path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $(readlink /proc/self/ns/mnt) $(cat)" >> {seen}\n')
    hook.chmod(0o755)
    kinds = ("prestart", "createRuntime", "poststop")
    bundle.config["hooks"] = {kind: [{"path": str(hook), "args": ["hook", kind]}] for kind in kinds}
    _comes_back(bundle, talks)
    bundle.delete().ok()
    lines = [line.split(" ", 2) for line in seen.read_text().splitlines()]
    assert [line[0] for line in lines] == [*kinds, *kinds]
    assert {line[1] for line in lines} == {os.readlink("/proc/self/ns/mnt")}
    assert [json.loads(line[2])["status"] for line in lines] == ["creating", "creating", "stopped"] * 2


def test_an_open_connection_needs_its_flag(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    # Both ends inside, so that both come back.
    bundle = home.sh("nc -l -p 99 -e cat & sleep 1; { while read x; do echo $x; done; } | nc 127.0.0.1 99")
    _up(bundle, talk)
    talk.say("one")
    talk.hear("one")
    _checkpoint(bundle).failed("criu failed: type DUMP")
    assert bundle.status() == "running"
    talk.say("two")
    talk.hear("two")
    _checkpoint(bundle, "--tcp-established", images="connected").ok()
    talk = _talk(talks)
    _restore(bundle, talk, "--tcp-established", images="connected").ok()
    talk.say("three")
    talk.hear("three")


def test_a_criu_that_is_killed_leaves_the_network_open_and_connections_alive(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = home.sh("nc -l -p 99 -e cat & sleep 1; { while read x; do echo $x; done; } | nc 127.0.0.1 99")
    _up(bundle, talk)
    talk.say("one")
    talk.hear("one")
    gate, images = bundle.path / "gate", bundle.path / "images"
    os.mkfifo(gate)
    home.ocirun("pause", bundle.id).ok()
    words = ("checkpoint", "--leave-running", "--tcp-established", "--image-path", str(images), bundle.id)
    with (bundle.path / "errors").open("wb") as errors:
        dumping = home.popen(*words, stderr=errors, env={"OCID_FAILPOINTS": f"checkpoint.dumped=pause:{gate}"})
    # Everything is dumped, and nothing undone yet.
    eventually(lambda: dumping.poll() is not None or b"Running post-dump scripts" in _read(images / "dump.log"))
    if dumping.poll() is not None:
        _show_log(images / "dump.log")
    assert dumping.poll() is None, (bundle.path / "errors").read_text()
    assert "CRIU" in _rules(bundle)
    (criu,) = [pid for pid in children(dumping.pid) if Path(f"/proc/{pid}/comm").read_text() == "criu\n"]
    # As for one that is killed for its time is over: else a read would be told that the connection is being repaired.
    Path("/sys/fs/cgroup", home.cgroup, bundle.id, "cgroup.freeze").write_text("1")
    os.kill(criu, signal.SIGKILL)
    with gate.open("wb"):
        assert dumping.wait(60) == 1
    assert "criu failed: type DUMP" in (bundle.path / "errors").read_text()
    assert "CRIU" not in _rules(bundle) and bundle.status() == "paused"  # as it was
    home.ocirun("resume", bundle.id).ok()
    talk.say("two")
    talk.hear("two")


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _rules(bundle: Bundle) -> str:
    """What a container's network lets in."""
    words = ["nsenter", "--target", str(bundle.pid()), "--net", "iptables", "-S"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_attached_it_ends_with_its_exit_code(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = _up(home.sh("read x; exit 7"), talk)
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    talk.say("go")
    where = ("--bundle", str(bundle.path), "--image-path", str(bundle.path / "images"))
    result = home.ocirun("restore", *where, bundle.id, timeout=120, stdin=talk.ends[0], stdout=talk.ends[1])
    assert result.code == 7, result
    bundle.gone()


def test_what_fails_to_restore_leaves_nothing(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, _ = counting
    _checkpoint(bundle).ok()
    (bundle.path / "images/core-1.img").unlink()
    _restore(bundle, _talk(talks)).failed("criu failed: type RESTORE")
    bundle.gone()
    _restore(bundle, _talk(talks), images="nowhere").failed("descriptors.json")
    bundle.gone()


def test_a_paused_container_is_dumped_too(counting: tuple[Bundle, Talk], talks: list[Talk]) -> None:
    bundle, _ = counting
    bundle.home.ocirun("pause", bundle.id).ok()
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    if bundle.status() == "paused":  # criu restores the freezer's state with the cgroup's other properties
        bundle.home.ocirun("resume", bundle.id).ok()
    talk.say("next")
    talk.hear("3")


def test_one_that_stands_still_is_dumped_stands_still_and_goes_on(counting: tuple[Bundle, Talk]) -> None:
    bundle, talk = counting
    bundle.home.ocirun("pause", bundle.id).ok()
    _checkpoint(bundle, "--leave-running").ok()
    assert bundle.status() == "paused", "criu let it go, while others of its pod were still to be dumped"
    bundle.home.ocirun("resume", bundle.id).ok()
    talk.say("next")
    talk.hear("3")


def test_a_container_of_a_shim_is_dumped_and_runs_on(tmp_path: Path) -> None:
    with lab(tmp_path) as opened:
        pod = opened.pod()
        one = pod.run("c", ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"])
        eventually(lambda: pod.lines("c"), 20, "the container to count")
        images, work = tmp_path / "images", tmp_path / "work"
        for directory in (images, work):
            directory.mkdir()
        opened.shims.pause(pod.sandbox, one)
        try:
            opened.shims.checkpoint(pod.sandbox, one, images, work, "criu", 120)
        except Exception:
            _show_log(work / "dump.log")
            raise
        finally:
            opened.shims.resume(pod.sandbox, one)
        assert list(images.glob("pages-*.img")) and list(images.glob("core-*.img"))
        known = len(pod.lines("c"))
        eventually(lambda: len(pod.lines("c")) > known, 20, "the container to count on")
        numbers = [int(line) for line in pod.lines("c")]
        assert numbers == list(range(1, len(numbers) + 1)), "it counted anew, or lost a line"


def test_its_children_come_along(home: Bundles, talks: list[Talk]) -> None:
    talk = _talk(talks)
    bundle = _up(home.sh("sleep 1111 & sleep 2222 & echo up; read x; jobs | wc -l; read x"), talk)
    talk.hear("up")
    _checkpoint(bundle).ok()
    talk = _talk(talks)
    _restore(bundle, talk).ok()
    assert bundle.exec("ps", "-o", "comm").ok().split().count("sleep") == 2
    talk.say("go")
    talk.hear("2")


def test_a_terminal_comes_back_on_a_console_socket(home: Bundles) -> None:
    bundle = home.sh(COUNT)
    bundle.process["terminal"] = True
    path = home.directory / "console"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        bundle.create("--console-socket", str(path)).ok()
        master = _master(listener)
        bundle.start().ok()
        os.write(master, b"next\n")
        _until(master, b"1\r\n")
        _checkpoint(bundle).ok()
        os.close(master)
        _restore(bundle, None, "--console-socket", str(path)).ok()
        master = _master(listener)
    os.write(master, b"next\n")
    _until(master, b"2\r\n")
    os.close(master)


def _master(listener: socket.socket) -> int:
    connection, _ = listener.accept()
    with connection:
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    return fds[0]


def _until(master: int, end: bytes) -> None:
    said = b""
    while not said.endswith(end):
        said += os.read(master, 4096)
