"""Hostile images, volumes, containers and words, by the rows of the threat list: each is refused or stays inside."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from runtime.linux.mount import mountinfo
from runtime.sealed import interpreter
from tests.bundles import Bundles, bundles
from tests.hostile import swapping, untouched
from tests.support import eventually, needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


@pytest.fixture
def outside(home: Bundles) -> Iterator[Path]:
    """A directory of the host that nothing may touch."""
    with untouched(home.directory) as marker:
        yield marker


def digest(*paths: Path) -> str:
    sums = hashlib.sha256()
    for path in sorted(paths):
        sums.update(path.read_bytes())
    return sums.hexdigest()


def ours() -> list[Path]:
    """The interpreter, what it loads, and every file of the runtime."""
    package = Path(runtime.__file__).parent
    stdlib = Path(sysconfig.get_path("stdlib"))
    return [Path(interpreter()), *package.rglob("*.py"), *stdlib.glob("*.py"), *stdlib.glob("lib-dynload/*.so")]


# ------------------------------------------------------------------------------------------------ the interpreter


def test_s01_entrypoint_is_the_runtimes_own_executable(home: Bundles) -> None:
    before = digest(*ours())
    one = home.make("/proc/self/exe", "-c", "open('/proc/self/exe', 'r+b')")
    one.run()
    script = one.rootfs / "bin/script"
    script.write_text("#!/proc/self/exe\nopen('/proc/self/exe', 'r+b')\n")
    script.chmod(0o755)
    one.process["args"] = ["/bin/script"]
    one.run()
    assert digest(*ours()) == before


def test_s01_a_container_that_waits_for_an_exec_cannot_write_the_interpreter(home: Bundles) -> None:
    before = digest(*ours())
    # Opens every executable that shows up, keeps the fd, and tries to open it for writing again and again.
    one = home.sh(
        "echo > /tmp/log; while :; do for p in /proc/[0-9]*; do"
        '  case "$(readlink $p/exe)" in *busybox*|"") ;; *) ( exec 3< $p/exe && echo seen >> /tmp/log;'
        "    for i in 1 2 3 4 5 6 7 8 9 10; do echo x 2>/dev/null >> /proc/self/fd/3 && echo WROTE >> /tmp/log; done )"
        "  2>/dev/null & ;; esac; done; done"
    )
    for kind in ("bounding", "effective", "permitted"):
        one.process["capabilities"][kind].append("CAP_SYS_PTRACE")
    one.up()
    for _ in range(12):
        one.exec("/proc/self/exe", "-c", "import time; time.sleep(1)")
        one.exec("true").ok()
    log = (one.rootfs / "tmp/log").read_text()
    assert "WROTE" not in log
    assert digest(*ours()) == before


def test_s01_the_process_before_execve_runs_from_a_sealed_copy(home: Bundles) -> None:
    one = home.make()
    one.create().ok()
    exe = f"/proc/{one.pid()}/exe"
    assert os.stat(exe).st_dev != os.stat(interpreter()).st_dev
    with pytest.raises(OSError, match=r"Read-only|Text file busy|not permitted"):
        os.open(exe, os.O_WRONLY)


def test_s17_before_execve_nobody_but_root_of_the_host_may_look(home: Bundles) -> None:
    one = home.make()
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.create().ok()
    pid = one.pid()
    assert "\nUid:\t1000\t1000" in Path(f"/proc/{pid}/status").read_text()
    assert os.stat(f"/proc/{pid}/fd").st_uid == 0, "it is dumpable: /proc/PID belongs to its user"
    # What it holds open: 0, 1, 2 and the socket that start comes over.
    held = {
        os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2
    }
    assert held == {"socket"}
    one.start().ok()
    eventually(lambda: os.stat(f"/proc/{pid}/fd").st_uid == 1000, what="the process to be itself")


# ------------------------------------------------------------------------------------------------- /proc and /sys


@pytest.mark.parametrize(
    "destination", ["/proc", "/proc/self", "/proc/sys/kernel", "/proc/../proc/1", "proc/self/attr"]
)
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_s02_nothing_is_mounted_over_proc(home: Bundles, destination: str, kind: str) -> None:
    one = home.make("true")
    source = home.directory / "source"
    source.mkdir()
    one.mount(destination, kind, source, *(["rbind"] if kind == "bind" else []))
    assert "cannot be mounted because" in one.run().failed("/proc")
    one.gone()
    one.config["mounts"].pop()
    one.run().ok()


def test_s02_what_lxcfs_does_is_allowed(home: Bundles) -> None:
    one = home.make("cat", "/proc/uptime")
    (home.directory / "uptime").write_text("1.00 2.00\n")
    one.mount("/proc/uptime", "bind", home.directory / "uptime", "bind", "ro")
    assert one.run().ok() == "1.00 2.00\n"


@pytest.mark.parametrize("target", ["/vol/x", "vol/x", "../../vol/x", "/dangling", "/{place}", "/bin/busybox"])
@pytest.mark.parametrize("place", ["proc", "sys"])
def test_s03_s06_a_linked_proc_or_sys_is_refused(home: Bundles, outside: Path, place: str, target: str) -> None:
    one = home.make("touch", "/ran")
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    (one.rootfs / "vol/x").mkdir(parents=True)
    (one.rootfs / place).rmdir()
    (one.rootfs / place).symlink_to(target.format(place=place))
    one.run().failed("must be mounted on an ordinary directory")
    assert not (one.rootfs / "ran").exists()
    one.gone()


def test_s12_sysctls_go_through_a_handle_of_our_own(home: Bundles, outside: Path) -> None:
    one = home.make("cat", "/written")
    one.config["mounts"] = [entry for entry in one.config["mounts"] if entry["destination"] != "/proc"]
    for name in ("sys/net/ipv4", "self/attr"):
        (one.rootfs / "proc" / name).mkdir(parents=True)
    (one.rootfs / "written").write_text("nothing\n")
    (one.rootfs / "proc/sys/net/ipv4/ip_forward").symlink_to("/written")
    one.linux["sysctl"] = {"net.ipv4.ip_forward": "1"}
    assert one.run().ok() == "nothing\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel.core_pattern", "|/bin/x"),
        ("kernel.shm_rmid_forced/../core_pattern", "x"),
        ("net.ipv4.ip_forward/../../../kernel/core_pattern", "x"),
        ("net..ipv4", "1"),
        ("net/../kernel/core_pattern", "x"),
        ("vm.swappiness", "1"),
        ("net.ipv4.ip_forward", "1\nkernel.core_pattern=x"),
        ("net.ipv4.ip forward", "1"),
    ],
)
def test_s59_sysctls_of_the_host_are_refused(home: Bundles, outside: Path, name: str, value: str) -> None:
    one = home.make("true")
    one.linux["sysctl"] = {name: value}
    one.run().failed("sysctl")
    one.gone()


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("network", "net.ipv4.ip_default_ttl", "/proc/self/ns/net"),
        ("ipc", "kernel.msgmax", "/proc/self/ns/ipc"),
        ("uts", "kernel.domainname", "/proc/self/ns/uts"),
    ],
)
def test_s59_sysctls_of_a_hosts_namespace_that_is_joined_are_refused(
    home: Bundles, kind: str, name: str, path: str
) -> None:
    held = Path("/proc/sys", name.replace(".", "/"))
    before = held.read_text()
    one = home.make("true")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != kind]
    one.linux["namespaces"].append({"type": kind, "path": path})
    one.linux["sysctl"] = {name: "33"}
    one.run().failed(f'sysctl "{name}" not allowed in host {kind} namespace')
    assert held.read_text() == before
    one.gone()


# ---------------------------------------------------------------------------------------------- races for a mount


@pytest.mark.parametrize("exists", [True, False])
def test_s04_s09_a_swapped_target_never_leads_out(home: Bundles, outside: Path, exists: bool) -> None:
    volume, source = home.directory / "volume", home.directory / "source"
    (volume / "place/sub").mkdir(parents=True)
    (volume / "link").symlink_to(outside)
    source.mkdir()
    (source / "mine").touch()
    deep = "sub" if exists else "sub/a/b"
    one = home.make("ls", f"/vol/place/{deep}")
    one.mount("/vol", "bind", volume, "rbind")
    one.mount(f"/vol/place/{deep}", "bind", source, "bind")
    with swapping(volume, "place", "link"):
        for _ in range(25):
            result = one.run()
            assert "Traceback" not in result.error and "ptmx" not in result.text
            one.gone()


def test_s10_a_hostile_dev_null_masks_nothing_away(home: Bundles, outside: Path) -> None:
    hostile = home.directory / "hostile-dev"
    hostile.mkdir()
    one = home.sh("stat -c %t:%T /proc/keys /secret; echo x > /proc/keys; cat /secret; chmod 0 /secret; echo end")
    (one.rootfs / "secret").write_text("secret")
    one.config["mounts"] = [entry for entry in one.config["mounts"] if not entry["destination"].startswith("/dev")]
    one.mount("/dev", "bind", hostile, "rbind")
    one.linux["maskedPaths"] = ["/proc/keys", "/secret"]
    null = os.stat("/dev/null")
    for kind in ("link", "missing", "regular", "fifo"):
        for name in os.listdir(hostile):
            (hostile / name).unlink()
        if kind == "link":
            (hostile / "null").symlink_to("/proc/sys/kernel/core_pattern")
        elif kind == "regular":
            (hostile / "null").write_text("regular")
        elif kind == "fifo":
            os.mkfifo(hostile / "null")
        assert one.run(stdin=None).text.split() == ["1:3", "1:3", "end"], kind
        now = os.stat("/dev/null")
        assert (now.st_mode, now.st_uid, now.st_rdev) == (null.st_mode, null.st_uid, null.st_rdev)


def test_s10_s13_a_swapped_masked_path_is_masked_all_the_same(home: Bundles, outside: Path) -> None:
    volume = home.directory / "volume"
    (volume / "dir").mkdir(parents=True)
    (volume / "dir/inside").write_text("inside")
    (volume / "link").symlink_to("/proc/sys/kernel")
    one = home.sh("cat /proc/self/mountinfo")
    one.mount("/vol", "bind", volume, "rbind")
    one.linux["maskedPaths"] = ["/vol/dir", "/proc/keys"]
    one.linux["readonlyPaths"] = ["/vol/dir", "/proc/sys", "/proc/bus"]
    host = {point.target: point.options for point in mountinfo()}
    with swapping(volume, "dir", "link"):
        for _ in range(15):
            result = one.run()
            if result.code == 0:
                found = {line.split()[4]: line.split()[5] for line in result.text.splitlines()}
                assert "ro" in found["/proc/sys"].split(",") and "/proc/keys" in found
    now = {point.target: point.options for point in mountinfo()}
    assert {target: options for target, options in now.items() if target in host} == {
        target: options for target, options in host.items() if target in now
    }


# ------------------------------------------------------------------------------------------------ /dev, terminals


@pytest.mark.parametrize("target", ["/outside", "{outside}", "../../outside", "../../../../../../{outside}"])
def test_s14_a_linked_dev_stays_in_the_root(home: Bundles, outside: Path, target: str) -> None:
    one = home.make("true")
    one.config["mounts"] = [entry for entry in one.config["mounts"] if not entry["destination"].startswith("/dev")]
    (one.rootfs / "dev").rmdir()
    (one.rootfs / "dev").symlink_to(target.format(outside=outside))
    one.run()
    one.gone()


@pytest.mark.parametrize("kind", ["link", "file", "empty"])
def test_s11_the_terminal_is_of_a_real_devpts(home: Bundles, outside: Path, kind: str) -> None:
    hostile = home.directory / "hostile-pts"
    hostile.mkdir()
    if kind == "link":
        (hostile / "ptmx").symlink_to("/proc/sys/kernel/core_pattern")
        (hostile / "0").symlink_to("/proc/sys/kernel/core_pattern")
    elif kind == "file":
        (hostile / "ptmx").write_text("")
    one = home.make("true")
    one.process["terminal"] = True
    one.config["mounts"] = [entry for entry in one.config["mounts"] if entry["destination"] != "/dev/pts"]
    one.mount("/dev/pts", "bind", hostile, "bind")
    one.run().failed("/dev/pts")
    one.gone()


def test_s11_a_linked_console_is_not_followed(home: Bundles, outside: Path) -> None:
    one = home.sh("stat -c %t:%T /dev/console; tty")
    one.process["terminal"] = True
    hostile = home.directory / "hostile-dev"
    (hostile / "pts").mkdir(parents=True)
    (hostile / "console").symlink_to("/proc/sys/kernel/core_pattern")
    one.config["mounts"][1] = {"destination": "/dev", "type": "bind", "source": str(hostile), "options": ["rbind"]}
    assert one.run().code == 1
    one.gone()


# ------------------------------------------------------------------------------------ directories and descriptors


def test_s08_a_working_directory_through_a_descriptor(home: Bundles, outside: Path) -> None:
    for number in (*range(3, 13), 20):
        one = home.make("ls")
        one.process["cwd"] = f"/proc/self/fd/{number}"
        one.run().failed("chdir to cwd")
        one.gone()
    one = home.make("pwd")
    (one.rootfs / "work").symlink_to("/proc/self/fd/7")
    one.process["cwd"] = "/work"
    one.run().failed("chdir to cwd")
    one.process["cwd"] = "/proc/self/cwd"
    one.run().failed("chdir to cwd")


def test_s08_exec_through_a_descriptor(home: Bundles) -> None:
    one = home.sh("ls -l /proc/self/fd; exec sleep 1000").up()
    for number in (*range(3, 11), 15):
        for process in ("self", "1"):
            one.exec("pwd", flags=("--cwd", f"/proc/{process}/fd/{number}")).failed("chdir to cwd")
            one.exec(f"/proc/{process}/fd/{number}/bin/sh", "-c", "echo out").failed("exec: ")
            one.exec(f"/proc/{process}/fd/{number}/usr/bin/id").failed("exec: ")


def test_s21_s63_a_working_directory_over_links_stays_inside(home: Bundles, outside: Path) -> None:
    one = home.make("pwd")
    (one.rootfs / "a").symlink_to(f"../../../../../../../..{outside}")
    one.process["cwd"] = "/a/new/directory"
    one.run()
    assert not (outside / "new").exists()
    assert (one.rootfs / str(outside).lstrip("/") / "new/directory").is_dir()


def test_s63_a_mount_target_over_links_stays_inside(home: Bundles, outside: Path) -> None:
    one = home.make("ls", f"{outside}/data")
    (one.rootfs / "a").symlink_to(f"../../../../../../../..{outside}")
    (one.rootfs / "file").symlink_to(f"{outside}/sub/dangling")
    source = home.directory / "source"
    source.mkdir()
    (source / "mine").touch()
    one.mount("/a/data", "bind", source, "bind").mount("/file", "bind", source / "mine", "bind")
    assert one.run().ok() == "mine\n"
    assert not (outside / "data").exists() and not (outside / "sub/dangling").exists()


# ---------------------------------------------------------------------------------------------------------- users


def test_s16_a_number_is_never_looked_up_as_a_name(home: Bundles) -> None:
    one = home.sh("id -u; id -g; sleep 1000")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.up()
    for user, said in (("1000", "1000\n"), ("1", "1\n"), ("01", "1\n"), ("1000:0", "1000\n"), ("0", "0\n")):
        assert one.exec("id", "-u", flags=("--user", user)).ok() == said
    assert one.exec("id", "-g", flags=("--user", "1:2")).ok() == "2\n"


@pytest.mark.parametrize(
    "user", ["name", "1:name", "1:", "4294967296", "2147483648", "-1", "1 ", "\uff11", "1_0", "+1", "1.0", ""]
)
def test_s15_s32_s33_a_user_is_exactly_its_number(home: Bundles, user: str) -> None:
    one = home.make().up()
    result = one.exec("id", "-u", flags=(f"--user={user}",))
    if user:
        assert result.code == 255 and result.text == "", result
    else:
        assert result.ok() == "0\n"  # not asked for: config.json's


def test_s20_the_hosts_null_device_keeps_its_owner(home: Bundles) -> None:
    before = os.stat("/dev/null")
    one = home.make("id", "-u")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    assert one.run().ok() == "1000\n"
    one.process["args"] = ["sleep", "1000"]
    one.up()
    with open("/dev/null", "r+b") as null:
        one.exec("true", stdin=null, stdout=null, stderr=null).ok()
    now = os.stat("/dev/null")
    assert (now.st_uid, now.st_gid, now.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


@pytest.mark.parametrize("kind", ["fifo", "huge", "device", "link", "directory"])
def test_s42_a_hostile_passwd_costs_nothing(home: Bundles, kind: str) -> None:
    one = home.sh("echo $HOME")
    passwd = one.rootfs / "etc/passwd"
    passwd.unlink()
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "huge":
        with open(passwd, "wb") as file:
            file.truncate(5 << 30)
    elif kind == "device":
        os.mknod(passwd, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    elif kind == "link":
        passwd.symlink_to("/dev/zero")
    else:
        passwd.mkdir()
    assert one.run(timeout=5.0).ok() == "/\n"


# ------------------------------------------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", "-x", "", "x" * 4096, "a\nb", "a b", "\u00e4", ".hidden"])
def test_s19_a_container_id_is_no_path(home: Bundles, name: str) -> None:
    one = home.make("true")
    one.write()
    for words in (
        ["run", "--bundle", str(one.path), "--", name],
        ["delete", "--force", "--", name],
        ["state", "--", name],
    ):
        home.ocirun(*words).failed("invalid container ID format" if name else "container id cannot be empty")
    assert not home.root.exists() or os.listdir(home.root) == []


@pytest.mark.parametrize("path", ["../x", "/a/../../x", "a\nb", "/"])
def test_s19_a_cgroup_path_stays_in_its_hierarchy(home: Bundles, path: str) -> None:
    one = home.make("true")
    one.linux["cgroupsPath"] = path
    one.run().failed("cgroupsPath")
    one.gone()


def test_s18_large_inputs_are_refused_or_work(home: Bundles) -> None:
    one = home.make("true")
    one.config["hostname"] = "h" * 70_000
    one.run().failed("hostname: longer than 64 bytes")
    one.config.pop("hostname")
    one.mount("/big", "tmpfs", "x" * 70_000, "size=4k")
    assert len(one.run().failed("mount tmpfs xxx")) < 80_000
    one.config["mounts"].pop()
    one.process["env"] = ["PATH=/bin", "BIG=" + "x" * 100_000]
    one.config["annotations"] = {"note": "x" * 300_000}
    one.run().ok()
    one.user_namespace()
    one.linux["uidMappings"] = [{"containerID": n, "hostID": 100_000 + n, "size": 1} for n in range(341)]
    one.run().failed("at most 340")
    one.gone()


def test_p08_bytes_that_are_no_text_arrive_as_they_are(home: Bundles) -> None:
    one = home.make("printf", "%s|", "placeholder")
    one.write()
    config = (one.path / "config.json").read_bytes().replace(b"placeholder", b"\xff\xfe\x80")
    (one.path / "config.json").write_bytes(config.replace(b'"PATH=/bin"', b'"PATH=/bin", "RAW=\xff"'))
    target = home.directory / "said"
    with open(target, "wb") as out:
        home.ocirun("run", "--bundle", str(one.path), one.id, stdout=out)
    assert target.read_bytes() == b"\xff\xfe\x80|"


def test_p09_nothing_of_the_image_is_imported(home: Bundles) -> None:
    one = home.make("true")
    version = f"python3.{sys.version_info.minor}"
    for directory in ("usr/lib/" + version, "work", "lib/" + version):
        for name in ("os.py", "encodings/__init__.py", "sitecustomize.py", "_strptime.py", "signal.py"):
            path = one.rootfs / directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("open('/trap', 'w').close()\n")
    one.process["cwd"] = "/work"
    one.process["env"] += ["PYTHONPATH=/work", "PYTHONHOME=/usr", "LD_PRELOAD=/work/x.so"]
    one.run(env={"PYTHONPATH": str(one.rootfs / "work")})
    one.process["args"] = ["no-such-command"]
    one.run().failed("executable file not found")
    assert not (one.rootfs / "trap").exists()


def test_s75_signals_to_the_own_group_stay_inside(home: Bundles) -> None:
    one = home.sh("kill -TERM 0; sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    assert one.run().code == 128 + signal.SIGTERM
    one.gone()


def test_s75_a_container_leads_a_session_of_its_own(home: Bundles) -> None:
    one = home.sh("cut -d ' ' -f 1,5,6 /proc/$$/stat")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    pid, group, session = one.run().ok().split()
    assert pid == group == session


def test_o35_processes_of_a_shared_pid_namespace_end_with_the_container(home: Bundles) -> None:
    one = home.sh("for i in 1 2 3; do setsid sleep 1000 & done; sleep 1000")
    one.linux["namespaces"] = [entry for entry in one.linux["namespaces"] if entry["type"] != "pid"]
    one.up()
    eventually(lambda: len(home.processes(one.id)) >= 4, what="its children")
    home.ocirun("kill", one.id, "KILL").ok()
    one.becomes("stopped")
    one.delete(force=False).ok()
    one.gone()


def test_s65_two_containers_share_no_environment(home: Bundles) -> None:
    first, second = home.sh("env; sleep 1000"), home.sh("env")
    first.process["env"] += ["SECRET=one"]
    first.up()
    assert "SECRET" not in second.run().ok()


def test_the_state_directory_is_closed_to_others(home: Bundles) -> None:
    one = home.make()
    before = os.umask(0)
    try:
        one.create().ok()
    finally:
        os.umask(before)
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((home.root / one.id).stat().st_mode) == 0o700
    assert stat.S_IMODE((home.root / one.id / "start.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((home.root / one.id / "state.json").stat().st_mode) == 0o600
    assert json.loads((home.root / one.id / "state.json").read_text())["id"] == one.id
