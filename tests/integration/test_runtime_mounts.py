"""Every option and field of config.json's mounts, by what /proc/PID/mountinfo says and by what the container can do."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.linux.mount import MS_BIND, MS_REMOUNT, MS_SHARED, MountPoint, mount, mountinfo, umount2
from tests.bundles import Bundle, Bundles, bundles
from tests.support import needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    before = host_mounts()
    with bundles(tmp_path) as opened:
        yield opened
    assert host_mounts() == before  # threats O39: whatever a test did, failures included


def host_mounts() -> list[tuple[str, str, str, str]]:
    return [(point.target, point.options, point.propagation, point.source) for point in mountinfo()]


def points(one: Bundle) -> dict[str, MountPoint]:
    """What the container sees, the last one at each place."""
    return {point.target: point for point in mountinfo(one.pid())}


def flags(point: MountPoint) -> set[str]:
    return set(point.options.split(","))


def privileged(one: Bundle, *names: str) -> Bundle:
    for kind in ("bounding", "permitted", "effective"):
        one.process["capabilities"][kind] += names or ("CAP_SYS_ADMIN",)
    return one


@contextmanager
def mounted(directory: Path, options: int = 0, data: str = "mode=755") -> Iterator[Path]:
    """A tmpfs of the host with these MS_* flags."""
    directory.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", str(directory), "tmpfs", options, data)
    try:
        yield directory
    finally:
        umount2(str(directory))


NOSUID, NODEV, NOEXEC, RDONLY, NOATIME = 2, 4, 8, 1, 1024


# -------------------------------------------------------------------------------------------------- a new filesystem


@pytest.mark.parametrize(
    ("options", "there", "super_options"),
    [
        ("", "rw,relatime", ""),
        ("defaults", "rw,relatime", ""),
        ("ro", "ro,relatime", ""),
        ("ro rw", "rw,relatime", ""),
        ("nosuid nodev noexec", "rw,nosuid,nodev,noexec,relatime", ""),
        ("nosuid suid nodev dev noexec exec", "rw,relatime", ""),
        ("noatime", "rw,noatime", ""),
        ("noatime atime", "rw,relatime", ""),
        ("relatime norelatime", "rw,relatime", ""),
        ("strictatime", "rw", ""),
        ("strictatime nostrictatime", "rw,relatime", ""),
        ("nodiratime", "rw,nodiratime,relatime", ""),
        ("nodiratime diratime", "rw,relatime", ""),
        ("nosymfollow", "rw,relatime,nosymfollow", ""),
        ("nosymfollow symfollow", "rw,relatime", ""),
        ("rnosuid rro", "ro,nosuid,relatime", ""),
        ("sync", "rw,relatime", "sync"),
        ("sync async", "rw,relatime", ""),
        ("dirsync", "rw,relatime", "dirsync"),
        ("lazytime", "rw,relatime", "lazytime"),
        ("lazytime nolazytime", "rw,relatime", ""),
        ("mand", "rw,relatime", "mand"),
        ("mand nomand", "rw,relatime", ""),
        ("iversion", "rw,relatime", ""),
        ("iversion noiversion silent loud", "rw,relatime", ""),
        ("iversion nosuid noatime sync", "rw,nosuid,noatime", "sync"),
    ],
)
def test_options_of_a_filesystem(home: Bundles, options: str, there: str, super_options: str) -> None:
    one = home.make().mount("/m", "tmpfs", "t", *options.split()).up()
    found = points(one)["/m"]
    wanted = set(there.split(","))
    assert flags(found) == wanted
    said = set(found.super_options.split(",")) & {"sync", "dirsync", "lazytime", "mand"}
    assert said == (set(super_options.split(",")) - {""})


def test_data_goes_to_the_filesystem_and_an_unknown_word_is_its_to_refuse(home: Bundles) -> None:
    one = home.sh("stat -c '%a %u %g' /m; sleep 1000").mount("/m", "tmpfs", "t", "mode=1750,uid=3", "gid=4", "size=64k")
    one.up()
    found = points(one)["/m"].super_options.split(",")
    assert {"size=64k", "mode=1750", "uid=3", "gid=4"} <= set(found)
    two = home.make("true").mount("/m", "tmpfs", "t", "no-such-word")
    two.run().failed("mount tmpfs t on /m (no-such-word)")
    two.config["mounts"][-1]["options"] = ["bind", "no-such-word"]
    two.run().failed('unknown option "no-such-word" for a bind mount')
    two.gone()


def test_a_tmpfs_has_the_mode_of_what_it_covers(home: Bundles) -> None:
    one = home.sh("stat -c %a /covered /new /given")
    (one.rootfs / "covered").mkdir()
    (one.rootfs / "covered").chmod(0o2750)
    (one.rootfs / "given").mkdir(0o700)
    for place in ("/covered", "/new"):
        one.mount(place, "tmpfs", "t")
    one.mount("/given", "tmpfs", "t", "mode=711")
    assert one.run().ok().split() == ["2750", "1777", "711"]


def test_a_read_only_tmpfs_is_filled_first(home: Bundles) -> None:
    source = home.directory / "source"
    source.mkdir()
    one = home.sh("touch /m/x; touch /m/below/x && echo below").mount("/m", "tmpfs", "t", "ro")
    one.mount("/m/below", "bind", source, "bind")
    result = one.run()
    assert result.text == "below\n" and "Read-only" in result.error and (source / "x").exists()


def test_the_filesystems_that_containers_have(home: Bundles) -> None:
    one = home.make()
    hardened = ("nosuid", "noexec", "nodev")
    one.mount("/dev/mqueue", "mqueue", "mqueue", *hardened)
    one.mount("/sys", "sysfs", "sysfs", *hardened, "ro")
    one.config["mounts"][0]["options"] += ["hidepid=2"]
    one.config["mounts"][2]["options"] += ["gid=5"]
    lower, upper, work = (home.directory / name for name in ("lower", "upper", "work"))
    for directory in (lower, upper, work):
        directory.mkdir()
    (lower / "file").write_text("lower\n")
    one.mount("/over", "overlay", "overlay", f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}")
    one.mount("/below", "overlay", "overlay", f"lowerdir={lower}:{upper}", "ro")
    one.up()
    found = points(one)
    assert [found[place].fstype for place in ("/dev/mqueue", "/sys", "/over")] == ["mqueue", "sysfs", "overlay"]
    assert "hidepid=invisible" in found["/proc"].super_options and "gid=5" in found["/dev/pts"].super_options
    one.exec("sh", "-c", "cat /over/file /below/file && echo upper > /over/file").ok()
    assert (upper / "file").read_text() == "upper\n" and (lower / "file").read_text() == "lower\n"


def test_an_overlay_of_many_long_names(home: Bundles) -> None:
    one = home.make("cat", "/over/file")
    lowers = [home.directory / f"lower-{'x' * 100}-{number}" for number in range(5)]
    for directory in lowers:
        directory.mkdir()
    (lowers[-1] / "file").write_text("deep\n")
    one.mount("/over", "overlay", "overlay", f"lowerdir={':'.join(map(str, lowers))}")
    assert one.run().ok() == "deep\n"


# -------------------------------------------------------------------------------------------------------------- binds


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Nothing about the mount: it is as its source.
        ("bind", "ro nosuid nodev noexec noatime"),
        ("rbind rprivate defaults", "ro nosuid nodev noexec noatime"),
        # Something: then that, and nothing but that; access times stay unless they are spoken of.
        ("bind ro", "ro noatime"),
        ("bind rw", "rw noatime"),
        ("bind dev", "rw noatime"),
        ("bind nosuid nodev", "rw nosuid nodev noatime"),
        ("bind relatime", "rw relatime"),
        ("bind strictatime ro", "ro"),
        ("bind sync", "rw noatime"),
        # For the tree, on top of what is there.
        ("bind rnodiratime", "ro nosuid nodev noexec noatime nodiratime"),
        ("bind rrw rsuid", "rw nodev noexec noatime"),
    ],
)
def test_options_of_a_bind(home: Bundles, options: str, wanted: str) -> None:
    with mounted(home.directory / "source", NOSUID | NODEV | NOEXEC | NOATIME) as source:
        (source / "x").touch()
        mount(None, str(source), None, MS_REMOUNT | MS_BIND | RDONLY | NOSUID | NODEV | NOEXEC | NOATIME)
        one = home.make().mount("/m", "none", source, *options.split()).up()
        assert flags(points(one)["/m"]) == set(wanted.split())
        assert {point.target: point for point in mountinfo()}[str(source)].options == "ro,nosuid,nodev,noexec,noatime"
        one.delete().ok()


@pytest.mark.parametrize("options", ["rbind rro", "rbind ro", "bind ro", "rbind rro rnosuid rnoexec", "rbind rnoatime"])
def test_recursive_options_reach_what_is_mounted_below(home: Bundles, options: str) -> None:
    with mounted(home.directory / "source") as source, mounted(source / "sub"):
        one = home.make().mount("/m", "bind", source, *options.split()).up()
        found = points(one)
        own, below = found["/m"], found.get("/m/sub")
        assert (below is not None) is options.startswith("rbind")
        assert ("ro" in flags(own)) is ("ro" in options.split() or "rro" in options)
        if below is not None:
            assert ("ro" in flags(below)) is ("rro" in options)
            assert ({"nosuid", "noexec"} <= flags(below)) is ("rnosuid" in options)
            assert ("noatime" in flags(below)) is ("rnoatime" in options)
        one.delete().ok()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("rbind", "ro nosuid nodev noexec"),
        ("rbind ro", "ro nosuid nodev noexec"),
        ("rbind nosymfollow ro", "ro nosuid nodev noexec nosymfollow"),
        ("rbind rw", ""),
        ("rbind ro dev", ""),
        ("rbind ro exec suid", ""),
    ],
)
def test_in_a_user_namespace_nothing_is_lifted(home: Bundles, options: str, wanted: str) -> None:
    with mounted(home.directory / "source") as source:
        mount(None, str(source), None, MS_REMOUNT | MS_BIND | RDONLY | NOSUID | NODEV | NOEXEC)
        one = home.make("grep", " /m ", "/proc/self/mountinfo").user_namespace()
        one.mount("/m", "bind", source, *options.split())
        if not wanted:
            one.run().failed("EPERM operation not permitted")
            return
        assert set(one.run().ok().split()[5].split(",")) - {"relatime"} == set(wanted.split())


@pytest.mark.parametrize("place", ["/new/deep/er", "/etc/new", "relative/place", "/a/../b", "/link/sub", "/dangling"])
@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "socket", "device"])
def test_targets_are_made_of_the_kind_of_their_source(home: Bundles, kind: str, place: str) -> None:
    source = home.directory / "source"
    if kind == "directory":
        source.mkdir()
    elif kind == "file":
        source.write_text("x")
    else:
        node = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "device": stat.S_IFCHR}[kind]
        os.mknod(source, node | 0o600, os.makedev(1, 3))
    one = home.make()
    (one.rootfs / "elsewhere").mkdir()
    (one.rootfs / "link").symlink_to("/elsewhere")
    (one.rootfs / "dangling").symlink_to("elsewhere/not-yet/there")
    one.mount(place, "bind", source, "bind").up()
    inside = {
        "/a/../b": "/b",
        "relative/place": "/relative/place",
        "/link/sub": "/elsewhere/sub",
        "/dangling": "/elsewhere/not-yet/there",
    }.get(place, place)
    assert inside in points(one)
    made = os.lstat(f"{one.rootfs}{inside}")
    assert stat.S_ISDIR(made.st_mode) if kind == "directory" else stat.S_ISREG(made.st_mode)


def test_sources_are_relative_to_the_bundle_and_may_be_links(home: Bundles) -> None:
    one = home.make("cat", "/one", "/two/file")
    (one.path / "data").mkdir()
    (one.path / "data/file").write_text("here\n")
    (one.path / "link").symlink_to("data")
    one.mount("/one", "none", "data/file", "bind").mount("/two", "bind", "link", "rbind")
    assert one.run().ok() == "here\nhere\n"


def test_a_file_on_a_directory_and_a_directory_on_a_file(home: Bundles) -> None:
    one = home.make("true")
    (one.path / "file").touch()
    one.mount("/etc", "bind", one.path / "file", "bind")
    one.run().failed("the source is no directory, and /etc is a directory")
    one.config["mounts"][-1].update(destination="/etc/passwd", source=str(home.directory))
    one.run().failed("ENOTDIR")
    one.config["mounts"][-1].update(destination="/x", source="/no/such")
    one.run().failed("bind /no/such on /x: open_tree /no/such: ENOENT no such file or directory")
    one.gone()


@pytest.mark.parametrize("place", ["/a/..", "/link", "/link/.", "/etc/../."])
def test_the_root_cannot_be_covered(home: Bundles, place: str) -> None:
    one = home.make("true")
    (one.rootfs / "link").symlink_to("/")
    one.mount(place, "tmpfs", "t")
    one.run().failed("is the root, which no mount may cover")
    one.gone()


# ------------------------------------------------------------------------------------------------------------ remount


def test_remount_of_what_an_earlier_entry_mounted(home: Bundles) -> None:
    source = home.directory / "source"
    source.mkdir()
    one = home.sh("touch /m/x; touch /t/x; grep -E ' /(m|t) ' /proc/self/mountinfo; sleep 1000")
    one.mount("/m", "bind", source, "bind", "nosuid", "nodev").mount("/t", "tmpfs", "t", "size=64k", "noexec")
    one.mount("/m", "bind", source, "bind", "remount", "ro", "nosuid")
    one.mount("/t", "tmpfs", "t", "remount", "size=128k", "nosuid", "ro", "sync")
    one.up()
    found = points(one)
    assert flags(found["/m"]) == {"ro", "nosuid", "relatime"}
    assert flags(found["/t"]) == {"ro", "nosuid", "relatime"}
    assert {"size=128k", "sync"} <= set(found["/t"].super_options.split(","))
    assert not (source / "x").exists()


def test_remount_of_what_is_no_mount_is_an_error(home: Bundles) -> None:
    one = home.make("true").mount("/tmp", "none", "", "bind", "remount", "ro")
    one.run().failed("remount /tmp (ro)")
    one.config["mounts"][-1]["options"] = ["remount", "ro"]
    one.run().failed("EINVAL")
    one.gone()


# ------------------------------------------------------------------------------------------------------------ /dev


def test_a_read_only_dev_has_its_devices(home: Bundles) -> None:
    one = home.sh("test -c /dev/null && test -L /dev/fd && touch /dev/x; echo > /dev/null && echo end; sleep 1000")
    one.config["mounts"][1]["options"].append("ro")
    one.create().ok()
    one.start().ok()
    assert "ro" in flags(points(one)["/dev"]) and one.exec("test", "-e", "/dev/x").code != 0
    one.exec("test", "-c", "/dev/urandom").ok()


def test_a_bound_dev_is_left_as_it_is(home: Bundles) -> None:
    mine = home.directory / "dev"
    mine.mkdir()
    os.mknod(mine / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    one = home.sh("ls /dev; touch /dev/x")
    one.config["mounts"] = [entry for entry in one.config["mounts"] if not entry["destination"].startswith("/dev")]
    one.mount("/dev", "bind", mine, "rbind", "ro")
    one.linux["devices"] = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5}]
    result = one.run()
    assert result.text == "null\n" and "Read-only" in result.error
    assert os.listdir(mine) == ["null"]


def test_devices_of_every_kind(home: Bundles) -> None:
    one = home.sh("for d in /dev/c /dev/sub/u /dev/p /opt/z; do stat -c '%n %F %t:%T %a %u:%g' $d; done")
    one.linux["devices"] = [
        {"path": "/dev/c", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"path": "/dev/sub/u", "type": "u", "major": 1, "minor": 7, "fileMode": 0o640, "gid": 6},
        {"path": "/dev/p", "type": "p", "fileMode": 0o4622},
        {"path": "/opt/z", "type": "b", "major": 1, "minor": 5},
    ]
    assert one.run().ok().splitlines() == [
        "/dev/c character special file 1:5 640 5:6",
        "/dev/sub/u character special file 1:7 640 0:6",
        "/dev/p fifo 0:0 4622 0:0",
        "/opt/z block special file 1:5 666 0:0",
    ]


def test_devices_in_a_user_namespace_are_the_hosts_own(home: Bundles) -> None:
    one = home.sh("stat -c '%n %F %t:%T' /dev/zero /dev/full /dev/urandom /dev/p; head -c 3 /dev/zero | wc -c")
    one.user_namespace()
    one.linux["devices"] = [
        {"path": "/dev/zero", "type": "c", "major": 1, "minor": 5},
        {"path": "/dev/full", "type": "u", "major": 1, "minor": 7},
        {"path": "/dev/p", "type": "p"},
    ]
    assert one.run().ok().splitlines() == [
        "/dev/zero character special file 1:5",
        "/dev/full character special file 1:7",
        "/dev/urandom character special file 1:9",
        "/dev/p fifo 0:0",
        "3",
    ]


def test_a_device_that_the_host_lacks_in_a_user_namespace(home: Bundles) -> None:
    one = home.make("true").user_namespace()
    one.linux["devices"] = [{"path": "/dev/null", "type": "c", "major": 1, "minor": 5}]
    one.run().failed("/dev/null of the host is not c 1:5")
    one.linux["devices"] = [{"path": "/dev/no-such", "type": "c", "major": 1, "minor": 5}]
    one.run().failed("device /dev/no-such c 1:5")
    one.gone()


@pytest.mark.parametrize("gid", [5, 70_000])
def test_devpts_with_a_gid_that_a_user_namespace_may_lack(home: Bundles, gid: int) -> None:
    one = home.make("cat", "/proc/self/mountinfo").user_namespace()
    one.config["mounts"][2]["options"].append(f"gid={gid}")
    result = one.run()
    devpts = next(line for line in result.ok().splitlines() if " /dev/pts " in line)
    assert ("gid=" in devpts) is (gid == 5) and ("no such gid" in result.error) is (gid != 5)
    one.config["mounts"][2]["options"].append("nonsense=1")
    one.run().failed("nonsense")


# ------------------------------------------------------------------------------------------- propagation of the root


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        ("private", ""),
        ("rprivate", ""),
        ("slave", "master:"),
        ("rslave", "master:"),
        ("shared", "shared:"),
        ("rshared", "shared:"),
        ("unbindable", "unbindable"),
        ("runbindable", "unbindable"),
    ],
)
@pytest.mark.parametrize("user", [False, True])
def test_o39_every_propagation_of_the_root_below_a_shared_mount(
    home: Bundles, value: str, tags: str, user: bool
) -> None:
    with mounted(home.directory / "shared") as parent:
        mount(None, str(parent), None, MS_SHARED)
        one = privileged(home.sh("mount -t tmpfs x /tmp; grep -E ' /(proc)? ' /proc/self/mountinfo"))
        one.config["root"]["path"] = str(parent / "rootfs")
        _copy(one.rootfs, parent / "rootfs")
        if user:
            one.rootfs = parent / "rootfs"
            one.user_namespace()
        one.linux["rootfsPropagation"] = value
        before = host_mounts()
        lines = one.run().ok().splitlines()
        assert host_mounts() == before
        root = next(line for line in lines if line.split()[4] == "/").split(" - ")[0].split()[6:]
        proc = next(line for line in lines if line.split()[4] == "/proc").split(" - ")[0].split()[6:]
        assert any(word.startswith(tags) for word in root) if tags else root == []
        assert (proc != []) is (value in ("rshared", "runbindable"))


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc"):
        (target / name).mkdir()
    for path in (source / "bin").iterdir():
        if path.is_symlink():
            (target / "bin" / path.name).symlink_to(os.readlink(path))
        else:
            (target / "bin" / path.name).write_bytes(path.read_bytes())
            (target / "bin" / path.name).chmod(0o755)


@pytest.mark.parametrize("user", [False, True])
def test_a_source_may_be_what_an_earlier_entry_mounted(home: Bundles, user: bool) -> None:
    one = home.make("cat", "/second/file")
    source = home.directory / "source"
    source.mkdir()
    (source / "file").write_text("mounted\n")
    (one.rootfs / "first").mkdir()
    (one.rootfs / "first/file").write_text("covered\n")
    if user:
        one.user_namespace()
    one.mount("/first", "bind", source, "bind").mount("/second", "bind", one.rootfs / "first", "rbind")
    assert one.run().ok() == "mounted\n"


@pytest.mark.parametrize(("option", "root"), [((), ""), (("rshared",), ""), (("rshared",), "rshared")])
def test_o39_what_is_mounted_in_a_user_namespace_never_reaches_the_host(
    home: Bundles, option: tuple[str, ...], root: str
) -> None:
    with mounted(home.directory / "volume") as volume:
        mount(None, str(volume), None, MS_SHARED)
        (volume / "back").mkdir()
        one = privileged(home.make()).user_namespace()
        (volume).chmod(0o777)
        os.chown(volume / "back", 100_000, 100_000)
        one.mount("/v", "bind", volume, "rbind", *option)
        if root:
            one.linux["rootfsPropagation"] = root
        one.up()
        before = host_mounts()
        one.exec("mount", "-t", "tmpfs", "x", "/v/back").ok()
        assert "/v/back" in points(one) and host_mounts() == before
        one.delete().ok()


def test_without_pivot_the_hosts_proc_is_out_of_sight(home: Bundles) -> None:
    # The kernel lets a user namespace mount a whole procfs if it finds one in sight, and the container's is not whole.
    one = home.sh("unshare -Urmpf mount -t proc proc /tmp && echo revealed; test -d /proc/1 && echo end")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.linux["maskedPaths"] = ["/proc/version"]
    for flags in ((), ("--no-pivot",)):
        result = one.run(*flags)
        assert result.text == "end\n" and "ermi" in result.error, result
    one.linux["maskedPaths"] = []
    assert one.run("--no-pivot").text == "revealed\nend\n"  # so it was not for another reason
    one.linux["rootfsPropagation"] = "rprivate"
    one.run("--no-pivot").failed("[r]private is not safe without pivot_root")
    one.gone()


def test_a_label_needs_a_kernel_that_has_them(home: Bundles) -> None:
    if os.path.exists("/sys/fs/selinux/enforce"):
        pytest.skip("this kernel has SELinux")
    one = home.make("true")
    one.linux["mountLabel"] = "system_u:object_r:container_file_t:s0:c1,c2"
    one.run().failed("selinux label is specified in config, but selinux is disabled or not supported")
    one.gone()


# ------------------------------------------------------------------------------------------------------------ cgroups


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", ["ro", "rw"])
@pytest.mark.parametrize("user", [False, True])
def test_cgroups_as_this_host_has_them(home: Bundles, own: bool, mode: str, user: bool) -> None:
    one = home.make()
    if not own:
        one.linux["namespaces"] = [item for item in one.linux["namespaces"] if item["type"] != "cgroup"]
    if user:
        one.user_namespace()
    one.mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro")
    one.mount("/sys/fs/cgroup", "cgroup", "cgroup", "noatime", mode)
    one.up()
    found = points(one)
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        assert found[str(top)].fstype == "cgroup2" and {mode, "nosuid"} <= flags(found[str(top)])
        assert user or "noatime" in flags(found[str(top)])
        return
    hierarchies = {point.target: point.fstype for point in mountinfo() if Path(point.target).parent == top}
    assert {path: found[path].fstype for path in hierarchies} == hierarchies
    for path in hierarchies:
        assert {mode, "nosuid", "nodev", "noexec"} <= flags(found[path])
        assert user or "noatime" in flags(found[path])
    script = 'for path; do echo "$path:" $(ls $path); echo "$path:" $(cat $path/cgroup.procs); done'
    said = one.exec("sh", "-c", script, "sh", *hierarchies, flags=("--user", "0")).ok().splitlines()
    for path, listed, procs in zip(hierarchies, said[::2], said[1::2], strict=True):
        assert listed.startswith(f"{path}: ") and procs.startswith(f"{path}: ")
        assert "cgroup.procs" in listed.split() and home.cgroup not in listed.split()  # its own part only
        assert "1" in procs.split()
    made = one.exec("mkdir", "/sys/fs/cgroup/pids/below")
    assert (made.code == 0) is (mode == "rw" and not user), made
    assert mode == "rw" or "Read-only" in made.error
    if made.code == 0:
        (Path(dict(cgroup_paths(one))["pids"]) / "below").rmdir()


def cgroup_paths(one: Bundle) -> list[tuple[str, str]]:
    lines = (line.split(":", 2) for line in Path(f"/proc/{one.pid()}/cgroup").read_text().splitlines())
    return [(name, f"/sys/fs/cgroup/{name}{path}") for _, name, path in lines]


def test_cgroup2_of_a_hybrid(home: Bundles) -> None:
    one = home.make().mount("/sys", "sysfs", "sysfs", "ro").mount("/sys/fs/cgroup", "cgroup2", "cgroup2", "ro")
    one.up()
    found = {target: point.fstype for target, point in points(one).items() if target.startswith("/sys/fs/cgroup")}
    assert found == {"/sys/fs/cgroup": "cgroup2"}
    assert "1" in one.exec("cat", "/sys/fs/cgroup/cgroup.procs").ok().split()
