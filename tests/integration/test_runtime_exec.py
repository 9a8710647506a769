"""exec: what the flags and a process.json ask for, which cgroups it enters, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.capabilities import CAPABILITIES as NUMBERS
from tests.bundles import CAPABILITIES, OCIRUN, Bundle, Bundles, bundles
from tests.costs import soon
from tests.support import SOON_S, eventually, needs

REFERENCE = Path(OCIRUN).name == "runc"
ours = pytest.mark.skipif(REFERENCE, reason="the reference on this machine is older, or does less")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def detached(one: Bundle, *flags: str, process: dict[str, Any] | None = None) -> int:
    """A detached exec of `sleep`; its pid."""
    file = one.path / "exec.pid"
    words = ["sleep", "1000"]
    if process is not None:
        path = one.path / "process.json"
        path.write_text(json.dumps(process))
        flags, words = (*flags, "--process", str(path)), []
    one.exec(*words, flags=(*flags, "--detach", "--pid-file", str(file))).ok()
    return int(file.read_text())


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def bits(*names: str) -> int:
    return sum(1 << NUMBERS[name] for name in names)


def test_flags_change_config_jsons_process(home: Bundles) -> None:
    one = home.make()
    one.process["user"] = {"uid": 0, "gid": 5, "additionalGids": [7]}
    one.process["env"] = ["PATH=/bin", "A=config"]
    one.process["noNewPrivileges"] = False
    one.up()
    pid = detached(one, "--user", "1000:1001", "-g", "8", "-g", "9", "--cwd", "/tmp", "-e", "A=flag", "-e", "B=2")
    found = status(pid)
    assert found["Uid"].split() == ["1000"] * 4 and found["Gid"].split() == ["1001"] * 4
    assert set(found["Groups"].split()) == {"7", "8", "9"}
    assert os.readlink(f"/proc/{pid}/cwd").endswith("/tmp")
    env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {b"A=flag", b"B=2", b"PATH=/bin"} <= set(env) and b"A=config" not in env
    assert status(detached(one, "--user", "1000"))["Gid"].split() == ["5"] * 4
    assert found["NoNewPrivs"] == "0" and status(detached(one, "--no-new-privs"))["NoNewPrivs"] == "1"


def test_no_new_privs_can_be_taken_back(home: Bundles) -> None:
    one = home.make().up()
    assert status(detached(one))["NoNewPrivs"] == "1"
    assert status(detached(one, "--no-new-privs=false"))["NoNewPrivs"] == "0"


def test_a_process_json_is_the_whole_process(home: Bundles) -> None:
    one = home.make()
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}]
    one.up()
    pid = detached(
        one,
        process={
            "args": ["sleep", "999"],
            "cwd": "/tmp",
            "env": ["PATH=/bin", "ONLY=this"],
            "user": {"uid": 33, "gid": 44, "additionalGids": [55]},
            "capabilities": {kind: ["CAP_KILL"] for kind in ("bounding", "permitted", "effective")},
            "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}],
            "oomScoreAdj": 321,
        },
    )
    found = status(pid)
    assert (found["Uid"].split()[0], found["Gid"].split()[0], found["Groups"]) == ("33", "44", "55")
    assert int(found["CapBnd"], 16) == bits("CAP_KILL") and found["NoNewPrivs"] == "0"
    env = {entry for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry}
    assert env == {b"PATH=/bin", b"ONLY=this", b"HOME=/"}
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +1 +2 ", limits) and not re.search(r"Max open files +100 ", limits)
    if not REFERENCE:  # the reference leaves what the container has
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "321\n"
    one.exec(flags=("--process", "/nowhere/process.json")).failed("no such file or directory", code=255)


def test_s05_what_a_process_json_does_not_say_is_the_containers(home: Bundles) -> None:
    """Above all its capabilities: without any it would have those of the caller."""
    one = home.make()
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}]
    one.process["capabilities"] = {kind: ["CAP_KILL"] for kind in ("bounding", "permitted", "effective")}
    one.up()
    bare = {"args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"]}
    pid = detached(one, process=bare)
    found = status(pid)
    assert {int(found[key], 16) for key in ("CapBnd", "CapPrm", "CapEff")} == {bits("CAP_KILL")}
    assert re.search(r"Max open files +100 +100 ", Path(f"/proc/{pid}/limits").read_text())
    given = detached(one, process={**bare, "capabilities": {}})
    assert int(status(given)["CapBnd"], 16) == 0
    if not REFERENCE:  # which keeps them in its state
        (one.path / "config.json").rename(one.path / "away")
        assert int(status(detached(one, process=bare))["CapBnd"], 16) == 0


def test_a_process_json_may_come_through_a_pipe(home: Bundles) -> None:
    one = home.make().up()
    reader, writer = os.pipe()
    os.write(writer, json.dumps({"args": ["echo", "piped"], "cwd": "/", "env": ["PATH=/bin"]}).encode())
    os.close(writer)
    try:
        assert one.exec(flags=("--process", f"/proc/self/fd/{reader}"), pass_fds=[reader]).ok() == "piped\n"
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": []}, "args must not be empty"),
        ({"cwd": ""}, "Cwd property must not be empty"),
        ({"cwd": "tmp"}, "Cwd must be an absolute path"),
        ({"env": ["A"]}, "invalid environment variable"),
    ],
)
def test_a_process_json_that_is_none_is_refused_in_the_peers_words(
    home: Bundles, changes: dict[str, object], words: str
) -> None:
    one = home.make().up()
    path = one.path / "process.json"
    path.write_text(json.dumps({"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], **changes}))
    one.exec(flags=("--process", str(path))).failed(words, code=255)


@pytest.mark.parametrize("inheritable", [[], ["CAP_KILL"]])
def test_s05_added_capabilities(home: Bundles, inheritable: list[str]) -> None:
    one = home.make()
    one.process["capabilities"]["inheritable"] = inheritable
    one.up()
    found = status(detached(one, "--cap", "CAP_SYS_CHROOT", "--cap=CAP_FOWNER"))
    both = bits(*CAPABILITIES, "CAP_SYS_CHROOT", "CAP_FOWNER")
    assert int(found["CapBnd"], 16) == int(found["CapEff"], 16) == int(found["CapPrm"], 16) == both
    assert int(found["CapInh"], 16) == bits(*inheritable)
    result = one.exec("true", flags=("--cap", "CAP_NOT_INVENTED"))
    assert result.code == 0 and "CAP_NOT_INVENTED" in result.error and "warning" in result.error


@pytest.mark.parametrize(
    ("user", "uid", "gid"), [("1", 1, 0), ("1:2", 1, 2), ("01", 1, 0), ("0", 0, 0), ("1000", 1000, 0)]
)
def test_s15_a_user_is_its_number(home: Bundles, user: str, uid: int, gid: int) -> None:
    one = home.make().up()
    found = status(detached(one, "--user", user))
    assert found["Uid"].split() == [str(uid)] * 4 and found["Gid"].split() == [str(gid)] * 4


@ours
def test_affinity_before_and_after_the_cgroup(home: Bundles) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    one = home.make().up()
    base = {"args": ["sleep", "999"], "cwd": "/", "env": ["PATH=/bin"]}
    assert os.sched_getaffinity(detached(one, process=base)) == set(cpus)
    last = cpus[-1]
    for affinity, expected in (
        ({"final": str(last)}, {last}),
        ({"initial": str(cpus[0]), "final": f"{last}-{last}"}, {last}),
        ({"initial": str(last)}, {last}),
        ({"initial": "", "final": ""}, set(cpus)),
    ):
        assert os.sched_getaffinity(detached(one, process={**base, "execCPUAffinity": affinity})) == expected, affinity
    one.exec("true", flags=("--process", _process(one, {**base, "execCPUAffinity": {"final": "4000"}}))).failed(
        "process.execCPUAffinity", code=255
    )
    # config.json's is for its execs, and not for its init.
    one.delete().ok()
    one.process["execCPUAffinity"] = {"final": str(last)}
    one.up()
    assert os.sched_getaffinity(one.pid()) == set(cpus) and os.sched_getaffinity(detached(one)) == {last}


def _process(one: Bundle, process: dict[str, Any]) -> str:
    path = one.path / "process.json"
    path.write_text(json.dumps(process))
    return str(path)


# ---------------------------------------------------------------------------------------------------------- cgroups


def cgroups(pid: int) -> dict[str, str]:
    found = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            found[name] = path
    return found


def below(home: Bundles, one: Bundle, name: str) -> None:
    """Makes a cgroup below the container's in every hierarchy; a cpuset needs processors before it takes anybody."""
    for directory in home.cgroups(one.id):
        path = Path(directory, name)
        path.mkdir(parents=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            level = Path(directory)
            for part in name.split("/"):
                above, level = level, level / part
                if (level / file).exists() and not (level / file).read_text().strip():
                    (level / file).write_text((above / file).read_text())


def test_a_cgroup_below_the_containers(home: Bundles) -> None:
    one = home.make().up()
    below(home, one, "sub/deep")
    top = cgroups(one.pid())
    found = cgroups(detached(one, "--cgroup", "sub/deep"))
    mine = {name for name, path in top.items() if path.endswith(one.id)}
    assert mine and {name: path for name, path in found.items() if name in mine} == {
        name: f"{top[name]}/sub/deep" for name in mine
    }
    assert cgroups(detached(one, "--cgroup=/")) == top == cgroups(detached(one))
    one.delete().ok()
    one.gone()


def test_a_cgroup_for_each_controller(home: Bundles) -> None:
    needs("cgroup1")
    one = home.make().up()
    below(home, one, "a")
    below(home, one, "b")
    top = cgroups(one.pid())
    found = cgroups(detached(one, "--cgroup", "memory,pids:a", "--cgroup", "devices:/b"))
    assert (found["memory"], found["pids"], found["devices"]) == (
        f"{top['memory']}/a",
        f"{top['pids']}/a",
        f"{top['devices']}/b",
    )
    assert found["freezer"] == top["freezer"] and found["cpuset"] == top["cpuset"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nothing"], "nothing"),
        (["memory:nothing"], "nothing"),
        ([".."], "not a sub cgroup path"),
        (["a/../../.."], "not a sub cgroup path"),
        (["memory:../x"], "not a sub cgroup path"),
        (["nonsense:/"], "unknown controller nonsense"),
        (["memory:/", "/"], "missing <controller>: prefix"),
        (["memory,:/"], "empty <controller> prefix"),
        (["memory:/", "memory:/"], "specified multiple times"),
    ],
)
def test_s19_a_cgroup_that_is_none_is_refused(home: Bundles, flags: list[str], said: str) -> None:
    if REFERENCE and said in ("empty <controller> prefix", "not a sub cgroup path", "specified multiple times"):
        pytest.skip("the reference goes by the names' beginnings, or not at all")
    if flags in (["memory:nothing"], ["memory:../x"]):
        needs("cgroup1")  # v2 has no cgroup for each controller
    one = home.make().up()
    one.exec("true", flags=tuple(f"--cgroup={flag}" for flag in flags)).failed(said, code=255)
    assert home.processes(one.id) == [one.pid()]


