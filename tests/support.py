"""What tests share: waiting without sleeping blind, and asking for abilities.

`needs` fails rather than skips an unknown ability; in CI (OCID_REQUIRE_ALL=1) a missing one fails the test.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runtime.linux.mount import MNT_DETACH, umount2
from tests.costs import SOON_S

T = TypeVar("T")

_ABILITIES: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "overlay": lambda: "overlay" in Path("/proc/filesystems").read_text(),
    "nftables": lambda: shutil.which("nft") is not None,
    "runc": lambda: shutil.which("runc") is not None,
    "crun": lambda: shutil.which("crun") is not None,
    "skopeo": lambda: shutil.which("skopeo") is not None,
    "docker-registry": lambda: shutil.which("docker-registry") is not None,
    "busybox": lambda: Path("/bin/busybox").exists(),
    "cgroup1": lambda: " - cgroup cgroup " in Path("/proc/self/mountinfo").read_text(),
}
# What the machine of hack/vm lacks on purpose: what needs it runs on the other machine, which has that.
ELSEWHERE = ("cgroup1",) if os.environ.get("OCID_VM") else ()


def needs(*abilities: str) -> None:
    """Skips the test, naming the first ability that this machine lacks; fails where everything is required."""
    for ability in abilities:
        if ability not in _ABILITIES:
            raise AssertionError(f"unknown ability {ability!r}: one of {sorted(_ABILITIES)}")
        if not _ABILITIES[ability]():
            import pytest  # half of the imports of a test's own process, which asks for nothing

            if os.environ.get("OCID_REQUIRE_ALL") and ability not in ELSEWHERE:
                pytest.fail(f"this machine lacks {ability}, and OCID_REQUIRE_ALL is set")
            pytest.skip(f"needs {ability}")


def eventually(probe: Callable[[], T], seconds: float = SOON_S, what: str = "") -> T:
    """The first true value of `probe`, asked again every few milliseconds; fails after `seconds`. What takes long is
    asked less often, an eighth of the time that it has taken later: probes cost a processor that others wait for."""
    began = time.monotonic()
    while True:
        value = probe()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"not within {seconds} s: {what or probe}")
        select.select([], [], [], min(max(0.005, waited / 8), 0.05))


def take_away(cgroup: str, processes: Callable[[], list[int]], mounts: Callable[[], list[str]]) -> None:
    """What a test that has failed left, in this order: its processes, its mounts, and `cgroup` at the top of each
    hierarchy with all below it. Later tests, and the machine, are not to see it."""
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes(), what="processes of the test to die")
    for target in reversed(mounts()):
        umount2(target, MNT_DETACH)
    take_away_cgroup(cgroup)


def take_away_cgroup(cgroup: str) -> None:
    """`cgroup` at the top of each hierarchy, with all below it."""
    for top in cgroup_tops():
        for directory, _, _ in os.walk(f"{top}/{cgroup}", topdown=False):
            os.rmdir(directory)


def cgroup_tops() -> list[str]:
    """What may be the top of a hierarchy; beside directories there are links that lead to several controllers'."""
    with os.scandir("/sys/fs/cgroup") as entries:
        return ["/sys/fs/cgroup", *(one.path for one in entries if one.is_dir(follow_symlinks=False))]
