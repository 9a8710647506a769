"""Bytes: pulling and unpacking a large image, and what a container prints on its way into the log."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from conformance.bench.subject import Subject, median
from conformance.cri_client import container

LINE = "x" * 99
PULL_S = 300.0
REMOVAL_S = 60.0
KEPT = 100  # files that a daemon may keep of an image: databases, directories by digest


def pull(subjects: Sequence[Subject], image: str, rounds: int, disk: Path) -> None:
    """Each alone on the `disk`: what the one before has written must not be flushed on the time of the next, nor what
    it has removed be deleted then. One of them deletes before it answers, the other later, and both that way round
    would be paid for by the other: 2.5 s of a processor for 73,000 files."""
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    os.sync()
    free = os.statvfs(disk).f_ffree
    for _ in range(rounds):
        for subject in subjects:
            began = time.perf_counter()
            subject.client.pull(image, timeout=PULL_S)
            times[subject.name].append(time.perf_counter() - began)
            subject.client.remove_image(image)
            _quiet(disk, free - KEPT, subject.name)
    for subject in subjects:
        subject.values["pull"] = median(times[subject.name])


def _quiet(disk: Path, free: int, name: str) -> None:
    """Waits until `free` inodes of the disk are free again and nothing is left to be written."""
    limit = time.monotonic() + REMOVAL_S
    while (now := os.statvfs(disk).f_ffree) < free:
        if time.monotonic() > limit:
            raise RuntimeError(f"{name}: {REMOVAL_S:g} s after its removal the image has {free - now} files on disk")
        time.sleep(0.05)
    os.sync()


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