@ours
def test_an_exec_goes_where_the_init_went_when_the_cgroup_takes_no_process(home: Bundles) -> None:
    """A v2 cgroup that has handed controllers down takes none, which is what systemd does in a container."""
    one = home.make()
    pages = sorted(Path("/sys/kernel/mm/hugepages").iterdir()) if Path("/sys/kernel/mm/hugepages").is_dir() else []
    if pages:  # what a hybrid's v2 has, if anything
        size = int(pages[-1].name.removeprefix("hugepages-").removesuffix("kB")) >> 10
        size, unit = (size >> 10, "GB") if size >= 1024 else (size, "MB")
        one.linux["resources"] = {"hugepageLimits": [{"pageSize": f"{size}{unit}", "limit": 0}]}
    one.up()
    top = next((Path(path) for path in home.cgroups(one.id) if Path(path, "cgroup.subtree_control").exists()), None)
    if top is None or not (top / "cgroup.controllers").read_text().strip():
        pytest.skip("no v2 hierarchy with a controller: hack/vm has one")
    (top / "init.scope").mkdir()
    (top / "init.scope/cgroup.procs").write_text(str(one.pid()))
    name = (top / "cgroup.controllers").read_text().split()[0]
    (top / "cgroup.subtree_control").write_text(f"+{name}")
    pid = detached(one)
    assert cgroups(pid)[""] == cgroups(one.pid())[""] and cgroups(pid)[""].endswith("/init.scope")


