"""Where a container's cgroups are, on every kind of machine, and what is no path."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cgroups.hierarchy import Hierarchy, detect, places_for, places_from
from runtime.errors import RuntimeFailure

V1 = """\
20 1 0:17 / /sys rw - sysfs sysfs rw
30 20 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/other rw - cgroup cgroup rw,name=other
35 30 0:29 / /mnt/memory\\040again rw - cgroup cgroup rw,memory
"""
UNIFIED = "40 30 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
V2 = "40 20 0:40 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
OWN = {"name=systemd": "/a", "cpu": "/b", "cpuacct": "/b", "memory": "/", "": "/user.slice/session-1.scope"}


def machine(tmp_path: Path, text: str) -> tuple[Hierarchy, ...]:
    file = tmp_path / "mountinfo"
    file.write_text(text)
    return detect(str(file))


def directories(path: str, hierarchies: tuple[Hierarchy, ...], own: dict[str, str] | None = None) -> list[str]:
    return [place.directory for place in places_for(path, "id", hierarchies, OWN if own is None else own)]


def test_v1(tmp_path: Path) -> None:
    found = machine(tmp_path, V1)
    assert [(one.version, one.mount, one.controllers) for one in found] == [
        (1, "/sys/fs/cgroup/cpu,cpuacct", ("cpu", "cpuacct")),
        (1, "/sys/fs/cgroup/memory", ("memory",)),
        (1, "/sys/fs/cgroup/systemd", ("name=systemd",)),
    ]
    assert directories("/x//y/./z/", found) == [
        "/sys/fs/cgroup/cpu,cpuacct/x/y/z",
        "/sys/fs/cgroup/memory/x/y/z",
        "/sys/fs/cgroup/systemd/x/y/z",
    ]
    assert directories("x/y", found) == [
        "/sys/fs/cgroup/cpu,cpuacct/b/x/y",
        "/sys/fs/cgroup/memory/x/y",
        "/sys/fs/cgroup/systemd/a/x/y",
    ]
    assert directories("", found)[0] == "/sys/fs/cgroup/cpu,cpuacct/b/id"


def test_hybrid(tmp_path: Path) -> None:
    found = machine(tmp_path, V1 + UNIFIED)
    assert [one.version for one in found] == [1, 1, 1, 2]
    assert directories("/x", found)[3] == "/sys/fs/cgroup/unified/x"
    assert directories("x", found)[3] == "/sys/fs/cgroup/unified/user.slice/session-1.scope/x"


def test_v2_makes_a_sibling_of_the_caller(tmp_path: Path) -> None:
    found = machine(tmp_path, V2)
    assert directories("/x", found) == ["/sys/fs/cgroup/x"]
    assert directories("", found) == ["/sys/fs/cgroup/user.slice/id"]
    assert directories("x/y", found, {"": "/"}) == ["/sys/fs/cgroup/x/y"]


def test_a_mount_of_a_part_of_the_hierarchy(tmp_path: Path) -> None:
    found = machine(tmp_path, V2.replace(" / /sys/fs", " /docker/abc /sys/fs"))
    assert directories("x", found, {"": "/docker/abc/init/me"}) == ["/sys/fs/cgroup/init/x"]
    assert directories("x", found, {"": "/docker/abcd/init"}) == ["/sys/fs/cgroup/x"]
    assert directories("x", found, {"": "/../other/me"}) == ["/sys/fs/cgroup/x"]


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="find cgroups: nothing of type cgroup or cgroup2 is mounted"):
        machine(tmp_path, V1.splitlines()[0] + "\n")


@pytest.mark.parametrize(
    "path",
    ["/..", "../x", "/a/../../x", "a/..", "/a\nb", "a\0b", "/", "//", ".", "/./", "a" * 256, "/a" * 2100, "\ud800x"]
    + ["/" + "é" * 128],
)
def test_s19_paths_that_are_none(tmp_path: Path, path: str) -> None:
    for text in (V1, V1 + UNIFIED, V2):
        with pytest.raises(RuntimeFailure, match="linux.cgroupsPath: ") as caught:
            directories(path, machine(tmp_path, text))
        assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize("container_id", ["..", "a/b", "", "a\n", "\0", "/a", "."])
def test_s19_ids_that_are_none(tmp_path: Path, container_id: str) -> None:
    with pytest.raises(RuntimeFailure, match="container id: "):
        places_for("", container_id, machine(tmp_path, V2), OWN)


def test_dots_within_a_name_are_fine(tmp_path: Path) -> None:
    assert directories("/kubepods.slice/..a/b..", machine(tmp_path, V2)) == ["/sys/fs/cgroup/kubepods.slice/..a/b.."]


def test_places_come_back_from_their_paths(tmp_path: Path) -> None:
    found = machine(tmp_path, V1 + UNIFIED)
    paths = {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/x",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/x",
        "memory": "/sys/fs/cgroup/memory/x",
        "": "/sys/fs/cgroup/unified/x",
    }
    assert [place.directory for place in places_from(paths, found)] == [
        "/sys/fs/cgroup/cpu,cpuacct/x",
        "/sys/fs/cgroup/memory/x",
        "/sys/fs/cgroup/unified/x",
    ]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("memory", "/sys/fs/cgroup/cpu,cpuacct/x"),
        ("memory", "/tmp/x"),
        ("memory", "/sys/fs/cgroup/memory"),
        ("memory", "/sys/fs/cgroup/memory/"),
        ("memory", "/sys/fs/cgroup/memory/../../../../etc"),
        ("memory", "/sys/fs/cgroup/memoryx/a"),
        ("pids", "/sys/fs/cgroup/pids/x"),
        ("", "/sys/fs/cgroup/memory/x"),
    ],
)
def test_recorded_paths_are_checked_as_well(tmp_path: Path, name: str, path: str) -> None:
    with pytest.raises(RuntimeFailure, match=f"cgroup path of {name or 'v2'}: "):
        places_from({name: path}, machine(tmp_path, V1 + UNIFIED))
