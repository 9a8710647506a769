"""The profile that RuntimeDefault means (`cri.apparmor`), on a kernel that applies it: what it denies, and what not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from cri.apparmor import PROFILE, load_default
from cri.spec.confine import APPARMOR_DEFAULT
from tests.bundles import Bundle, Bundles

ADMIN = ["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_DAC_OVERRIDE", "CAP_KILL"]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    assert load_default()
    yield
    subprocess.run(["apparmor_parser", "--remove"], input=PROFILE, text=True, check=True)


def confined(home: Bundles, script: str) -> Bundle:
    """A container that only the profile stops."""
    bundle = home.make("sh", "-c", script)
    for name in ("bounding", "effective", "permitted"):
        bundle.process["capabilities"][name] = ADMIN
    bundle.linux["maskedPaths"], bundle.linux["readonlyPaths"] = [], []
    bundle.process["apparmorProfile"] = APPARMOR_DEFAULT
    return bundle


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs none /tmp",
        "echo h >/proc/sysrq-trigger",
        "echo 50 >/proc/sys/vm/swappiness",
        "echo core >/proc/sys/kernel/core_pattern",
        "cat /proc/kcore",
    ],
)
def test_what_it_denies_to_one_that_nothing_else_stops(home: Bundles, script: str) -> None:
    # AppArmor's refusal is EACCES; a capability that is missing would be EPERM.
    confined(home, script).run().failed("Permission denied")


def test_what_is_the_containers_own_it_leaves_alone(home: Bundles) -> None:
    own = ("/proc/sys/kernel/shm_rmid_forced", "/proc/sys/net/ipv4/ip_forward", "/proc/self/oom_score_adj")
    writes = " && ".join(f"echo 1 >{path}" for path in own)
    script = f"set -e; {writes}; sleep 1000 & kill $!; wait $! || echo $?; cat /proc/self/attr/current"
    assert confined(home, script).run().ok() == f"143\n{APPARMOR_DEFAULT} (enforce)\n"
