"""Races and tricks about every kind of mount, by the rows of the threat list: nothing of the host changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.linux.mount import MS_SHARED, mount
from tests.bundles import Bundle, Bundles, bundles
from tests.hostile import swapping, untouched
from tests.integration.test_runtime_mounts import flags, host_mounts, mounted, points, privileged
from tests.support import eventually, needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    before, fds = host_mounts(), len(os.listdir("/proc/self/fd"))
    with bundles(tmp_path) as opened:
        yield opened
    assert host_mounts() == before and len(os.listdir("/proc/self/fd")) == fds


@pytest.fixture
def outside(home: Bundles) -> Iterator[Path]:
    """A directory of the host that nothing may touch."""
    with untouched(home.directory) as marker:
        yield marker


def entry(kind: str, destination: str, source: Path) -> dict[str, Any]:
    """A mount of this kind."""
    options = {
        "bind": ["rbind", "ro"],
        "file": ["bind"],
        "tmpfs": ["size=64k", "mode=700"],
        "copyup": ["tmpcopyup", "size=64k"],
        "overlay": [f"lowerdir={source}"],
        "idmap": ["bind", "idmap"],
        "remount": ["bind", "remount", "ro"],
        "cgroup": ["ro"],
        "mqueue": ["nosuid"],
        "devpts": ["newinstance"],
    }[kind]
    fstype = {"file": "bind", "copyup": "tmpfs", "idmap": "bind", "remount": "none"}.get(kind, kind)
    path = source / "mine" if kind == "file" else source
    found = {"destination": destination, "type": fstype, "source": str(path), "options": options}
    if kind == "idmap":
        lines = [{"containerID": 0, "hostID": 0, "size": 1}]
        found |= {"uidMappings": lines, "gidMappings": lines}
    return found


KINDS = ("bind", "file", "tmpfs", "copyup", "overlay", "idmap", "remount", "cgroup", "mqueue", "devpts")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep", ["sub", "new/deep/er"])
def test_s04_s09_every_kind_of_mount_into_a_swapped_directory(
    home: Bundles,
    outside: Path,
    kind: str,
    deep: str,
) -> None:
    volume, source = home.directory / "volume", home.directory / "source"
    (volume / "place/sub").mkdir(parents=True)
    (volume / "link").symlink_to(f"../../../../../../../../../..{outside}")
    source.mkdir()
    (source / "mine").write_text("mine")
    one = home.make("ls", f"/vol/place/{deep}").mount("/vol", "bind", volume, "rbind")
    one.config["mounts"].append(entry(kind, f"/vol/place/{deep}", source))
    with swapping(volume, "place", "link"):
        for _ in range(4):
            result = one.run()
            assert "Traceback" not in result.error and "stdin" not in result.text, result
            one.gone()


@pytest.mark.parametrize("what", ["device", "masked", "readonly", "cwd"])
def test_s09_s13_the_rest_of_a_root_in_a_swapped_directory(home: Bundles, outside: Path, what: str) -> None:
    volume = home.directory / "volume"
    (volume / "place/sub").mkdir(parents=True)
    (volume / "place/file").write_text("own")
    (volume / "link").symlink_to(f"../../../../../../../../../..{outside}")
    one = home.make("ls", "/vol/place").mount("/vol", "bind", volume, "rbind")
    if what == "device":
        names = ("new/device", "file", "sub/null")
        one.linux["devices"] = [{"path": f"/vol/place/{n}", "type": "c", "major": 1, "minor": 3} for n in names]
    elif what == "cwd":
        one.process["cwd"] = "/vol/place/work/here"
    else:
        key = "maskedPaths" if what == "masked" else "readonlyPaths"
        one.linux[key] = ["/vol/place/sub", "/vol/place/file", "/vol/place"]
    with swapping(volume, "place", "link"):
        for _ in range(6):
            result = one.run()
            assert "Traceback" not in result.error and "stdin" not in result.text, result
            one.gone()


@pytest.mark.parametrize("target", ["{outside}", "../../../../../../../../..{outside}", "/proc/1/root{outside}"])
@pytest.mark.parametrize("kind", KINDS)
def test_s63_every_kind_of_mount_through_a_planted_link(
    home: Bundles,
    outside: Path,
    kind: str,
    target: str,
) -> None:
    source = home.directory / "source"
    source.mkdir()
    (source / "mine").write_text("mine")
    one = home.make("true")
    (one.rootfs / "planted").symlink_to(target.format(outside=outside))
    for place in ("/planted", "/planted/sub", "/planted/new", "/planted/../sub"):
        one.config["mounts"][3:] = [entry(kind, place, source)]
        result = one.run()
        assert "Traceback" not in result.error, result
        one.gone()


@pytest.mark.parametrize("place", ["/proc", "/proc/sys", "/proc/self/attr", "/proc/1/ns", "/p/sys", "/p/self", "/p"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("remount", "cgroup")])
def test_s02_s06_no_kind_of_mount_gets_into_proc(home: Bundles, kind: str, place: str) -> None:
    source = home.directory / "source"
    source.mkdir()
    (source / "mine").write_text("mine")
    one = home.make("touch", "/ran")
    (one.rootfs / "p").symlink_to("proc")
    one.config["mounts"].append(entry(kind, place, source))
    result = one.run()
    assert result.code == 1 and ("cannot be mounted because" in result.error or "is a directory" in result.error)
    assert not (one.rootfs / "ran").exists()
    one.gone()


@pytest.mark.parametrize("place", ["/sys", "/proc"])
def test_s06_in_a_user_namespace_a_linked_proc_or_sys_is_refused(home: Bundles, outside: Path, place: str) -> None:
    one = home.make("true").mount("/sys", "sysfs", "sysfs", "ro").user_namespace()
    (one.rootfs / place.lstrip("/")).rmdir()
    (one.rootfs / place.lstrip("/")).symlink_to("/tmp")
    one.run().failed("must be mounted on an ordinary directory")
    one.gone()


@pytest.mark.parametrize("kind", ["link", "fifo", "regular", "missing"])
def test_s10_masks_in_a_user_namespace_are_of_the_null_device(home: Bundles, outside: Path, kind: str) -> None:
    hostile = home.directory / "hostile-dev"
    hostile.mkdir()
    if kind == "link":
        (hostile / "null").symlink_to("/proc/sys/kernel/core_pattern")
    elif kind == "fifo":
        os.mkfifo(hostile / "null")
    elif kind == "regular":
        (hostile / "null").write_text("regular")
    one = home.sh("stat -c %t:%T /proc/keys /secret; echo x > /proc/keys; cat /secret; chmod 0 /secret; echo end")
    (one.rootfs / "secret").write_text("secret")
    one.user_namespace()
    one.config["mounts"] = [item for item in one.config["mounts"] if not item["destination"].startswith("/dev")]
    one.mount("/dev", "bind", hostile, "rbind")
    one.linux["maskedPaths"] = ["/proc/keys", "/secret"]
    null = os.stat("/dev/null")
    result = one.run()
    assert result.text.split() == ["1:3", "1:3", "end"], result
    now = os.stat("/dev/null")
    assert (now.st_mode, now.st_uid, now.st_rdev) == (null.st_mode, null.st_uid, null.st_rdev)


@pytest.mark.parametrize("user", [False, True])
def test_s10_masked_and_read_only_paths_through_links(home: Bundles, outside: Path, user: bool) -> None:
    one = home.sh("cat /a/file; touch /b/x; cat /hidden/file; touch /proc/sys/kernel/x")
    for name in ("real", "shown"):
        (one.rootfs / name).mkdir()
        (one.rootfs / name / "file").write_text(f"{name}\n")
    (one.rootfs / "a").symlink_to("real")
    (one.rootfs / "b").symlink_to("../../../../shown")
    (one.rootfs / "hidden").symlink_to(outside)
    (one.rootfs / "loop").symlink_to("loop")
    if user:
        one.user_namespace()
    one.linux["maskedPaths"] = ["/a", "/hidden", "/real/file/below", "/no/such"]
    one.linux["readonlyPaths"] = ["/b", "/proc/sys", "/no/such"]
    result = one.run()
    assert result.text == "" and "/b/x: Read-only" in result.error
    one.linux["maskedPaths"] = ["/loop"]
    one.run().failed("mask /loop")


@pytest.mark.parametrize("user", [False, True])
def test_s14_a_linked_dev_of_any_kind(home: Bundles, outside: Path, user: bool) -> None:
    one = home.sh("ls -l /dev/; echo x > /dev/null")
    if user:
        one.user_namespace()
    (one.rootfs / "dev").rmdir()
    for target in (str(outside), f"../../../../../../../..{outside}", "/proc/self/root", "/sys", "/dangling/dev"):
        (one.rootfs / "dev").unlink(missing_ok=True)
        (one.rootfs / "dev").symlink_to(target)
        for mounts in (one.config["mounts"], one.config["mounts"][:1]):
            whole, one.config["mounts"] = one.config["mounts"], mounts
            result = one.run()
            one.config["mounts"] = whole
            assert "Traceback" not in result.error and "of the host" not in result.text
            one.gone()


def test_s21_device_names_that_the_image_has_planted(home: Bundles, outside: Path) -> None:
    one = home.sh("for d in null zero mine; do stat -c '%F %t:%T' /dev/$d; done; readlink /dev/fd")
    one.config["mounts"] = one.config["mounts"][:1]
    for name in ("null", "zero", "mine", "fd", "ptmx"):
        (one.rootfs / "dev" / name).symlink_to(outside / "null")
    one.linux["devices"] = [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "uid": 5, "fileMode": 0o600}]
    lines = one.run().ok().splitlines()
    assert lines[:3] == [f"character special file 1:{minor}" for minor in (3, 5, 5)]


def test_s11_the_console_in_a_dev_that_is_read_only(home: Bundles) -> None:
    one = home.sh("stat -c %F /dev/console; tty; touch /dev/x")
    one.config["mounts"][1]["options"].append("ro")
    one.process["terminal"] = True
    result = one.run()
    assert "character special file" in result.text and "Read-only" in result.text


def volumes(one: Bundle, shared: Path) -> Bundle:
    """One of each kind of volume that could leave something behind."""
    source = one.home.directory / "source"
    source.mkdir(exist_ok=True)
    lines = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    one.mount("/shared", "bind", shared, "rbind", "rshared").mount("/slave", "bind", shared, "rbind", "rslave")
    one.mount("/private", "bind", shared, "rbind", "rprivate").mount("/mapped", "bind", source, "bind", "idmap")
    one.config["mounts"][-1] |= {"uidMappings": lines, "gidMappings": lines}
    one.mount("/up", "tmpfs", "tmpfs", "tmpcopyup").mount("/over", "overlay", "overlay", f"lowerdir={source}:{shared}")
    return one


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("root", ["", "rshared", "shared", "private"])
def test_o39_volumes_of_every_propagation_leave_no_mount(home: Bundles, root: str, user: bool) -> None:
    with mounted(home.directory / "shared") as shared:
        mount(None, str(shared), None, MS_SHARED)
        one = volumes(privileged(home.sh("mount -t tmpfs x /private; mount -t tmpfs x /slave; touch /up/x")), shared)
        if user:
            one.user_namespace()
        if root:
            one.linux["rootfsPropagation"] = root
        before = host_mounts()
        for _ in range(4):
            one.run().ok()
            assert host_mounts() == before


POINTS = [
    *(f"create.{name}" for name in ("cgroup", "cloned", "ready", "saved")),
    *(f"init.{name}" for name in ("propagation", "rootfs", "mounts", "pivot", "protection", "command")),
    "idmap.mapped",
]


@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize("where", POINTS)
def test_o38_o39_a_start_that_fails_anywhere_leaves_no_mount(home: Bundles, where: str, action: str) -> None:
    with mounted(home.directory / "shared") as shared:
        mount(None, str(shared), None, MS_SHARED)
        (shared / "data").write_text("precious")
        one = volumes(home.make("true"), shared)
        before = host_mounts()
        result = one.run(env={"OCID_FAILPOINTS": f"{where}={action}"})
        assert result.code in (1, -9), result
        assert host_mounts() == before and (shared / "data").read_text() == "precious"
        one.delete()
        eventually(lambda: not home.processes(), what="all of its processes to end")
        assert (shared / "data").read_text() == "precious" and host_mounts() == before
        one.run().ok()


def test_o38_a_mount_that_is_busy_costs_no_data(home: Bundles) -> None:
    with mounted(home.directory / "volume") as volume:
        (volume / "data").write_text("precious")
        one = home.make().mount("/v", "bind", volume, "rbind").up()
        busy = os.open(f"/proc/{one.pid()}/root/v/data", os.O_RDONLY)  # keeps the container's mount of it in use
        try:
            one.delete().ok()
            assert (volume / "data").read_text() == "precious" and os.read(busy, 8) == b"precious"
        finally:
            os.close(busy)


def test_s57_destinations_with_dots_stay_inside(home: Bundles, outside: Path) -> None:
    source = home.directory / "source"
    source.mkdir()
    one = home.make()
    for number, place in enumerate(
        (f"/..{outside}", f"../..{outside}/x", "/a/../../b", "/c/./d//e/", f"//{outside}/y")
    ):
        one.mount(place, "bind", source, "bind", "ro" if number % 2 else "rw")
    one.up()
    inside = {str(outside), f"{outside}/x", "/b", "/c/d/e", f"{outside}/y"}
    found = points(one)
    assert inside <= set(found) and "ro" in flags(found[f"{outside}/x"])
