"""A node as most nodes are: the daemon is a service of systemd's, containers are scopes in the slices that a kubelet
makes for its pods, and criu is the real one.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conformance.cri_client import connected, container
from conformance.leaks import Machine
from cri.api import api_pb2 as pb
from tests.e2e import STOP_S, Node, busybox_layout, messages, retired
from tests.support import eventually
from tests.vm.units import CGROUPS, known_units, shown, systemctl

MIB = 1 << 20
COUNT = "touch /written; i=0; while :; do i=$((i+1)); echo $i; usleep 50000; done"
PARENTS = ("kubepods.slice", "kubepods-burstable.slice")


class Service(Node):
    """A node whose daemon is a unit."""

    @property
    def unit(self) -> str:
        return f"{self.tag}.service"

    def start(self, *, umask: int = -1) -> None:
        output = f"--property=StandardError=append:{self.log}"
        words = ["systemd-run", "--quiet", "--collect", f"--unit={self.unit}", output, *self.words, "serve"]
        subprocess.run(words, check=True, timeout=STOP_S)
        eventually(self._answers, what=f"{self.unit} to serve")
        self._client = self._stack.enter_context(connected(self.socket))

    def held(self) -> frozenset[str]:
        """Without the daemon, which is another process after each start."""
        daemon = shown(self.unit, "MainPID")["MainPID"]
        return frozenset(thing for thing in super().held() if not thing.startswith(f"process {daemon} "))

    def end(self, number: int = signal.SIGTERM) -> None:
        """By a signal to everybody in the unit's cgroup."""
        self._stack.close()
        self._client = None
        systemctl("kill", f"--signal={number}", self.unit, check=False)
        systemctl("stop", self.unit, check=False)


@dataclass(frozen=True)
class Running:
    """A pod with a container, in a slice of the pod's own."""

    pod: str
    one: str
    slice: str

    @property
    def unit(self) -> str:
        return f"ocid-{self.one}.scope"

    @property
    def place(self) -> Path:
        return CGROUPS.joinpath(*PARENTS, self.slice, self.unit)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    before = Machine.now()
    directory = tmp_path_factory.mktemp("n")
    made = Service(directory, runtime='cgroup_driver = "systemd"', limits="[checkpoint]\nenabled = true")
    try:
        made.start()
        words = [*made.words, "load", "-q", "-i", str(busybox_layout())]
        loaded = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        made.image = loaded.stdout.decode().split()[0]
        # One pod before anything is counted: bridge, zygote and the cached seccomp program stay.
        made.drop(made.run(made.image, ["true"], network=True)[0])
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            made.client.clear()
        made.end()
        retired(made, before)
        print(made.log.read_text()[-4000:])
        systemctl("stop", PARENTS[0], f"{made.tag}.slice", check=False)
    assert known_units("ocid-*.scope") == []


@pytest.fixture(scope="module")
def running(node: Service) -> Iterator[Running]:
    """As a kubelet runs it; and once it is gone, all of it is."""
    before = node.held()
    config = node.pod_config(network=True)
    own = f"kubepods-burstable-pod{config.metadata.uid.replace('-', '_')}.slice"
    for name in (*PARENTS, own):
        _make_slice(name)
    config.linux.cgroup_parent = "/".join(("", *PARENTS, own))
    pod = node.client.run_pod(config)
    one = container("main", node.image, ["sh", "-c", COUNT])
    limits = pb.LinuxContainerResources(
        memory_limit_in_bytes=64 * MIB, cpu_shares=512, cpu_quota=25_000, cpu_period=100_000
    )
    one.linux.resources.CopyFrom(limits)
    made = Running(pod, node.client.create(pod, one, config), own)
    node.client.start(made.one)
    yield made
    node.client.stop(made.one)
    assert known_units(made.unit) == [] and not made.place.exists()
    assert node.client.status(made.one).exit_code == 137
    node.client.remove(made.one)
    node.drop(pod)
    # The slices are whoever's made them.
    assert [path for path in made.place.parent.iterdir() if path.is_dir()] == []
    assert shown(own, "ActiveState") == {"ActiveState": "active"}
    systemctl("stop", PARENTS[0])
    node.settles(before | {f"file {node.root}/checkpoints"})


