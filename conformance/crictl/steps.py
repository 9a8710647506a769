"""What the steps of the scenario share: the objects made so far, and how a step says that something is not so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conformance.crictl.tool import CheckFailed, Crictl

PAGE_PATH = "/index.html"
TRANSPORTS = ("spdy", "websocket")
WAIT_S = 20.0


@dataclass(slots=True)
class Scenario:
    """`image` is a reference of the busybox image, `transports` are those that the runtime's streams come by,
    `hangs_up` says that a terminal ends with its client, `observes` that all of statistics and events are there; the
    other fields are filled by the steps."""

    crictl: Crictl
    image: str
    directory: Path
    cgroup: str
    pod: str = ""
    container: str = ""
    pid: int = 0
    transports: tuple[str, ...] = TRANSPORTS
    hangs_up: bool = True
    observes: bool = True

    def on_containerd(self) -> None:
        """Debian's is older than the WebSocket protocol that crictl speaks (v5.channel.k8s.io), and leaves a command
        running whose terminal's client has gone. Nor has it metrics, events and RuntimeConfig (1.6, of 2022)."""
        self.transports, self.hangs_up, self.observes = ("spdy",), False, False

    @property
    def pod_file(self) -> Path:
        return self.directory / "pod.json"

    @property
    def container_file(self) -> Path:
        return self.directory / "container.json"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"


def check(condition: object, what: str) -> None:
    if not condition:
        raise CheckFailed(what)


def eventually(probe: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not probe():
        if time.monotonic() > deadline:
            raise CheckFailed(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.02)
