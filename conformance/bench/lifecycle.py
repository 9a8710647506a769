"""One pod with one container, up, asked, and down again, call by call; the subjects take turns pod by pod."""

from __future__ import annotations

import time
from collections.abc import Sequence

from conformance.bench.subject import Subject, median, timed
from conformance.cri_client import container

UP = ("run_pod", "create", "start")
DOWN = ("stop", "remove", "stop_pod", "remove_pod")


def measure(subjects: Sequence[Subject], rounds: int) -> None:
    samples: dict[str, dict[str, list[float]]] = {subject.name: {} for subject in subjects}
    # One round more than is counted: the first pod makes the bridge, loads tables and starts what is started lazily.
    for number in range(rounds + 1):
        for subject in subjects:
            for key, value in _one(subject, number).items():
                if number:
                    samples[subject.name].setdefault(key, []).append(value)
    for subject in subjects:
        subject.values.update({key: median(values) for key, values in samples[subject.name].items()})


def _one(subject: Subject, number: int) -> dict[str, float]:
    client, times = subject.client, dict[str, float]()
    pod_config = subject.names.pod(f"life{number}")
    began = time.perf_counter()
    pod = client.run_pod(pod_config)
    times["run_pod"] = (time.perf_counter() - began) * 1000
    began = time.perf_counter()
    one = client.create(pod, container("main", subject.image, ["sleep", "3600"]), pod_config)
    times["create"] = (time.perf_counter() - began) * 1000
    times["start"] = timed(lambda: client.start(one))
    times["pod_up"] = sum(times[key] for key in UP)
    times["exec"] = timed(lambda: _exec_true(subject, one))
    times["status"] = timed(lambda: client.status(one))
    times["stop"] = timed(lambda: client.stop(one))
    times["remove"] = timed(lambda: client.remove(one))
    times["stop_pod"] = timed(lambda: client.stop_pod(pod))
    times["remove_pod"] = timed(lambda: client.remove_pod(pod))
    times["pod_down"] = sum(times[key] for key in DOWN)
    return times


def _exec_true(subject: Subject, one: str) -> None:
    code, _, errors = subject.client.exec_sync(one, ["true"])
    if code != 0:
        raise RuntimeError(f"{subject.name}: exec true exits with {code}: {errors!r}")
