"""containerd's CRI with the real crictl: the scenario of conformance/crictl, then what a pod may ask of a runtime.

The steps of the scenario share what they made; those here make pods of their own, which `tidy` removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance import daemons
from conformance.clients.steps import Surprise, eventually, expect, holds, same
from conformance.crictl import scenario
from conformance.crictl.steps import Scenario
from conformance.crictl.tool import Crictl
from conformance.images import BUSYBOX
from conformance.registry import Registry

# Values of the CRI's enumerations, which crictl reads from JSON as numbers.
RUNTIME_DEFAULT, POD, NODE = 0, 0, 2
HOST = {"security_context": {"namespace_options": {"network": NODE, "pid": NODE, "ipc": NODE}}}


@dataclass(slots=True)
class Cri(Scenario):
    """Adds pods and containers made by one call each."""

    runtime: str = ""
    pods: list[str] = field(default_factory=list)

    def run_pod(self, name: str, **linux: Any) -> str:
        document = {
            "metadata": {"name": name, "namespace": "clients", "uid": name, "attempt": 1},
            # A pod in the host's network namespace has the host's name.
            "hostname": name if linux != HOST else "",
            "log_directory": str(self.logs),
            "linux": {"cgroup_parent": self.cgroup, **linux},
        }
        self.logs.mkdir(exist_ok=True)
        self.spec(name).write_text(json.dumps(document))
        pod = self.crictl.ok("runp", self.spec(name))
        self.pods.append(pod)
        return pod

    def spec(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def start(self, pod: str, pod_name: str, script: str, linux: dict[str, Any], **more: Any) -> str:
        """A container that runs `script`; its id. It is named after its pod."""
        document = {
            "metadata": {"name": "main", "attempt": len(os.listdir(self.logs))},
            "image": {"image": self.image},
            "command": ["sh", "-c", script],
            "log_path": f"{pod_name}-{len(os.listdir(self.logs))}.log",
            "linux": linux,
            **more,
        }
        file = self.directory / f"{pod_name}-container.json"
        file.write_text(json.dumps(document))
        container = self.crictl.ok("create", pod, file, self.spec(pod_name))
        self.crictl.ok("start", container)
        return container

    def ended(self, container: str) -> dict[str, Any]:
        """Its status once it has ended."""
        seen: dict[str, Any] = {}

        def exited() -> bool:
            seen.update(self.crictl.json("inspect", container)["status"])
            return bool(seen["state"] == "CONTAINER_EXITED")

        eventually(exited, f"container {container[:12]} ends")
        return seen

    def printed(self, script: str, pod_name: str, security: dict[str, Any], code: int = 0, **more: Any) -> str:
        """What `script` prints in a pod of its own, under a security context."""
        pod = self.run_pod(pod_name)
        container = self.start(pod, pod_name, script, {"security_context": security, **more})
        status = self.ended(container)
        result = self.crictl.run("logs", container)
        if status["exitCode"] != code:
            raise Surprise(f"{script}: expected exit code {code}, got {status['exitCode']}: {result.stderr}")
        return (result.stdout + result.stderr).strip()

    def tidy(self) -> None:
        for pod in self.pods:
            self.crictl.ok("rmp", "--force", pod)
        self.pods.clear()


def pull_again(it: Cri) -> None:
    """The scenario's last step removed the image."""
    it.crictl.ok("pull", it.image)


def user_and_groups(it: Cri) -> None:
    security = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 50}, "supplemental_groups": [33]}
    same("ids", it.printed("id -u; id -g; id -G", "users", security).split()[:2], ["1000", "50"])


def confinement(it: Cri) -> None:
    show = "awk '/CapEff|NoNewPrivs|^Seccomp:/ {print $2}' /proc/self/status"
    security: dict[str, Any] = {
        "capabilities": {"drop_capabilities": ["ALL"]},
        "no_new_privs": True,
        "seccomp": {"profile_type": RUNTIME_DEFAULT},
        "readonly_rootfs": True,
    }
    same("capabilities, no_new_privs, seccomp", it.printed(show, "bare", security).split(), ["0" * 16, "1", "2"])
    holds("a read-only root", it.printed("touch /x", "readonly", security, code=1), "Read-only file system")
    text = it.printed(
        "cat /proc/timer_list; ls /sys/firmware", "masked", {"masked_paths": ["/proc/timer_list", "/sys/firmware"]}
    )
    same("masked paths", text, "")


def privileged(it: Cri) -> None:
    pod = it.run_pod("mighty", security_context={"privileged": True})
    container = it.start(
        pod, "mighty", "mount -t tmpfs none /tmp && echo mounted", {"security_context": {"privileged": True}}
    )
    same("exit code", it.ended(container)["exitCode"], 0)


