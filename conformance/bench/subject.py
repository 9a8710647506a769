"""A runtime under measurement: its daemon, a client, and names for what is made in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from conformance.cri_client import Cri, Names
from conformance.daemons import Daemon, all_pids, pss_bytes

MIB = 1 << 20
_STANDS_STILL_S = 3.0  # garbage collectors, caches; ours: runtime.shim.rest


@dataclass(slots=True)
class Subject:
    """`values` collects the results by metric key, `notes` what explains them; `daemon_pids` are the processes it has
    while idle."""

    daemon: Daemon
    client: Cri
    names: Names
    image: str
    daemon_pids: frozenset[int]
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.daemon.name

    def daemon_pss(self) -> float:
        return sum(map(pss_bytes, self.daemon_pids)) / MIB


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that `call` takes."""
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def median(values: list[float]) -> float:
    return statistics.median(values)


def settled_pss(pids: Callable[[], frozenset[int]], seconds: float = 15.0) -> float:
    """The MiB of these processes once it has stood still for as long as the most patient of them waits for quiet
    before it gives memory back."""
    deadline = time.monotonic() + seconds
    last, since = -1.0, time.monotonic()
    while True:
        now = sum(map(pss_bytes, pids())) / MIB
        if abs(now - last) >= 0.05:
            last, since = now, time.monotonic()
        if time.monotonic() - since > _STANDS_STILL_S or time.monotonic() > deadline:
            return now
        time.sleep(0.5)


def new_since(before: frozenset[int]) -> frozenset[int]:
    return all_pids() - before
