"""Many pods at once: how fast eight callers bring them up and down, what listing them costs, and what each weighs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from conformance.bench.subject import MIB, Subject, median, new_since, settled_pss, timed
from conformance.cri_client import container
from conformance.daemons import all_pids, pss_bytes

CALLERS = 8
PAYLOAD = "86399"
LISTINGS = 20
T = TypeVar("T")


def measure(subjects: Sequence[Subject], pods: int) -> None:
    for subject in subjects:
        before = all_pids()
        began = time.perf_counter()
        up = _all(lambda number, subject=subject: _up(subject, number), range(pods))  # type: ignore[misc]
        subject.values["up_rate"] = pods / (time.perf_counter() - began)
        subject.values["list"] = median([timed(subject.client.list_containers) for _ in range(LISTINGS)])
        if len(subject.client.list_stats()) != pods:
            raise RuntimeError(f"{subject.name}: ListContainerStats does not show {pods} containers")
        subject.values["list_stats"] = median([timed(subject.client.list_stats) for _ in range(LISTINGS)])
        overhead = settled_pss(lambda before=before, subject=subject: _helpers(before, subject))  # type: ignore[misc]
        subject.values["per_pod"] = overhead / pods
        subject.notes.append(f"helpers of {pods} pods: {_breakdown(_helpers(before, subject))}")
        subject.values["daemon_full"] = subject.daemon_pss()
        began = time.perf_counter()
        _all(lambda pair, subject=subject: _down(subject, pair), up)  # type: ignore[misc]
        subject.values["down_rate"] = pods / (time.perf_counter() - began)


def _all(work: Callable[[T], tuple[str, str]], items: Iterable[T]) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(CALLERS) as pool:
        return list(pool.map(work, items))


def _up(subject: Subject, number: int) -> tuple[str, str]:
    pod_config = subject.names.pod(f"many{number}")
    pod = subject.client.run_pod(pod_config)
    one = subject.client.create(pod, container("main", subject.image, ["sleep", PAYLOAD]), pod_config)
    subject.client.start(one)
    return pod, one


def _down(subject: Subject, pair: tuple[str, str]) -> tuple[str, str]:
    pod, one = pair
    subject.client.stop(one)
    subject.client.remove(one)
    subject.client.stop_pod(pod)
    subject.client.remove_pod(pod)
    return pair


def _helpers(before: frozenset[int], subject: Subject) -> frozenset[int]:
    """What runs for the pods beside the containers' own processes: shims, monitors, pause."""
    return frozenset(pid for pid in new_since(before) - subject.daemon_pids if not _is_payload(pid))


def _breakdown(pids: frozenset[int]) -> str:
    """How many processes of which name, and what one of them weighs."""
    weights: dict[str, list[float]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            weights.setdefault(Path(f"/proc/{pid}/comm").read_text().split()[0], []).append(pss_bytes(pid) / MIB)
    return ", ".join(f"{len(each)} × {name} {sum(each) / len(each):.2f} MiB" for name, each in sorted(weights.items()))


def _is_payload(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as handle:
            return handle.read().split(b"\0")[:2] == [b"sleep", PAYLOAD.encode()]
    except OSError:
        return True
