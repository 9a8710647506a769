"""Hostile images and hostile neighbours against the native runtime, by the rows of the list of threats."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.linux.mount import mountinfo
from runtime.sealed import interpreter
from tests.bundles import Bundle, Bundles, bundles
from tests.support import eventually, needs

LINKS = {
    "relative": "data",
    "absolute": "/data",
    "upwards": "../../../../../data",
    "dangling": "/nowhere",
    "loop": "proc",
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host that must look afterwards as it does before."""
    host = tmp_path / "host"
    (host / "below").mkdir(parents=True)
    for name in ("ptmx", "fd", "stdin", "core", "hosts", "file"):
        (host / name).write_text("of the host\n")
    before = listing(host)
    yield host
    assert listing(host) == before


def listing(directory: Path) -> list[tuple[Any, ...]]:
    """What is there: names, modes, owners, inodes, times, contents."""
    found: list[tuple[Any, ...]] = []
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append(
            (str(path), status.st_mode, status.st_uid, status.st_gid, status.st_ino, status.st_mtime_ns, content)
        )
    return found


def replace(path: Path, target: str) -> None:
    """Puts a link where a directory or file was."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


def works_afterwards(home: Bundles) -> None:
    home.make("true").run().ok()


# --------------------------------------------------------------------------------------------- the runtime's own files


def hashes() -> dict[str, str]:
    top = Path(runtime.__file__).parent
    files = [Path(interpreter()), *top.rglob("*.py")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("entry", ["/proc/self/exe", "/script", "/link"])
def test_s01_the_runtime_cannot_be_written_through_proc_self_exe(home: Bundles, entry: str) -> None:
    before = hashes()
    one = home.sh(
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do for p in /proc/[0-9]*; do"
        " (echo overwritten > $p/exe) 2>/dev/null && [ $(readlink $p/exe) != /bin/busybox ] && echo wrote $p;"
        " done; done; echo tried"
    )
    (one.rootfs / "script").write_text("#!/proc/self/exe\n")
    (one.rootfs / "script").chmod(0o755)
    (one.rootfs / "link").symlink_to("/proc/self/exe")
    for kind in ("bounding", "effective", "permitted"):
        one.process["capabilities"][kind] += ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]
    reader, writer = os.pipe()
    one.write()
    child = home.popen("run", "--bundle", str(one.path), one.id, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    try:
        while child.poll() is None:
            one.exec(entry, "-c", "print('the interpreter ran')", timeout=20)
        said = os.read(reader, 65536).decode()
    finally:
        os.close(reader)
        child.wait()
    assert said == "tried\n"
    assert hashes() == before
    two = home.make(entry, "-c", "import os; print(os.listdir('/'))")
    for name in ("script", "link"):
        (two.rootfs / name).symlink_to(f"{one.rootfs}/{name}")
    two.run()
    works_afterwards(home)


# ------------------------------------------------------------------------------------------------- /proc, /sys and /dev


@pytest.mark.parametrize(
    "where", ["/proc", "/proc/self", "/proc/sys", "/proc/../proc", "/x/../proc/self/attr", "/proc/self/../sys"]
)
def test_s02_nothing_is_mounted_over_proc(home: Bundles, where: str) -> None:
    volume = home.directory / "volume"
    (volume / "attr").mkdir(parents=True)
    one = home.sh("touch /ran").mount(where, "bind", volume, "rbind")
    one.run().failed("cannot be mounted because")
    assert not (one.rootfs / "ran").exists()
    one.config["mounts"][-1] = {"destination": where, "type": "tmpfs", "source": "tmpfs"}
    one.run().failed("cannot be mounted because")
    one.gone()
    works_afterwards(home)


def test_s02_the_fixed_list_over_proc_is_allowed(home: Bundles) -> None:
    (home.directory / "cpuinfo").write_text("ours\n")
    one = home.make("cat", "/proc/cpuinfo").mount("/proc/cpuinfo", "bind", home.directory / "cpuinfo", "bind", "ro")
    assert one.run().ok() == "ours\n"


@pytest.mark.parametrize("name", ["proc", "sys"])
@pytest.mark.parametrize("link", LINKS)
def test_s03_s06_proc_and_sys_must_be_directories_of_their_own(home: Bundles, name: str, link: str) -> None:
    one = home.sh("touch /ran")
    one.mount("/sys", "sysfs", "sysfs", "ro")
    (one.rootfs / "data").mkdir()
    replace(one.rootfs / name, LINKS[link] if link != "loop" else name)
    said = one.run().failed("ordinary directory")
    assert f"/{name}" in said
    assert not (one.rootfs / "ran").exists() and not list((one.rootfs / "data").iterdir())
    one.gone()


def test_s03_proc_through_a_link_into_a_shared_volume(home: Bundles) -> None:
    volume = home.directory / "volume"
    (volume / "proc").mkdir(parents=True)
    one = home.sh("touch /ran").mount("/vol", "bind", volume, "rbind")
    one.config["mounts"].insert(0, one.config["mounts"].pop())
    replace(one.rootfs / "proc", "/vol/proc")
    one.run().failed("ordinary directory")
    assert not (one.rootfs / "ran").exists() and not list((volume / "proc").iterdir())


@pytest.mark.parametrize("user", [False, True])
def test_s07_cgroups_asked_read_only_are_read_only(home: Bundles, user: bool) -> None:
    one = home.sh(
        "find / -xdev >/dev/null 2>&1; for f in $(ls -d /sys/fs/cgroup/* /sys/fs/cgroup/*/*); do"
        " [ -f $f ] && (echo 1 > $f) 2>/dev/null && echo wrote $f; done; touch /sys/fs/cgroup/x; echo end"
    )
    if user:
        one.user_namespace()
    one.linux["namespaces"] = [item for item in one.linux["namespaces"] if item["type"] != "cgroup"]
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    one.mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", "nosuid")
    result = one.run()
    assert result.text == "end\n" and "Read-only" in result.error


def test_s08_no_fd_of_the_host_is_a_way_out(home: Bundles) -> None:
    one = home.make("ls", "-l", "/proc/self/fd")
    held = os.open("/", os.O_PATH | os.O_DIRECTORY)
    os.set_inheritable(held, True)
    try:
        said = one.run(close_fds=False).ok()
        assert [line.split()[-3] for line in said.splitlines() if " -> " in line] == ["0", "1", "2"]
        two = home.make()
        (two.rootfs / "work").symlink_to("/proc/self/fd/7")
        two.up()
        for number in (*range(3, 9), held):
            for where in (f"/proc/self/fd/{number}", f"/proc/1/fd/{number}", f"/proc/self/fd/{number}/../..", "/work"):
                result = two.exec("sh", "-c", "pwd; ls /", flags=("--cwd", where), close_fds=False)
                assert result.code != 0 or "pytest" not in result.text and "home" not in result.text, (where, result)
            three = home.make("pwd")
            three.process["cwd"] = f"/proc/self/fd/{number}"
            three.run(close_fds=False).failed("cwd")
        for number in (3, 4, 5, 6, 7, 8, held):
            one = home.make(f"/proc/self/fd/{number}/bin/busybox", "true")
            assert one.run(close_fds=False).code == 1
    finally:
        os.close(held)


@pytest.mark.parametrize("kind", ["link", "missing", "file", "fifo", "loop"])
def test_s10_a_mask_is_a_null_device_whatever_dev_null_is(home: Bundles, kind: str) -> None:
    one = home.sh(
        "for p in /proc/version /proc/meminfo /masked; do stat -L -c '%F %t:%T' $p; cat $p | wc -c; done;"
        "ls /proc/tty | wc -l; (echo x > /proc/sys/kernel/core_pattern) 2>&1 | grep -c Read-only"
    )
    one.config["mounts"] = [entry for entry in one.config["mounts"] if not entry["destination"].startswith("/dev")]
    null = one.rootfs / "dev/null"
    (one.rootfs / "masked").write_text("secret")
    if kind == "link":
        null.symlink_to("/proc/sys/kernel/core_pattern")
    elif kind == "loop":
        null.symlink_to("/dev/null")
    elif kind == "file":
        null.write_text("a file")
    elif kind == "fifo":
        os.mkfifo(null)
    one.linux["maskedPaths"] = ["/proc/version", "/proc/meminfo", "/proc/tty", "/masked"]
    one.linux["readonlyPaths"] = ["/proc/sys"]
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    assert one.run().ok().split("\n") == ["character special file 1:3", "0"] * 3 + ["0", "1", ""]
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before
    assert (one.rootfs / "masked").read_text() == "secret"


@pytest.mark.parametrize("kind", ["no devpts", "volume", "link"])
def test_s11_the_console_is_of_the_containers_own_devpts(home: Bundles, kind: str) -> None:
    one = home.sh("stat -c %t:%T /dev/console; (echo x > /proc/sys/kernel/core_pattern) 2>&1 | grep -c Read-only")
    one.process["terminal"] = True
    one.linux["readonlyPaths"] = ["/proc/sys"]
    volume = home.directory / "volume"
    volume.mkdir()
    (volume / "ptmx").symlink_to("/proc/sys/kernel/core_pattern")
    (volume / "0").symlink_to("/proc/sys/kernel/core_pattern")
    devpts = one.config["mounts"].pop()
    if kind == "volume":
        one.config["mounts"].append(devpts)
        one.mount("/dev/pts", "bind", volume, "rbind")
    elif kind == "link":
        one.config["mounts"].pop()
        one.config["mounts"].append(devpts)
        (one.rootfs / "dev/console").symlink_to("/proc/sys/kernel/core_pattern")
    result = one.run()
    if kind == "link":
        assert "core_pattern" not in result.text and result.code == 1 or result.text.split() == ["88:0", "1"], result
    else:
        assert "/dev/pts" in result.failed("console")
    one.gone()
    works_afterwards(home)


@pytest.mark.parametrize("target", ["absolute", "upwards"])
def test_s14_dev_that_is_a_link_stays_inside(home: Bundles, marker: Path, target: str) -> None:
    one = home.make("true")
    one.config["mounts"] = one.config["mounts"][:1]
    replace(one.rootfs / "dev", str(marker) if target == "absolute" else "../../../../../../../../.." + str(marker))
    one.run()
    works_afterwards(home)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("1", (1, 0)), ("1:2", (1, 2)), ("01", (1, 0)), ("1000", (1000, 0)), ("0", (0, 0)), ("0:5", (0, 5)),
        ("name", None), ("name:2", None), ("1:", None), (":1", None), ("-1", None), ("4294967295", None),
        ("4294967296", None), ("1 ", None), ("1:2:3", None), ("0x0", None), ("\u0661", None),
    ],
)  # fmt: skip
def test_s15_s16_a_user_is_exactly_what_was_asked(home: Bundles, user: str, expected: tuple[int, int] | None) -> None:
    one = home.make().up()
    result = one.exec("sh", "-c", "id -u; id -g", flags=("--user", user))
    if expected is None:
        assert result.code == 1 and result.text == "", result
    else:
        assert result.ok().split() == [str(number) for number in expected]


def test_s18_too_much_of_anything_is_a_clean_error(home: Bundles) -> None:
    one = home.make("true").user_namespace()
    one.linux["uidMappings"] = [{"containerID": n, "hostID": 100_000 + n, "size": 1} for n in range(7000)]
    one.run().failed("7000 mappings")
    two = home.make("true")
    for key, value, words in (
        ("hostname", "x" * 70_000, "hostname: longer than 64 bytes"),
        ("root", {"path": "x/" * 35_000}, "root.path"),
        ("mounts", [{"destination": "/a", "type": "tmpfs", "options": ["size=" + "9" * 70_000]}], "mount tmpfs on /a"),
        ("mounts", [{"destination": "/a" * 40_000, "type": "tmpfs"}], "mounts[0].destination: longer"),
    ):
        before = two.config.get(key)
        two.config[key] = value
        said = two.run().failed(words)
        assert "Traceback" not in said
        two.config[key] = before
    two.process["args"] = ["true", *["x" * 1000] * 500]
    two.run().ok()
    two.gone()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "-x", "", "x" * 4096, "a\nb", "a b", "../x", ".hidden", "ü"])
def test_s19_an_id_is_no_path(home: Bundles, name: str) -> None:
    one = home.make("true")
    one.write()
    home.root.mkdir()
    before = sorted(os.listdir(home.root.parent))
    for words in (
        ["create", "--bundle", str(one.path), "--", name],
        ["state", "--", name],
        ["delete", "--force", "--", name],
    ):
        result = home.ocirun(*words)
        assert result.code == 1 and "invalid container ID format" in result.error, result
    assert sorted(os.listdir(home.root.parent)) == before and not [n for n in os.listdir(home.root) if n[0] != "."]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cgroupsPath", "../escape"), ("cgroupsPath", "/a/../../escape"), ("cgroupsPath", "/"),
        ("cgroupsPath", "/a\nb"),
        ("resources", {"unified": {"../memory.max": "1"}}), ("resources", {"unified": {"cgroup.procs": "1"}}),
        ("resources", {"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
        ("resources", {"hugepageLimits": [{"pageSize": "2MB/../../x", "limit": 1}]}),
    ],
)  # fmt: skip
def test_s19_names_of_cgroups_are_no_paths(home: Bundles, key: str, value: object) -> None:
    one = home.make("true")
    one.linux[key] = value
    assert "Traceback" not in one.run().failed("")
    assert home.cgroups() == []
    one.gone()


def test_s20_the_hosts_dev_null_keeps_its_owner(home: Bundles) -> None:
    before = os.stat("/dev/null")
    one = home.make()
    one.process["user"] = {"uid": 1000, "gid": 1000}
    with open("/dev/null", "r+") as null:
        one.create(stdin=null, stdout=null, stderr=null)
        one.start().ok()
        one.exec("true", flags=("--user", "1000"), stdin=null, stdout=null, stderr=null)
    after = os.stat("/dev/null")
    assert (after.st_uid, after.st_gid, after.st_mode, after.st_rdev) == (0, 0, before.st_mode, os.makedev(1, 3))


def test_s21_links_planted_where_the_runtime_makes_things(home: Bundles, marker: Path) -> None:
    one = home.make("true")
    one.config["mounts"] = one.config["mounts"][:1]
    for name in ("ptmx", "fd", "stdin", "null", "zero", "full", "tty", "console", "pts", "shm", "core"):
        (one.rootfs / "dev" / name).symlink_to(marker / "file")
    for name in ("hosts", "resolv.conf", "hostname"):
        (one.rootfs / "etc" / name).symlink_to(f"../../../../../../../../..{marker}/hosts")
        source = home.directory / name
        source.write_text("given\n")
        one.mount(f"/etc/{name}", "bind", source, "bind", "ro")
    (one.rootfs / "v").symlink_to(marker / "below")
    one.mount("/v/new/deep", "tmpfs", "tmpfs")
    one.mount("/v/file", "bind", home.directory / "hosts", "bind")
    one.process["cwd"] = "/v/work"
    one.run().ok()


@pytest.mark.parametrize("destination", ["/../../etc", "/v", "/v/..", "/v/x/../../.."])
def test_s34_a_destination_never_shows_the_host(home: Bundles, marker: Path, destination: str) -> None:
    one = home.sh("cat /host/file /v/file /etc/hosts /etc/file; ls -R /v /etc")
    (one.rootfs / "v").symlink_to(marker)
    one.mount(destination, "tmpfs", "tmpfs", "size=4k")
    assert "of the host" not in one.run().text


def test_s22_a_container_mounts_no_cgroup_of_its_own(home: Bundles) -> None:
    one = home.sh(
        "mkdir /tmp/c; unshare -Urm mount -t cgroup -o memory x /tmp/c; mount -t cgroup -o memory x /tmp/c; ls /tmp/c"
    )
    one.linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["unshare", "mount", "clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    }
    result = one.run()
    assert result.text == "" and "not permitted" in result.error.lower(), result


# ----------------------------------------------------------------------------------------------- neighbours that race

SWAP = """
import ctypes, os, sys
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None)
print("ready", flush=True)
while True:
    libc.renameat2(-100, b"a", -100, b"b", 2)
