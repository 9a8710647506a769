"""What pods may use, what they do use, and what a kubelet does about it; logs, which it rotates."""

from __future__ import annotations

import gzip
import re
from typing import Any

from conformance.clients.steps import eventually, expect, holds, same
from conformance.cri_client import Cri
from conformance.kubelet.node import NAME, Node
from conformance.kubelet.pods import FOREVER, Document, container, pod
from conformance.kubelet.step import Step
from cri.api import api_pb2

LINES = 2500
STATS_S = 40.0


def limits_pods(node: Node) -> list[Document]:
    busybox = node.images["busybox"]
    fixed = {"memory": "48Mi", "cpu": "250m"}
    some = {"requests": {"memory": "16Mi", "cpu": "100m"}, "limits": {"memory": "64Mi"}}
    return [
        pod("guaranteed", container("main", busybox, resources={"limits": fixed, "requests": fixed})),
        pod("burstable", container("main", busybox, resources=some)),
    ]


def limits(node: Node) -> None:
    """In the kernel's files, of container and pod, below the cgroup of the pod's quality of service."""
    for name in ("guaranteed", "burstable", "plain"):
        node.until_ready(name)
    for name, quality in (("guaranteed", "Guaranteed"), ("burstable", "Burstable"), ("plain", "BestEffort")):
        same(f"quality of {name}", node.status(name)["qosClass"], quality)

    def read(name: str, controller: str, file: str) -> list[int]:
        """Of the pod, and of its container."""
        above = node.cgroup_of(node.pod(name), controller)
        return [int((path / file).read_text()) for path in (above, above / node.running(name)["main"])]

    same("memory", read("guaranteed", "memory", "memory.limit_in_bytes"), [48 << 20, 48 << 20])
    same("quota", read("guaranteed", "cpu", "cpu.cfs_quota_us"), [25000, 25000])
    same("shares", read("guaranteed", "cpu", "cpu.shares"), [256, 256])
    same("memory", read("burstable", "memory", "memory.limit_in_bytes"), [64 << 20, 64 << 20])
    same("quota", read("burstable", "cpu", "cpu.cfs_quota_us"), [-1, -1])
    same("shares", read("burstable", "cpu", "cpu.shares"), [102, 102])


def memory_pods(node: Node) -> list[Document]:
    eat = "x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo $x | wc -c"
    greedy = container("main", node.images["busybox"], eat, resources={"limits": {"memory": "16Mi"}})
    return [pod("greedy", greedy, restartPolicy="Never")]


def memory(node: Node) -> None:
    """Who takes more than its limit is killed for it, and it is said."""
    eventually(lambda: node.status("greedy").get("phase") == "Failed", "the pod fails", 60)
    ended = node.status("greedy", "main")["state"]["terminated"]
    same("exit", (ended["exitCode"], ended["reason"]), (137, "OOMKilled"))


def statistics_pods(node: Node) -> list[Document]:
    busy = "dd if=/dev/zero of=/big bs=1M count=7 2>/dev/null; echo x >/out/big; while :; do :; done"
    used = container("busy", node.images["busybox"], busy, resources={"limits": {"cpu": "200m", "memory": "64Mi"}})
    return [pod("used", used, container("idle", node.images["busybox"]))]


def statistics(node: Node) -> None:
    """The kubelet's summary is ours: cpu, memory, writable layers, network, the image store."""
    node.until_ready("used")
    eventually(lambda: node.out("big"), "seven megabytes are written", 20)

    def find() -> Document:
        pods = node.get("/stats/summary")["pods"]
        found = [one for one in pods if one["podRef"]["name"] == f"used-{NAME}"]
        return dict(found[0]) if found else {}

    def container_of(whole: Document, name: str) -> Document:
        return next((dict(one) for one in whole.get("containers", []) if one["name"] == name), {})

    def complete() -> Any:
        busy = container_of(find(), "busy")
        return busy.get("rootfs", {}).get("usedBytes", 0) > 7 << 20 and busy.get("cpu", {}).get("usageNanoCores")

    eventually(complete, "the summary has the writable layer and the cpu", STATS_S)
    whole = find()
    busy, idle = container_of(whole, "busy"), container_of(whole, "idle")
    expect(busy["rootfs"]["usedBytes"] < 9 << 20, f"writable layer of {busy['rootfs']}")
    expect(0 < busy["cpu"]["usageNanoCores"] < 400_000_000, f"cpu of 200m: {busy['cpu']}")
    expect(idle["rootfs"]["usedBytes"] < 1 << 20, f"writable layer of the idle: {idle['rootfs']}")
    expect(0 < busy["memory"]["workingSetBytes"] < 64 << 20, f"memory: {busy['memory']}")
    expect(whole["memory"]["workingSetBytes"] >= busy["memory"]["workingSetBytes"], f"pod less than its part: {whole}")
    holds("network", str(whole["network"]), "rxBytes", "eth0")
    expect(whole["process_stats"]["process_count"] >= 2, f"processes: {whole['process_stats']}")
    told = node.get("/stats/summary")["node"]["runtime"]["imageFs"]
    with Cri(node.socket) as client:
        ours = client.images.ImageFsInfo(api_pb2.ImageFsInfoRequest()).image_filesystems[0]
    same("bytes of images", told["usedBytes"], ours.used_bytes.value)


def rotation_pods(node: Node) -> list[Document]:
    # Not faster than eight files of 20 KiB can hold what comes between two looks: then nothing may be missing.
    count = f"while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; [ $((i % 25)) -ne 0 ] || sleep 0.1; done"
    return [pod("rotation", container("main", node.images["busybox"], f"i=0; {count}; {FOREVER}"))]


def rotation(node: Node) -> None:
    """The kubelet renames, we reopen: every line is in one of the files, once and in order."""
    eventually(lambda: node.running("rotation"), "the pod runs", 30)
    directory = next((node.base / "logs").glob("default_rotation-*")) / "main"

    def numbers() -> list[int]:
        found: list[int] = []
        for file in sorted(directory.glob("0.log*"), key=lambda path: (path.name == "0.log", path.name)):
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            found += map(int, re.findall(rb"line (\d+)\n", data))
        return found

    eventually(lambda: numbers()[-1:] == [LINES], "the last line is logged", 60)
    # Until nothing is renamed or compressed any more.
    eventually(lambda: len(list(directory.glob("0.log.*"))) >= 2, "logs are rotated", 30)
    eventually(lambda: numbers() == list(range(1, LINES + 1)), "every line is there once and in order", 30)


STEPS = (
    Step(limits, limits_pods),
    Step(memory, memory_pods),
    Step(statistics, statistics_pods),
    Step(rotation, rotation_pods),
)
