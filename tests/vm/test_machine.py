"""The machine is what this lane promises; everything else here stands on it."""

from __future__ import annotations

from pathlib import Path


def test_it_has_one_cgroup_hierarchy() -> None:
    mounts = [line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()]
    assert "cgroup2" in mounts and "cgroup" not in mounts
    wanted = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids"}
    assert wanted <= set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())


def test_systemd_is_its_init_and_apparmor_is_on() -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    assert Path("/sys/module/apparmor/parameters/enabled").read_text() == "Y\n"
    assert "/dev/vdc" in Path("/proc/swaps").read_text()