# ------------------------------------------------------------------------------------------------ its states and end


def test_exec_into_a_paused_container(home: Bundles) -> None:
    one = home.make().up()
    home.ocirun("pause", one.id).ok()
    one.exec("true").failed("cannot exec in a paused container", code=255)
    child = home.popen("exec", "--ignore-paused", one.id, "touch", "/tmp/ran")
    eventually(lambda: len(home.processes(one.id)) == 2)
    assert child.poll() is None and not (one.rootfs / "tmp/ran").exists()
    home.ocirun("resume", one.id).ok()
    assert child.wait(SOON_S) == 0 and (one.rootfs / "tmp/ran").exists()


def test_exec_into_a_created_container(home: Bundles) -> None:
    one = home.make()
    one.create().ok()
    assert one.exec("echo", "early").ok() == "early\n"
    assert one.status() == "created"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["nothing"],
            255,
            'exec failed: unable to start container process: exec: "nothing": executable file not found in $PATH',
        ),
        (["/nothing"], 255, "stat /nothing: no such file or directory"),
        (["/etc"], 255, "permission denied"),
        (["/etc/passwd"], 255, "permission denied"),
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["--cwd", "/nothing", "true"], 255, 'chdir to cwd ("/nothing") set in config.json failed'),
        (["--user", "name", "true"], 255, "name"),
        (["--tty", "--detach", "true"], 255, "cannot allocate tty if runc will detach without setting console socket"),
        (["--console-socket", "/x", "true"], 255, "cannot use console socket if runc will not detach or allocate tty"),
    ],
)
def test_an_execs_exit_code_is_its_own_or_255(home: Bundles, words: list[str], code: int, said: str) -> None:
    one = home.make().up()
    flags = words[: words.index("true")] if words[0].startswith("--") else []
    result = one.exec(*words[len(flags) :], flags=tuple(flags))
    assert result.code == code and said in result.error.replace('\\"', '"'), result
    eventually(lambda: home.processes(one.id) == [one.pid()])


def test_a_detached_exec_is_a_child_of_nobody_here_and_ends_with_the_container(home: Bundles) -> None:
    one = home.make().up()
    with soon():  # it sleeps for a thousand seconds
        pid = detached(one)
    assert sorted(home.processes()) == sorted([one.pid(), pid])
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    eventually(lambda: not home.processes(one.id))


def test_an_attached_exec_passes_signals_and_stdio(home: Bundles) -> None:
    one = home.make().up()
    child = home.popen(
        "exec", one.id, "sh", "-c", "trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.01; done",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(10)
    assert child.stdout.read() == b"got\n" and child.wait(SOON_S) == 3
    child.stdout.close()
    done = subprocess.run(
        home.command("exec", one.id, "cat"), input=b"x" * 300_000, capture_output=True, check=True, timeout=SOON_S
    )
    assert done.stdout == b"x" * 300_000
