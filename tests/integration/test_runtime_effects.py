"""What config.json asks for, looked at from inside the container and in the kernel."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.capabilities import CAPABILITIES as NUMBERS
from runtime.linux.mount import MS_SHARED, MountPoint, mount, mountinfo, umount2
from tests.bundles import CAPABILITIES, Bundle, Bundles, bundles
from tests.support import SOON_S, eventually, needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def mask(*names: str) -> int:
    return sum(1 << NUMBERS[name] for name in set(names))


def status(text: str) -> dict[str, str]:
    """/proc/PID/status as a mapping."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def test_the_process_is_who_and_where_it_should_be(home: Bundles) -> None:
    one = home.sh(
        "id -u; id -g; id -G; umask; pwd; echo $A; echo $HOME; cat /proc/self/oom_score_adj; echo x > f; stat -c %a f"
    )
    one.process["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o077}
    one.process.update(cwd="/tmp/deep/er", env=["PATH=/bin", "A=first", "A=last=2"], oomScoreAdj=500)
    (one.rootfs / "tmp/deep/er").mkdir(parents=True)
    os.chown(one.rootfs / "tmp/deep/er", 1000, 1000)
    lines = one.run().ok().splitlines()
    assert lines[:2] == ["1000", "1001"] and set(lines[2].split()) == {"1001", "5", "7"}
    assert lines[3:] == ["0077", "/tmp/deep/er", "last=2", "/tmp", "500", "600"]


def test_oom_score_below_what_is_allowed_is_clamped(home: Bundles) -> None:
    one = home.make("cat", "/proc/self/oom_score_adj")
    one.process["oomScoreAdj"] = -900
    result = one.run()
    lowest = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(result.ok()) == -900 or (int(result.ok()) == lowest and "oom_score_adj -900" in result.error)


def test_rlimits(home: Bundles) -> None:
    one = home.make("cat", "/proc/self/limits")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    one.process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]
    limits = one.run().ok()
    assert "Max open files            100                  200" in limits
    assert "Max core file size        0                    0" in limits
    one.process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 5}]
    one.run().failed("process.rlimits[0].soft")
    assert hard >= 200


@pytest.mark.parametrize("uid", [0, 1000])
def test_s05_five_sets_of_capabilities(home: Bundles, uid: int) -> None:
    one = home.make("cat", "/proc/self/status")
    one.process["user"] = {"uid": uid, "gid": uid}
    one.process["capabilities"] = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NOT_INVENTED"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    }
    found = {key: int(value, 16) for key, value in status(one.run().ok()).items() if key.startswith("Cap")}
    assert found["CapBnd"] == mask("CAP_CHOWN", "CAP_KILL", "CAP_SETUID")
    assert found["CapInh"] == found["CapAmb"] == mask("CAP_KILL")
    if uid:
        assert found["CapPrm"] == found["CapEff"] == mask("CAP_KILL")


@pytest.mark.parametrize("add", [[], ["CAP_NET_BIND_SERVICE"]])
def test_s05_nothing_is_inheritable_unless_asked(home: Bundles, add: list[str]) -> None:
    one = home.make("sh", "-c", "cat /proc/self/status; sleep 1000")
    for kind in ("bounding", "permitted", "effective"):
        one.process["capabilities"][kind] = [*CAPABILITIES, *add]
    one.up()
    show = ("cat", "/proc/self/status")
    for found in (
        status(Path(f"/proc/{one.pid()}/status").read_text()),
        status(one.exec(*show).ok()),
        status(one.exec(*show, flags=("--cap", "CAP_SYS_CHROOT")).ok()),
        status(one.exec(*show, flags=("--user", "1000")).ok()),
    ):
        assert int(found["CapInh"], 16) == int(found["CapAmb"], 16) == 0
        assert int(found["CapBnd"], 16) & ~mask("CAP_SYS_CHROOT") == mask(*CAPABILITIES, *add)
        assert found["NoNewPrivs"] == "1"
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0  # a user without ambient capabilities


def test_sysctl_and_names(home: Bundles) -> None:
    one = home.sh(
        "hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax; ip link"
    )
    one.config |= {"hostname": "one", "domainname": "example"}
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.msgmax": "4096"}
    lines = one.run().ok().splitlines()
    assert lines[:4] == ["one", "example", "1", "4096"]
    assert "LOOPBACK,UP" in lines[4] and len(lines) < 12
    one.linux["sysctl"] = {"net.ipv4.no_such": "1"}
    assert "sysctl net.ipv4.no_such=1" in one.run().failed("ENOENT")
    one.gone()


