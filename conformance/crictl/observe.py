"""What crictl shows of use, limits and events: statsp, metricsp, metricdescs, runtime-config, update, events."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.crictl.steps import WAIT_S, Scenario, check, eventually

LIFE = [f"CONTAINER_{what}_EVENT" for what in ("CREATED", "STARTED", "STOPPED", "DELETED")]
LIMIT = 48 << 20


def statsp(it: Scenario) -> None:
    (shown,) = it.crictl.json("statsp", "--id", it.pod, "-o", "json")["stats"]
    linux = shown["linux"]
    used = int(linux["memory"]["workingSetBytes"]["value"])
    check(0 < used < 64 << 20, f"statsp shows {used} bytes in use")
    check([one["attributes"]["id"] for one in linux["containers"]] == [it.container], f"statsp shows {linux}")
    carried = linux["network"]["defaultInterface"]
    check(carried["name"] == "eth0" and int(carried["rxBytes"]["value"]) > 0, f"statsp shows {carried}")
    check(it.pod[:12] in it.crictl.ok("statsp"), "the table of statsp does not show the pod")


def metricsp(it: Scenario) -> None:
    if not it.observes:
        return
    described = {one["name"] for one in it.crictl.json("metricdescs")["descriptors"]}
    (shown,) = it.crictl.json("metricsp")["podMetrics"]
    check(shown["podSandboxId"] == it.pod, f"metricsp shows {shown['podSandboxId']}")
    (container,) = shown["containerMetrics"]
    names = {one["name"] for one in (*shown["metrics"], *container["metrics"])}
    check(names <= described, f"not described: {names - described}")
    wanted = {"container_cpu_usage_seconds_total", "container_memory_working_set_bytes"}
    wanted.add("container_network_receive_bytes_total")
    check(wanted <= names, f"metricsp lacks {wanted - names}")


def runtime_config(it: Scenario) -> None:
    if not it.observes:
        return
    text = it.crictl.ok("runtime-config")
    check("CGROUPFS" in text, f"runtime-config says {text!r}")


def update(it: Scenario) -> None:
    it.crictl.ok("update", "--memory", LIMIT, "--cpu-share", 512, it.container)
    shown = it.crictl.json("inspect", it.container)["status"]["resources"]["linux"]
    check(int(shown["memoryLimitInBytes"]) == LIMIT, f"inspect shows {shown} after update")
    for line in Path(f"/proc/{it.pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            force = Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
            break
    else:
        force = Path(f"/sys/fs/cgroup{path}/memory.max")
    check(force.read_text().strip() == str(LIMIT), f"{force} holds {force.read_text()!r} after update")


def events(it: Scenario) -> None:
    """A short life after the other until crictl, which says nothing when it is connected, has told of a whole one."""
    if not it.observes:
        return
    file = it.directory / "events.json"
    config = json.loads(it.container_file.read_text())
    with open(file, "wb") as output:
        process = subprocess.Popen(it.crictl.command("events", "-o", "json"), stdout=output, stdin=subprocess.DEVNULL)
    lives: list[str] = []

    def told() -> bool:
        config["metadata"]["name"] = f"brief{len(lives)}"
        (it.directory / "brief.json").write_text(json.dumps({**config, "command": ["true"], "log_path": ""}))
        one = it.crictl.ok("create", it.pod, it.directory / "brief.json", it.pod_file)
        lives.append(one)
        it.crictl.ok("start", one)
        it.crictl.ok("stop", "--timeout", "0", one)
        it.crictl.ok("rm", one)
        return one in _told(file)

    try:
        eventually(told, "events tells of a container")
        one = lives[-1]
        eventually(lambda: len(_told(file).get(one, ())) == len(LIFE), f"events tells all of {one[:13]}")
        found = _told(file)[one]
        check(found == LIFE, f"events shows {found}")
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _told(file: Path) -> dict[str, list[Any]]:
    """The kinds of events by container, in the order of the lines."""
    found: dict[str, list[Any]] = {}
    decoder, text = json.JSONDecoder(), file.read_text().lstrip()
    while text:
        try:
            event, end = decoder.raw_decode(text)
        except ValueError:
            break  # the last one is still being written
        found.setdefault(event["containerId"], []).append(event["containerEventType"])
        text = text[end:].lstrip()
    return found


STEPS: tuple[Callable[[Scenario], None], ...] = (statsp, metricsp, runtime_config, update, events)