def _make_slice(name: str) -> None:
    """As kubelets do: a transient unit, which systemd puts below the slices that its name tells of."""
    manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    properties = ("2", "MemoryAccounting", "b", "true", "DefaultDependencies", "b", "false")
    call = ("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "replace", *properties, "0")
    subprocess.run(["busctl", "call", *manager, *call], check=True, stdout=subprocess.DEVNULL, timeout=STOP_S)
    eventually(lambda: shown(name, "ActiveState")["ActiveState"] == "active", what=f"{name} to be there")


def _pid(node: Service, one: str) -> int:
    return int(node.client.info(one)["pid"])


def _files(place: Path, *names: str) -> list[str]:
    return [(place / name).read_text().strip() for name in names]


def test_a_container_is_a_scope_in_its_pods_slice(node: Service, running: Running) -> None:
    pid = _pid(node, running.one)
    assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/{running.place.relative_to(CGROUPS)}\n"
    told = shown(running.unit, "ActiveState", "Slice", "MemoryMax", "CPUQuotaPerSecUSec", "CPUWeight")
    wanted = {"MemoryMax": str(64 * MIB), "CPUQuotaPerSecUSec": "250ms", "CPUWeight": "59"}
    assert told == {"ActiveState": "active", "Slice": running.slice, **wanted}
    assert _files(running.place, "memory.max", "cpu.max", "cpu.weight") == [str(64 * MIB), "25000 100000", "59"]
    node.goes_on(running.one)
    assert node.client.stats(running.one).memory.working_set_bytes.value > 0


def test_the_kubelet_is_told_of_the_driver(node: Service) -> None:
    answer = node.client.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=STOP_S)
    assert answer.linux.cgroup_driver == pb.SYSTEMD


def test_new_limits_of_a_container_are_systemds_too(node: Service, running: Running) -> None:
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=50_000, cpu_period=100_000)
    request = pb.UpdateContainerResourcesRequest(container_id=running.one, linux=limits)
    try:
        node.client.runtime.UpdateContainerResources(request, timeout=STOP_S)
        systemctl("daemon-reload")
        assert _files(running.place, "memory.max", "cpu.max") == [str(96 * MIB), "50000 100000"]
        assert shown(running.unit, "MemoryMax") == {"MemoryMax": str(96 * MIB)}
    finally:
        request.linux.CopyFrom(pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_quota=25_000))
        node.client.runtime.UpdateContainerResources(request, timeout=STOP_S)


def test_new_limits_of_a_pod_are_systemds_too(node: Service, running: Running) -> None:
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=256 * MIB)
    request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=running.pod, resources=limits)
    node.client.runtime.UpdatePodSandboxResources(request, timeout=STOP_S)
    assert _files(running.place.parent, "memory.max") == [str(256 * MIB)]
    # As everything does that makes a unit known to it.
    systemctl("daemon-reload")
    assert _files(running.place.parent, "memory.max") == [str(256 * MIB)]
    assert shown(running.slice, "MemoryMax") == {"MemoryMax": str(256 * MIB)}


def test_a_service_that_is_killed_takes_no_pod_with_it(node: Service, running: Running) -> None:
    pid = _pid(node, running.one)
    node.end(signal.SIGKILL)
    node.start()
    assert [(pod.id, pod.state) for pod in node.client.list_pods()] == [(running.pod, pb.SANDBOX_READY)]
    assert _pid(node, running.one) == pid
    node.goes_on(running.one)


def test_a_pod_that_names_no_parent_is_in_the_nodes_slice(node: Service) -> None:
    pod, one, _ = node.run(node.image, ["sleep", "1000"])
    assert shown(f"ocid-{one}.scope", "ActiveState", "Slice") == {"ActiveState": "active", "Slice": f"{node.tag}.slice"}
    node.drop(pod)
    assert known_units(f"ocid-{one}.scope") == []


def test_a_container_and_its_pod_are_dumped_by_the_real_criu_and_run_on(
    node: Service, running: Running, tmp_path: Path
) -> None:
    request = pb.CheckpointContainerRequest(container_id=running.one, location=str(tmp_path / "c.tar"), timeout=120)
    node.client.runtime.CheckpointContainer(request, timeout=120)
    node.goes_on(running.one)
    whole = pb.CheckpointPodRequest(
        pod_sandbox_id=running.pod, output_path=str(tmp_path / "p.tar"), container_ids=[running.one]
    )
    node.client.runtime.CheckpointPod(whole, timeout=120)
    node.goes_on(running.one)
    for file, prefix in (("c.tar", ""), ("p.tar", "containers/main/")):
        with tarfile.open(tmp_path / file) as archive:
            names = archive.getnames()
            assert any(name.startswith(f"{prefix}checkpoint/pages-") for name in names), names
            assert _json(archive, f"{prefix}config.dump")["id"] == running.one
            with tarfile.open(fileobj=io.BytesIO(_read(archive, f"{prefix}rootfs-diff.tar"))) as layer:
                assert "written" in layer.getnames()
    assert list((node.root / "checkpoints").glob("*")) == []
    lines = [int(line) for line in messages(Path(node.client.status(running.one).log_path))]
    assert lines == list(range(1, len(lines) + 1)), "it counted anew, or lost a line"


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _json(archive: tarfile.TarFile, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(_read(archive, name))
    return found
