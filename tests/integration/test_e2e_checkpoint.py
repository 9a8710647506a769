"""Checkpoints over the CRI with a criu that only pretends (tests/fakes/criu.py): what stands still meanwhile, what
becomes of a pod when criu fails or the daemon is killed, what the archive holds. The real criu is in tests/vm.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from conformance.cri_client import container
from cri.api import api_pb2 as pb
from runtime.linux.process import process_state
from tests.e2e import Node, named_log, node, stocked
from tests.support import SOON_S, eventually, needs

CLONE = Path(__file__).parents[2]
COUNT = "touch /written; i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"


class Criu:
    """The program, which looks at the pod's freezers before it does what its plan says."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.program = directory / "criu"
        self._states = directory / "states"
        self.plan("ok")

    def watch(self, tag: str) -> None:
        look = f"for f in $(find /sys/fs/cgroup/freezer/{tag} -name freezer.state); do cat $f; done >> {self._states}"
        run = f'cd {CLONE} && exec {sys.executable} -m tests.fakes.criu {self.directory} "$@"'
        self.program.write_text(f"#!/bin/sh\n{look}\n{run}\n")
        self.program.chmod(0o755)

    def plan(self, what: str) -> None:
        (self.directory / "plan").write_text(what)

    @contextlib.contextmanager
    def planned(self, what: str) -> Iterator[None]:
        for name in ("pids", "let-go"):
            (self.directory / name).unlink(missing_ok=True)
        self.plan(what)
        try:
            yield
        finally:
            self.plan("ok")

    def alive(self) -> list[int]:
        """Who runs of a criu that hangs, and of what it has started."""
        with contextlib.suppress(FileNotFoundError):
            pids = map(int, (self.directory / "pids").read_text().split())
            return [pid for pid in pids if Path(f"/proc/{pid}").exists() and process_state(pid) != "Z"]
        return []

    def states(self) -> list[str]:
        """Of every freezer of the pod, each time that criu ran."""
        return self._states.read_text().split() if self._states.exists() else []


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Criu]]:
    needs("root", "overlay", "busybox", "cgroup1")
    directory = tmp_path_factory.mktemp("n")
    criu = Criu(tmp_path_factory.mktemp("c") / "criu")
    section = f'[checkpoint]\nenabled = true\ncriu = "{criu.program}"\n'
    with stocked() as registry, node(directory, limits=section) as made:
        criu.watch(made.tag)
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        pod, ids = _pod(made)
        _checkpoint(made, pod, ids, directory / "first.tar")  # makes the directory for those to come, which stays
        made.drop(pod)
        yield made, criu


def _pod(node: Node) -> tuple[str, list[str]]:
    config = node.pod_config()
    pod = node.client.run_pod(config)
    ids = []
    for name in ("one", "two"):
        ids.append(node.client.create(pod, container(name, node.image, ["sh", "-c", COUNT]), config))
        node.client.start(ids[-1])
    return pod, ids


def _checkpoint(node: Node, pod: str, ids: list[str], target: Path) -> None:
    request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(target), container_ids=ids)
    node.client.runtime.CheckpointPod(request, timeout=60)


def test_a_pod_is_dumped_while_all_of_it_stands_still_and_runs_on(bench: tuple[Node, Criu], tmp_path: Path) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    node.goes_on(ids[0])
    before = len(criu.states())
    _checkpoint(node, pod, ids, tmp_path / "pod.tar")
    frozen = [state for state in criu.states()[before:] if state == "FROZEN"]
    assert len(frozen) == 4, "two freezers, looked at for each of two dumps"
    for one in ids:
        node.goes_on(one)
    options = json.loads((criu.directory / "options").read_text())
    # By criu's images/rpc.proto: it leaves them running, whatever connections and file locks they have.
    assert [options[number] for number in "358"] == [1, 1, 1]
    with tarfile.open(tmp_path / "pod.tar") as archive:
        about = json.load(archive.extractfile("pod.dump"))  # type: ignore[arg-type]
        assert about["containers"] == dict(zip(("one", "two"), ids, strict=True))
        raw = archive.extractfile("containers/one/rootfs-diff.tar")
        assert raw is not None
        with tarfile.open(fileobj=io.BytesIO(raw.read())) as layer:
            assert "written" in layer.getnames()
        spec = json.load(archive.extractfile("containers/two/spec.dump"))  # type: ignore[arg-type]
        assert spec["process"]["args"] == ["sh", "-c", COUNT]
    node.drop(pod)


def test_when_criu_fails_everybody_goes_on_and_the_caller_hears_why(bench: tuple[Node, Criu], tmp_path: Path) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    with criu.planned("fail"), pytest.raises(grpc.RpcError) as caught:
        _checkpoint(node, pod, ids, tmp_path / "pod.tar")
    said = str(caught.value.details())  # type: ignore[attr-defined]
    assert "criu failed: type DUMP errno 22: first: cause" in said
    assert "first: cause" in named_log(said).read_text()
    assert list(tmp_path.iterdir()) == [] and not list((node.root / "checkpoints").glob("*"))
    for one in ids:
        node.goes_on(one)
    node.drop(pod)