"""


class Swapper:
    """Exchanges `a`, a directory, and `b`, a link to a directory of the host, in a volume, as fast as it can."""

    def __init__(self, volume: Path, host: Path) -> None:
        (volume / "a").mkdir(parents=True)
        (volume / "b").symlink_to(host)
        self._child = subprocess.Popen([sys.executable, "-I", "-c", SWAP, str(volume)], stdout=subprocess.PIPE)
        assert self._child.stdout is not None and self._child.stdout.readline() == b"ready\n"

    def __enter__(self) -> Swapper:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()


def of_the_host(home: Bundles) -> list[tuple[str, str, str]]:
    """The host's mounts and their flags, without what other tests do at the same moment."""
    mine = str(home.directory.parent)
    seen = [(point.target, point.fstype, point.options) for point in mountinfo()]
    return [item for item in seen if item[0].startswith(mine) or not item[0].startswith(("/tmp/", "/run/", "/var/"))]


def racing(home: Bundles, volume: Path, script: str) -> Bundle:
    """A container whose mounts go through the swapped name, existing and new."""
    one = home.sh(script)
    one.mount("/vol", "bind", volume, "rbind")
    one.mount("/vol/a", "tmpfs", "tmpfs", "size=4k")
    one.mount("/vol/a/new/deep", "tmpfs", "tmpfs", "size=4k")
    return one


