"""Rows of the list of threats beside those of test_runtime_hostile.py: cgroups, inherited fds, planted links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import Bundles, bundles
from tests.support import needs


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


# ------------------------------------------------------------------------------------------------- /proc, /sys and /dev


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


def test_s08_an_inherited_fd_of_the_host_is_no_way_out(home: Bundles) -> None:
    one = home.make("ls", "-l", "/proc/self/fd")
    held = os.open("/", os.O_PATH | os.O_DIRECTORY)
    os.set_inheritable(held, True)
    try:
        said = one.run(close_fds=False).ok()
        assert [line.split()[-3] for line in said.splitlines() if " -> " in line] == ["0", "1", "2"]
        two = home.make()
        (two.rootfs / "work").symlink_to(f"/proc/self/fd/{held}")
        two.up()
        for where in (f"/proc/self/fd/{held}", f"/proc/1/fd/{held}", f"/proc/self/fd/{held}/../..", "/work"):
            two.exec("pwd", flags=("--cwd", where), close_fds=False).failed("chdir to cwd")
        assert two.exec(f"/proc/self/fd/{held}/bin/busybox", "true", close_fds=False).code == 255
        one.process["args"] = [f"/proc/self/fd/{held}/bin/busybox", "true"]
        assert one.run(close_fds=False).code == 1
    finally:
        os.close(held)


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
