"""`ocirun` for callers who are not the machine's root: an ordinary user, alone or with newuidmap, and root of a user
namespace. They share nothing with root here but the program: a state directory and bundles of their own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.bundles import OCIRUN, Bundle, Bundles, bundles
from tests.support import eventually, needs

# An account of every Debian, with its own group: newuidmap knows callers by name.
USER = pwd.getpwnam("backup")
AS_USER: dict[str, Any] = {"user": USER.pw_uid, "group": USER.pw_gid, "extra_groups": []}
SUBID = 300_000


@pytest.fixture
def home() -> Iterator[Bundles]:
    needs("root", "busybox")
    # Not below pytest's own directory: every session that starts closes that to all but root.
    with TemporaryDirectory(prefix="ocirun-rootless-") as directory, bundles(Path(directory)) as opened:
        Path(directory).chmod(0o711)
        give(opened.directory)
        opened.root.mkdir()
        give(opened.root)
        yield opened


def give(path: Path, uid: int = USER.pw_uid, gid: int = USER.pw_gid) -> None:
    """Makes a tree the user's; not the busybox that all tests share by hard links."""
    for directory, _, files in os.walk(path):
        os.lchown(directory, uid, gid)
        for name in files:
            if (file := Path(directory, name)).lstat().st_nlink == 1:
                os.lchown(file, uid, gid)


def single(one: Bundle) -> Bundle:
    """The config that an ordinary user can have without help: his ids are root's, and no cgroup is named."""
    one.linux.pop("cgroupsPath")
    one.linux["namespaces"].append({"type": "user"})
    one.linux["uidMappings"] = [{"containerID": 0, "hostID": USER.pw_uid, "size": 1}]
    one.linux["gidMappings"] = [{"containerID": 0, "hostID": USER.pw_gid, "size": 1}]
    give(one.path)
    return one


def up(one: Bundle) -> Bundle:
    one.create(**AS_USER).ok()
    one.home.ocirun("start", one.id, **AS_USER).ok()
    return one


def status(text: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


# ------------------------------------------------------------------------------------------------- an ordinary user


def test_the_template_for_an_ordinary_user_runs(home: Bundles) -> None:
    one = home.make()
    give(one.path)
    assert home.ocirun("spec", "--rootless", "--bundle", str(one.path), **AS_USER).ok() == ""
    config = json.loads((one.path / "config.json").read_text())
    assert {entry["type"] for entry in config["linux"]["namespaces"]} == {
        "pid",
        "ipc",
        "uts",
        "mount",
        "cgroup",
        "user",
    }
    assert "resources" not in config["linux"]
    assert not any(word.startswith(("uid=", "gid=")) for m in config["mounts"] for word in m["options"])
    config["process"].update(terminal=False, args=["sh", "-c", "id -u; ls /sys/fs/cgroup; touch /sys/x /y; stty -a"])
    one.config = config
    give(one.path)
    result = one.run(**AS_USER)
    assert result.text.split()[0] == "0" and len(result.text.split()) > 1, result
    assert result.error.count("Read-only file system") == 2, result
    one.gone()


def test_one_mapping_is_written_without_help(home: Bundles) -> None:
    one = single(home.make())
    one.process["oomScoreAdj"] = 500
    up(one)
    pid = one.pid()
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", str(USER.pw_uid), "1"]
    assert Path(f"/proc/{pid}/gid_map").read_text().split() == ["0", str(USER.pw_gid), "1"]
    assert Path(f"/proc/{pid}/setgroups").read_text() == "deny\n"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    found = status(Path(f"/proc/{pid}/status").read_text())
    assert found["Uid"].split() == [str(USER.pw_uid)] * 4 and found["Groups"].split() == []
    assert int(found["CapInh"], 16) == 0
    for name in ("user", "net", "pid", "ipc", "uts", "mnt", "cgroup"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


def test_the_users_root_is_not_the_machines(home: Bundles) -> None:
    secret = home.directory / "secret"
    secret.write_text("root's")
    os.chown(secret, 0, 0)
    secret.chmod(0o600)
    one = single(home.sh("cat /secret; mknod /tmp/x b 8 0; echo > /mine/file"))
    (one.rootfs / "secret").touch()
    (one.path / "mine").mkdir()
    give(one.path)
    one.mount("/secret", "bind", secret, "rbind").mount("/mine", "bind", one.path / "mine", "rbind")
    result = one.run(**AS_USER)
    assert result.code == 0 and "cat: can't open '/secret': Permission denied" in result.error
    assert "mknod: /tmp/x: Operation not permitted" in result.error
    assert (one.path / "mine/file").stat().st_uid == USER.pw_uid


def test_devices_are_those_of_the_host(home: Bundles) -> None:
    one = single(
        home.sh("for d in null zero full random urandom tty; do stat -c %t:%T /dev/$d; done; echo x >/dev/null")
    )
    assert one.run(**AS_USER).ok().split() == ["1:3", "1:5", "1:7", "1:8", "1:9", "5:0"]
    one.linux["devices"] = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3}]
    one.run(**AS_USER).failed("/dev/mine")
    one.gone()