def test_s04_s09_s40_a_swapped_target_never_leads_to_the_host(home: Bundles, marker: Path) -> None:
    volume = home.directory / "volume"
    before = of_the_host(home)
    with Swapper(volume, marker):
        for _ in range(8):
            one = racing(home, volume, "cat /vol/a/file /vol/b/file /vol/file 2>/dev/null; echo end")
            result = one.run()
            assert "of the host" not in result.text
    assert of_the_host(home) == before
    works_afterwards(home)


def test_s13_read_only_and_masked_paths_hold_while_they_are_swapped(home: Bundles, marker: Path) -> None:
    volume = home.directory / "volume"
    before = of_the_host(home)
    with Swapper(volume, marker):
        for _ in range(4):
            one = home.sh("cat /vol/a/file /vol/b/file 2>/dev/null; echo end; sleep 1000")
            one.mount("/vol", "bind", volume, "rbind")
            one.linux["readonlyPaths"] = ["/proc/sys", "/vol/a", "/vol/b"]
            one.linux["maskedPaths"] = ["/proc/version", "/vol/b"]
            if one.create().code:
                continue  # it said no: that is fine too
            found = {point.target: point for point in mountinfo(one.pid())}
            assert "ro" in found["/proc/sys"].options.split(",")
            assert {point.fstype for target, point in found.items() if target == "/proc/version"} == {"tmpfs"}
            one.delete().ok()
    assert of_the_host(home) == before
    eventually(lambda: not home.processes())