def test_read_only_root_masked_and_read_only_paths(home: Bundles) -> None:
    one = home.sh(
        "touch /x; touch /tmp/x; touch /data/x && echo data; cat /proc/version | wc -c; "
        "ls /proc/acpi /masked 2>/dev/null | grep -v :; cat /secret; echo x > /secret; touch /masked/x;"
        "echo 1 > /proc/sys/net/ipv4/ip_forward; cat /part/f; touch /part/f"
    )
    one.config["root"]["readonly"] = True
    for name in ("data", "masked", "part"):
        (one.rootfs / name).mkdir()
    (one.rootfs / "masked/inside").touch()
    (one.rootfs / "part/f").write_text("part\n")
    (one.rootfs / "secret").write_text("secret\n")
    one.mount("/data", "tmpfs", "tmpfs", "size=4k")
    one.linux["maskedPaths"] = ["/proc/version", "/proc/acpi", "/masked", "/secret", "/not/there"]
    one.linux["readonlyPaths"] = ["/proc/sys", "/part", "/not/there/either"]
    result = one.run()
    assert result.text.split() == ["data", "0", "part"], result
    for words in (
        "/x: Read-only",
        "/tmp/x: Read-only",
        "ip_forward: Read-only",
        "masked/x: Read-only",
        "/part/f: Read-only",
    ):
        assert words in result.error, result
    assert (one.rootfs / "secret").read_text() == "secret\n"


def points(one: Bundle) -> dict[str, MountPoint]:
    return {point.target: point for point in mountinfo(one.pid())}


def test_mount_options(home: Bundles) -> None:
    one = home.make()
    source = home.directory / "source"
    (source / "below").mkdir(parents=True)
    (source / "file").write_text("x")
    one.mount("/a", "bind", source, "rbind", "ro", "nosuid", "nodev", "noexec", "noatime")
    one.mount("/b/c", "bind", source / "file", "bind")
    one.mount("/shm", "tmpfs", "shm", "mode=1777", "size=64k", "nosuid", "noexec", "ro")
    one.mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev")
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    one.mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro")
    one.up()
    found = points(one)
    assert set(found["/a"].options.split(",")) == {"ro", "nosuid", "nodev", "noexec", "noatime"}
    assert found["/b/c"].options.startswith("rw") and (one.rootfs / "b/c").is_file()
    assert {"ro", "nosuid", "noexec"} <= set(found["/shm"].options.split(",")) and "size=64k" in found[
        "/shm"
    ].super_options
    assert found["/sys"].fstype == "sysfs" and "ro" in found["/sys"].options.split(",")
    assert found["/dev/mqueue"].fstype == "mqueue"
    below = [point for target, point in found.items() if target.startswith("/sys/fs/cgroup")]
    assert below and all("ro" in point.options.split(",") for point in below)
    # Nobody's source of a mount outside, and none of the host's mounts.
    assert set(found) <= {"/", "/proc", "/dev", "/dev/pts", "/a", "/b/c", "/shm", "/dev/mqueue", "/sys"} | {
        p.target for p in below
    }


def test_mount_errors_name_source_target_and_flags(home: Bundles) -> None:
    one = home.make("true")
    one.mount("/a", "bind", "/no/such/source", "bind", "ro")
    one.run().failed("bind /no/such/source on /a (ro)")
    one.config["mounts"].pop()
    one.mount("/a", "nosuchfs", "x")
    one.run().failed("mount nosuchfs x on /a")
    one.config["mounts"].pop()
    one.mount("/a", "tmpfs", "x", "nonsense=1")
    one.run().failed("nonsense")
    one.config["mounts"].pop()
    one.mount("/a", "bind", "/tmp", "bind", "nonsense")
    one.run().failed('mounts[3].options[1]: unknown option "nonsense"')
    one.gone()


@pytest.mark.parametrize(
    ("option", "arrives", "returns"), [("rprivate", False, False), ("rslave", True, False), ("rshared", True, True)]
)
def test_propagation(home: Bundles, option: str, arrives: bool, returns: bool) -> None:
    source = home.directory / "volume"
    (source / "sub").mkdir(parents=True)
    (source / "back").mkdir()
    mount(str(source), str(source), None, 4096)
    try:
        mount(None, str(source), None, MS_SHARED)
        one = home.make()
        if returns:  # otherwise all of the host's mounts are slaves before they are bound, as in the peers
            one.linux["rootfsPropagation"] = "rshared"
        one.mount("/v", "bind", source, "rbind", option)
        for kind in ("bounding", "permitted", "effective"):
            one.process["capabilities"][kind].append("CAP_SYS_ADMIN")
        one.up()
        mount("tmpfs", str(source / "sub"), "tmpfs", 0)
        try:
            assert ("/v/sub" in points(one)) is arrives
            one.exec("mount", "-t", "tmpfs", "x", "/v/back").ok()
            assert (str(source / "back") in home.mounts()) is returns
        finally:
            one.exec("umount", "/v/back").ok()
            umount2(str(source / "sub"))
    finally:
        one.delete().ok()
        umount2(str(source))