def test_every_verb_of_an_ordinary_user(home: Bundles) -> None:
    one = single(home.make())
    one.create(**AS_USER).ok()
    # Before start as well as after: the init is its caller's to look at (and nobody else is in there).
    assert home.ocirun("exec", one.id, "id", "-u", **AS_USER).ok() == "0\n"
    home.ocirun("start", one.id, **AS_USER).ok()
    assert home.ocirun("exec", one.id, "sh", "-c", "exit 7", **AS_USER).code == 7
    script = "readlink /proc/1/ns/net; readlink /proc/1/ns/user"
    said = home.ocirun("exec", one.id, "sh", "-c", script, **AS_USER).ok()
    assert said.split() == [os.readlink(f"/proc/{one.pid()}/ns/{name}") for name in ("net", "user")]
    assert json.loads(home.ocirun("ps", "-f", "json", one.id, **AS_USER).ok()) == [one.pid()]
    home.ocirun("pause", one.id, **AS_USER).failed("cgroups not configured for container")
    limit = ("update", "--memory", "100000000", one.id)
    home.ocirun(*limit, **AS_USER).failed("cannot set memory limit: container could not join or create cgroup")
    assert one.id in home.ocirun("list", "-q", **AS_USER).ok().split()
    assert home.cgroups(one.id) == []
    home.ocirun("delete", one.id, **AS_USER).failed("that is not stopped: running")
    home.ocirun("kill", "--all", one.id, "KILL", **AS_USER).ok()
    one.becomes("stopped")
    home.ocirun("delete", one.id, **AS_USER).ok()
    one.gone()


def test_a_terminal_of_an_ordinary_user(home: Bundles) -> None:
    one = single(home.sh("tty; stty size; stat -c %u /dev/console; test -c /dev/console && echo there"))
    one.process["terminal"] = True
    one.write()
    words = " ".join(home.command("run", "--bundle", str(one.path), one.id))
    done = subprocess.run(
        ["script", "-qec", f"stty rows 30 cols 100; exec {words}", "/dev/null"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        **AS_USER,
    )
    assert done.returncode == 0, done
    assert done.stdout.replace(b"\r", b"").split() == [b"/dev/pts/0", b"30", b"100", b"0", b"there"]
    one.gone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no user", "rootless container requires user namespaces"),
        ("groups", "cannot set any additional groups in a rootless container"),
        ("limit", "cannot set pids limit: container could not join or create cgroup"),
        ("path", "make cgroup /sys/fs/cgroup/"),
        ("uid", "cannot set uid to unmapped user in user namespace"),
        ("idmap", "id-mapped mounts are not supported for rootless containers"),
    ],
)
def test_what_an_ordinary_user_cannot_have_is_said(home: Bundles, change: str, words: str) -> None:
    one = single(home.make("true"))
    if change == "no user":
        one.linux["namespaces"].pop()
        del one.linux["uidMappings"], one.linux["gidMappings"]
    elif change == "groups":
        one.process["user"]["additionalGids"] = [USER.pw_gid]
    elif change == "limit":
        one.linux["resources"] = {"pids": {"limit": 10}}
    elif change == "path":
        one.linux["cgroupsPath"] = f"/{home.cgroup}/{one.id}"
    elif change == "uid":
        one.process["user"]["uid"] = 1
    else:
        one.mount("/mnt", "bind", one.path, "bind", "idmap")
    one.run(**AS_USER).failed(words)
    one.gone()


def test_cgroups_are_best_effort_only_where_the_flag_says_so(home: Bundles) -> None:
    one = single(home.make("true"))
    one.write()
    words = ("run", "--bundle", str(one.path), one.id)
    home.ocirun("--rootless", "true", *words, **AS_USER).ok()
    home.ocirun("--rootless=auto", *words, **AS_USER).ok()
    home.ocirun("--rootless=false", *words, **AS_USER).failed("make cgroup /sys/fs/cgroup/")
    home.ocirun("--rootless=maybe", *words, **AS_USER).failed("--rootless: expected true, false or auto")
    one.gone()