def out_of_memory(it: Cri) -> None:
    pod = it.run_pod("hungry")
    limits = {"memory_limit_in_bytes": 20 << 20, "memory_swap_limit_in_bytes": 20 << 20}
    container = it.start(pod, "hungry", "exec tail /dev/zero", {"resources": limits})
    status = it.ended(container)
    same("exit code and reason", (status["exitCode"], status["reason"]), (137, "OOMKilled"))


def update(it: Cri) -> None:
    pod = it.run_pod("grows")
    container = it.start(pod, "grows", "exec sleep 3600", {"resources": {"memory_limit_in_bytes": 20 << 20}})
    it.crictl.ok("update", "--memory", str(64 << 20), container)
    pid = it.crictl.json("inspect", container)["info"]["pid"]
    line = next(
        x for x in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if ":memory:" in x or x.startswith("0::")
    )
    path = line.split(":", 2)[2]
    files = [f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes", f"/sys/fs/cgroup{path}/memory.max"]
    values = [int(Path(file).read_text()) for file in files if os.path.exists(file)]
    same("the limit after update", values, [64 << 20])


def shared_pid_namespace(it: Cri) -> None:
    namespaces = {"namespace_options": {"pid": POD}}
    pod = it.run_pod("shared", security_context=namespaces)
    first = it.start(pod, "shared", "exec sleep 3600", {"security_context": namespaces})
    second = it.start(pod, "shared", "ps -o args; exec sleep 3600", {"security_context": namespaces})
    eventually(lambda: "sleep 3600" in it.crictl.ok("logs", second), "one container sees the other's process")
    holds("exec sees both", it.crictl.ok("exec", "-s", first, "ps", "-o", "comm"), "sleep")


def host_namespaces(it: Cri) -> None:
    pod = it.run_pod("host", **HOST)
    container = it.start(pod, "host", "exec sleep 3600", HOST)
    pid = it.crictl.json("inspect", container)["info"]["pid"]
    for kind in ("net", "pid", "ipc"):
        same(f"the {kind} namespace", os.readlink(f"/proc/{pid}/ns/{kind}"), os.readlink(f"/proc/self/ns/{kind}"))


def mounts_and_devices(it: Cri) -> None:
    folder = it.directory / "volume"
    folder.mkdir(exist_ok=True)
    pod = it.run_pod("volumes")
    more = {
        "mounts": [
            {"container_path": "/data", "host_path": str(folder)},
            {"container_path": "/fixed", "host_path": str(folder), "readonly": True},
        ],
        "devices": [{"container_path": "/dev/held", "host_path": "/dev/fuse", "permissions": "r"}],
    }
    script = "echo written > /data/file; touch /fixed/x; : < /dev/held && echo readable; : > /dev/held"
    container = it.start(pod, "volumes", script, {}, **more)
    it.ended(container)
    result = it.crictl.run("logs", container)
    same("on the host", (folder / "file").read_text(), "written\n")
    same("the device, read", result.stdout, "readable\n")
    holds("what is refused", result.stderr, "Read-only file system", "not permitted")


def exec_and_stop(it: Cri) -> None:
    pod = it.run_pod("busy")
    container = it.start(pod, "busy", "trap 'exit 4' TERM; while :; do sleep 0.1; done", {})
    holds("a time limit", it.crictl.fails("exec", "-s", "--timeout", "1", container, "sleep", "3600"), "imeout")
    text = it.crictl.ok("exec", "-s", container, "ps", "-o", "args")
    expect("sleep 3600" not in text, f"what ran out of time runs on: {text}")
    it.crictl.ok("stop", "--timeout", "10", container)
    same("exit code after stop", it.ended(container)["exitCode"], 4)


STEPS: tuple[Callable[[Cri], None], ...] = (
    *scenario.STEPS,
    pull_again,
    user_and_groups,
    confinement,
    privileged,
    out_of_memory,
    update,
    shared_pid_namespace,
    host_namespaces,
    mounts_and_devices,
    exec_and_stop,
)


@contextmanager
def cri(runtime: str, directory: Path, images: Registry, crictl: Path) -> Iterator[Cri]:
    """A containerd of its own whose pods run with `runtime`."""
    cgroup = f"cri-{directory.parent.name}"
    config = directory / "crictl.yaml"
    config.write_text("")
    binary = daemons.command_path("ocirun") if runtime == "ocirun" else runtime
    try:
        with daemons.containerd(directory, images.address, runtime=binary) as daemon:
            tool = Crictl(crictl, daemon.socket, config)
            it = Cri(tool, images.reference(BUSYBOX), directory, f"/{cgroup}", runtime=runtime)
            it.on_containerd()
            tool.ok("pull", it.image)
            yield it
    finally:
        daemons.remove_cgroup(cgroup)