def test_devices(home: Bundles) -> None:
    one = home.sh(
        "for d in null zero full random urandom tty; do stat -c '%n %F %t:%T %a' /dev/$d; done;"
        "stat -c '%t:%T %a %u' /dev/mine;"
        "for l in ptmx fd stdin; do readlink /dev/$l; done;"
        "head -c 3 /dev/zero | od -An -tx1; head -c 1 /dev/mine; echo > /dev/mem"
    )
    one.linux["devices"] = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o600, "uid": 7}]
    one.linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    result = one.run()
    lines = result.text.splitlines()
    assert lines[0] == "/dev/null character special file 1:3 666" and lines[5].endswith("5:0 666")
    assert lines[6:10] == ["1:5 600 7", "pts/ptmx", "/proc/self/fd", "/proc/self/fd/0"]
    assert lines[10].split() == ["00", "00", "00"]


def test_seccomp_holds_for_init_and_exec(home: Bundles) -> None:
    one = home.make()
    one.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}],
    }
    one.up()
    assert status(Path(f"/proc/{one.pid()}/status").read_text())["Seccomp"] == "2"
    one.exec("mkdir", "/tmp/x").failed("not supported")
    # What confines the init confines an exec although the bundle says otherwise now, and even without a bundle.
    one.linux.pop("seccomp")
    one.write()
    one.exec("mkdir", "/tmp/x").failed("not supported")


def test_no_new_privs_is_off_when_not_asked(home: Bundles) -> None:
    one = home.make("cat", "/proc/self/status")
    one.process["noNewPrivileges"] = False
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    found = status(one.run().ok())
    assert (found["NoNewPrivs"], found["Seccomp"], int(found["CapEff"], 16)) == ("0", "2", 0)


def test_namespaces_are_made_or_joined(home: Bundles) -> None:
    first = home.make().up()
    pid = first.pid()
    second = home.make()
    second.linux["namespaces"] = [
        {"type": "mount"},
        *({"type": kind, "path": f"/proc/{pid}/ns/{name}"} for kind, name in
          (("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid"))),
    ]  # fmt: skip
    second.up()
    for name in ("net", "ipc", "uts", "pid"):
        assert os.readlink(f"/proc/{second.pid()}/ns/{name}") == os.readlink(f"/proc/{pid}/ns/{name}")
    assert os.readlink(f"/proc/{second.pid()}/ns/mnt") != os.readlink(f"/proc/{pid}/ns/mnt")
    assert os.readlink(f"/proc/{second.pid()}/ns/cgroup") == os.readlink("/proc/self/ns/cgroup")
    second.delete().ok()
    second.gone()
    assert first.status() == "running"
    third = home.make("true")
    third.linux["namespaces"][2]["path"] = f"/proc/{pid}/ns/uts"
    third.run().failed("that is no network namespace")
    third.linux["namespaces"][2]["path"] = "/no/such/ns"
    third.run().failed("/no/such/ns")
    third.gone()


def test_user_namespace(home: Bundles) -> None:
    one = home.make().user_namespace()
    one.process["user"] = {"uid": 5, "gid": 6}
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    source = home.directory / "source"
    source.mkdir()
    one.mount("/data", "bind", source, "rbind", "ro")
    one.linux["maskedPaths"] = ["/proc/version", "/sys/firmware"]
    one.linux["readonlyPaths"] = ["/proc/sys"]
    one.up()
    pid = one.pid()
    found = status(Path(f"/proc/{pid}/status").read_text())
    assert found["Uid"].split()[0] == "100005" and found["Gid"].split()[0] == "100006"
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "100000", "65536"]
    assert one.exec("id", "-u", flags=("--user", "0")).ok() == "0\n"
    assert (
        one.exec("sh", "-c", "echo x > /dev/null; stat -c %t:%T /dev/null; cat /proc/version | wc -c").ok()
        == "1:3\n0\n"
    )
    one.exec("touch", "/data/x", flags=("--user", "0")).failed("Read-only")


