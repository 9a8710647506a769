"""What is compared before a restored process runs, shown on a container that was made and config.json that says less.

A container of config.json itself passes; each test gives it something that config.json does not, as images could.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import restored, spec
from runtime.errors import RuntimeFailure
from runtime.restored_mounts import verify_mounts
from tests.bundles import Bundle, Bundles, bundles
from tests.support import eventually, needs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Bundles]:
    needs("root", "busybox")
    with bundles(tmp_path) as opened:
        yield opened


def _plain(home: Bundles) -> Bundle:
    """As a container of a pod is: somebody, without privileges to gain, with masks and a volume."""
    bundle = home.make()
    bundle.process["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [2000]}
    bundle.process["noNewPrivileges"] = True
    bundle.process["oomScoreAdj"] = 500
    bundle.process["capabilities"] = {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]}
    bundle.linux["maskedPaths"] = ["/proc/kcore", "/proc/timer_list", "/sys/firmware"]
    bundle.linux["readonlyPaths"] = ["/proc/sys", "/proc/bus"]
    (bundle.path / "volume").mkdir()
    bundle.mount("/data", "bind", bundle.path / "volume", "bind", "ro", "nosuid")
    bundle.mount("/scratch", "tmpfs", "tmpfs")
    return bundle


def _verify(bundle: Bundle, **changed: Any) -> None:
    """`changed` are parts of config.json as it is now."""
    bundle.config |= changed
    bundle.write()
    config = spec.parse((bundle.path / "config.json").read_bytes())
    pid = bundle.pid()
    members = restored.members(pid, [pid], but=-1)
    restored.verify(config, pid, members, members)
    sources = {mount.destination: mount.source for mount in config.mounts if mount.kind == "bind"}
    verify_mounts(config, pid, os.stat(f"/proc/{pid}/root"), sources)


def _refuses(bundle: Bundle, words: str) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        _verify(bundle)
    assert words in str(caught.value)


def test_a_container_is_as_its_config_says(home: Bundles) -> None:
    bundle = _plain(home).up()
    _verify(bundle)
    assert Path(f"/proc/{bundle.pid()}/oom_score_adj").read_text() == "500\n"


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"uid": 1001, "gid": 1000, "additionalGids": [2000]}, "has the uids 1000"),
        ({"uid": 1000, "gid": 1001, "additionalGids": [2000]}, "has groups that it may not have: 1000"),
        ({"uid": 1000, "gid": 1000}, "has groups that it may not have: 2000"),
    ],
)
def test_s71_somebody_else(home: Bundles, user: dict[str, Any], words: str) -> None:
    bundle = _plain(home).up()
    bundle.process["user"] = user
    _refuses(bundle, words)


def test_s71_capabilities_that_no_execve_would_have_given(home: Bundles) -> None:
    bundle = _plain(home)
    bundle.process["capabilities"]["ambient"] = bundle.process["capabilities"]["inheritable"] = ["CAP_KILL"]
    bundle.up()
    _verify(bundle)
    del bundle.process["capabilities"]["ambient"]
    _refuses(bundle, "CapPrm that it may not have: CAP_KILL")


def test_s71_privileges_to_gain_and_no_filter(home: Bundles) -> None:
    bundle = _plain(home)
    bundle.process["noNewPrivileges"] = False
    bundle.up()
    bundle.process["noNewPrivileges"] = True
    _refuses(bundle, "it lacks no_new_privs")
    bundle.process["noNewPrivileges"] = False
    bundle.linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    _refuses(bundle, "has no seccomp filter")


def test_s71_more_priority_and_less_to_be_killed_for(home: Bundles) -> None:
    bundle = _plain(home)
    bundle.process["oomScoreAdj"] = 400
    bundle.up()
    pid = bundle.pid()
    bundle.process["oomScoreAdj"] = 500
    _verify(bundle)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    os.setpriority(os.PRIO_PROCESS, pid, -5)
    _refuses(bundle, "has a priority that it may not have: policy 0, nice -5")


def test_s71_a_process_outside_of_the_cgroup_is_seen_by_its_parent(home: Bundles) -> None:
    bundle = _plain(home).up()
    config = spec.parse((bundle.path / "config.json").read_bytes())
    pid = bundle.pid()
    with pytest.raises(RuntimeFailure, match=f"restored process {pid} is outside of the container's cgroup"):
        restored.verify(config, pid, restored.members(pid, [], but=-1), [])


def test_s71_all_that_descends_from_the_init_is_looked_at(home: Bundles) -> None:
    bundle = home.sh("(sleep 1000 & sleep 1001) & exec sleep 1002")
    bundle.up()
    pid = bundle.pid()

    def below() -> list[int]:
        return restored.members(pid, [], but=-1)

    eventually(lambda: len(below()) == 3, what="three sleeps, each the parent of the next")
    child = next(one for one in below() if one != pid)
    assert pid in restored.members(pid, [], but=child) and child not in restored.members(pid, [], but=child)


def _inside(bundle: Bundle, *words: str) -> None:
    subprocess.run(["nsenter", "-t", str(bundle.pid()), "-m", *words], check=True)


def test_s71_a_mount_that_config_json_has_not(home: Bundles) -> None:
    bundle = _plain(home).up()
    _inside(bundle, "/bin/busybox", "mount", "-t", "tmpfs", "none", "/scratch")
    _verify(bundle)  # over one of the same kind at the same place: nothing is seen of the host
    _inside(bundle, "/bin/busybox", "mount", "-t", "proc", "none", "/data")
    _refuses(bundle, "mount point /data does not show")
    _inside(bundle, "/bin/busybox", "umount", "/data")
    _verify(bundle)
    _inside(bundle, "/bin/busybox", "mkdir", "/new")
    _inside(bundle, "/bin/busybox", "mount", "-t", "tmpfs", "none", "/new")
    _refuses(bundle, "mount point /new shows tmpfs")


def test_s71_a_filesystem_of_another_kind(home: Bundles) -> None:
    bundle = _plain(home).up()
    _inside(bundle, "/bin/busybox", "mount", "-t", "sysfs", "none", "/scratch")
    _refuses(bundle, "mount point /scratch is of type sysfs, in config.json of tmpfs")


def test_s71_a_volume_that_is_another_or_may_be_written_to(home: Bundles) -> None:
    bundle = _plain(home).up()
    entry = next(mount for mount in bundle.config["mounts"] if mount["destination"] == "/data")
    (bundle.path / "other").mkdir()
    entry["source"] = str(bundle.path / "other")
    _refuses(bundle, "mount point /data does not show")
    entry["source"] = str(bundle.path / "volume")
    entry["options"].append("noexec")
    _refuses(bundle, "mount point /data is mounted without noexec")
    entry["options"].remove("noexec")
    _verify(bundle)
    _inside(bundle, "/bin/busybox", "mount", "-o", "remount,bind,rw", "none", "/data")
    _refuses(bundle, "mount point /data is mounted without ro")


def test_s71_a_path_that_is_not_masked_or_may_be_written_to(home: Bundles) -> None:
    bundle = _plain(home).up()
    bundle.linux["maskedPaths"].append("/proc/version")
    _refuses(bundle, "mount point /proc/version is not masked")
    bundle.linux["maskedPaths"][-1] = "/proc/tty"
    _refuses(bundle, "mount point /proc/tty is not masked")
    bundle.linux["maskedPaths"].pop()
    bundle.linux["readonlyPaths"].append("/proc/irq")
    _refuses(bundle, "mount point /proc/irq can be written to")


def test_s71_another_root(home: Bundles) -> None:
    bundle = _plain(home).up()
    config = spec.parse((bundle.path / "config.json").read_bytes())
    with pytest.raises(RuntimeFailure, match="mount point / is another root filesystem"):
        verify_mounts(config, bundle.pid(), os.stat("/tmp"), {})
