"""What is computed before anything is done: mounts, rootfs plans, options, states, and the words of parse errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runtime import mounts, rootfs, spec, spec_hooks, spec_process, state
from runtime.commands.change import signal_number
from runtime.errors import RuntimeFailure
from runtime.fields import FieldError, Fields
from runtime.linux import mount as leaf
from runtime.linux.process import start_time
from runtime.options import Flag, UsageError, parse
from runtime.state import State

# ------------------------------------------------------------------------------------------------------------- mounts


def entry(*options: str, **fields: object) -> mounts.Mount:
    document = {"destination": "/d", "type": "tmpfs", "source": "s", "options": list(options), **fields}
    return mounts.parse(Fields(document, "mounts[0]"))


@pytest.mark.parametrize(
    ("options", "set_", "clear"),
    [
        ((), 0, 0),
        (("ro",), leaf.MOUNT_ATTR_RDONLY, 0),
        (("ro", "rw"), 0, leaf.MOUNT_ATTR_RDONLY),
        (("rw", "ro"), leaf.MOUNT_ATTR_RDONLY, 0),
        (("nosuid", "nodev", "noexec"), 2 | 4 | 8, 0),
        (("nosuid", "suid"), 0, leaf.MOUNT_ATTR_NOSUID),
        (("noatime",), leaf.MOUNT_ATTR_NOATIME, leaf.MOUNT_ATTR_ATIME),
        (("noatime", "relatime"), leaf.MOUNT_ATTR_RELATIME, leaf.MOUNT_ATTR_ATIME),
        (("noatime", "strictatime"), leaf.MOUNT_ATTR_STRICTATIME, leaf.MOUNT_ATTR_ATIME),
        (("nosymfollow",), leaf.MOUNT_ATTR_NOSYMFOLLOW, 0),
    ],
)
def test_options_become_attributes_and_the_later_wins(options: tuple[str, ...], set_: int, clear: int) -> None:
    assert entry(*options).attributes == mounts.Attributes(set_, clear)


def test_recursive_options_data_and_propagation_are_told_apart() -> None:
    found = entry("rbind", "rro", "rnosuid", "rslave", "private", type="none", source="/s")
    assert found.kind == "bind" and found.attributes.set == 0
    assert found.recursive_attributes.set == leaf.MOUNT_ATTR_RDONLY | leaf.MOUNT_ATTR_NOSUID
    assert found.propagation == ((leaf.MS_SLAVE, True), (leaf.MS_PRIVATE, False))
    data = entry("size=64k", "mode=1777", "sync", "defaults", "x=a=b", "acl")
    assert data.data == (("size", "64k"), ("mode", "1777"), ("x", "a=b"), ("acl", None))
    assert entry(type="cgroup2").kind == "cgroup"
    assert entry("ro", "size=1", destination="d/").describe() == "mount tmpfs s on /d (ro,size=1)"
    assert entry("bind", "ro", source="/s").describe() == "bind /s on /d (ro)"


IDS = {"containerID": 0, "hostID": 1, "size": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"destination": ""}, "mounts[0].destination: is required"),
        ({"destination": "/"}, "cannot replace the root"),
        ({"destination": "/.//../"}, "cannot replace the root"),
        ({"destination": "/a\0b"}, "mounts[0].destination: holds a NUL byte"),
        ({"destination": "/" + "x" * 5000}, "mounts[0].destination: longer than 4095 bytes"),
        ({"options": "ro"}, "mounts[0].options: expected array"),
        ({"options": ["bind", "size=1"]}, 'mounts[0].options[1]: unknown option "size=1" for a bind mount'),
        ({"options": ["bind"], "source": ""}, "mounts[0].source: is required for a bind mount"),
        ({"type": ""}, "mounts[0].type: is required"),
        ({"uidMappings": [{}]}, "mounts[0].uidMappings[0].containerID: is required"),
        ({"options": ["idmap"]}, "mounts[0].options: id-mapped mounts are only supported for bind-mounts"),
        ({"options": ["bind"], "uidMappings": [IDS]}, "mounts[0].gidMappings: id-mapped mounts must have both"),
        (
            {"options": ["bind", "idmap"], "gidMappings": [IDS]},
            "mounts[0].uidMappings: id-mapped mounts must have both",
        ),
    ],
)
def test_a_wrong_mount_is_named_by_its_path(fields: dict[str, object], words: str) -> None:
    with pytest.raises(FieldError) as caught:
        entry(**fields)
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------- config.json


def document(**changes: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["true"], "cwd": "/"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]},
        **changes,
    }


def parsed(**changes: Any) -> spec.Spec:
    return spec.parse(json.dumps(document(**changes)).encode())


def linux(**changes: Any) -> dict[str, Any]:
    return {"linux": {"namespaces": [{"type": "mount"}, {"type": "network"}], **changes}}


def process(**changes: Any) -> dict[str, Any]:
    return {"process": {"args": ["true"], "cwd": "/", **changes}}


def test_the_smallest_spec() -> None:
    found = parsed()
    assert found.process is not None and found.process.user == spec_process.User() and not found.process.terminal
    assert found.has_new("network") and not found.has("pid") and found.seccomp is None
    assert found.resources.devices is None and found.hooks == spec_hooks.Hooks()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ociVersion": None}, "ociVersion: is required"),
        ({"ociVersion": "0.9"}, "ociVersion: expected a version 1.x"),
        ({"root": None}, "root: is required"),
        (process(args=[""]), "process.args"),
        (process(cwd="a"), 'process.cwd: Cwd must be an absolute path, got "a"'),
        (process(env=["A"]), 'process.env[0]: invalid environment variable: expected NAME=VALUE, got "A"'),
        (process(env=["=A"]), "process.env[0]"),
        (process(env=["A=\0"]), "process.env[0]: holds a NUL byte"),
        (process(user={"uid": True}), "process.user.uid: expected integer, got true"),
        (process(user={"umask": 0o1000}), "process.user.umask"),
        (process(user={"additionalGids": [1, -1]}), "process.user.additionalGids[1]"),
        (process(oomScoreAdj=1001), "process.oomScoreAdj: expected integer from -1000 to 1000"),
        (process(rlimits=[{"type": "NOFILE", "soft": 1, "hard": 1}]), "process.rlimits[0].type"),
        (process(rlimits=[{"type": "RLIMIT_X", "soft": 1, "hard": 1}]), "process.rlimits[0].type"),
        (process(rlimits=[{"type": "RLIMIT_CPU", "soft": 1}]), "process.rlimits[0].hard: is required"),
        (process(rlimits=[{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2), "process.rlimits[1].type"),
        (process(scheduler={"policy": "FIFO"}), "process.scheduler.policy: expected one of"),
        (process(scheduler={"policy": "SCHED_BATCH", "priority": 3}), "process.scheduler.priority: can only be given"),
        (process(scheduler={"policy": "SCHED_RR", "period": 3}), "process.scheduler.period: can only be given"),
        (process(scheduler={"policy": "SCHED_RR", "priority": 100}), "process.scheduler.priority: expected integer"),
        (process(scheduler={"policy": "SCHED_OTHER", "nice": 20}), "process.scheduler.nice: expected integer"),
        (process(scheduler={"policy": "SCHED_OTHER", "flags": ["X"]}), "process.scheduler.flags[0]: expected one of"),
        (process(execCPUAffinity={"initial": "0-"}), "process.execCPUAffinity.initial: expected processors"),
        (process(execCPUAffinity={"final": "3-1"}), 'process.execCPUAffinity.final: "3-1" is no range'),
        (process(execCPUAffinity={"final": "0-99999"}), "process.execCPUAffinity.final"),
        (process(ioPriority={"class": "X"}), "process.ioPriority.class: expected one of"),
        (linux(namespaces=[]), "linux.namespaces"),
        (linux(namespaces=[{"type": "mount", "path": "/x"}]), "linux.namespaces"),
        (linux(namespaces=[{"type": "mount"}, {"type": "pid", "path": "x"}]), "linux.namespaces[1].path"),
        (
            linux(namespaces=[{"type": "mount"}, {"type": "user"}]),
            "linux.uidMappings: user namespaces enabled, but no uid mappings found",
        ),
        (linux(uidMappings=[{"containerID": 0, "hostID": 0, "size": 1}]), "linux.uidMappings"),
        (linux(sysctl={"kernel.panic": "1"}), "linux.sysctl"),
        (linux(sysctl={"net.a/../b": "1"}), "linux.sysctl"),
        (linux(sysctl={"kernel.msgmax": "1"}), "needs a ipc namespace"),
        (linux(sysctl={"net.x": "1\n2"}), "line break"),
        (linux(devices=[{"path": "/dev/../x", "type": "c", "major": 1, "minor": 1}]), "linux.devices[0].path"),
        (linux(devices=[{"path": "/dev/x", "type": "z"}]), "linux.devices[0].type: expected one of"),
        (linux(maskedPaths=["x"]), "linux.maskedPaths[0]"),
        (linux(rootfsPropagation="x"), "linux.rootfsPropagation"),
        (linux(seccomp={}), "linux.seccomp.defaultAction: is required"),
        (linux(mountLabel=1), "linux.mountLabel: expected string"),
        ({"mounts": [{"destination": "/a", "source": "/s", "options": ["rbind", "idmap"]}]}, "mounts[0].options"),
        (linux(timeOffsets={"boottime": {}}), "linux.timeOffsets"),
        ({"hostname": "x"}, "hostname: unable to set it without a uts namespace"),
        ({"hooks": {"prestart": [{"path": "x"}]}}, "hooks.prestart[0].path"),
        ({"hooks": {"poststop": [{"path": "/x", "timeout": 0}]}}, "hooks.poststop[0].timeout"),
        ({"annotations": {"a": 1}}, "annotations"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError) as caught:
        parsed(**changes)
    assert words in str(caught.value) and caught.value.code == "invalid_argument" and caught.value.step == "config"


def test_what_this_kernel_does_not_know_is_kept_apart() -> None:
    found = parsed(**process(capabilities={"bounding": ["CAP_KILL", "CAP_NEW"], "ambient": ["CAP_NEW"]}))
    assert found.process is not None and found.process.capabilities is not None
    assert found.process.capabilities.bounding == 1 << 5 and found.process.capabilities.unknown == ("CAP_NEW",)


# -------------------------------------------------------------------------------------------------------------- plans


def test_the_plan_of_mounts_is_in_order_with_devices_last() -> None:
    found = parsed(
        mounts=[
            {"destination": "/proc", "type": "proc"},
            {"destination": "/dev", "type": "tmpfs", "options": ["nosuid"]},
        ],
        **process(cwd="/work"),
        **linux(
            devices=[{"path": "/dev/null", "type": "c", "major": 9, "minor": 9}, {"path": "/dev/console", "type": "p"}]
        ),
    )
    said = [op.describe() for op in rootfs.plan_mounts(found)]
    assert said[:2] == ["mount proc on /proc", "mount tmpfs on /dev (nosuid)"]
    assert said[2] == "device /dev/null c 9:9 mode 666"  # the config's wins over the default
    assert sum("device" in line for line in said) == 6 and not any("console" in line for line in said)
    assert said[-2:] == ["links in /dev: ptmx, fd, stdin, stdout, stderr", "directory /work"]


def test_a_bound_dev_gets_no_devices_of_ours() -> None:
    found = parsed(mounts=[{"destination": "/dev/", "type": "bind", "source": "/dev", "options": ["rbind"]}])
    assert [op.describe() for op in rootfs.plan_mounts(found)] == ["bind /dev on /dev"]


def test_protection_comes_in_an_order_that_can_work() -> None:
    found = parsed(root={"path": "r", "readonly": True}, **linux(maskedPaths=["/m"], readonlyPaths=["/r", "/s"]))
    said = [op.describe() for op in rootfs.plan_protection(found)]
    assert said == ["read-only tmpfs mounts", "read-only /r", "read-only /s", "mask /m", "read-only /"]


# ------------------------------------------------------------------------------------------------------- command line

FLAGS = (
    Flag(("root",), "str", "where"),
    Flag(("detach", "d"), "bool", "go"),
    Flag(("env", "e"), "list", "more"),
    Flag(("count",), "int", "how many"),
)


def test_flags_end_at_the_first_word() -> None:
    found = parse(["--root=/x", "-d", "--env", "A=1", "-e", "B=2", "--count", "-3", "run", "--root", "z"], FLAGS)
    assert found.text("root") == "/x" and found.on("detach") and found.all("env") == ["A=1", "B=2"]
    assert found.number("count") == -3 and found.words == ["run", "--root", "z"]
    assert parse(["--", "-d"], FLAGS).words == ["-d"] and parse(["-"], FLAGS).words == ["-"]
    assert parse([], FLAGS).number("count", 7) == 7 and not parse(["--detach=false"], FLAGS).on("detach")
    assert parse(["--root", "a", "--root", "b"], FLAGS).text("root") == "b"
    assert parse(["-d=T"], FLAGS).on("detach") and not parse(["-d=0"], FLAGS).on("detach")
    assert parse(["--env="], FLAGS).given("env") and not parse([], FLAGS).given("env")


def test_flags_may_be_mixed_with_words_where_no_command_follows() -> None:
    found = parse(["a", "-d", "b", "--root", "/x", "--", "-e"], FLAGS, mixed=True)
    assert found.words == ["a", "b", "-e"] and found.on("detach") and found.text("root") == "/x"
    with pytest.raises(UsageError, match="-n"):
        parse(["a", "-n"], FLAGS, mixed=True)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--nothing"], "flag provided but not defined: -nothing"),
        (["--root"], "flag needs an argument: --root"),
        (["--detach=perhaps"], "--detach: expected true or false"),
    ],
)
def test_wrong_flags_are_named(words: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse(words, FLAGS)


@pytest.mark.parametrize("text", ["x", "1.5", "0x1", "--", "9" * 30])
def test_a_number_is_a_number(text: str) -> None:
    with pytest.raises(UsageError, match="--count"):
        parse([f"--count={text}"], FLAGS).number("count")


def test_signals_by_name_and_number() -> None:
    wanted = {"KILL": 9, "SIGTERM": 15, "sigusr1": 10, "0": 0, "64": 64, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63}
    assert {text: signal_number(text) for text in wanted} == wanted
    for text in ("", "SIG", "65", "RTMIN+31", "RTMAX+1", "-9", "KILL\n"):
        with pytest.raises(UsageError):
            signal_number(text)


# -------------------------------------------------------------------------------------------------------------- state


def facts(**changes: Any) -> State:
    values = {"pid": os.getpid(), "started": start_time(os.getpid()), **changes}
    return State(id="c", created="2026-01-01T00:00:00Z", bundle="/b", rootfs="/b/r", version="1.0.2", **values)


def test_state_survives_the_disk(tmp_path: Path) -> None:
    root = str(tmp_path)
    state.reserve(root, "c")
    known = facts(cgroup_paths=(("memory", "/m"), ("", "/u")), annotations=(("a", "b"),), owner=0, filter_flags=4)
    state.save(root, known)
    assert state.load(root, "c") == known
    assert stat_mode(tmp_path / "c") == 0o700 and stat_mode(tmp_path / "c/state.json") & 0o077 == 0
    with pytest.raises(RuntimeFailure, match="container with id exists: c"):
        state.reserve(root, "c")
    assert list(state.ids(root)) == ["c"] and list(state.ids(f"{root}/nothing")) == []


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_status_is_asked_of_the_kernel(tmp_path: Path) -> None:
    root = str(tmp_path)
    state.reserve(root, "c")
    assert state.status(root, facts()) == "running"
    assert state.status(root, facts(started=1)) == "stopped"  # the pid, but another process
    assert state.status(root, facts(pid=(1 << 22) + 1)) == "stopped"
    os.mknod(tmp_path / "c" / state.START_SOCKET, 0o140600)
    assert state.status(root, facts()) == "created"
    assert state.describe(facts(), "stopped")["pid"] == 0


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"id":"c","init_process_pid":"1"}', b"\xff"])
def test_o46_a_damaged_state_is_said_as_such(tmp_path: Path, raw: bytes) -> None:
    directory = state.reserve(str(tmp_path), "c")
    (Path(directory) / "state.json").write_bytes(raw)
    with pytest.raises(RuntimeFailure, match="is damaged") as caught:
        state.load(str(tmp_path), "c")
    assert caught.value.code == "failed_precondition" and "--force" in caught.value.hint


def test_states_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="^container does not exist$"):
        state.load(str(tmp_path), "c")
    state.reserve(str(tmp_path), "c")
    with pytest.raises(RuntimeFailure, match="never completely created"):
        state.load(str(tmp_path), "c")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", ".a", "a b", "a\n", "a\0", "ä", "x" * 1025])
def test_s19_ids_are_file_names(name: str) -> None:
    with pytest.raises(RuntimeFailure, match="invalid container ID format" if name else "cannot be empty"):
        state.check_id(name)
    assert state.check_id("A-b_c.d+9") == "A-b_c.d+9"