def test_memory_limit_too_low_to_start_is_said(home: Bundles) -> None:
    one = home.make("true")
    one.linux["resources"] = {"memory": {"limit": 6 << 20}, "pids": {"limit": 5}}
    one.run().ok()  # the interpreter is not charged to the container (threats O34)
    one.linux["resources"] = {"memory": {"limit": 4096}}
    assert one.run().code != 0
    one.gone()


def test_cgroup_limits_are_in_force(home: Bundles) -> None:
    one = home.make()
    one.linux["resources"] = {"memory": {"limit": 64 << 20}, "pids": {"limit": 33}}
    one.up()
    said = [Path(path) for path in home.cgroups(one.id)]
    values = {path.name: path.read_text().strip() for top in said for path in top.iterdir() if path.name in
              ("memory.limit_in_bytes", "memory.max", "pids.max")}  # fmt: skip
    assert str(64 << 20) in values.values() and values["pids.max"] == "33"


def test_the_callers_affinity_signals_and_fds_do_not_travel(home: Bundles) -> None:
    one = home.sh("cat /proc/self/status; ls -l /proc/self/fd")
    before = os.sched_getaffinity(0)
    held = os.open("/", os.O_RDONLY)
    os.set_inheritable(held, True)
    os.sched_setaffinity(0, {min(before)})
    try:
        result = one.run(close_fds=False, preexec_fn=lambda: ctypes.CDLL(None).signal(15, ctypes.c_void_p(1)))
    finally:
        os.sched_setaffinity(0, before)
        os.close(held)
    found = status(result.ok())
    assert found["Cpus_allowed_list"] == status(Path("/proc/self/status").read_text())["Cpus_allowed_list"]
    assert int(found["SigIgn"], 16) == int(found["SigBlk"], 16) == 0
    fds = [line.split()[-3] for line in result.text.splitlines() if " -> " in line]
    assert fds == ["0", "1", "2"]  # ls's own is gone when ls looks at it


def test_attached_terminal_of_a_run(home: Bundles) -> None:
    one = home.sh("tty; stty size; echo done")
    one.process["terminal"] = True
    one.write()
    words = f"stty rows 30 cols 100; exec {' '.join(home.command('run', '--bundle', str(one.path), one.id))}"
    done = subprocess.run(
        ["script", "-qec", words, "/dev/null"], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done
    assert done.stdout.replace(b"\r", b"").split() == [b"/dev/pts/0", b"30", b"100", b"done"]
    eventually(lambda: not home.processes(one.id))
    one.gone()


def test_a_user_namespace_is_joined_by_path(home: Bundles) -> None:
    first = home.make().user_namespace().up()
    pid = first.pid()
    second = home.make().user_namespace()
    for key in ("uidMappings", "gidMappings"):
        second.linux.pop(key)
    second.linux["namespaces"] = [
        {"type": "mount"},
        {"type": "pid"},
        *({"type": kind, "path": f"/proc/{pid}/ns/{name}"} for kind, name in
          (("user", "user"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts"))),
    ]  # fmt: skip
    second.up()
    for name in ("user", "net", "ipc", "uts"):
        assert os.readlink(f"/proc/{second.pid()}/ns/{name}") == os.readlink(f"/proc/{pid}/ns/{name}")
    assert status(Path(f"/proc/{second.pid()}/status").read_text())["Uid"].split()[0] == "100000"
    assert second.exec("id", "-u").ok() == "0\n"


def test_no_pivot_and_closed_stdio(home: Bundles) -> None:
    one = home.sh("ls / | wc -l; ls /../.. | wc -l")
    lines = one.run("--no-pivot").ok().split()
    assert lines[0] == lines[1] == str(len(os.listdir(one.rootfs)))
    words = " ".join(home.command("run", "--bundle", str(one.path), one.id))
    closed = subprocess.run(["sh", "-c", f"exec {words} <&- >&- 2>&-"], check=False, timeout=SOON_S)
    assert closed.returncode in (0, 1)
    one.gone()


def test_a_file_in_the_way_and_a_file_over_a_directory_are_said(home: Bundles) -> None:
    one = home.make("true")
    (one.rootfs / "file").touch()
    source = home.directory / "source"
    source.mkdir()
    one.mount("/file", "bind", source, "bind")
    assert "on /file" in one.run().failed("ENOTDIR")
    one.config["mounts"][-1].update(destination="/tmp", source="/etc/passwd")
    assert "bind /etc/passwd on /tmp" in one.run().failed("is a directory")
    one.config["mounts"][-1].update(destination="/file/below", source=str(source))
    assert "on /file/below" in one.run().failed("ENOTDIR")
    one.gone()