def test_one_that_waits_to_be_started_again_is_refused_and_started_again(
    bench: tuple[Node, Criu], tmp_path: Path
) -> None:
    node, _ = bench
    config = node.pod_config()
    pod = node.client.run_pod(config)
    wanted = container("again", node.image, ["sh", "-c", "exit 1"])
    wanted.annotations["ocid.restart"] = "always"
    one = node.client.create(pod, wanted, config)
    node.client.start(one)

    def waits() -> bool:
        told = node.client.info(one)
        return told["restarts"] >= 4 and not told["pid"]  # for almost two seconds

    eventually(waits, what="a longer pause")
    request = pb.CheckpointContainerRequest(container_id=one, location=str(tmp_path / "c.tar"), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        node.client.runtime.CheckpointContainer(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "is to be started again" in str(caught.value.details())
    assert list(tmp_path.iterdir()) == list((node.state / "pods" / pod).glob("paused")) == []
    eventually(lambda: node.client.info(one)["restarts"] > 4, what="the next run")
    node.drop(pod)


def test_without_criu_it_says_what_to_install(bench: tuple[Node, Criu], tmp_path: Path) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    hidden = criu.program.rename(criu.program.with_name("elsewhere"))
    try:
        request = pb.CheckpointContainerRequest(container_id=ids[0], location=str(tmp_path / "c.tar"))
        with pytest.raises(grpc.RpcError) as caught:
            node.client.runtime.CheckpointContainer(request, timeout=60)
    finally:
        hidden.rename(criu.program)
    error = caught.value
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
    assert "executable file not found" in str(error.details())  # type: ignore[attr-defined]
    node.goes_on(ids[0])
    node.drop(pod)


def test_a_daemon_killed_in_the_middle_leaves_nobody_frozen(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("root", "overlay", "busybox", "cgroup1")
    target = tmp_path_factory.mktemp("t")
    criu = Criu(tmp_path_factory.mktemp("c") / "criu")
    section = f'[checkpoint]\nenabled = true\ncriu = "{criu.program}"\n'
    with stocked() as registry, node(tmp_path_factory.mktemp("n"), limits=section) as made:
        criu.watch(made.tag)
        made.image = f"{registry.name}/busybox:1"
        made.client.pull(made.image)
        pod, ids = _pod(made)
        made.end()
        with monkeypatch.context() as armed:
            armed.setenv("OCID_FAILPOINTS", "checkpoint.imaged=kill")
            made.start()
        with contextlib.suppress(grpc.RpcError):
            _checkpoint(made, pod, ids, target / "pod.tar")
        assert made.process is not None and made.process.wait(SOON_S) == -9
        made.end()
        made.start()
        for one in ids:
            made.goes_on(one)
        assert list(target.iterdir()) == [] and not list((made.root / "checkpoints").glob("*"))
        made.drop(pod)


@pytest.mark.parametrize("plan", ["hang", "deaf"])
def test_a_criu_that_does_not_end_in_its_time_is_ended_and_everybody_goes_on(
    bench: tuple[Node, Criu], tmp_path: Path, plan: str
) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    before = node.held()
    request = pb.CheckpointContainerRequest(container_id=ids[0], location=str(tmp_path / "c.tar"), timeout=2)
    with criu.planned(plan), pytest.raises(grpc.RpcError) as caught:
        node.client.runtime.CheckpointContainer(request, timeout=60)
    error = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    said = str(error.details())  # type: ignore[attr-defined]
    assert "criu did not end within 2 s, and was killed" in said and "the request's timeout is that limit" in said
    assert "this may take a while" in named_log(said).read_text()
    assert (criu.directory / "let-go").exists() == (plan == "hang"), "it is asked to end before it is made to"
    assert not criu.alive()
    assert list(tmp_path.iterdir()) == []
    node.settles(before)
    for one in ids:
        node.goes_on(one)
    _checkpoint(node, pod, ids, tmp_path / "pod.tar")  # and the same works now
    node.drop(pod)


def test_when_its_callers_deadline_passes_a_pod_goes_on(bench: tuple[Node, Criu], tmp_path: Path) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    before = node.held()
    request = pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(tmp_path), container_ids=ids)
    with criu.planned("hang"), pytest.raises(grpc.RpcError) as caught:
        node.client.runtime.CheckpointPod(request, timeout=2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    node.settles(before)
    assert not criu.alive() and list(tmp_path.iterdir()) == []
    for one in ids:
        node.goes_on(one)
    node.drop(pod)


@pytest.mark.parametrize("how", ["stop_pod", "stop"])
def test_a_pod_ends_although_its_criu_hangs(bench: tuple[Node, Criu], tmp_path: Path, how: str) -> None:
    node, criu = bench
    pod, ids = _pod(node)
    with criu.planned("deaf"), ThreadPoolExecutor(1) as threads:
        call = threads.submit(_checkpoint, node, pod, ids, tmp_path / "pod.tar")
        eventually(criu.alive, what="criu to run")
        for one in ids if how == "stop" else ():
            node.client.stop(one)
            assert node.client.status(one).state == pb.CONTAINER_EXITED
        node.client.stop_pod(pod)
        with pytest.raises(grpc.RpcError):
            call.result()
        assert not criu.alive()
    node.client.remove_pod(pod)
    assert list(tmp_path.iterdir()) == [] and not list((node.root / "checkpoints").glob("*"))
