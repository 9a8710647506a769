"""Prometheus metrics of this node: what is asked of it, how long that takes and fails, and what it takes to run.

Imported only where metrics are configured. Refuses labels that a request chooses: an operation is a call of the proto,
a code one of gRPC's, so the number of series is bounded (threats R5). Invariant: counting blocks nobody; what has to
be read from the kernel (memory of the shims) is read when somebody asks, in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from cri.api import api_pb2 as pb
from cri.errors import CallFailed
from cri.intercept import Call
from cri.records import Container, Pod
from cri.version import VERSION
from runtime.linux.files import AT_FDCWD, read_bounded

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PULL_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_ROLLUP_LIMIT = 1 << 16


class Metrics:
    """cri.intercept.Observer, and what is scraped. `pods` and `containers` are the store's own."""

    def __init__(self, pods: Mapping[str, Pod], containers: Mapping[str, Container]) -> None:
        registry = self._registry = CollectorRegistry()
        operation = ("operation",)
        self._calls = Counter("ocid_operations", "CRI calls that have ended", operation, registry=registry)
        self._errors = Counter(
            "ocid_operations_errors", "CRI calls that failed, by gRPC code", ("operation", "code"), registry=registry
        )
        self._seconds = Histogram(
            "ocid_operations_seconds", "Time that CRI calls took", operation, buckets=_SECONDS, registry=registry
        )
        self._under_way = Gauge("ocid_operations_in_progress", "CRI calls under way", operation, registry=registry)
        self._pulls = Counter("ocid_image_pulls", "Image pulls that have ended", ("result",), registry=registry)
        self._pull_seconds = Histogram(
            "ocid_image_pull_seconds", "Time that image pulls took", buckets=_PULL_SECONDS, registry=registry
        )
        self._pulled = Counter("ocid_image_pull_bytes", "Bytes of blobs that pulls had to fetch", registry=registry)
        Gauge("ocid_build_info", "1, with the version", ("version",), registry=registry).labels(VERSION).set(1)
        ProcessCollector(registry=registry)  # process_resident_memory_bytes, process_open_fds …: of this daemon
        GCCollector(registry=registry)
        registry.register(_Node(pods, containers))

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Counts a call, and how it ends."""
        started = time.perf_counter()
        code = ""
        with self._under_way.labels(call.name).track_inprogress():
            try:
                yield
            except CallFailed as error:
                code = error.code.name
                raise
            except (asyncio.CancelledError, GeneratorExit):
                # A stream is over when its reader has had enough.
                code = "" if call.streaming else "CANCELLED"
                raise
            finally:
                took = time.perf_counter() - started
                self._calls.labels(call.name).inc()
                if not call.streaming:
                    self._seconds.labels(call.name).observe(took)
                if code:
                    self._errors.labels(call.name, code).inc()
                if call.name == "PullImage":
                    self._pulls.labels("error" if code else "ok").inc()
                    self._pull_seconds.observe(took)

    def downloaded(self, size: int) -> None:
        """A blob of `size` bytes has come."""
        self._pulled.inc(size)

    def text(self) -> bytes:
        """All of it in Prometheus' text format; reads /proc, so not for the event loop."""
        return generate_latest(self._registry)


class _Node(Collector):
    """What there is now."""

    def __init__(self, pods: Mapping[str, Pod], containers: Mapping[str, Container]) -> None:
        self._pods = pods
        self._containers = containers

    def collect(self) -> Iterable[Metric]:
        pods = list(self._pods.values())
        yield _by_state("ocid_pods", "Pods", Counts("ready" if pod.ready else "notready" for pod in pods))
        states = Counts(
            pb.ContainerState.Name(one.state).removeprefix("CONTAINER_").lower()
            for one in list(self._containers.values())
        )
        yield _by_state("ocid_containers", "Containers", states)
        shims = [pod.pid for pod in pods if pod.ready and pod.pid]
        yield GaugeMetricFamily("ocid_shims", "Shims of pods that are ready", len(shims))
        memory = sum(_proportional(pid) for pid in shims)
        yield GaugeMetricFamily("ocid_shims_memory_bytes", "Memory of all shims, shared pages by share (PSS)", memory)


def _by_state(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, f"{text}, by state", labels=("state",))
    for state, number in sorted(counts.items()):
        family.add_metric((state,), number)
    return family


def _proportional(pid: int) -> int:
    """PSS in bytes; 0 of a process that has gone."""
    try:
        text = read_bounded(AT_FDCWD, f"/proc/{pid}/smaps_rollup", _ROLLUP_LIMIT)
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return 0
