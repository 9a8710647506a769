"""AppArmor's profiles: put on the process of a run and of an exec, or a clear error."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import OCIRUN, Bundles

PROFILE = """
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  network,
  signal,
  ptrace,
  mount,
  umount,
  deny /{denied} rwklx,
}}
"""
NAMES = ("ocid-test", "ocid-test-other")


@pytest.fixture(scope="module", autouse=True)
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("apparmor") / "profiles"
    file.write_text("abi <abi/3.0>,\n" + "".join(PROFILE.format(name=name, denied=f"tmp/{name}") for name in NAMES))
    subprocess.run(["apparmor_parser", "-K", "-r", str(file)], check=True)
    yield
    subprocess.run(["apparmor_parser", "-R", str(file)], check=True)


def _label(pid: int) -> str:
    """As the host's kernel sees it, not as the container's /proc tells."""
    return Path(f"/proc/{pid}/attr/apparmor/current").read_text().strip()


def test_s12_a_container_runs_under_its_profile(home: Bundles) -> None:
    bundle = home.make()
    bundle.process["apparmorProfile"] = "ocid-test"
    for name in NAMES:
        (bundle.rootfs / "tmp" / name).write_text("content\n")
    bundle.up()
    assert _label(bundle.pid()) == "ocid-test (enforce)"
    bundle.exec("cat", "/tmp/ocid-test").failed("Permission denied")
    assert bundle.exec("cat", "/tmp/ocid-test-other").ok() == "content\n"


def test_without_a_profile_it_is_unconfined(home: Bundles) -> None:
    bundle = home.make().up()
    assert _label(bundle.pid()) == "unconfined"


def test_an_exec_has_the_containers_profile_or_its_own(home: Bundles) -> None:
    bundle = home.make()
    bundle.process["apparmorProfile"] = "ocid-test"
    bundle.up()
    current = ("cat", "/proc/self/attr/current")
    assert bundle.exec(*current).ok().strip() == "ocid-test (enforce)"
    assert bundle.exec(*current, flags=("--apparmor", "ocid-test-other")).ok().strip() == "ocid-test-other (enforce)"
    process = bundle.path / "process.json"
    wanted = {"args": list(current), "cwd": "/", "env": ["PATH=/bin"], "apparmorProfile": "ocid-test-other"}
    process.write_text(json.dumps(wanted))
    done = home.ocirun("exec", "--process", str(process), bundle.id)
    assert done.ok().strip() == "ocid-test-other (enforce)"


def test_with_a_user_namespace_and_a_filter(home: Bundles) -> None:
    bundle = home.make("cat", "/proc/self/attr/current")
    bundle.user_namespace()
    bundle.process["apparmorProfile"] = "ocid-test"
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"]}
    assert bundle.run().ok().strip() == "ocid-test (enforce)"


def test_a_profile_that_is_not_loaded_is_an_error(home: Bundles) -> None:
    bundle = home.make()
    bundle.process["apparmorProfile"] = "ocid-none"
    # runc looks it up when the process starts, we before that.
    failed = bundle.run().failed("apparmor" if "runc" in OCIRUN else "process.apparmorProfile: apply ocid-none")
    assert "runc" in OCIRUN or "no such profile is loaded" in failed
    bundle.gone()


def test_an_exec_with_a_profile_that_is_not_loaded_is_an_error(home: Bundles) -> None:
    bundle = home.make().up()
    result = bundle.exec("true", flags=("--apparmor", "ocid-none"))
    assert result.code in (1, 255) and "apparmor" in result.error.lower()
    assert bundle.status() == "running"


def test_s12_a_container_that_hides_proc_gets_no_start(home: Bundles) -> None:
    """A /proc that is no procfs must not be what the label is written to."""
    bundle = home.make()
    bundle.process["apparmorProfile"] = "ocid-test"
    bundle.config["mounts"] = [one for one in bundle.config["mounts"] if one["destination"] != "/proc"]
    for file in ("self/attr/apparmor/exec", "self/attr/exec", "thread-self/attr/apparmor/exec"):
        fake = bundle.rootfs / "proc" / file
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.touch()
    if bundle.create().code == 0:
        bundle.start().ok()
        assert _label(bundle.pid()) == "ocid-test (enforce)"
