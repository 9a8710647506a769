"""What a case may need of the machine, each probed once per process. A name that is not here is an error."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from conformance.harness import kernel


def _release() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()))


def _filesystem(name: str) -> bool:
    return name in Path("/proc/filesystems").read_text().split()


def _v1(*controllers: str) -> bool:
    return all(controller in kernel.v1_controllers() for controller in controllers)


def _apparmor() -> bool:
    enabled = Path("/sys/module/apparmor/parameters/enabled")
    return enabled.exists() and enabled.read_text().strip() == "Y"


def _criu() -> bool:
    # Being installed is not enough: an older CRIU does not find its way about in a newer kernel.
    if not shutil.which("criu"):
        return False
    return subprocess.run(["criu", "check"], capture_output=True, check=False).returncode == 0


ABILITIES: dict[str, Callable[[], bool]] = {
    "cgroup1": lambda: _v1("cpu", "memory", "devices", "freezer", "pids"),
    "cgroup2": kernel.unified,
    "freezer": lambda: kernel.unified() or _v1("freezer"),
    "memory": lambda: kernel.unified() or _v1("memory"),
    "pids": lambda: kernel.unified() or _v1("pids"),
    "blkio": lambda: _v1("blkio"),
    "hugetlb": lambda: _v1("hugetlb"),
    "net_cls": lambda: _v1("net_cls"),
    "userns": lambda: (
        Path("/proc/self/ns/user").exists() and int(Path("/proc/sys/user/max_user_namespaces").read_text()) > 0
    ),
    "timens": lambda: Path("/proc/self/ns/time").exists(),
    "cgroupns": lambda: Path("/proc/self/ns/cgroup").exists(),
    "overlay": lambda: _filesystem("overlay"),
    "idmap": lambda: _release() >= (5, 12),
    "rro": lambda: _release() >= (5, 12),
    "apparmor": _apparmor,
    "selinux": lambda: Path("/sys/fs/selinux/enforce").exists(),
    "criu": _criu,
    "systemd": lambda: Path("/run/systemd/system").is_dir(),
    "newuidmap": lambda: shutil.which("newuidmap") is not None and shutil.which("newgidmap") is not None,
    "two-cpus": lambda: len(os.sched_getaffinity(0)) >= 2,
}


@functools.cache
def has(ability: str) -> bool:
    """True when this machine has it."""
    return ABILITIES[ability]()


def missing(needs: tuple[str, ...]) -> str:
    """The first of `needs` that this machine lacks, or an empty string."""
    return next((ability for ability in needs if not has(ability)), "")