def test_cgroups_that_the_user_was_given_are_used(home: Bundles) -> None:
    tops = [top for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()) if not top.is_symlink()]
    places = [top / home.cgroup for top in tops if (top / "cgroup.procs").exists() and (top / "tasks").exists()]
    if places:  # v1: one hierarchy is the user's, the rest is not
        for place in places:
            place.mkdir()
        theirs = Path("/sys/fs/cgroup/pids", home.cgroup)
        os.chown(theirs, USER.pw_uid, USER.pw_gid)
    else:  # v2: a subtree is delegated, and the user's processes are below it (cgroups(7))
        theirs = Path("/sys/fs/cgroup", home.cgroup)
        theirs.mkdir()
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+pids")
        places = [theirs / "session"]
        places[0].mkdir()
        for name in ("", "cgroup.procs", "cgroup.subtree_control", "session", "session/cgroup.procs"):
            os.chown(theirs / name, USER.pw_uid, USER.pw_gid)
    one = single(home.make())
    one.linux["resources"] = {"pids": {"limit": 10}}
    one.write()
    enter = "; ".join(f"echo 0 > {place}/cgroup.procs" for place in places)
    who = f"--reuid {USER.pw_uid} --regid {USER.pw_gid} --clear-groups"
    words = home.command("run", "--detach", "--bundle", str(one.path), one.id)
    silent: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run(["sh", "-c", f'{enter}; exec setpriv {who} "$@"', "sh", *words], check=True, **silent)
    assert home.cgroups(one.id) == [f"{theirs}/{one.id}"]
    assert Path(home.cgroups(one.id)[0], "cgroup.procs").read_text().split() == [str(one.pid())]
    assert Path(home.cgroups(one.id)[0], "pids.max").read_text() == "10\n"
    home.ocirun("delete", "--force", one.id, **AS_USER).ok()
    one.gone()
    for place in places:
        if place.name == "session":
            place.rmdir()


def test_state_is_kept_in_the_users_runtime_directory(home: Bundles, tmp_path: Path) -> None:
    runtime_directory = home.directory.parent / "xdg"
    runtime_directory.mkdir(mode=0o700)
    give(runtime_directory)
    one = single(home.make())
    one.write()

    def run(*words: str, **changes: Any) -> str:
        env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime_directory)}
        # Output to files: the container keeps what it is given.
        with open(tmp_path / "said", "wb") as said:
            options = {**AS_USER, **changes}
            done = subprocess.run([OCIRUN, *words], env=env, check=False, stdout=said, stderr=said, **options)
        assert done.returncode == 0, (words, (tmp_path / "said").read_text())
        return (tmp_path / "said").read_text()

    run("run", "--detach", "--bundle", str(one.path), one.id)
    try:
        made = runtime_directory / "ocirun"
        assert (made / one.id / "state.json").exists() and stat.S_IMODE(made.stat().st_mode) == 0o1700
        assert json.loads(run("state", one.id))["status"] == "running"
    finally:
        run("delete", "--force", one.id)
    assert list(made.iterdir()) == [] or [p.name for p in made.iterdir()] == [".seccomp"]


def test_s01_an_ordinary_users_init_runs_from_a_sealed_copy(home: Bundles) -> None:
    one = single(home.make())
    one.create(**AS_USER).ok()
    exe = f"/proc/{one.pid()}/exe"
    assert os.readlink(exe).startswith("/memfd:ocid-")
    with pytest.raises(OSError, match=r"Text file busy|not permitted"):
        os.open(exe, os.O_WRONLY)


def test_s17_what_joins_a_users_container_is_not_its_to_look_at(home: Bundles) -> None:
    """A process that joins is never dumpable, and an init that joins others is not either."""
    one = single(home.make())
    up(one)
    two = single(home.make())
    two.linux["namespaces"][1]["path"] = f"/proc/{one.pid()}/ns/pid"
    two.linux["namespaces"][-1]["path"] = f"/proc/{one.pid()}/ns/user"
    two.create(**AS_USER).ok()
    assert os.stat(f"/proc/{two.pid()}/fd").st_uid == 0
    home.ocirun("start", two.id, **AS_USER).ok()
    eventually(lambda: os.stat(f"/proc/{two.pid()}/fd").st_uid == USER.pw_uid, what="the process to be itself")


# ---------------------------------------------------------------------------------------- ranges through newuidmap


@pytest.fixture
def ranges(home: Bundles) -> Bundles:
    """/etc/subuid and /etc/subgid give the user a range: for programs started by `with_ranges` only."""
    for name in ("subuid", "subgid"):
        (home.directory.parent / name).write_text(f"{USER.pw_name}:{SUBID}:1000\n")
    return home


def with_ranges(home: Bundles, *words: str, path: str = os.environ["PATH"]) -> list[str]:
    files = home.directory.parent
    binds = [f"mount --bind {files}/{name} /etc/{name}" for name in ("subuid", "subgid")]
    who = f"--reuid {USER.pw_uid} --regid {USER.pw_gid} --clear-groups"
    script = " && ".join([*binds, f'exec setpriv {who} env PATH={path} "$@"'])
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *home.command(*words)]


