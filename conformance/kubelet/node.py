"""A node: ocid, a kubelet that drives it, and the network between them, all below one directory.

    BASE/ocid/        root, state, network lists, leases, log of ocid
    BASE/kubelet/     the kubelet's root directory        BASE/logs/   logs of pods
    BASE/manifests/   static pods: one file, one pod      BASE/out/    what containers show, mounted as /out in them

The kubelet is configured as on any node, with intervals short enough to be waited for, and on statistics from the CRI
(PodAndContainerStatsFromCRI), so that all it knows of pods it has from ocid. Needs namespaces of its own
(conformance.isolated): ports and addresses are fixed. cgroups, which have no namespace here, are below one of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from conformance.clients.steps import Surprise, eventually
from conformance.cri_client import Cri
from conformance.daemons import ocid_command, remove_cgroup, retire
from conformance.kubelet.kubectl import Kubectl
from conformance.kubelet.log_scan import Absence
from conformance.kubelet.pods import Document, with_out
from conformance.kubelet.service import Service
from conformance.leaks import CGROUPS

NAME = "node0"
ADDRESS = "10.250.0.1"
API, READ_ONLY, HEALTH = 10250, 10255, 10248
BRIDGE = "pods0"
GATES = {"PodAndContainerStatsFromCRI": True, "ContainerStopSignals": True}
POD_WAIT_S = 60.0
# A kubelet connects again after a pause, and then tells what became of the calls before.
AWAY = timedelta(seconds=10)
# What a kubelet writes on every node, whatever its root directory is (kubelet: setupKernelTunables).
TUNABLES = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
# Where it puts files, whatever its root directory is: the sockets of device plugins, links to logs.
FIXED = (Path("/var/lib/kubelet"), Path("/var/log/containers"))
KEY_TUNABLES = ("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes")


@dataclass(slots=True)
class Node:
    """`images` are references by name; `cgroup` is what all that the kubelet makes is below, "/" the machine's root;
    `changes` replaces top-level keys of the kubelet's configuration, `more` is added to that of ocid."""

    base: Path
    kubelet_binary: Path
    images: dict[str, str]
    cgroup: str
    changes: Document = field(default_factory=dict)
    more: str = ""
    kubectl: Kubectl | None = None
    ocid: Service = field(init=False)
    kubelet: Service = field(init=False)
    socket: Path = field(init=False)
    tunables: dict[str, str] = field(init=False, default_factory=dict)
    made: list[Path] = field(init=False, default_factory=list)
    absences: list[Absence] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for name in ("ocid", "manifests", "out", "logs", "plugins"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        (self.base / "resolv.conf").write_text("nameserver 192.0.2.1\n")
        command, self.socket = ocid_command(
            self.base / "ocid",
            "10.201.0.0/16",
            BRIDGE,
            handlers={"runc": shutil.which("runc") or "/usr/sbin/runc"},
            more=f'[checkpoint]\nenabled = true\ncriu = "{self.base}/criu"\n{self.more}',  # a step puts one there
        )
        self.ocid = Service("ocid", command, self.base / "ocid.log", self._serves)
        words = [str(self.kubelet_binary), f"--config={self.base}/kubelet.json", f"--root-dir={self.base}/kubelet"]
        words += [f"--cert-dir={self.base}/kubelet-certificates", f"--hostname-override={NAME}"]
        words.append(f"--node-ip={ADDRESS}")
        self.kubelet = Service("kubelet", words, self.base / "kubelet.log", self._healthy)

    # Its life

    def up(self) -> None:
        for name in (*TUNABLES, *KEY_TUNABLES):
            self.tunables[name] = Path("/proc/sys", name).read_text().strip()
        for directory in FIXED:
            if not directory.exists():
                directory.mkdir()
                self.made.append(directory)
            subprocess.run(["mount", "-t", "tmpfs", "fixed", directory], check=True)
        # A kubelet asks for an address of its node and a way out of it. (Not every kernel has links of type dummy.)
        subprocess.run(["ip", "link", "add", NAME, "type", "bridge"], check=True)
        subprocess.run(["ip", "address", "add", f"{ADDRESS}/24", "dev", NAME], check=True)
        subprocess.run(["ip", "link", "set", NAME, "up"], check=True)
        subprocess.run(["ip", "route", "add", "default", "via", "10.250.0.254"], check=True)
        for top in hierarchies():
            (top / self.cgroup.strip("/")).mkdir(exist_ok=True)
        self.ocid.start()
        self.configure()
        self.kubelet.start()

    def join(self, kubectl: Kubectl) -> None:
        """The kubelet starts anew as a member of a cluster, and with events. (Not before: its EventedPLEG, which is
        alpha, leaves ActiveContainerStatuses empty when a runtime answers what it asks for, and then runs init
        containers again and again.)"""
        self.kubectl = kubectl
        self.kubelet.stop()
        self.configure(featureGates=GATES | {"EventedPLEG": True})
        self.kubelet.command.append(f"--kubeconfig={kubectl.kubeconfig}")
        self.kubelet.start()

    def member(self) -> Kubectl:
        """kubectl of the cluster that the node is a member of."""
        assert self.kubectl is not None, "this is for a node of a cluster"
        return self.kubectl

    def configure(self, **changes: Any) -> None:
        """Writes the kubelet's configuration; it is read at its next start."""
        self.changes.update(changes)
        (self.base / "kubelet.json").write_text(json.dumps(self.configuration() | self.changes, indent=1))

    def configuration(self) -> Document:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "staticPodPath": str(self.base / "manifests"),
            "podLogsDir": str(self.base / "logs"),
            "volumePluginDir": str(self.base / "plugins"),
            "resolvConf": str(self.base / "resolv.conf"),
            "cgroupRoot": self.cgroup,
            "failCgroupV1": False,  # the machine may have no other
            "failSwapOn": False,
            "maxOpenFiles": resource.getrlimit(resource.RLIMIT_NOFILE)[1],  # more takes CAP_SYS_RESOURCE
            "oomScoreAdj": int(Path("/proc/self/oom_score_adj").read_text()),  # so does less
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "readOnlyPort": READ_ONLY,
            "seccompDefault": True,
            "serializeImagePulls": False,
            "containerLogMaxSize": "20Ki",
            "containerLogMaxFiles": 8,
            "containerLogMonitorInterval": "3s",
            "crashLoopBackOff": {"maxContainerRestartPeriod": "2s"},
            "syncFrequency": "5s",
            "fileCheckFrequency": "5s",
            "volumeStatsAggPeriod": "5s",
            "evictionHard": {"memory.available": "1Mi"},
            "registryPullQPS": 0,  # without a limit: all pods come at once
            "featureGates": GATES,
        }

    def down(self) -> None:
        """Ends everything, whatever state it is in; what a node leaves to its reboot is taken away here."""
        self.kubelet.stop()
        if self.ocid.process:
            with Cri(self.socket) as client:
                client.clear()
        self.ocid.stop()
        retire(self.socket.parent)
        # The kubelet makes its root directory a mount of its own, for mounts to be shared through it.
        subprocess.run(["umount", self.base / "kubelet"], capture_output=True, check=False)
        for directory in FIXED:
            subprocess.run(["umount", directory], capture_output=True, check=False)
        for directory in self.made:
            directory.rmdir()
        if self.cgroup != "/":
            remove_cgroup(self.cgroup.strip("/"))
        for link in (NAME, BRIDGE):
            subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
        for name, value in self.tunables.items():
            Path("/proc/sys", name).write_text(value)

    def _serves(self) -> bool:
        if not self.socket.exists():
            return False
        with Cri(self.socket) as client, contextlib.suppress(Exception):
            return all(client.conditions().values())
        return False

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            for port in (HEALTH, READ_ONLY):  # its servers come one after the other
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return self.call("/healthz") == "ok"
        return False

    @contextlib.contextmanager
    def ocid_away(self) -> Iterator[None]:
        """Notes for the reading of the log that ocid does not answer in this block, nor at once after it."""
        since = datetime.now()
        try:
            yield
        finally:
            self.absences.append(Absence(since, datetime.now() + AWAY))

    # What it is asked to run

    def apply(self, document: Document) -> None:
        """A static pod, new or changed; or, once there is an API server, a pod that names its node, or what it must
        have before it gets one."""
        document = with_out(document, str(self.base / "out"))
        if self.kubectl and ("nodeName" in document["spec"] or "resourceClaims" in document["spec"]):
            self.kubectl.apply(document)
            return
        # Renamed into place: the kubelet reads what is there.
        name = document["metadata"]["name"]
        fresh = self.base / f".{name}.json"
        fresh.write_text(json.dumps(document, indent=1))
        os.rename(fresh, self.base / "manifests" / f"{name}.json")

    def withdraw(self, name: str) -> None:
        manifest = self.base / "manifests" / f"{name}.json"
        if self.kubectl and not manifest.exists():
            self.kubectl.ok("delete", "pod", name, "--ignore-not-found", "--wait=false")
        manifest.unlink(missing_ok=True)

    # What it says

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{READ_ONLY}{path}", timeout=20) as reply:
            return json.load(reply)

    def metric(self, name: str) -> float:
        """Of the kubelet's own metrics, without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{READ_ONLY}/metrics", timeout=20) as reply:
            lines = reply.read().decode().splitlines()
        return float(next((line.split()[1] for line in lines if line.startswith(f"{name} ")), 0))

    def call(self, path: str, method: str = "GET") -> str:
        """The kubelet's own API, as an API server uses it."""
        request = urllib.request.Request(f"https://127.0.0.1:{API}{path}", method=method)
        context = ssl._create_unverified_context()  # noqa: S323  it signs its certificate itself
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            raise Surprise(f"{method} {path}: {error.code} {error.read().decode()[:300]}") from error

    def pod(self, name: str) -> Document:
        """The pod as the kubelet tells it; {} when it has none of that name."""
        for item in self.get("/pods")["items"] or []:
            if item["metadata"]["name"] in _names(name):
                return dict(item)
        return {}

    def status(self, name: str, container: str = "") -> Document:
        """The status of the pod, or of one container of it; {} while there is none."""
        whole = self.pod(name).get("status", {})
        if not container:
            return dict(whole)
        for one in whole.get("containerStatuses", []) + whole.get("initContainerStatuses", []):
            if one["name"] == container:
                return dict(one)
        return {}

    def ready(self, name: str) -> bool:
        conditions = {one["type"]: one["status"] for one in self.status(name).get("conditions", [])}
        return conditions.get("Ready") == "True"

    def until_ready(self, name: str) -> Document:
        eventually(lambda: self.ready(name), f"pod {name} is ready", POD_WAIT_S)
        return self.status(name)

    def until_gone(self, name: str) -> None:
        """The kubelet has forgotten the pod, and ocid runs nothing of it."""
        eventually(lambda: not self.pod(name), f"the kubelet has no pod {name}", POD_WAIT_S)
        eventually(lambda: not self.running(name), f"nothing of pod {name} runs", POD_WAIT_S)

    # What the runtime and the machine say

    def running(self, name: str) -> dict[str, str]:
        """The ids of the pod's running containers by their names, as ocid lists them."""
        with Cri(self.socket) as client:
            return {
                one.metadata.name: one.id
                for one in client.list_containers()
                if one.labels["io.kubernetes.pod.name"] in _names(name) and one.state == 1
            }

    def pid(self, container_id: str) -> int:
        with Cri(self.socket) as client:
            return int(client.info(container_id)["pid"])

    def inside(self, name: str, container: str, script: str) -> str:
        """What a shell in the container prints."""
        with Cri(self.socket) as client:
            code, output, errors = client.exec_sync(self.running(name)[container], ["sh", "-c", script])
        if code != 0:
            raise Surprise(f"{script!r} in {name}/{container} exits {code}: {output!r} {errors!r}")
        return output.decode()

    def out(self, file: str) -> str:
        """What a container wrote to /out/FILE; "" while there is none."""
        with contextlib.suppress(OSError):
            return (self.base / "out" / file).read_text()
        return ""

    def cgroups(self) -> list[Path]:
        """Every cgroup of a pod."""
        below = f"{self.cgroup.strip('/')}/kubepods"
        walked = [
            entry for top in hierarchies() for entry in os.walk(top / below)
        ]  # which knows that some go meanwhile
        return [Path(directory, name) for directory, names, _ in walked for name in names if name.startswith("pod")]

    def cgroup_of(self, document: Document, controller: str) -> Path:
        """The pod's cgroup, where a kubelet puts it by its quality of service."""
        quality = document["status"]["qosClass"].lower()
        middle = "" if quality == "guaranteed" else f"/{quality}"
        return CGROUPS / controller / f"{self.cgroup.strip('/')}/kubepods{middle}/pod{document['metadata']['uid']}"


def _names(name: str) -> tuple[str, str]:
    """A kubelet adds its node's name to that of a static pod."""
    return name, f"{name}-{NAME}"


def hierarchies() -> list[Path]:
    """Every mount of cgroups of this machine."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if " cgroup" in line]
    return [Path(point) for point in points if point.startswith(str(CGROUPS))]
