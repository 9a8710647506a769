"""What `--systemd-cgroup` refuses: a machine without systemd, and one with v1 controllers, whoever asks. What it does
is shown in tests/vm/test_systemd_scope.py and test_user_systemd.py."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.bundles import Bundles, Result, bundles
from tests.integration.test_runtime_rootless import USER, give, single
from tests.support import needs

# A /run of its own, so that the machine under the test has a systemd, or none.
OWN_RUN = 'mount -t tmpfs none /run && mkdir -p "/run/systemd/$0" && exec "$@"'
AS_USER = ("setpriv", "--reuid", str(USER.pw_uid), "--regid", str(USER.pw_gid), "--clear-groups")


@pytest.fixture
def home() -> Iterator[Bundles]:
    needs("root", "busybox")
    # Not below pytest's own directory: every session that starts closes that to all but root.
    with TemporaryDirectory(prefix="ocirun-systemd-") as directory, bundles(Path(directory)) as opened:
        Path(directory).chmod(0o711)
        opened.root.mkdir()
        yield opened


def refused(home: Bundles, said: str, systemd: bool = True, who: tuple[str, ...] = ()) -> None:
    """`ocirun --systemd-cgroup create` fails with one sentence that says so, and nothing is left of it."""
    one = home.make()
    one.linux["cgroupsPath"] = ""
    if who:
        single(one)
        give(home.root)
    one.write()
    cgroups = home.cgroups(one.id)
    words = [*who, *home.command("--systemd-cgroup", "create", "--bundle", str(one.path), one.id)]
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", OWN_RUN, "system" if systemd else "private"]
    done = subprocess.run([*enter, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    Result(done.returncode, done.stdout, done.stderr).failed(said)
    assert home.cgroups(one.id) == cgroups and not (home.root / one.id).exists()
    assert not home.processes(one.id)


def test_without_systemd(home: Bundles) -> None:
    refused(home, "systemd not running on this host, cannot use systemd cgroups manager", systemd=False)


def test_v1_controllers_beside_systemd(home: Bundles) -> None:
    needs("cgroup1")
    refused(home, "--systemd-cgroup: this machine has cgroup v1 controllers, and the systemd driver is for v2 alone")


def test_an_ordinary_users_systemd_beside_v1_controllers(home: Bundles) -> None:
    needs("cgroup1")
    refused(home, "--systemd-cgroup: this machine has cgroup v1 controllers", who=AS_USER)
