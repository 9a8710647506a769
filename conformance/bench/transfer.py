"""Bytes: pulling and unpacking a large image, and what a container prints on its way into the log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from conformance.bench.subject import Subject, median
from conformance.cri_client import container

LINE = "x" * 99
PULL_S = 300.0


def pull(subjects: Sequence[Subject], image: str, rounds: int) -> None:
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for _ in range(rounds):
        for subject in subjects:
            # What the one before has written must not be flushed on the time of the next.
            os.sync()
            began = time.perf_counter()
            subject.client.pull(image, timeout=PULL_S)
            times[subject.name].append(time.perf_counter() - began)
            subject.client.remove_image(image)
    for subject in subjects:
        subject.values["pull"] = median(times[subject.name])


def logs(subjects: Sequence[Subject], megabytes: int) -> None:
    """From the start of the container until it has exited; then the log must be complete."""
    total = megabytes * 1_000_000
    for subject in subjects:
        os.sync()
        pod_config = subject.names.pod("logs")
        pod = subject.client.run_pod(pod_config)
        script = f"yes {LINE} | head -c {total}"
        one = subject.client.create(pod, container("loud", subject.image, ["sh", "-c", script]), pod_config)
        began = time.perf_counter()
        subject.client.start(one)
        code = subject.client.wait_exit(one)
        subject.values["logs"] = total / 1e6 / (time.perf_counter() - began)
        path = subject.client.status(one).log_path
        lines = _lines(path)
        if code != 0 or lines != total // 100:
            raise RuntimeError(f"{subject.name}: exit code {code}, {lines} of {total // 100} lines in {path}")
        os.unlink(path)
        subject.client.stop_pod(pod)
        subject.client.remove_pod(pod)


def _lines(path: str) -> int:
    with open(path, "rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 20), b""))