def wide(one: Bundle) -> Bundle:
    single(one)
    one.linux["uidMappings"].append({"containerID": 1, "hostID": SUBID, "size": 1000})
    one.linux["gidMappings"].append({"containerID": 1, "hostID": SUBID, "size": 1000})
    one.write()
    return one


def test_ranges_are_mapped_by_newuidmap(ranges: Bundles, tmp_path: Path) -> None:
    assert shutil.which("newuidmap"), "Debian's package uidmap (hack/setup)"
    one = wide(ranges.make())
    one.process["user"] = {"uid": 5, "gid": 6, "additionalGids": [7]}
    one.write()
    with open(tmp_path / "said", "wb") as said:
        words = with_ranges(ranges, "run", "--detach", "--bundle", str(one.path), one.id)
        done = subprocess.run(words, stdout=said, stderr=said, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, (tmp_path / "said").read_text()
    pid = one.pid()
    lines = [line.split() for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
    assert lines == [["0", str(USER.pw_uid), "1"], ["1", str(SUBID), "1000"]]
    assert Path(f"/proc/{pid}/setgroups").read_text() == "allow\n"
    found = status(Path(f"/proc/{pid}/status").read_text())
    assert found["Uid"].split()[0] == str(SUBID + 4) and found["Gid"].split()[0] == str(SUBID + 5)
    assert found["Groups"].split() == [str(SUBID + 6)]
    # Ids are mapped once: later commands need no range.
    assert ranges.ocirun("exec", "--user", "5:6", one.id, "id", "-u", **AS_USER).ok() == "5\n"
    ranges.ocirun("kill", one.id, "KILL", **AS_USER).ok()
    one.becomes("stopped")
    ranges.ocirun("delete", one.id, **AS_USER).ok()
    one.gone()


@pytest.mark.parametrize(
    ("host", "path", "words"),
    [
        (SUBID + 1, os.environ["PATH"], "uid range [1-1001) -> [300001-301001) not allowed"),
        (SUBID, "/nonexistent", 'exec: "newuidmap": executable file not found in $PATH'),
    ],
)
def test_ranges_that_newuidmap_does_not_give(ranges: Bundles, host: int, path: str, words: str) -> None:
    one = wide(ranges.make("true"))
    one.linux["uidMappings"][1]["hostID"] = host
    one.write()
    command = with_ranges(ranges, "run", "--bundle", str(one.path), one.id, path=path)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and words in done.stderr, done
    one.gone()


# ------------------------------------------------------------------------------------------ root of a user namespace


@pytest.mark.parametrize("mounts", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_root_of_a_user_namespace(home: Bundles, mounts: bool, inner: bool) -> None:
    """As `podman unshare` does it, with a mount namespace, and as `unshare -r` does it, without one."""
    one = single(home.sh("id -u; cat /proc/self/uid_map; stat -c %t:%T /dev/null"))
    if inner:
        for key in ("uidMappings", "gidMappings"):
            one.linux[key][0]["hostID"] = 0
    else:
        one.linux["namespaces"].pop()
        del one.linux["uidMappings"], one.linux["gidMappings"]
    one.write()
    words = ["unshare", "--user", "--map-root-user", *(["--mount"] if mounts else [])]
    words += home.command("run", "--bundle", str(one.path), one.id)
    done = subprocess.run(words, capture_output=True, text=True, check=False, **AS_USER)
    assert done.returncode == 0, done
    # Inside the inner one the outer's ids are what it maps to.
    assert done.stdout.split() == ["0", "0", "0" if inner else str(USER.pw_uid), "1", "1:3"], done
    one.gone()


def test_o37_a_killed_create_of_an_ordinary_user_leaves_nothing(home: Bundles) -> None:
    """The caller is killed in the middle of create: the init goes with it, and delete --force has the rest."""
    one = single(home.make())
    one.write()
    fifo = one.path / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    armed = {"OCID_FAILPOINTS": f"init.mounts=pause:{fifo}"}
    child = home.popen("create", "--bundle", str(one.path), one.id, env=armed, **AS_USER)
    try:
        # Open for writing without waiting: that works once somebody waits for it at the other end.
        writer = eventually(lambda: reached(fifo), what="the init to be on its way")
        init = init_of(child.pid)
        assert (home.root / one.id).exists() and cmdline(init)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    os.close(writer)
    eventually(lambda: not cmdline(init), what="the init to end")
    home.ocirun("delete", "--force", one.id, **AS_USER).ok()
    one.gone()


def reached(fifo: Path) -> int:
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return 0


def init_of(pid: int) -> int:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else 0


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
