"""What is measured, what the design allows for it, and the table that shows both.

A budget is an absolute figure taken where containerd needed `reference`. On a slower machine the same code misses the
figure and keeps the ratio, so a value passes when it holds the budget, or the budget's ratio to containerd measured in
the same run; the table says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. `reference` is containerd's figure where the budget was set, 0 where there was none."""

    key: str
    title: str
    unit: str
    budget: float = 0.0
    reference: float = 0.0
    more_is_better: bool = False


METRICS = (
    Metric("run_pod", "RunPodSandbox, p50", "ms"),
    Metric("create", "CreateContainer, p50", "ms"),
    Metric("start", "StartContainer, p50", "ms"),
    Metric("pod_up", "pod up, p50", "ms", 40, 301.5),
    Metric("exec", "ExecSync(true), p50", "ms", 8, 42.3),
    Metric("status", "ContainerStatus, p50", "ms"),
    Metric("stop", "StopContainer (0 s grace), p50", "ms"),
    Metric("remove", "RemoveContainer, p50", "ms"),
    Metric("stop_pod", "StopPodSandbox, p50", "ms"),
    Metric("remove_pod", "RemovePodSandbox, p50", "ms"),
    Metric("pod_down", "pod down, p50", "ms", 40, 298.3),
    Metric("up_rate", "pods up per second, 8 callers", "/s", 40, 5.6, more_is_better=True),
    Metric("down_rate", "pods down per second, 8 callers", "/s", more_is_better=True),
    Metric("list", "ListContainers, p50", "ms"),
    Metric("list_stats", "ListContainerStats, p50", "ms", 10, 100.7),
    Metric("idle", "daemon idle, PSS", "MiB", 55, 58.3),
    Metric("per_pod", "overhead per pod, PSS", "MiB", 1.2, 5.56),
    Metric("daemon_full", "daemon with all pods, PSS", "MiB"),
    Metric("pull", "pull + unpack, 1.18 GiB in 73 k files", "s", 7, 22),
    Metric("link", "pull over 100 Mbit/s, 50 ms, resets: of the line", "%", 95, more_is_better=True),
    Metric("logs", "log throughput, 100-byte lines", "MB/s", 150, 28, more_is_better=True),
    Metric("stream", "exec stream, stdout over WebSocket", "MB/s", 120, 47, more_is_better=True),
    Metric("runtime", "run true: ocirun against runc, p50", "ms", 1, 1),
    Metric("runtime_exec", "exec true: ocirun against runc, p50", "ms", 1, 1),
)

RUNTIMES = ("runtime", "runtime_exec")  # measured against runc, not containerd

Values = Mapping[str, float]


def verdict(metric: Metric, ocid: float, peer: float | None) -> str:
    """ "PASS", "PASS (ratio)", "FAIL", or "" where the design sets no budget."""
    if not metric.budget:
        return ""
    if metric.key in RUNTIMES:
        # The budget is the peer itself.
        return "PASS" if peer and ocid <= peer else "FAIL"
    if ocid >= metric.budget if metric.more_is_better else ocid <= metric.budget:
        return "PASS"
    if peer and metric.reference:
        ratio, allowed = ocid / peer, metric.budget / metric.reference
        if ratio >= allowed if metric.more_is_better else ratio <= allowed:
            return "PASS (ratio)"
    return "FAIL"


def render(results: Mapping[str, Values]) -> tuple[str, int]:
    """The table in Markdown, and how many budgets were missed."""
    peer, ours = results.get("containerd", {}), results.get("ocid", {})
    lines = ["| what | unit | containerd | ocid | ocid / containerd | budget | |", "|---|---|---|---|---|---|---|"]
    missed = 0
    for metric in METRICS:
        theirs, mine = peer.get(metric.key), ours.get(metric.key)
        if theirs is None and mine is None:
            continue
        ratio = f"{mine / theirs:.3f}" if mine is not None and theirs else ""
        judged = verdict(metric, mine, theirs) if mine is not None else ""
        missed += judged == "FAIL"
        allowed = "≤ runc" if metric.key in RUNTIMES else f"{'≥' if metric.more_is_better else '≤'} {metric.budget:g}"
        cells = [metric.title, metric.unit, _number(theirs), _number(mine), ratio, allowed if metric.budget else ""]
        lines.append(f"| {' | '.join([*cells, judged])} |")
    return "\n".join(lines), missed


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
