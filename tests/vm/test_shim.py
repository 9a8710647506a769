"""Pods on one cgroup hierarchy, with systemd and an older kernel: scopes of their containers, user namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shims import Lab, Pod, lab
from tests.vm.units import CGROUPS, known_units, shown, systemctl

SLICE = "ocidshims.slice"
FIRST = 300_000


@pytest.fixture(params=["native", "runc"])
def pods(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path, request.param) as opened:
        yield opened
    assert known_units("ocid-*.scope") == []
    systemctl("stop", SLICE)


def test_a_container_of_a_pod_is_a_scope_in_its_slice(pods: Lab) -> None:
    pod = pods.pod()
    one = pod.run("one", ["sleep", "1000"], linux=_linux(pod, cgroupsPath=f"{SLICE}:ocid:{pod.id}-one"))
    unit = f"ocid-{one}.scope"
    pid = pod.facts(one).pid
    assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/{SLICE}/{unit}\n"
    assert shown(unit, "ActiveState", "Slice") == {"ActiveState": "active", "Slice": SLICE}
    pods.shims.update(pod.sandbox, one, {"memory": {"limit": 64 << 20}})
    assert (CGROUPS / SLICE / unit / "memory.max").read_text() == f"{64 << 20}\n"
    systemctl("daemon-reload")
    assert (CGROUPS / SLICE / unit / "memory.max").read_text() == f"{64 << 20}\n"
    assert pod.exec(one, ["cat", "/proc/self/cgroup"]).stdout.decode().strip().endswith(unit)
    pods.shims.delete(pod.sandbox, one)
    assert known_units(unit) == [] and not (CGROUPS / SLICE / unit).exists()


def _linux(pod: Pod, **more: object) -> dict[str, object]:
    kinds = [{"type": "mount"}, {"type": "pid"}, {"type": "network"}]
    return {
        "namespaces": [*kinds, *({"type": kind, "path": f"{pod.directory}/ns/{kind}"} for kind in ("ipc", "uts"))],
        **more,
    }


def test_layers_are_mapped_for_a_user_namespace(tmp_path: Path) -> None:
    with lab(tmp_path) as opened:
        lines = ((0, FIRST, 65536),)
        pod = opened.pod(new_netns=True, shared_pid=True, uids=lines, gids=lines)
        kinds = {"user": "user", "network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid"}
        namespaces = [{"type": kind, "path": f"{pod.directory}/ns/{name}"} for kind, name in kinds.items()]
        one = pod.spec(
            "one",
            ["sh", "-c", "ls -ln /bin/busybox; echo x > /new; cat /proc/1/comm; sleep 1000"],
            linux={
                "namespaces": [{"type": "mount"}, *namespaces],
                "cgroupsPath": f"/{opened.machine.cgroup}/{pod.id}-one",
            },
        )
        os.chown(pod.bundle("one") / "upper", FIRST, FIRST)
        opened.shims.create(pod.sandbox, one)
        opened.shims.start_container(pod.sandbox, one.id)
        pid = pod.facts(one.id).pid
        assert os.stat(f"/proc/{pid}").st_uid == FIRST
        result = pod.exec(one.id, ["sh", "-c", "ls -ln /bin/busybox /new; cat /proc/1/comm; echo again > /dev/stdout"])
        words = result.stdout.decode().split()
        assert (words[2], words[3]) == ("0", "0") and words[-2:] == ["ocid-pause", "again"], result
        assert (opened.home.root / "bin/busybox").stat().st_uid == 0
        assert (pod.bundle("one") / "upper/new").stat().st_uid == FIRST
