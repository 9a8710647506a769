"""A kubelet on cgroup v2 with systemd's driver, which it hears of from ocid: slices for its pods, and a pod in one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.kubelet.log_scan import scan
from conformance.kubelet.node import Node
from conformance.kubelet.pods import OFTEN, container, pod
from tests.e2e import drop_table
from tests.support import eventually
from tests.vm.units import CGROUPS, known_units, shown, systemctl

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
ENDS = "trap 'echo ended > /out/ended; exit 0' TERM; while :; do sleep 0.1; done"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    programs = list((ROOT / ".cache/bin").glob("kubelet-*"))
    if not programs:
        pytest.skip("no kubelet is on the clone's disk: the machine that made it had no Go compiler")
    made = Node(tmp_path, programs[0], {}, "/", more='[runtime]\ncgroup_driver = "systemd"\n')
    try:
        made.up()
        (layout,) = (ROOT / ".cache/images").glob("busybox-*")
        words = [*made.ocid.command[:-1], "load", "-q", "-i", str(layout)]  # instead of "serve"
        loaded = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        made.images["busybox"] = loaded.stdout.split()[0]
        yield made
    finally:
        for log in (made.kubelet.log, made.ocid.log):
            print(log.read_text()[-6000:] if log.exists() else f"no {log}")
        made.down()
        drop_table()
        systemctl("stop", "kubepods.slice", check=False)


def test_a_pod_is_probed_limited_and_ended_in_its_order(node: Node) -> None:
    probe = {"exec": {"command": ["sh", "-c", "echo x >> /out/probed"]}, **OFTEN}
    limits = {"requests": {"cpu": "100m", "memory": "32Mi"}, "limits": {"cpu": "250m", "memory": "64Mi"}}
    main = container("main", node.images["busybox"], ENDS, resources=limits, readinessProbe=probe, livenessProbe=probe)
    node.apply(pod("one", main, terminationGracePeriodSeconds=60))
    node.until_ready("one")
    uid, one = node.pod("one")["metadata"]["uid"], node.running("one")["main"]
    own, unit = f"kubepods-burstable-pod{uid.replace('-', '_')}.slice", f"ocid-{one}.scope"
    place = CGROUPS / "kubepods.slice/kubepods-burstable.slice" / own / unit
    assert Path(f"/proc/{node.pid(one)}/cgroup").read_text() == f"0::/{place.relative_to(CGROUPS)}\n"
    assert shown(unit, "ActiveState", "Slice") == {"ActiveState": "active", "Slice": own}
    for directory in (place, place.parent):
        limited = [(directory / name).read_text().strip() for name in ("memory.max", "cpu.max")]
        assert limited == [str(64 * MIB), "25000 100000"]
    probed = len(node.out("probed"))
    eventually(lambda: len(node.out("probed")) > probed + 2, what="more probes")
    (told,) = node.get("/stats/summary")["pods"]
    assert told["containers"][0]["memory"]["workingSetBytes"] > 0 and told["cpu"]["usageCoreNanoSeconds"] > 0
    assert node.status("one", "main")["restartCount"] == 0

    node.withdraw("one")
    node.until_gone("one")
    assert node.out("ended") == "ended\n"
    eventually(lambda: not place.parent.exists(), what="the pod's slice to go")
    assert known_units(unit) == known_units(own) == []
    said = scan(node.kubelet.log.read_text(), node.absences)
    # How fast a machine is, which this one is not.
    assert [line for line in said if "housekeeping took too long" not in line] == []
