"""conformance/run kubelet [--only WORD] [--keep]

A real kubelet drives ocid: pods of every kind that the steps need, then restarts of both, then the same node as the
member of a cluster, with kubectl; last what the kubelet's log says of the runtime, and what is left on the machine. In
namespaces of its own. Exit code 1 when any of it fails; the steps after a failed one still run, so that one run shows
everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conformance.clients.steps import Score, Surprise, eventually
from conformance.images import layouts, push
from conformance.isolated import reenter
from conformance.kubelet import (
    amounts,
    checkpoint,
    confinement,
    devices,
    hands,
    lifecycle,
    members,
    network,
    probes,
    restarts,
    shutdown,
    troubles,
    volumes,
)
from conformance.kubelet.cluster import cluster
from conformance.kubelet.log_scan import scan
from conformance.kubelet.node import Node
from conformance.kubelet.step import Step, play
from conformance.leaks import SETTLE_S, Machine, left_over
from conformance.registry import registry

ROOT = Path(__file__).parents[2]
IMAGES = ("busybox", "nginx")
CALM = (
    *lifecycle.STEPS,
    *probes.STEPS,
    *volumes.STEPS,
    *network.STEPS,
    *confinement.STEPS,
    *amounts.STEPS,
    *checkpoint.STEPS,
)


def built(program: str) -> Path:
    """The program at the version that go.mod pins, built when it is not there yet."""
    if not (os.environ.get("GO") or shutil.which("go") or os.access("/usr/local/go/bin/go", os.X_OK)):
        print(f"no Go compiler is here: {program} cannot be built, and the lane is skipped")
        raise SystemExit(0)
    result = subprocess.run([ROOT / "hack" / "kubernetes", program], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{program} cannot be built: see above")
    return Path(result.stdout.strip())


def run(base: Path, programs: dict[str, Path], only: str) -> Score:
    with registry(base / "registry") as here:
        for layout in layouts(IMAGES):
            push(layout, here.address)
        images = {name: here.reference(f"{name}:1") for name in IMAGES}
        before = Machine.now()
        node = Node(base, programs["kubelet"], images, f"/{base.name}")
        score = Score()
        try:
            node.up()
            score.add(play(node, _chosen(CALM, only)))
            score.add(play(node, _chosen(restarts.STEPS, only)))
            score.add(emptied(node))
            score.add(in_cluster(node, programs, only))
        finally:
            node.down()
        score.add(silent(node))
        score.failed += _leaks(before, base.name)
    return score


def in_cluster(node: Node, programs: dict[str, Path], only: str) -> Score:
    """The same node with an API server."""
    score = Score()
    with cluster(node.base / "cluster", programs["kube-apiserver"], programs["kubectl"]) as kubectl:
        try:
            node.join(kubectl)
            score.add(play(node, _chosen((*hands.STEPS, *members.STEPS, *devices.STEPS), only)))
            score.add(emptied(node))
            score.add(play(node, _chosen((*troubles.STEPS, *shutdown.STEPS), only)))
            score.add(emptied(node))
        finally:
            node.kubelet.stop()
    return score


def emptied(node: Node) -> Score:
    """Every pod is withdrawn by now: the kubelet takes each apart, and leaves no volume and no cgroup of any."""
    for manifest in (node.base / "manifests").iterdir():  # of a step that failed
        node.withdraw(manifest.stem)
    try:
        eventually(lambda: not list((node.base / "kubelet" / "pods").iterdir()), "no directories of pods are left", 90)
        eventually(lambda: not node.get("/pods")["items"], "the kubelet has no pods", 60)
        eventually(lambda: not node.cgroups(), "no cgroups of pods are left", 60)
    except Surprise as error:
        print(f"  emptied: FAILED: {error}")
        return Score(failed=1)
    return Score(passed=1)


def silent(node: Node) -> Score:
    """The kubelet's log holds no error that is not known to say nothing against the runtime."""
    lines = scan(node.kubelet.log.read_text(errors="replace"), node.absences)
    for line in lines:
        print(f"  the kubelet's log: {line}")
    return Score(passed=int(not lines), failed=len(lines))


def _chosen(steps: tuple[Step, ...], only: str) -> list[Step]:
    return [step for step in steps if only in step.name]


def _leaks(before: Machine, mark: str) -> int:
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = Machine.now()
        # cgroups are the one thing here without a namespace: of those only what carries our name counts.
        found = [line for line in left_over(before, now) if not line.startswith(("cgroup", "nftables table"))]
        found += [line for line in left_over(before, now, [mark]) if line.startswith("cgroup")]
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for line in found:
        print(f"  left over: {line}")
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="conformance/run kubelet", description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="only steps with this in their name")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the logs of kubelet and ocid there")
    args = parser.parse_args()
    # Before the namespaces: both may need the network.
    programs = {name: built(name) for name in ("kubelet", "kube-apiserver", "kubectl")}
    layouts(IMAGES)
    reenter("conformance.kubelet", sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="kubelet-") as directory:
        base = Path(directory)
        try:
            score = run(base, programs, args.only)
        finally:
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                for log in base.rglob("*.log"):
                    shutil.copy(log, args.keep)
    print(f"kubelet: {score.passed} passed, {score.failed} failed")
    return 1 if score.failed else 0


if __name__ == "__main__":
    sys.exit(main())
